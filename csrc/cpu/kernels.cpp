// The kernels of all operators for one instruction set, named by PRUNETRAIN_KERNELS: baseline, avx2 or avx512. Compiled once
// for each with that set's flags (setup.py).
#ifndef PRUNETRAIN_KERNELS
#define PRUNETRAIN_KERNELS baseline
#endif

#include "batch_norm_act.h"
#include "channel_map.h"
#include "group_lasso.h"
#include "sgd.h"

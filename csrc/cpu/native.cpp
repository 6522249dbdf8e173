// The library: which instruction set, and the registration of every operator (the third part of each header).
#include "common.h"

#include <cstdlib>
#include <cstring>

namespace prunetrain {

namespace {

int supported() {
#if defined(__x86_64__) && !defined(PRUNETRAIN_BASELINE_ONLY)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return wide ? 2 : 1;
#else
  return 0;
#endif
}

// PRUNETRAIN_CPU=baseline|avx2|avx512 asks for less than the machine has, as tests do; more is not to be had.
int chosen() {
  const char* wanted = std::getenv("PRUNETRAIN_CPU");
  const int most = supported();
  if (wanted == nullptr) return most;
  const int asked = std::strcmp(wanted, "avx512") == 0 ? 2 : std::strcmp(wanted, "avx2") == 0 ? 1 : 0;
  return asked < most ? asked : most;
}

}  // namespace

int isa() {
  static const int found = chosen();
  return found;
}

int64_t instruction_set() { return isa(); }

}  // namespace prunetrain

#include "batch_norm_act.h"
#include "channel_map.h"
#include "group_lasso.h"
#include "sgd.h"

STABLE_TORCH_LIBRARY(prunetrain_kernels_cpu, m) {
  m.def("instruction_set() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(prunetrain_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&prunetrain::instruction_set));
}

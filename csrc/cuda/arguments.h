// What the launchers pass to the kernels: plain structs, known to both sides.
#pragma once

namespace prunetrain {

enum class Number { fp32, fp16, bf16, fp64 };

// One row of the table of tensors: `Tile` and its places, in the order of prunetrain_kernels/ops/tables.py.
struct Entry {
  long long rows, columns, inner, channels, numel, first_tile, across, row_slots, column_slots, norms, used, group;
};

// One row of hyperparameters, in the order of `hyper` in prunetrain_kernels/ops/sgd.py.
struct Settings {
  float momentum, undamped, decay, nesterov, sign;
};

// All pointers are of the device. `params`, `grads`, `buffers` and `learning_rates` are tables of addresses.
struct SgdArguments {
  const Entry* entries;
  const int* tile_tensor;
  const long long *params, *grads, *buffers;
  const int* first;
  const float* norms;
  float *sums, *maxima;  // the slots
  const long long* learning_rates;
  const Settings* settings;
  const float *coefficient, *grad_scale, *found_inf;  // scalars, or null
};

struct FoldArguments {
  const Entry* entries;
  const int *fold_tensor, *fold_start;
  const float *sums, *maxima;  // the slots
  float *norms, *max_abs;      // max_abs may be null
  float eps;
  const float* found_inf;  // or null
};

// The output as the matrix of prunetrain_kernels/ops/layout.py; row `full_rows` is cut after `tail` numbers.
struct ChannelMapArguments {
  const void* x;
  const int* source;
  const void* base;  // or null
  void* out;
  long long full_rows, row_in;  // row_in: numbers of x behind one row of the output
  int columns, tail, inner, channels, channels_in;
  int span, column_blocks;  // set by the launcher: threads along a row, blocks along a row
};

#ifndef __CUDACC_RTC__  // NVRTC compiles kernels only
// Launch on a stream; null, or what went wrong.
const char* launch_sgd(Number, long long tiles, const SgdArguments&, void* stream);
const char* launch_fold(long long programs, const FoldArguments&, void* stream);
const char* launch_channel_map(Number, ChannelMapArguments, void* stream);
#endif

}  // namespace prunetrain

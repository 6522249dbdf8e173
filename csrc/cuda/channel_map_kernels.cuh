// Channels selected and placed by index: out[:, c] = base[:, c] + (x[:, source[c]], or 0 where source[c] is -1), as
// prunetrain_kernels/ops/channel_index.py says it.
//
// The output is a matrix in which a column stays on one channel (ops/layout.py), so a thread owns WIDTH neighbouring
// columns, finds out once where they come from, and walks down the rows. Neighbours in the output are neighbours in x
// in runs of RUN:
//
//     NCHW            maps of a multiple of 16 bytes (or 8): RUN = WIDTH, loads and stores of that many
//     NHWC, odd maps  RUN = 1, and WIDTH makes 4 bytes: a warp then stores 128 bytes, and what it loads, element by
//                     element, lies in a few neighbouring lines; wider would scatter the loads of a warp
#pragma once

#include "arguments.h"
#include "launch.cuh"
#include "numbers.cuh"

namespace prunetrain {

constexpr int MAP_STEPS = 8;   // rows that a thread walks down
constexpr int MAP_AT_ONCE = 4;  // of which it has in flight at a time

// `count` of a thread's elements at `at` and the elements behind them in x; all WIDTH where `count` says so.
template <class T, int RUN, int WIDTH>
__device__ inline void write_elements(
    const ChannelMapArguments& a, long long at, int count, const Pack<T, RUN> (&x)[WIDTH / RUN]) {
  const T* const base = static_cast<const T*>(a.base);
  T* const out = static_cast<T*>(a.out);
  Pack<T, WIDTH> result;
  for (int i = 0; i < WIDTH; ++i) result.at[i] = x[i / RUN].at[i % RUN];  // moved as bits where nothing is added
  if (base) {
    Pack<T, WIDTH> addend{};
    if (count == WIDTH)
      addend = *reinterpret_cast<const Pack<T, WIDTH>*>(base + at);
    else
      for (int i = 0; i < WIDTH; ++i)
        if (i < count) addend.at[i] = base[at + i];
    for (int i = 0; i < WIDTH; ++i) round_to(result.at[i], number(addend.at[i]) + number(result.at[i]));
  }
  if (count == WIDTH) {
    *reinterpret_cast<Pack<T, WIDTH>*>(out + at) = result;
    return;
  }
  for (int i = 0; i < WIDTH; ++i)
    if (i < count) out[at + i] = result.at[i];
}

template <class T, int RUN, int WIDTH>
__global__ void __launch_bounds__(THREADS) channel_map_kernel(ChannelMapArguments a) {
  constexpr int RUNS = WIDTH / RUN;
  const T* const x = static_cast<const T*>(a.x);
  const int rows_at_once = THREADS / a.span;
  const int column = (int(blockIdx.x % a.column_blocks) * a.span + int(threadIdx.x) % a.span) * WIDTH;
  const long long row0 =
      (long long)(blockIdx.x / a.column_blocks) * rows_at_once * MAP_STEPS + int(threadIdx.x) / a.span;
  if (column >= a.columns) return;

  long long from[RUNS];  // in a row of x; -1 for a channel that x does not have
  for (int i = 0; i < RUNS; ++i) {
    const int mine = column + i * RUN, period = mine / a.inner;
    const int channel = a.source[period % a.channels];
    const long long period_in = (long long)(period / a.channels) * a.channels_in;
    from[i] = channel < 0 ? -1 : (period_in + channel) * a.inner + mine % a.inner;
  }

  for (int step = 0; step < MAP_STEPS; step += MAP_AT_ONCE) {
    Pack<T, RUN> values[MAP_AT_ONCE][RUNS];
    int count[MAP_AT_ONCE];
    for (int s = 0; s < MAP_AT_ONCE; ++s) {
      const long long row = row0 + (step + s) * rows_at_once;
      const int limit = row < a.full_rows ? a.columns : row == a.full_rows ? a.tail : 0;
      count[s] = min(WIDTH, limit - column);
      for (int i = 0; i < RUNS; ++i) {
        values[s][i] = Pack<T, RUN>{};
        if (from[i] < 0 || i * RUN >= count[s]) continue;
        values[s][i] = *reinterpret_cast<const Pack<T, RUN>*>(x + row * a.row_in + from[i]);
      }
    }
    for (int s = 0; s < MAP_AT_ONCE; ++s)
      if (count[s] > 0)
        write_elements<T, RUN, WIDTH>(a, (row0 + (step + s) * rows_at_once) * a.columns + column, count[s], values[s]);
  }
}

}  // namespace prunetrain

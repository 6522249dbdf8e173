// SGD with the group lasso inside, many tensors in one launch. The maths is that of prunetrain_kernels/ops/sgd.py, the
// tables and the slots are those of ops/tables.py.
//
// A block updates one tile of 64 rows x 128 columns. LANES neighbouring threads share a row, WIDTH elements each, so
// that a thread stays on its columns while it walks down the tile:
//
//     rows in storage at multiples of 16 bytes    a thread owns WIDTH neighbours, one load of 16 bytes
//     others                                      a thread owns columns LANES apart, so that loads coalesce
//
// Row sums are folded between the LANES threads by shuffles, column sums between the groups of threads through shared
// memory; both go to slots of the tile's own. The fold kernel adds the slots of a channel. All in a fixed order.
#pragma once

#include "arguments.h"
#include "launch.cuh"
#include "numbers.cuh"

namespace prunetrain {

constexpr int TILE_ROWS = 64, TILE_COLUMNS = 128, FOLD_CHANNELS = 32;  // as in ops/tables.py
constexpr int FOLD_LANES = THREADS / FOLD_CHANNELS;                   // threads that share a channel

template <class T>
struct Shape {
  static constexpr int WIDTH = 16 / sizeof(T);        // elements of a thread in a row
  static constexpr int LANES = TILE_COLUMNS / WIDTH;  // threads of a row
  static constexpr int GROUPS = THREADS / LANES;      // rows at a time
};

// The largest |w| is tracked by its bits: those of positive numbers are in the numbers' order, NaN above infinity.
struct TilePartials {
  float row_sum[TILE_ROWS];
  int row_size[TILE_ROWS];
  float column_sum[16][TILE_COLUMNS];  // of each of up to 16 groups
  int column_size[16][TILE_COLUMNS];
};

// Column, in its tile, of a thread's element `i`.
template <class T, bool VECTOR>
__device__ inline int column_of(int lane, int i) {
  return VECTOR ? lane * Shape<T>::WIDTH + i : i * Shape<T>::LANES + lane;
}

// Says of a pointer that was read from a table what the compiler knows of the others.
template <class T>
__device__ inline void assume_global(const T* pointer) {
#ifdef __CUDACC__
  __builtin_assume(__isGlobal(pointer));
#endif
}

// A thread's elements of a row of which `limit` columns exist; 0 beyond.
template <class T, bool VECTOR>
__device__ inline void load(const T* row, int lane, int limit, float (&to)[Shape<T>::WIDTH]) {
  constexpr int WIDTH = Shape<T>::WIDTH;
  assume_global(row);
  if (VECTOR && (lane + 1) * WIDTH <= limit) {
    const auto pack = *reinterpret_cast<const Pack<T, WIDTH>*>(row + lane * WIDTH);
    for (int i = 0; i < WIDTH; ++i) to[i] = number(pack.at[i]);
    return;
  }
  for (int i = 0; i < WIDTH; ++i) {
    const int column = column_of<T, VECTOR>(lane, i);
    to[i] = column < limit ? number(row[column]) : 0.0f;
  }
}

// Writes them, rounded, and leaves what was written in `values`.
template <class T, bool VECTOR>
__device__ inline void store(T* row, int lane, int limit, float (&values)[Shape<T>::WIDTH]) {
  constexpr int WIDTH = Shape<T>::WIDTH;
  Pack<T, WIDTH> pack;
  assume_global(row);
  for (int i = 0; i < WIDTH; ++i) {
    round_to(pack.at[i], values[i]);
    values[i] = number(pack.at[i]);
  }
  if (VECTOR && (lane + 1) * WIDTH <= limit) {
    *reinterpret_cast<Pack<T, WIDTH>*>(row + lane * WIDTH) = pack;
    return;
  }
  for (int i = 0; i < WIDTH; ++i) {
    const int column = column_of<T, VECTOR>(lane, i);
    if (column < limit) row[column] = pack.at[i];
  }
}

template <class T, bool VECTOR>
__device__ inline void update_tile(
    const SgdArguments& a, const Entry& entry, int index, int row0, int column0, TilePartials& partials) {
  constexpr int WIDTH = Shape<T>::WIDTH, LANES = Shape<T>::LANES, GROUPS = Shape<T>::GROUPS;
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
  const int rows = int(entry.rows), columns = int(entry.columns), used = int(entry.used);
  T* const params = reinterpret_cast<T*>(a.params[index]);
  T* const grads = reinterpret_cast<T*>(a.grads[index]);
  T* const buffers = reinterpret_cast<T*>(a.buffers[index]);  // null without momentum
  const bool begins = a.first[index] != 0;
  const Settings set = a.settings[entry.group];
  const float* const rate = reinterpret_cast<const float*>(a.learning_rates[entry.group]);
  assume_global(rate);
  const float lr = *rate;
  const float scale = a.grad_scale ? *a.grad_scale : 1.0f;
  static_assert(GROUPS <= 16 && LANES <= 32, "partials have a place for each group, and a row lies within a warp");
  const bool by_inputs = a.coefficient && (used & 1), by_outputs = a.coefficient && (used & 2);
  const float pull = a.coefficient ? *a.coefficient : 0.0f;

  float inverse_in[WIDTH], column_sum[WIDTH];
  int column_size[WIDTH];
  for (int i = 0; i < WIDTH; ++i) {
    const int column = column0 + column_of<T, VECTOR>(lane, i);
    const bool counts = by_inputs && column < columns;
    inverse_in[i] = counts ? 1.0f / a.norms[entry.norms + column / int(entry.inner) % int(entry.channels)] : 0.0f;
    column_sum[i] = 0.0f;
    column_size[i] = 0;
  }

  for (int step = 0; step < TILE_ROWS && row0 + step < rows; step += GROUPS) {  // the same for all threads
    const int row = row0 + step + group;
    const long long start = (long long)row * columns + column0;
    int limit = row < rows ? min(columns - column0, TILE_COLUMNS) : 0;
    if (limit > entry.numel - start) limit = int(entry.numel - start);  // a tensor cut into rows may end in a short one

    float p[WIDTH], g[WIDTH], b[WIDTH];
    load<T, VECTOR>(params + start, lane, limit, p);
    load<T, VECTOR>(grads + start, lane, limit, g);
    if (buffers && !begins) load<T, VECTOR>(buffers + start, lane, limit, b);
    if (a.grad_scale) {
      float unscaled[WIDTH];
      for (int i = 0; i < WIDTH; ++i) unscaled[i] = g[i] = g[i] / scale;
      store<T, VECTOR>(grads + start, lane, limit, unscaled);
    }
    const float inverse_out =
        by_outputs && row < rows ? 1.0f / a.norms[entry.norms + entry.channels + row] : 0.0f;
    for (int i = 0; i < WIDTH; ++i) {
      g[i] = g[i] * set.sign + p[i] * set.decay;
      if (used && a.coefficient) g[i] += p[i] * ((inverse_in[i] + inverse_out) * pull);
      float move = g[i];
      if (buffers) {
        b[i] = begins ? g[i] : set.momentum * b[i] + set.undamped * g[i];
        move = set.nesterov != 0.0f ? g[i] + set.momentum * b[i] : b[i];
      }
      p[i] -= lr * move;
    }
    if (buffers) store<T, VECTOR>(buffers + start, lane, limit, b);
    store<T, VECTOR>(params + start, lane, limit, p);

    if (used) {
      float row_sum = 0.0f;
      int row_size = 0;
      for (int i = 0; i < WIDTH; ++i) {
        const float w = column_of<T, VECTOR>(lane, i) < limit ? p[i] : 0.0f;
        const int size = __float_as_int(w) & 0x7fffffff;
        row_sum += w * w;
        row_size = max(row_size, size);
        column_sum[i] += w * w;
        column_size[i] = max(column_size[i], size);
      }
      for (int apart = LANES / 2; apart > 0; apart /= 2) {
        row_sum += __shfl_xor_sync(0xffffffffu, row_sum, apart);
        row_size = max(row_size, __shfl_xor_sync(0xffffffffu, row_size, apart));
      }
      if (lane == 0) {
        partials.row_sum[step + group] = row_sum;
        partials.row_size[step + group] = row_size;
      }
    }
  }

  if (!used) return;  // the same for all threads
  for (int i = 0; i < WIDTH; ++i) {
    partials.column_sum[group][column_of<T, VECTOR>(lane, i)] = column_sum[i];
    partials.column_size[group][column_of<T, VECTOR>(lane, i)] = column_size[i];
  }
  __syncthreads();
  const int at = threadIdx.x;
  if (at < TILE_ROWS && row0 + at < rows) {
    const long long slot = entry.row_slots + (long long)(column0 / TILE_COLUMNS) * rows + row0 + at;
    a.sums[slot] = partials.row_sum[at];
    a.maxima[slot] = __int_as_float(partials.row_size[at]);
  }
  if (at < TILE_COLUMNS && column0 + at < columns) {
    float sum = 0.0f;
    int size = 0;
    for (int i = 0; i < GROUPS; ++i) {
      sum += partials.column_sum[i][at];
      size = max(size, partials.column_size[i][at]);
    }
    const long long slot = entry.column_slots + (long long)(row0 / TILE_ROWS) * columns + column0 + at;
    a.sums[slot] = sum;
    a.maxima[slot] = __int_as_float(size);
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS, sizeof(T) == 4 ? 3 : 2) sgd_kernel(SgdArguments a) {
  __shared__ TilePartials partials;
  if (a.found_inf && *a.found_inf != 0.0f) return;  // gradient scaling skips the step
  const int tile = blockIdx.x, index = a.tile_tensor[tile];
  const Entry entry = a.entries[index];
  const int place = tile - int(entry.first_tile), across = int(entry.across);
  const int row0 = place / across * TILE_ROWS, column0 = place % across * TILE_COLUMNS;
  const long long addresses = a.params[index] | a.grads[index] | a.buffers[index];
  if (entry.columns % Shape<T>::WIDTH == 0 && addresses % 16 == 0)
    update_tile<T, true>(a, entry, index, row0, column0, partials);
  else
    update_tile<T, false>(a, entry, index, row0, column0, partials);
}

// One block folds the slots of 32 channels of one side of one weight; the thread of lane l takes every 8th slot from l.
__global__ void __launch_bounds__(THREADS) fold_kernel(FoldArguments a) {
  __shared__ float sum_of[FOLD_LANES][FOLD_CHANNELS];
  __shared__ int size_of[FOLD_LANES][FOLD_CHANNELS];
  if (a.found_inf && *a.found_inf != 0.0f) return;  // nothing was measured
  const Entry entry = a.entries[a.fold_tensor[blockIdx.x]];
  const long long in_channels = (entry.channels + FOLD_CHANNELS - 1) / FOLD_CHANNELS * FOLD_CHANNELS;
  const int mine = threadIdx.x % FOLD_CHANNELS, lane = threadIdx.x / FOLD_CHANNELS;
  const long long start = a.fold_start[blockIdx.x];
  const bool is_in = start < in_channels;
  const long long count = is_in ? entry.channels : entry.rows;
  const long long channel = (is_in ? start : start - in_channels) + mine;
  // inputs: a channel has `repeats` columns in each of the tiles down; outputs: one slot per tile across
  const long long down = (entry.rows + TILE_ROWS - 1) / TILE_ROWS, repeats = entry.columns / entry.channels;
  const long long slots = is_in ? down * repeats : entry.across;
  float sum = 0.0f;
  int size = 0;
  for (long long slot = lane; slot < slots && channel < count; slot += FOLD_LANES) {
    long long at = entry.row_slots + slot * entry.rows + channel;
    if (is_in) {
      const int copy = int(slot % repeats), inner = int(entry.inner);
      const long long column = copy / inner * entry.channels * inner + channel * inner + copy % inner;
      at = entry.column_slots + slot / repeats * entry.columns + column;
    }
    sum += a.sums[at];
    size = max(size, __float_as_int(a.maxima[at]));
  }
  sum_of[lane][mine] = sum;
  size_of[lane][mine] = size;
  __syncthreads();
  if (lane != 0 || channel >= count) return;
  for (int i = 1; i < FOLD_LANES; ++i) {
    sum += sum_of[i][mine];
    size = max(size, size_of[i][mine]);
  }
  const long long to = entry.norms + (is_in ? 0 : entry.channels) + channel;
  a.norms[to] = sqrtf(sum + a.eps);
  if (a.max_abs) a.max_abs[to] = __int_as_float(size);
}

}  // namespace prunetrain

// Batch norm with residual and ReLU, forward and backward (prunetrain_kernels/ops/batch_norm_act.py has the maths).
//
// An activation is one run of numbers in storage order, walked in one of two ways. By columns: rows of whole periods
// (C * inner numbers) in which a column belongs to one channel, with parameters and sums for every column, so that few
// channels are vectors too. By planes: `inner` neighbours at a time that share their channel's parameters.
//
// Statistics are sums of d = x - s and d^2, s being a channel's mean over a sixteenth of the part: what cancels in
// sum d^2 - (sum d)^2 / n is sixteen times the rest at worst. Parts are merged by Chan's formula, in fp64 and in order:
// the same bits for any number of threads.
#pragma once

#include "common.h"

namespace prunetrain {

struct BatchNorm {
  int64_t numel, channels, inner;
  int64_t columns;  // of a row; a multiple of 8, so that a row begins with a byte of the mask. 0: by planes
  int64_t width;    // of parameters in memory: columns or channels, rounded up to whole cache lines
  int64_t piece;    // elements that one thread writes at a time; a multiple of `columns` and of 8
  int64_t part;     // elements of whose channels sums are taken, `channel_step` channels at a time
  int64_t channel_step;
  bool relu;
  const void *x, *residual, *dy;
  void *y, *dx, *dresidual;
  uint8_t* mask;  // bit i % 8 of byte i // 8: whether the ReLU let element i through
  // By column or, by planes, by channel: dx = scale * (g - offset - (x - mean) * slope); null offset: scale * g
  const void *mean, *scale, *bias, *offset, *slope;
};

// Two results for each channel of a part, at slots[0] and slots[channels] on: mean and sum of squares about it, of x;
// sum g and sum g * (x - mean). `scratch` is 3 * width numbers and 2 * channels doubles.
PRUNETRAIN_DECLARE(
    void, batch_norm_measure, const BatchNorm&, int64_t dtype, int64_t part, int64_t channel0, double* slots,
    void* scratch)
PRUNETRAIN_DECLARE(
    void, batch_norm_sum, const BatchNorm&, int64_t dtype, int64_t part, int64_t channel0, double* slots, void* scratch)
PRUNETRAIN_DECLARE(void, batch_norm_write, const BatchNorm&, int64_t dtype, int64_t piece)
PRUNETRAIN_DECLARE(void, batch_norm_write_gradient, const BatchNorm&, int64_t dtype, int64_t piece)

}  // namespace prunetrain

#ifdef PRUNETRAIN_KERNELS  // ------------------------------------------------------------------------------------------

namespace prunetrain {
namespace PRUNETRAIN_KERNELS {
namespace {

constexpr int64_t NUMBERS = 1024;  // elements at a time: what is known of them stays in the first-level cache
constexpr int64_t SAMPLE = 16;

// A value that is a type, to choose a template by an argument.
template <typename T, T VALUE>
struct Constant {
  static constexpr T value = VALUE;
};

// A parameter of neighbouring elements: each has its own, or they share one.
template <bool COLUMNS, typename A>
struct Parameter {
  const A* own;
  A shared;
  Parameter(const void* all, int64_t at) : own(static_cast<const A*>(all) + at), shared(*own) {}
  A operator[](int64_t j) const { return COLUMNS ? own[j] : shared; }
};

// f(at, count, column): the elements [begin, end), which is whole rows, some at a time.
template <bool COLUMNS, typename F>
inline void blocks(const BatchNorm& b, int64_t begin, int64_t end, const F& f) {
  const int64_t step = COLUMNS ? b.columns : end - begin;
  for (int64_t row = begin; row < end; row += step) {
    const int64_t width = least(step, end - row);
    for (int64_t column = 0; column < width; column += NUMBERS) f(row + column, least(NUMBERS, width - column), column);
  }
}

// f(constant of rows, at, count, column): as blocks of columns, of ROWS rows at once and at the end of one: their sum
// is added to a total that is read and written once.
template <int64_t ROWS, typename F>
inline void row_groups(const BatchNorm& b, int64_t begin, int64_t end, const F& f) {
  int64_t row = begin;
  for (; row + ROWS * b.columns <= end; row += ROWS * b.columns)
    for (int64_t column = 0; column < b.columns; column += NUMBERS)
      f(Constant<int64_t, ROWS>{}, row + column, least(NUMBERS, b.columns - column), column);
  blocks<true>(b, row, end, [&](int64_t at, int64_t count, int64_t column) {
    f(Constant<int64_t, 1>{}, at, count, column);
  });
}

// f(j, count, parameter): elements [at, at + count) by runs that begin with the j-th, and where their parameters begin.
template <bool COLUMNS, typename F>
inline void runs(const BatchNorm& b, int64_t at, int64_t count, int64_t column, const F& f) {
  if constexpr (COLUMNS) {
    f(int64_t{0}, count, column);
  } else {
    int64_t channel = (at / b.inner) % b.channels, left = b.inner - at % b.inner;
    for (int64_t j = 0; j < count; j += left, left = b.inner) {
      f(j, least(left, count - j), channel);
      if (++channel == b.channels) channel = 0;
    }
  }
}

// Asks for the `count` elements from `at` on of what will be read soon: a block works through its tensors one after the
// other, too little of each for the processor to foresee the next.
//
// Inlined by force: GCC takes a function that does nothing else for one without effects, and drops the call.
template <typename T, typename... Tensors>
[[gnu::always_inline]] inline void ask_for(int64_t at, int64_t count, Tensors... tensors) {
  const void* all[] = {tensors...};
  for (const void* tensor : all) {
    const char* from = static_cast<const char*>(tensor) + at * static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; tensor && i < count * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(from + i);
  }
}

template <typename A>
inline A normalized(A x, A mean, A scale, A bias) {
  return (x - mean) * scale + bias;
}

// Flags of `count` elements, 0 or 1 each, as bits; seven more flags are written to.
inline void pack(uint8_t* flags, int64_t count, uint8_t* bits) {
  for (int64_t j = count; j < count + 7; ++j) flags[j] = 0;
  for (int64_t i = 0; i < (count + 7) / 8; ++i) {
    uint64_t eight;
    __builtin_memcpy(&eight, flags + 8 * i, 8);
    bits[i] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);  // the product gathers them in the top byte
  }
}

// Flags of elements [at, at + count), zero or not; returns where they begin in `room`, of 14 more.
inline const uint8_t* unpack(const uint8_t* bits, int64_t at, int64_t count, uint8_t* room) {
  const int64_t first = at / 8, last = (at + count + 7) / 8;
  for (int64_t i = first; i < last; ++i) {
    const uint64_t eight = (bits[i] * 0x0101010101010101u) & 0x8040201008040201u;
    __builtin_memcpy(room + 8 * (i - first), &eight, 8);
  }
  return room + at % 8;
}
inline const int32_t* unpack(const uint8_t* bits, int64_t at, int64_t count, int32_t* room) {
  const int64_t first = at / 8, last = (at + count + 7) / 8;
  for (int64_t i = first; i < last; ++i)
    for (int64_t k = 0; k < 8; ++k) room[8 * (i - first) + k] = bits[i] & (1 << k);
  return room + at % 8;
}

template <typename T, bool COLUMNS, bool RESIDUAL, bool RELU, bool RECORD>
void write_piece(const BatchNorm& b, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) uint8_t flags[NUMBERS + 8];
  blocks<COLUMNS>(b, begin, end, [&](int64_t at, int64_t count, int64_t column) {
    ask_for<T>(at + count, count, b.x, b.residual, b.y);
    runs<COLUMNS>(b, at, count, column, [&](int64_t first, int64_t n, int64_t p) {
      const T* x = static_cast<const T*>(b.x) + at + first;
      const T* residual = RESIDUAL ? static_cast<const T*>(b.residual) + at + first : nullptr;
      T* y = static_cast<T*>(b.y) + at + first;
      uint8_t* through = flags + first;
      const Parameter<COLUMNS, A> mean(b.mean, p), scale(b.scale, p), bias(b.bias, p);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        A value = normalized<A>(load(x + j), mean[j], scale[j], bias[j]);
        if constexpr (RESIDUAL) value += load(residual + j);
        if constexpr (RECORD) through[j] = value <= 0 ? 0 : 1;  // NaN passes
        if constexpr (RELU) value = value <= 0 ? 0 : value;
        store(y + j, value);
      }
    });
    if (RECORD) pack(flags, count, b.mask + at / 8);
  });
}

template <typename T, bool COLUMNS>
void write_piece(const BatchNorm& b, int64_t begin, int64_t end) {
  if (b.mask != nullptr) return write_piece<T, COLUMNS, true, true, true>(b, begin, end);
  if (b.residual != nullptr)
    return b.relu ? write_piece<T, COLUMNS, true, true, false>(b, begin, end)
                  : write_piece<T, COLUMNS, true, false, false>(b, begin, end);
  return b.relu ? write_piece<T, COLUMNS, false, true, false>(b, begin, end)
                : write_piece<T, COLUMNS, false, false, false>(b, begin, end);
}

// By planes flags are as wide as fp32: with bytes among its numbers a loop takes 64 elements at a time, and a plane may
// have fewer.
template <bool COLUMNS>
struct FlagOf {
  using Type = uint8_t;
};
template <>
struct FlagOf<false> {
  using Type = int32_t;
};
template <bool COLUMNS>
using Flag = typename FlagOf<COLUMNS>::Type;

// How backward knows what the ReLU let through: there is none, it was recorded, it is computed again.
enum class Act { NONE, RECORDED, AGAIN };

// f(constant of the Act)
template <typename F>
inline void with_act(const BatchNorm& b, const F& f) {
  if (b.mask != nullptr) f(Constant<Act, Act::RECORDED>{});
  else if (b.relu) f(Constant<Act, Act::AGAIN>{});
  else f(Constant<Act, Act::NONE>{});
}

// Of one element; `dy` has been read, so that it need not wait for the rest.
template <Act ACT, typename A, typename F>
inline A through_act(A dy, F flag, A x, A mean, A scale, A bias) {
  if constexpr (ACT == Act::RECORDED) return flag ? dy : 0;
  if constexpr (ACT == Act::AGAIN) return normalized(x, mean, scale, bias) <= 0 ? 0 : dy;
  return dy;
}

template <typename T, bool COLUMNS, Act ACT, bool OF_BATCH, bool RESIDUAL>
void write_gradient_piece(const BatchNorm& b, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr bool READS_X = ACT == Act::AGAIN || OF_BATCH;
  alignas(64) Flag<COLUMNS> room[NUMBERS + 16];
  blocks<COLUMNS>(b, begin, end, [&](int64_t at, int64_t count, int64_t column) {
    ask_for<T>(at + count, count, b.dy, READS_X ? b.x : nullptr, b.dx, RESIDUAL ? b.dresidual : nullptr);
    const Flag<COLUMNS>* recorded = ACT == Act::RECORDED ? unpack(b.mask, at, count, room) : room;
    runs<COLUMNS>(b, at, count, column, [&](int64_t first, int64_t n, int64_t p) {
      const T *dy = static_cast<const T*>(b.dy) + at + first, *x = static_cast<const T*>(b.x) + at + first;
      const Flag<COLUMNS>* flags = recorded + first;
      T* dx = static_cast<T*>(b.dx) + at + first;
      T* dresidual = RESIDUAL ? static_cast<T*>(b.dresidual) + at + first : nullptr;
      const Parameter<COLUMNS, A> mean(b.mean, p), scale(b.scale, p), bias(b.bias, p);
      const Parameter<COLUMNS, A> offset(OF_BATCH ? b.offset : b.mean, p), slope(OF_BATCH ? b.slope : b.mean, p);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const A number = READS_X ? load(x + j) : 0;
        A g = through_act<ACT, A>(load(dy + j), flags[j], number, mean[j], scale[j], bias[j]);
        if constexpr (RESIDUAL) store(dresidual + j, g);
        if constexpr (OF_BATCH) g = g - offset[j] - (number - mean[j]) * slope[j];
        store(dx + j, g * scale[j]);
      }
    });
  });
}

// dresidual alone.
template <typename T, bool COLUMNS, Act ACT>
void write_residual_piece(const BatchNorm& b, int64_t begin, int64_t end) {
  using A = Acc<T>;
  alignas(64) Flag<COLUMNS> room[NUMBERS + 16];
  blocks<COLUMNS>(b, begin, end, [&](int64_t at, int64_t count, int64_t column) {
    const Flag<COLUMNS>* recorded = ACT == Act::RECORDED ? unpack(b.mask, at, count, room) : room;
    runs<COLUMNS>(b, at, count, column, [&](int64_t first, int64_t n, int64_t p) {
      const T *dy = static_cast<const T*>(b.dy) + at + first, *x = static_cast<const T*>(b.x) + at + first;
      const Flag<COLUMNS>* flags = recorded + first;
      T* dresidual = static_cast<T*>(b.dresidual) + at + first;
      const Parameter<COLUMNS, A> mean(b.mean, p), scale(b.scale, p), bias(b.bias, p);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) {
        const A number = ACT == Act::AGAIN ? load(x + j) : 0;
        store(dresidual + j, through_act<ACT, A>(load(dy + j), flags[j], number, mean[j], scale[j], bias[j]));
      }
    });
  });
}

template <typename T, bool COLUMNS>
void write_gradient_piece(const BatchNorm& b, int64_t begin, int64_t end) {
  with_act(b, [&](auto act) {
    constexpr Act ACT = decltype(act)::value;
    if (b.dx == nullptr) return write_residual_piece<T, COLUMNS, ACT>(b, begin, end);
    if constexpr (ACT == Act::RECORDED) {
      if (b.dresidual != nullptr)
        return b.offset ? write_gradient_piece<T, COLUMNS, ACT, true, true>(b, begin, end)
                        : write_gradient_piece<T, COLUMNS, ACT, false, true>(b, begin, end);
    } else if (b.dresidual != nullptr) {  // not in a network: fewer loops to compile
      write_residual_piece<T, COLUMNS, ACT>(b, begin, end);
    }
    return b.offset ? write_gradient_piece<T, COLUMNS, ACT, true, false>(b, begin, end)
                    : write_gradient_piece<T, COLUMNS, ACT, false, false>(b, begin, end);
  });
}

// Sums of columns as those of their channels.
template <typename A>
inline void fold(const BatchNorm& b, const A* sums, double* totals) {
  for (int64_t c = 0; c < b.channels; ++c) totals[c] = 0;
  const int64_t inner = b.inner, channels = b.channels;
  for (const A* end = sums + b.columns; sums < end; sums += inner * channels) {
    if (inner == 1) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) totals[c] += sums[c];
    } else {
      for (int64_t j = 0; j < inner * channels; ++j) totals[j / inner] += sums[j];
    }
  }
}

// The point to take sums about, a mean of some numbers: any will do, so a finite one.
template <typename A>
inline A about(double sum, int64_t count) {
  const A mean = static_cast<A>(sum / static_cast<double>(count));
  return mean - mean == 0 ? mean : 0;
}

inline void finish(double about, double sum, double squares, int64_t count, double* mean, double* m2) {
  const double off = sum / static_cast<double>(count), rest = squares - sum * off;
  *mean = about + off;
  *m2 = rest < 0 ? 0 : rest;  // NaN stays
}

template <typename T>
void measure_columns(const BatchNorm& b, int64_t begin, int64_t end, double* slots, void* scratch) {
  using A = Acc<T>;
  A *s = static_cast<A*>(scratch), *s1 = s + b.width, *s2 = s1 + b.width;
  double *sums = reinterpret_cast<double*>(s2 + b.width), *squares = sums + b.channels;
  const T* x = static_cast<const T*>(b.x);
  const int64_t rows = (end - begin + b.columns - 1) / b.columns;
  const int64_t sample = least(end - begin, (rows + SAMPLE - 1) / SAMPLE * b.columns);
  for (int64_t j = 0; j < b.columns; ++j) s1[j] = s2[j] = 0;
  row_groups<4>(b, begin, begin + sample, [&](auto rows, int64_t at, int64_t count, int64_t column) {
    const T* from = x + at;
    A* to = s1 + column;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      A sum = 0;
      for (int64_t r = 0; r < decltype(rows)::value; ++r) sum += load(from + r * b.columns + j);
      to[j] += sum;
    }
  });
  fold(b, s1, sums);
  const int64_t period = b.inner * b.channels;
  for (int64_t c = 0; c < b.channels; ++c) {
    const A point = about<A>(sums[c], sample / b.channels);
    for (int64_t i = 0; i < b.inner; ++i) s[c * b.inner + i] = point;
  }
  for (int64_t j = period; j < b.columns; ++j) s[j] = s[j - period];
  for (int64_t j = 0; j < b.columns; ++j) s1[j] = 0;
  row_groups<4>(b, begin, end, [&](auto rows, int64_t at, int64_t count, int64_t column) {
    const T* from = x + at;
    const A* about = s + column;
    A *to1 = s1 + column, *to2 = s2 + column;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      A sum = 0, squares = 0;
      for (int64_t r = 0; r < decltype(rows)::value; ++r) {
        const A d = load(from + r * b.columns + j) - about[j];
        sum += d;
        squares += d * d;
      }
      to1[j] += sum;
      to2[j] += squares;
    }
  });
  fold(b, s1, sums);
  fold(b, s2, squares);
  for (int64_t c = 0; c < b.channels; ++c)
    finish(s[c * b.inner], sums[c], squares[c], (end - begin) / b.channels, slots + c, slots + b.channels + c);
}

template <typename T>
void measure_planes(const BatchNorm& b, int64_t begin, int64_t end, int64_t channel0, double* slots) {
  using A = Acc<T>;
  const int64_t image = b.channels * b.inner, images = (end - begin) / image;
  // of several images some whole ones, of one its beginning
  const int64_t sampled = images > 1 ? (images + SAMPLE - 1) / SAMPLE : 1;
  const int64_t of_each = images > 1 ? b.inner : (b.inner + SAMPLE - 1) / SAMPLE;
  for (int64_t c = channel0; c < least(channel0 + b.channel_step, b.channels); ++c) {
    const T* x = static_cast<const T*>(b.x) + begin + c * b.inner;
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < sampled; ++i) {
      A s = 0;
#pragma omp simd reduction(+ : s)
      for (int64_t j = 0; j < of_each; ++j) s += load(x + i * image + j);
      sum += s;
    }
    const A s = about<A>(sum, sampled * of_each);
    sum = 0;
    for (int64_t i = 0; i < images; ++i) {
      for (int64_t first = 0; first < b.inner; first += NUMBERS) {
        const T* from = x + i * image + first;
        A s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
        for (int64_t j = 0; j < least(NUMBERS, b.inner - first); ++j) {
          const A d = load(from + j) - s;
          s1 += d;
          s2 += d * d;
        }
        sum += s1;
        squares += s2;
      }
    }
    finish(s, sum, squares, images * b.inner, slots + c, slots + b.channels + c);
  }
}

template <typename T, Act ACT>
void sum_columns(const BatchNorm& b, int64_t begin, int64_t end, double* slots, void* scratch) {
  using A = Acc<T>;
  constexpr int64_t ROWS = 2, ROOM = NUMBERS + 64;
  A *s1 = static_cast<A*>(scratch), *s2 = s1 + b.width;
  for (int64_t j = 0; j < b.columns; ++j) s1[j] = s2[j] = 0;
  alignas(64) uint8_t room[ROWS * ROOM];
  row_groups<ROWS>(b, begin, end, [&](auto rows, int64_t at, int64_t count, int64_t column) {
    constexpr int64_t HERE = decltype(rows)::value;
    for (int64_t r = 0; r < HERE; ++r) {
      ask_for<T>(at + (r + HERE) * b.columns, count, b.dy, b.x);
      if (ACT == Act::RECORDED) unpack(b.mask, at + r * b.columns, count, room + r * ROOM);  // rows begin with a byte
    }
    const T *dy = static_cast<const T*>(b.dy) + at, *x = static_cast<const T*>(b.x) + at;
    const Parameter<true, A> mean(b.mean, column), scale(b.scale, column), bias(b.bias, column);
    A *to1 = s1 + column, *to2 = s2 + column;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      A sum = 0, sum_x = 0;
      for (int64_t r = 0; r < HERE; ++r) {
        const A number = load(x + r * b.columns + j), from = load(dy + r * b.columns + j);
        const A g = through_act<ACT, A>(from, room[r * ROOM + j], number, mean[j], scale[j], bias[j]);
        sum += g;
        sum_x += g * (number - mean[j]);
      }
      to1[j] += sum;
      to2[j] += sum_x;
    }
  });
  fold(b, s1, slots);
  fold(b, s2, slots + b.channels);
}

template <typename T, Act ACT>
void sum_planes(const BatchNorm& b, int64_t begin, int64_t end, int64_t channel0, double* slots) {
  using A = Acc<T>;
  const int64_t image = b.channels * b.inner;
  alignas(64) int32_t room[NUMBERS + 16];
  for (int64_t c = channel0; c < least(channel0 + b.channel_step, b.channels); ++c) {
    const Parameter<false, A> mean(b.mean, c), scale(b.scale, c), bias(b.bias, c);
    double sum = 0, sum_x = 0;
    for (int64_t plane = begin + c * b.inner; plane < end; plane += image) {
      for (int64_t first = 0; first < b.inner; first += NUMBERS) {
        const int64_t at = plane + first, count = least(NUMBERS, b.inner - first);
        const int32_t* flags = ACT == Act::RECORDED ? unpack(b.mask, at, count, room) : room;
        const T *dy = static_cast<const T*>(b.dy) + at, *x = static_cast<const T*>(b.x) + at;
        A s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
        for (int64_t j = 0; j < count; ++j) {
          const A number = load(x + j);
          const A g = through_act<ACT, A>(load(dy + j), flags[j], number, mean[j], scale[j], bias[j]);
          s1 += g;
          s2 += g * (number - mean[j]);
        }
        sum += s1;
        sum_x += s2;
      }
    }
    slots[c] = sum;
    slots[b.channels + c] = sum_x;
  }
}

}  // namespace

void batch_norm_measure(
    const BatchNorm& b, int64_t dtype, int64_t part, int64_t channel0, double* slots, void* scratch) {
  const int64_t begin = part * b.part, end = least(b.numel, begin + b.part);
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (b.columns) measure_columns<T>(b, begin, end, slots, scratch);
    else measure_planes<T>(b, begin, end, channel0, slots);
  });
}

void batch_norm_sum(const BatchNorm& b, int64_t dtype, int64_t part, int64_t channel0, double* slots, void* scratch) {
  const int64_t begin = part * b.part, end = least(b.numel, begin + b.part);
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    with_act(b, [&](auto act) {
      if (b.columns) sum_columns<T, decltype(act)::value>(b, begin, end, slots, scratch);
      else sum_planes<T, decltype(act)::value>(b, begin, end, channel0, slots);
    });
  });
}

void batch_norm_write(const BatchNorm& b, int64_t dtype, int64_t piece) {
  const int64_t begin = piece * b.piece, end = least(b.numel, begin + b.piece);
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (b.columns) write_piece<T, true>(b, begin, end);
    else write_piece<T, false>(b, begin, end);
  });
}

void batch_norm_write_gradient(const BatchNorm& b, int64_t dtype, int64_t piece) {
  const int64_t begin = piece * b.piece, end = least(b.numel, begin + b.piece);
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    if (b.columns) write_gradient_piece<T, true>(b, begin, end);
    else write_gradient_piece<T, false>(b, begin, end);
  });
}

}  // namespace PRUNETRAIN_KERNELS
}  // namespace prunetrain

#else  // --------------------------------------------------------------------------------------------------------------

#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>

namespace prunetrain {

// The walk over a dense activation with `inner` numbers of a channel side by side, and as many channels as values have.
inline BatchNorm batch_norm_of(const Tensor& x, int64_t inner, const std::vector<std::optional<Tensor>>& values) {
  check_cpu(x, "x");
  const int64_t channels = values[0]->numel();
  for (const std::optional<Tensor>& t : values)
    STD_TORCH_CHECK(!t.has_value() || (t->is_cpu() && t->numel() == channels), "parameters must be of x's channels.");
  STD_TORCH_CHECK(x.numel() > 0 && x.numel() % (channels * inner) == 0, "x must be of whole images.");
  constexpr int64_t SIZE = 1 << 15;  // elements of a piece: it is in the second-level cache when it is read again
  BatchNorm b{};
  b.x = x.data_ptr();
  b.numel = x.numel();
  b.channels = channels;
  b.inner = inner;
  const int64_t period = channels * inner;
  if (inner == 1 || (inner < 32 && period <= 4096)) {
    const int64_t row = std::lcm(period, int64_t{period < 512 ? 16 : 8});  // whole vectors if it stays short
    b.columns = row * (row < 512 ? 512 / row : 1);
    b.part = b.piece = b.columns * std::max<int64_t>(1, SIZE / b.columns);
    b.channel_step = channels;
  } else {
    b.piece = SIZE;
    b.part = period * std::max<int64_t>(1, 4096 / inner);
    b.channel_step = std::max<int64_t>(1, SIZE / (b.part / channels));
  }
  b.width = ((b.columns ? b.columns : channels) + 15) / 16 * 16;
  return b;
}

// Uninitialised memory that begins with a cache line: a vector that straddles two is slow to store.
struct Lines {
  explicit Lines(int64_t bytes) : memory(new char[static_cast<size_t>(bytes) + 63]) {}
  void* data() const { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64); }
  std::unique_ptr<char[]> memory;
};

// kernel(b, dtype, part, channel0, slots, scratch) for all parts; then merge(count per channel, slots) in order.
template <typename Kernel, typename Merge>
void reduce(const BatchNorm& b, int64_t dtype, Kernel kernel, const Merge& merge) {
  const int64_t parts = (b.numel + b.part - 1) / b.part, steps = (b.channels + b.channel_step - 1) / b.channel_step;
  std::vector<double> slots(static_cast<size_t>(parts * 2 * b.channels));
  torch::stable::parallel_for(0, parts * steps, 1, [&](int64_t begin, int64_t end) {
    const Lines scratch(3 * b.width * (dtype == FLOAT64 ? 8 : 4) + 2 * b.channels * 8);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i / steps;
      kernel(b, dtype, part, i % steps * b.channel_step, slots.data() + part * 2 * b.channels, scratch.data());
    }
  });
  for (int64_t i = 0; i < parts; ++i)
    merge(std::min(b.part, b.numel - i * b.part) / b.channels, slots.data() + i * 2 * b.channels);
}

// kernel(b, dtype, piece) for all pieces; a thread begins with those that it read last and has in its caches.
template <typename Kernel>
void write(const BatchNorm& b, int64_t dtype, Kernel kernel) {
  torch::stable::parallel_for(0, (b.numel + b.piece - 1) / b.piece, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end; i-- > begin;) kernel(b, dtype, i);
  });
}

// Parameters of all columns, or of all channels by planes, as the kernels read them.
template <typename A>
struct Parameters {
  explicit Parameters(BatchNorm& b) : b(b), memory(5 * b.width * static_cast<int64_t>(sizeof(A))) {}

  // value(c), of a channel.
  template <typename F>
  const void* add(const F& value) {
    A* to = static_cast<A*>(memory.data()) + used++ * b.width;
    const int64_t inner = b.columns ? b.inner : 1, period = b.channels * inner;
    for (int64_t c = 0; c < b.channels; ++c)
      for (int64_t i = 0; i < inner; ++i) to[c * inner + i] = static_cast<A>(value(c));
    for (int64_t j = period; j < b.columns; j += period) std::memcpy(to + j, to, period * sizeof(A));
    return to;
  }

  const BatchNorm& b;
  int64_t used = 0;
  Lines memory;
};

template <typename A>
const A* of_channels(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<const A*>(t->data_ptr()) : nullptr;
}

template <typename A>
void forward(
    BatchNorm& b, int64_t dtype, Tensor& mean_tensor, Tensor& var_tensor, bool measure,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
  A *mean = static_cast<A*>(mean_tensor.data_ptr()), *var = static_cast<A*>(var_tensor.data_ptr());
  const size_t channels = static_cast<size_t>(b.channels);
  if (measure) {
    std::vector<double> means(channels), squares(channels);
    int64_t before = 0;
    reduce(b, dtype, PRUNETRAIN_PICK(batch_norm_measure), [&](int64_t count, const double* slots) {
      const double share = static_cast<double>(count) / static_cast<double>(before + count);
      for (size_t c = 0; c < channels; ++c) {
        const double apart = before ? slots[c] - means[c] : 0;
        means[c] = before ? means[c] + apart * share : slots[c];
        squares[c] += slots[channels + c] + apart * apart * share * static_cast<double>(before);
      }
      before += count;
    });
    for (size_t c = 0; c < channels; ++c) {
      mean[c] = static_cast<A>(means[c]);
      var[c] = static_cast<A>(squares[c] / static_cast<double>(before));
    }
  }
  if (b.y == nullptr) return;
  const A *w = of_channels<A>(weight), *shift = of_channels<A>(bias);
  Parameters<A> parameters(b);
  b.mean = parameters.add([&](int64_t c) { return mean[c]; });
  b.scale = parameters.add([&](int64_t c) { return (w ? w[c] : 1) / std::sqrt(var[c] + eps); });
  b.bias = parameters.add([&](int64_t c) { return shift ? shift[c] : 0; });
  write(b, dtype, PRUNETRAIN_PICK(batch_norm_write));
}

template <typename A>
void backward(
    BatchNorm& b, int64_t dtype, const Tensor& mean_tensor, const Tensor& var_tensor,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, std::optional<Tensor>& sum_dy,
    std::optional<Tensor>& sum_dy_xhat, bool sum, double count, double eps) {
  const A *mean = static_cast<const A*>(mean_tensor.data_ptr()), *var = static_cast<const A*>(var_tensor.data_ptr());
  const A *w = of_channels<A>(weight), *shift = of_channels<A>(bias);
  const auto rstd = [&](int64_t c) { return 1 / std::sqrt(var[c] + eps); };
  Parameters<A> parameters(b);
  b.mean = parameters.add([&](int64_t c) { return mean[c]; });
  b.scale = parameters.add([&](int64_t c) { return (w ? w[c] : 1) * rstd(c); });
  b.bias = parameters.add([&](int64_t c) { return shift ? shift[c] : 0; });
  if (sum) {
    const size_t channels = static_cast<size_t>(b.channels);
    std::vector<double> totals(2 * channels);
    reduce(b, dtype, PRUNETRAIN_PICK(batch_norm_sum), [&](int64_t, const double* slots) {
      for (size_t i = 0; i < 2 * channels; ++i) totals[i] += slots[i];
    });
    for (int64_t c = 0; c < b.channels; ++c) {
      static_cast<A*>(sum_dy->data_ptr())[c] = static_cast<A>(totals[c]);
      static_cast<A*>(sum_dy_xhat->data_ptr())[c] = static_cast<A>(totals[channels + c] * rstd(c));
    }
  }
  if (b.dx == nullptr && b.dresidual == nullptr) return;
  if (count > 0) {
    const A *g = of_channels<A>(sum_dy), *g_xhat = of_channels<A>(sum_dy_xhat);
    b.offset = parameters.add([&](int64_t c) { return g[c] / count; });
    b.slope = parameters.add([&](int64_t c) { return g_xhat[c] / count * rstd(c); });
  }
  write(b, dtype, PRUNETRAIN_PICK(batch_norm_write_gradient));
}

// The address of an activation that is stored as `x`; null of none.
inline void* beside(const Tensor& x, const std::optional<Tensor>& t, const char* name) {
  if (!t.has_value()) return nullptr;
  check_cpu(*t, name);
  STD_TORCH_CHECK(t->scalar_type() == x.scalar_type() && t->numel() == x.numel(), name, " must be as x is.");
  return t->data_ptr();
}

inline uint8_t* mask_of(const Tensor& x, const std::optional<Tensor>& mask) {
  if (!mask.has_value()) return nullptr;
  STD_TORCH_CHECK(mask->is_cpu() && mask->numel() == (x.numel() + 7) / 8, "the mask must be of a bit for each of x.");
  return static_cast<uint8_t*>(mask->data_ptr());
}

// mean and var, written first if they are to be measured; then y and mask, those that are given. Parameters are fp32,
// of a fp64 x fp64.
void batch_norm_forward(
    const Tensor& x, Tensor& mean, Tensor& var, bool measure, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, std::optional<Tensor> y,
    std::optional<Tensor> mask, int64_t dtype, int64_t inner, double eps, bool relu) {
  BatchNorm b = batch_norm_of(x, inner, {mean, var, weight, bias});
  b.residual = beside(x, residual, "the residual");
  b.y = beside(x, y, "y");
  b.mask = mask_of(x, mask);
  b.relu = relu;
  (dtype == FLOAT64 ? forward<double> : forward<float>)(b, dtype, mean, var, measure, weight, bias, eps);
}

// sum_dy and sum_dy_xhat, if they are to be summed; then dx and dresidual, those that are given. A count of 0: mean and
// var were constants.
void batch_norm_backward(
    const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& var, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& mask, std::optional<Tensor> sum_dy,
    std::optional<Tensor> sum_dy_xhat, bool sum, std::optional<Tensor> dx, std::optional<Tensor> dresidual,
    int64_t dtype, int64_t inner, double count, double eps, bool relu) {
  BatchNorm b = batch_norm_of(x, inner, {mean, var, weight, bias, sum_dy, sum_dy_xhat});
  b.dy = beside(x, dy, "dy");
  b.dx = beside(x, dx, "dx");
  b.dresidual = beside(x, dresidual, "dresidual");
  b.mask = mask_of(x, mask);
  b.relu = relu;
  (dtype == FLOAT64 ? backward<double> : backward<float>)(
      b, dtype, mean, var, weight, bias, sum_dy, sum_dy_xhat, sum, count, eps);
}

template <typename A>
void update(Tensor& running, const Tensor& value, double factor, double momentum) {
  check_cpu(running, "a running statistic");
  STD_TORCH_CHECK(running.numel() == value.numel(), "running statistics must be of as many channels as new ones.");
  A* to = static_cast<A*>(running.data_ptr());
  const A* from = static_cast<const A*>(value.data_ptr());
  for (int64_t c = 0; c < running.numel(); ++c)
    to[c] = static_cast<A>(momentum * (from[c] * factor) + (1 - momentum) * to[c]);
}

// All four are fp32, or fp64; var is biased.
void batch_norm_update(
    Tensor& running_mean, Tensor& running_var, const Tensor& mean, const Tensor& var, int64_t dtype, double unbiased,
    double momentum) {
  const auto by_dtype = dtype == FLOAT64 ? update<double> : update<float>;
  by_dtype(running_mean, mean, 1, momentum);
  by_dtype(running_var, var, unbiased, momentum);
}

}  // namespace prunetrain

STABLE_TORCH_LIBRARY_FRAGMENT(prunetrain_kernels_cpu, m) {
  m.def(
      "batch_norm_forward(Tensor x, Tensor(a!) mean, Tensor(b!) var, bool measure, Tensor? weight, Tensor? bias, "
      "Tensor? residual, Tensor(c!)? y, Tensor(d!)? mask, int dtype, int inner, float eps, bool relu) -> ()");
  m.def(
      "batch_norm_backward(Tensor dy, Tensor x, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? mask, "
      "Tensor(a!)? sum_dy, Tensor(b!)? sum_dy_xhat, bool sum, Tensor(c!)? dx, Tensor(d!)? dresidual, int dtype, "
      "int inner, float count, float eps, bool relu) -> ()");
  m.def(
      "batch_norm_update(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, int dtype, "
      "float unbiased, float momentum) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(prunetrain_kernels_cpu, CPU, m) {
  m.impl("batch_norm_forward", TORCH_BOX(&prunetrain::batch_norm_forward));
  m.impl("batch_norm_backward", TORCH_BOX(&prunetrain::batch_norm_backward));
  m.impl("batch_norm_update", TORCH_BOX(&prunetrain::batch_norm_update));
}

#endif

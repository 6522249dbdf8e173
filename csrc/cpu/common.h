// What all native CPU operators share: instruction sets, dtypes, tables of tensors, threads.
//
// An operator is one header of three parts. The first declares its arguments and its kernels; the second, compiled with
// PRUNETRAIN_KERNELS once per instruction set (kernels.cpp), holds the kernels; the third, compiled once (native.cpp),
// cuts the work into pieces for PyTorch's threads and registers the operator on the stable ABI.
//
// The second part uses neither PyTorch's headers nor the standard library: an inline function that is compiled for
// AVX-512 could be the copy of it that the linker keeps for everybody.
#pragma once

#include <cstddef>
#include <cstdint>

namespace prunetrain {

// As in Python: prunetrain_kernels/ops/native.py.
enum Dtype : int64_t { FLOAT32 = 0, FLOAT16 = 1, BFLOAT16 = 2, FLOAT64 = 3 };

// One row of the table that ops/tables.py makes: the tensor as rows x columns in storage order.
struct Entry {
  int64_t rows, columns, inner, channels, numel, first_tile, across, row_slots, column_slots, norms, used, group;
};
static_assert(sizeof(Entry) == 12 * sizeof(int64_t), "ops/tables.py: FIELDS");

// Rows [row0, row0 + rows) of one tensor: what one thread works on at a time. `slots` is where the partial results of its
// input channels go, if they are wanted.
struct Chunk {
  int64_t tensor, row0, rows, slots;
};

}  // namespace prunetrain

// Declares a kernel for every instruction set that is built. PRUNETRAIN_PICK(name) is the one for this machine.
#if defined(__x86_64__) && !defined(PRUNETRAIN_BASELINE_ONLY)
#define PRUNETRAIN_DECLARE(result, name, ...)        \
  namespace baseline { result name(__VA_ARGS__); }   \
  namespace avx2 { result name(__VA_ARGS__); }       \
  namespace avx512 { result name(__VA_ARGS__); }
#define PRUNETRAIN_PICK(name) \
  (isa() == 2 ? &avx512::name : isa() == 1 ? &avx2::name : &baseline::name)
#else
#define PRUNETRAIN_DECLARE(result, name, ...) \
  namespace baseline { result name(__VA_ARGS__); }
#define PRUNETRAIN_PICK(name) (&baseline::name)
#endif

#ifdef PRUNETRAIN_KERNELS  // ------------------------------------------------------------------------------------------

namespace prunetrain {
namespace PRUNETRAIN_KERNELS {
namespace {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// Numbers are stored as T and computed as Acc<T>; the largest |w| is found among the bits of positive numbers, which are in
// the numbers' order, NaN above infinity.
template <typename T>
struct Number {
  using Acc = float;
  using Bits = int32_t;
};
template <>
struct Number<double> {
  using Acc = double;
  using Bits = int64_t;
};
template <typename T>
using Acc = typename Number<T>::Acc;
template <typename T>
using Bits = typename Number<T>::Bits;

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const bfloat16* p) { return bit_cast<float>(uint32_t{p->bits} << 16); }
inline float load(const half* p) {
  // The exponent is moved by a multiplication, which makes normal numbers of subnormal ones too.
  const uint32_t h = p->bits, magnitude = (h & 0x7fffu) << 13;
  const float scaled = bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t finite = bit_cast<uint32_t>(scaled);
  return bit_cast<float>(((h & 0x7c00u) == 0x7c00u ? special : finite) | ((h & 0x8000u) << 16));
}

inline void store(float* p, float value) { *p = value; }
inline void store(double* p, double value) { *p = value; }
inline void store(bfloat16* p, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  p->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void store(half* p, float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  // Normal results: rounded to nearest even in integers, the exponent moved by 112. Subnormal ones: an addition rounds.
  const uint32_t normal = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  const uint32_t tiny = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  const uint32_t large = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  p->bits = static_cast<uint16_t>((magnitude < 0x477ff000u ? finite : large) | ((bits >> 16) & 0x8000u));
}

// a * b + c, rounded once where the instruction set can. Contraction by the compiler is off: where products are fused, and
// so what the last bit is, is said here and not left to it.
template <typename N>
inline N multiply_add(N a, N b, N c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (sizeof(N) == 4) return __builtin_fmaf(a, b, c);
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline float absolute(float value) { return __builtin_fabsf(value); }
inline double absolute(double value) { return __builtin_fabs(value); }
inline float square_root(float value) { return __builtin_sqrtf(value); }
inline double square_root(double value) { return __builtin_sqrt(value); }
template <typename N>
inline N least(N a, N b) {
  return b < a ? b : a;
}
template <typename N>
inline N most(N a, N b) {
  return a < b ? b : a;
}

// Calls f with a value of the C++ type that stores `dtype`.
template <typename F>
inline void with_dtype(int64_t dtype, const F& f) {
  switch (dtype) {
    case FLOAT32: return f(float{});
    case FLOAT16: return f(half{});
    case BFLOAT16: return f(bfloat16{});
    case FLOAT64: return f(double{});
  }
}

}  // namespace
}  // namespace PRUNETRAIN_KERNELS
}  // namespace prunetrain

#else  // -----------------------------------------------------------------------------------------------------------------

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

namespace prunetrain {

using torch::stable::Tensor;

// 2 for AVX-512, 1 for AVX2, 0 for neither; native.cpp.
int isa();

inline int64_t element_size(int64_t dtype) { return dtype == FLOAT64 ? 8 : dtype == FLOAT32 ? 4 : 2; }

// f(i) for i in [0, count), in pieces of one on PyTorch's threads (torch.set_num_threads).
template <typename F>
void each(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU.");
}

// A one-dimensional int64 tensor's numbers.
inline const int64_t* numbers(const Tensor& t) {
  check_cpu(t, "a table");
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Long && t.is_contiguous(), "a table must be int64.");
  return static_cast<const int64_t*>(t.data_ptr());
}

// A scalar tensor (fp32 or fp64) as a number; `absent` without one.
inline double number(const std::optional<Tensor>& t, double absent) {
  if (!t.has_value()) return absent;
  check_cpu(*t, "a scalar");
  return t->scalar_type() == torch::headeronly::ScalarType::Double ? *static_cast<const double*>(t->data_ptr())
                                                                 : *static_cast<const float*>(t->data_ptr());
}

// A table's tensors, cut into chunks that do not depend on the number of threads; so results do not either.
struct Table {
  const Entry* entries;
  int64_t count;
  std::vector<Chunk> chunks;
  std::vector<int64_t> first_chunk;  // of each tensor, and of the one after the last
  int64_t slots = 0;                 // of all chunks' input channels

  explicit Table(const Tensor& table) : entries(reinterpret_cast<const Entry*>(numbers(table))), count(table.size(0)) {
    for (int64_t t = 0; t < count; ++t) {
      const Entry& e = entries[t];
      // About 64 thousand numbers, so that a thread's share is fair, and 64 rows, so that little is left to fold.
      const int64_t by_size = (1 << 16) / (e.columns > 0 ? e.columns : 1), step = by_size > 64 ? by_size : 64;
      first_chunk.push_back(static_cast<int64_t>(chunks.size()));
      for (int64_t row = 0; row < e.rows; row += step) {
        chunks.push_back({t, row, e.rows - row < step ? e.rows - row : step, slots});
        slots += e.used ? e.channels : 0;
      }
    }
    first_chunk.push_back(static_cast<int64_t>(chunks.size()));
  }
};

}  // namespace prunetrain

#endif

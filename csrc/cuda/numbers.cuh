// Element types and their way to fp32 and back, without any header: so these files compile with nvcc, through NVRTC
// (which has no standard library) and, for tests, with a C++ compiler for the CPU (on_host.h).
#pragma once

namespace prunetrain {

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// -- the type that sums are made in: fp32, or fp64 for fp64 -----------------------------------------------------------

template <class T>
struct Sums {
  using type = float;
};
template <>
struct Sums<double> {
  using type = double;
};

__device__ inline float number(float x) { return x; }
__device__ inline double number(double x) { return x; }
__device__ inline float number(BFloat16 x) { return __int_as_float(int(unsigned(x.bits) << 16)); }
__device__ inline float number(Half x) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
#else
  return float(__builtin_bit_cast(_Float16, x));
#endif
}

__device__ inline void round_to(float& out, float x) { out = x; }
__device__ inline void round_to(double& out, double x) { out = x; }
__device__ inline void round_to(Half& out, float x) {
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  out = __builtin_bit_cast(Half, _Float16(x));
#endif
}
__device__ inline void round_to(BFloat16& out, float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else  // to the nearest, ties to even; a NaN must not be carried over into an infinity
  const unsigned bits = unsigned(__float_as_int(x));
  out.bits = x != x ? 0x7fff : (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

// -- several elements at once -----------------------------------------------------------------------------------------

template <class T, int COUNT>
struct alignas(COUNT * sizeof(T) < 16 ? COUNT * sizeof(T) : 16) Pack {  // one load or store of up to 16 bytes
  T at[COUNT];
};

}  // namespace prunetrain

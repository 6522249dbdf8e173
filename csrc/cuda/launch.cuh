// How the launchers start a kernel that takes one struct.
#pragma once

namespace prunetrain {

constexpr int THREADS = 256;                 // of every block
constexpr long long MOST_BLOCKS = 2147483647;  // along the first axis of a grid

#ifndef __CUDACC_RTC__
template <class Arguments>
const char* launch(void (*kernel)(Arguments), long long blocks, const Arguments& arguments, void* stream) {
  if (blocks == 0) return nullptr;
  if (blocks > MOST_BLOCKS) return "more blocks than a grid has; use smaller tensors";
#ifdef __CUDACC__
  kernel<<<unsigned(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(arguments);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#else
  on_host::run(blocks, THREADS, [&] { kernel(arguments); });
  return nullptr;
#endif
}
#endif

}  // namespace prunetrain

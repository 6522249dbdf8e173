// CUDA's kernels on a CPU, for tests: included before everything else (g++ -include on_host.h), it makes the kernels
// ordinary functions and runs every thread of a block as a fiber. A fiber runs until it must wait for others, at
// __syncthreads or at a shuffle, and then the next one goes on: slow, exact, and the same every time.
//
// Proves the index maths, the values and that all threads meet at every barrier. With ON_HOST_BACKWARDS in the
// environment blocks and threads run in the opposite order, which shows most missing barriers. Of speed: nothing.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __shared__ static  // blocks run one after the other
#define __launch_bounds__(...)

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx;

namespace on_host {

constexpr int WARP = 32;
constexpr size_t STACK = 64 << 10;  // bytes
constexpr int PATIENCE = 1000;      // rounds without a barrier opening, after which the block is stuck

struct Barrier {
  int arrived = 0, opened = 0;
};

struct Block {
  int threads = 0, current = 0;
  bool progress = false;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<double> exchanged;  // two per thread: who is late reads one shuffle while who is early writes the next
  std::vector<int> shuffles;      // of each thread
  std::vector<ucontext_t> fibers;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> done;
  ucontext_t scheduler;
  std::function<void()> body;
};
inline Block block;

inline void wait(Barrier& barrier, int members) {
  const int before = barrier.opened;
  if (++barrier.arrived == members) {
    barrier.arrived = 0;
    ++barrier.opened;
    block.progress = true;
    return;
  }
  while (barrier.opened == before) swapcontext(&block.fibers[block.current], &block.scheduler);
}

inline void begin() {
  block.body();
  block.done[block.current] = block.progress = true;
}

template <class Body>
void run(long long blocks, int threads, Body body) {
  block.body = body;
  block.threads = threads;
  block.fibers.resize(threads);
  block.stacks.resize(threads);
  block.exchanged.resize(2 * threads);
  for (auto& stack : block.stacks) stack.resize(STACK);
  const bool backwards = std::getenv("ON_HOST_BACKWARDS") != nullptr;
  for (long long nth = 0; nth < blocks; ++nth) {
    const long long index = backwards ? blocks - 1 - nth : nth;
    blockIdx.x = unsigned(index);
    block.all = {};
    block.warps.assign(threads / WARP, {});
    block.shuffles.assign(threads, 0);
    block.done.assign(threads, false);
    for (int i = 0; i < threads; ++i) {
      getcontext(&block.fibers[i]);
      block.fibers[i].uc_stack.ss_sp = block.stacks[i].data();
      block.fibers[i].uc_stack.ss_size = STACK;
      block.fibers[i].uc_link = &block.scheduler;
      makecontext(&block.fibers[i], begin, 0);
    }
    int stuck = 0;
    for (bool alive = true; alive; stuck = block.progress ? 0 : stuck + 1) {
      if (stuck > PATIENCE) {
        std::fprintf(stderr, "threads of block %lld wait at barriers that the others never reach\n", index);
        std::abort();
      }
      alive = block.progress = false;
      for (int n = 0; n < threads; ++n) {
        const int i = backwards ? threads - 1 - n : n;
        if (block.done[i]) continue;
        alive = true;
        block.current = i;
        threadIdx.x = unsigned(i);
        swapcontext(&block.scheduler, &block.fibers[i]);
      }
    }
  }
}

}  // namespace on_host

inline void __syncthreads() {
  on_host::wait(on_host::block.all, on_host::block.threads);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int apart) {
  auto& block = on_host::block;
  const int me = block.current, page = block.shuffles[me]++ % 2 * block.threads;
  std::memcpy(&block.exchanged[page + me], &value, sizeof(T));
  on_host::wait(block.warps[me / on_host::WARP], on_host::WARP);
  std::memcpy(&value, &block.exchanged[page + (me ^ apart)], sizeof(T));
  return value;
}

inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
using std::max;
using std::min;

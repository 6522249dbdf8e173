// Channels by a map: out[:, c] = base[:, c] + (x[:, source[c]], or 0 where source[c] is -1), which is channel gather,
// scatter and scatter-add (prunetrain_kernels/ops/channel_index.py).
//
// x is (outer, channels_in, inner) and out (outer, channels, inner) in storage order: channels_last has inner = 1 and a pixel
// for each `outer`, contiguous has inner = H*W and an image for each. Neighbouring channels of the map that are neighbours
// in x too are copied as one run.
#pragma once

#include "common.h"

namespace prunetrain {

// Output channels [channel, channel + count), from x's `from` on; from = -1: absent in x.
struct Run {
  int64_t channel, count, from;
};

struct ChannelMap {
  const void* x;
  const void* base;  // null for zeros; may be `out`
  void* out;
  const int32_t* source;
  const Run* runs;
  int64_t run_count, channels_in, channels, inner;
  bool in_runs;  // worth copying run by run; else element by element
};

PRUNETRAIN_DECLARE(void, map_channels, const ChannelMap&, int64_t dtype, int64_t outer0, int64_t outers)

}  // namespace prunetrain

#ifdef PRUNETRAIN_KERNELS  // --------------------------------------------------------------------------------------------

namespace prunetrain {
namespace PRUNETRAIN_KERNELS {

void map_channels(const ChannelMap& m, int64_t dtype, int64_t outer0, int64_t outers) {
  with_dtype(dtype, [&](auto kind) {
    using T = decltype(kind);
    for (int64_t i = outer0; i < outer0 + outers; ++i) {
      const T* x = static_cast<const T*>(m.x) + i * m.channels_in * m.inner;
      const T* base = m.base ? static_cast<const T*>(m.base) + i * m.channels * m.inner : nullptr;
      T* out = static_cast<T*>(m.out) + i * m.channels * m.inner;
      if (m.in_runs) {
        for (int64_t r = 0; r < m.run_count; ++r) {
          const int64_t at = m.runs[r].channel * m.inner, count = m.runs[r].count * m.inner;
          const T* from = x + (m.runs[r].from < 0 ? 0 : m.runs[r].from) * m.inner;
          const size_t bytes = static_cast<size_t>(count) * sizeof(T);
          if (m.runs[r].from < 0) {
            if (base == nullptr) __builtin_memset(static_cast<void*>(out + at), 0, bytes);
            else if (base != out) __builtin_memcpy(static_cast<void*>(out + at), base + at, bytes);
          } else if (base == nullptr) {
            __builtin_memcpy(static_cast<void*>(out + at), from, bytes);
          } else {
#pragma omp simd
            for (int64_t j = 0; j < count; ++j) store(out + at + j, load(base + at + j) + load(from + j));
          }
        }
      } else if (base == nullptr) {  // inner is 1
        for (int64_t c = 0; c < m.channels; ++c) out[c] = m.source[c] < 0 ? T{} : x[m.source[c]];
      } else {
        for (int64_t c = 0; c < m.channels; ++c)
          store(out + c, load(base + c) + (m.source[c] < 0 ? 0 : load(x + m.source[c])));
      }
    }
  });
}

}  // namespace PRUNETRAIN_KERNELS
}  // namespace prunetrain

#else  // -----------------------------------------------------------------------------------------------------------------

namespace prunetrain {

// x, base and out are dense in one layout, `inner` apart from channel to channel; the map is trusted to lie within x.
void channel_map(
    const Tensor& x, const Tensor& source, const std::optional<Tensor>& base, Tensor& out, int64_t dtype, int64_t inner) {
  check_cpu(x, "x");
  check_cpu(out, "out");
  const int64_t channels = source.numel(), outer = out.numel() / (channels * inner);
  const auto* map = static_cast<const int32_t*>(source.data_ptr());
  std::vector<Run> runs;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t from = map[c] < 0 ? -1 : map[c];
    if (!runs.empty()) {
      Run& last = runs.back();
      if (from < 0 ? last.from < 0 : last.from >= 0 && last.from + last.count == from) {
        ++last.count;
        continue;
      }
    }
    runs.push_back({c, 1, from});
  }
  const auto count = static_cast<int64_t>(runs.size());
  const ChannelMap m{x.data_ptr(),
                     base.has_value() ? base->data_ptr() : nullptr,
                     out.data_ptr(),
                     map,
                     runs.data(),
                     count,
                     x.numel() / (outer * inner),
                     channels,
                     inner,
                     inner > 1 || count * 8 <= channels};
  const int64_t by_size = (1 << 15) / (channels * inner), piece = by_size > 1 ? by_size : 1;
  each((outer + piece - 1) / piece, [&](int64_t i) {
    PRUNETRAIN_PICK(map_channels)(m, dtype, i * piece, outer - i * piece < piece ? outer - i * piece : piece);
  });
}

}  // namespace prunetrain

STABLE_TORCH_LIBRARY_FRAGMENT(prunetrain_kernels_cpu, m) {
  m.def("channel_map(Tensor x, Tensor source, Tensor? base, Tensor(a!) out, int dtype, int inner) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(prunetrain_kernels_cpu, CPU, m) { m.impl("channel_map", TORCH_BOX(&prunetrain::channel_map)); }

#endif

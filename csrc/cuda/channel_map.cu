// Launcher of channel_map_kernels.cuh.
#include "channel_map_kernels.cuh"

namespace prunetrain {

namespace {

template <class T, int RUN, int WIDTH>
const char* launch_width(ChannelMapArguments a, void* stream) {
  const long long items = (a.full_rows ? a.columns : a.tail + WIDTH - 1) / WIDTH;  // along a row
  a.span = 32;
  while (a.span < THREADS && a.span < items) a.span *= 2;
  a.column_blocks = int((items + a.span - 1) / a.span);
  const long long rows = a.full_rows + (a.tail > 0), rows_of_a_block = (long long)(THREADS / a.span) * MAP_STEPS;
  const long long row_blocks = (rows + rows_of_a_block - 1) / rows_of_a_block;
  return launch(channel_map_kernel<T, RUN, WIDTH>, row_blocks * a.column_blocks, a, stream);
}

bool in_packs_of(int bytes, const ChannelMapArguments& a, int size) {
  const auto addresses = reinterpret_cast<unsigned long long>(a.x) | reinterpret_cast<unsigned long long>(a.base) |
                         reinterpret_cast<unsigned long long>(a.out);
  return (long long)(a.inner) * size % bytes == 0 && addresses % bytes == 0;
}

template <class T>
const char* launch_number(const ChannelMapArguments& a, void* stream) {
  constexpr int SIZE = sizeof(T), HALF_WIDE = SIZE < 8 ? 8 / SIZE : 1, NARROW = SIZE < 4 ? 4 / SIZE : 1;
  if (in_packs_of(16, a, SIZE)) return launch_width<T, 16 / SIZE, 16 / SIZE>(a, stream);
  if (in_packs_of(8, a, SIZE)) return launch_width<T, HALF_WIDE, HALF_WIDE>(a, stream);
  const auto written = reinterpret_cast<unsigned long long>(a.base) | reinterpret_cast<unsigned long long>(a.out);
  if (written % (NARROW * SIZE) == 0) return launch_width<T, 1, NARROW>(a, stream);
  return launch_width<T, 1, 1>(a, stream);
}

}  // namespace

const char* launch_channel_map(Number dtype, ChannelMapArguments arguments, void* stream) {
  switch (dtype) {
    case Number::fp32: return launch_number<float>(arguments, stream);
    case Number::fp16: return launch_number<Half>(arguments, stream);
    case Number::bf16: return launch_number<BFloat16>(arguments, stream);
    default: return launch_number<double>(arguments, stream);
  }
}

}  // namespace prunetrain

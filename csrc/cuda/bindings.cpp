// The launchers as PyTorch operators, on the stable ABI: one library for every PyTorch from 2.11 on, built without CUDA
// headers of PyTorch. The Python side (prunetrain_kernels/ops/cuda_native.py) checks what users give; here only what
// would make the kernels read wrong memory is checked.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "arguments.h"

#ifdef PRUNETRAIN_ON_HOST  // for tests: the kernels on CPU tensors (on_host.h)
#define NAMESPACE prunetrain_kernels_cuda_on_host
#define DEVICE CPU
#else
#define NAMESPACE prunetrain_kernels_cuda
#define DEVICE CUDA
#pragma weak aoti_torch_get_current_cuda_stream  // in libtorch_cuda, which a PyTorch for CPUs lacks
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using prunetrain::Number;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Number number_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Number::fp32;
    case ScalarType::Half: return Number::fp16;
    case ScalarType::BFloat16: return Number::bf16;
    case ScalarType::Double: return Number::fp64;
    default: STD_TORCH_CHECK(false, "the kernels take fp32, fp16, bf16 and fp64 tensors only");
  }
}

// The tensor's memory, as the type that the kernels read it with.
template <class T>
T* memory(const Tensor& tensor, ScalarType type, const Tensor& beside, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(tensor.device() == beside.device(), name, " lies on another device than the rest");
  return tensor.numel() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

const float* scalar(const std::optional<Tensor>& tensor, const Tensor& beside, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->numel() == 1, name, " must be one number");
  return memory<const float>(*tensor, ScalarType::Float, beside, name);
}

// Runs `launch(stream)` on the current stream of the tensor's device.
template <class Launch>
void launch_beside(const Tensor& tensor, const char* what, Launch launch) {
#ifdef PRUNETRAIN_ON_HOST
  const char* error = launch(nullptr);
#else
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch was built without CUDA");
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  const char* error = launch(stream);
#endif
  STD_TORCH_CHECK(error == nullptr, what, " could not be launched: ", error ? error : "");
}

// One update of all tensors of a table, and the fold of what it measured.
void sgd_(
    const Tensor& tensors, const Tensor& tile_tensor, const Tensor& fold_tensor, const Tensor& fold_start,
    const Tensor& params, const Tensor& grads, const Tensor& buffers, const Tensor& first, ScalarType dtype,
    const Tensor& learning_rates, const Tensor& settings, const Tensor& sums, const Tensor& maxima,
    const Tensor& norms, const Tensor& max_abs, const std::optional<Tensor>& coefficient,
    const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf, double eps) {
  const auto longs = [&](const Tensor& t, const char* name) {
    return memory<const long long>(t, ScalarType::Long, tensors, name);
  };
  const auto ints = [&](const Tensor& t, const char* name) {
    return memory<const int>(t, ScalarType::Int, tensors, name);
  };
  const auto floats = [&](const Tensor& t, const char* name) {
    return memory<float>(t, ScalarType::Float, tensors, name);
  };
  const int64_t count = tensors.numel() * int64_t(sizeof(long long)) / int64_t(sizeof(prunetrain::Entry));
  STD_TORCH_CHECK(
      params.numel() == count && grads.numel() == count && buffers.numel() == count && first.numel() == count,
      "every list must have one entry per tensor of the table");
  const auto* entries = reinterpret_cast<const prunetrain::Entry*>(longs(tensors, "tensors"));
  const prunetrain::SgdArguments update{
      entries,
      ints(tile_tensor, "tile_tensor"),
      longs(params, "params"),
      longs(grads, "grads"),
      longs(buffers, "buffers"),
      ints(first, "first"),
      floats(norms, "norms"),
      floats(sums, "sums"),
      floats(maxima, "maxima"),
      longs(learning_rates, "learning_rates"),
      reinterpret_cast<const prunetrain::Settings*>(floats(settings, "settings")),
      scalar(coefficient, tensors, "coefficient"),
      scalar(grad_scale, tensors, "grad_scale"),
      scalar(found_inf, tensors, "found_inf"),
  };
  const prunetrain::FoldArguments fold{
      entries,
      ints(fold_tensor, "fold_tensor"),
      ints(fold_start, "fold_start"),
      update.sums,
      update.maxima,
      floats(norms, "norms"),
      floats(max_abs, "max_abs"),
      float(eps),
      update.found_inf,
  };
  launch_beside(tensors, "the update", [&](void* stream) {
    const char* error = prunetrain::launch_sgd(number_of(dtype), tile_tensor.numel(), update, stream);
    return error ? error : prunetrain::launch_fold(fold_tensor.numel(), fold, stream);
  });
}

// Writes `out`; x, base and out are dense, in one layout, and described by the numbers (arguments.h).
void channel_map_(
    const Tensor& x, const Tensor& source, const std::optional<Tensor>& base, const Tensor& out, int64_t full_rows,
    int64_t columns, int64_t tail, int64_t inner, int64_t channels_in, int64_t row_in) {
  STD_TORCH_CHECK(x.scalar_type() == out.scalar_type(), "x and the output differ in dtype");
  STD_TORCH_CHECK(x.device() == out.device(), "x and the output lie on different devices");
  STD_TORCH_CHECK(!base || base->scalar_type() == out.scalar_type(), "base and the output differ in dtype");
  STD_TORCH_CHECK(!base || base->device() == out.device(), "base and the output lie on different devices");
  STD_TORCH_CHECK(!base || base->numel() == out.numel(), "base and the output differ in shape");
  STD_TORCH_CHECK(full_rows * columns + tail == out.numel(), "the matrix is not that of the output");
  prunetrain::ChannelMapArguments arguments{};
  arguments.x = x.numel() ? x.data_ptr() : nullptr;
  arguments.source = memory<const int>(source, ScalarType::Int, out, "source");
  arguments.base = base ? base->data_ptr() : nullptr;
  arguments.out = out.data_ptr();
  arguments.full_rows = full_rows;
  arguments.row_in = row_in;
  arguments.columns = int(columns);
  arguments.tail = int(tail);
  arguments.inner = int(inner);
  arguments.channels = int(source.numel());
  arguments.channels_in = int(channels_in);
  launch_beside(out, "the channel map", [&](void* stream) {
    return prunetrain::launch_channel_map(number_of(out.scalar_type()), arguments, stream);
  });
}

}  // namespace

// Parameters, gradients and buffers are written through tables of addresses: not operators for tracing.
// PyTorch's macros paste their arguments; these expand NAMESPACE and DEVICE first.
#define DEFINE(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)
#define IMPLEMENT(ns, device, m) STABLE_TORCH_LIBRARY_IMPL(ns, device, m)

DEFINE(NAMESPACE, m) {
  m.def(
      "sgd_(Tensor tensors, Tensor tile_tensor, Tensor fold_tensor, Tensor fold_start, Tensor params, Tensor grads, "
      "Tensor buffers, Tensor first, ScalarType dtype, Tensor learning_rates, Tensor settings, Tensor(a!) sums, "
      "Tensor(b!) maxima, Tensor(c!) norms, Tensor(d!) max_abs, Tensor? coefficient, Tensor? grad_scale, "
      "Tensor? found_inf, float eps) -> ()");
  m.def(
      "channel_map_(Tensor x, Tensor source, Tensor? base, Tensor(a!) out, int full_rows, int columns, int tail, "
      "int inner, int channels_in, int row_in) -> ()");
}

IMPLEMENT(NAMESPACE, DEVICE, m) {
  m.impl("sgd_", TORCH_BOX(&sgd_));
  m.impl("channel_map_", TORCH_BOX(&channel_map_));
}

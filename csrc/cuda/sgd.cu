// Launchers of sgd_kernels.cuh.
#include "sgd_kernels.cuh"

namespace prunetrain {

const char* launch_sgd(Number dtype, long long tiles, const SgdArguments& arguments, void* stream) {
  switch (dtype) {
    case Number::fp32: return launch(sgd_kernel<float>, tiles, arguments, stream);
    case Number::fp16: return launch(sgd_kernel<Half>, tiles, arguments, stream);
    case Number::bf16: return launch(sgd_kernel<BFloat16>, tiles, arguments, stream);
    default: return "the update takes fp32, fp16 or bf16 parameters";
  }
}

const char* launch_fold(long long programs, const FoldArguments& arguments, void* stream) {
  return launch(fold_kernel, programs, arguments, stream);
}

}  // namespace prunetrain

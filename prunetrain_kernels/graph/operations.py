"""Tables of operations, by what they do to channels. `functions.py` has the rules, which look them up here."""

import operator

import torch
import torch.nn.functional as F

# Functions that work on each value by itself, so channels go through untouched whatever the number of dimensions.
UNARY = (
    "relu", "relu_", "sigmoid", "tanh", "abs", "absolute", "neg", "negative", "square", "exp", "exp2", "expm1", "log",
    "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tan", "asin", "acos", "atan", "arcsin",
    "arccos", "arctan", "sinh", "cosh", "asinh", "acosh", "atanh", "erf", "erfc", "erfinv", "sinc", "logit",
    "digamma", "lgamma", "sign", "sgn", "floor", "ceil", "round", "trunc", "fix", "frac", "nan_to_num", "isnan",
    "isinf", "isfinite", "logical_not", "bitwise_not", "signbit", "clone", "detach", "positive",
)  # fmt: skip
POINTWISE_FUNCTIONS = {
    F.relu, F.relu_, F.relu6, F.leaky_relu, F.leaky_relu_, F.elu, F.elu_, F.selu, F.celu, F.gelu, F.silu, F.mish,
    F.hardswish, F.hardtanh, F.hardsigmoid, F.sigmoid, F.logsigmoid, F.tanh, F.softplus, F.softsign, F.dropout,
    F.hardshrink, F.softshrink, F.tanhshrink, F.threshold,
    torch.dropout, torch.selu, torch.celu, torch.threshold,
    operator.neg, operator.pos, operator.invert, operator.abs, abs,
} | {getattr(torch, name) for name in UNARY if hasattr(torch, name)} | {
    getattr(torch.special, name) for name in UNARY if hasattr(torch.special, name)
}  # fmt: skip
POINTWISE_METHODS = {
    "contiguous", "float", "half", "bfloat16", "double", "bool", "int", "long", "to", "type", "type_as",
    "requires_grad_", "sigmoid_", "tanh_", "exp_", "log_", "sqrt_", "rsqrt_", "abs_", "neg_", "square_", "sin_", "cos_",
    "reciprocal_", "round_", "floor_", "ceil_", "cpu", "cuda",
} | set(UNARY)  # fmt: skip
# Functions that make a tensor of the first operand's shape, whatever its values.
LIKE = {
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like,
    torch.randint_like, torch.bernoulli, "bernoulli",
}  # fmt: skip
# Functions that work on each channel's map by itself.
SPATIAL_FUNCTIONS = {
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    F.lp_pool1d, F.lp_pool2d, F.interpolate, F.upsample, F.dropout1d, F.dropout2d, F.dropout3d,
    F.max_pool1d_with_indices, F.max_pool2d_with_indices, F.max_pool3d_with_indices,
    F.adaptive_max_pool1d_with_indices, F.adaptive_max_pool2d_with_indices, F.adaptive_max_pool3d_with_indices,
}  # fmt: skip
UNPOOLING = {F.max_unpool1d, F.max_unpool2d, F.max_unpool3d}
# Operations on each value by itself, of several operands: they say where the channels of all of these lie.
ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}
OTHER_ELEMENTWISE = {
    operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv, operator.itruediv, operator.pow,
    operator.ipow, operator.mod, operator.floordiv, operator.and_, operator.or_, operator.xor,
    operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne,
    torch.sub, torch.subtract, torch.mul, torch.multiply, torch.div, torch.divide, torch.true_divide,
    torch.floor_divide, torch.maximum, torch.minimum, torch.fmax, torch.fmin, torch.pow, torch.float_power,
    torch.remainder, torch.fmod, torch.atan2, torch.hypot, torch.logaddexp, torch.xlogy, torch.copysign,
    torch.heaviside, torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne, torch.less, torch.less_equal,
    torch.greater, torch.greater_equal, torch.not_equal, torch.isclose, torch.logical_and, torch.logical_or,
    torch.logical_xor, torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor,
    torch.where, torch.lerp, torch.addcmul, torch.addcdiv, torch.masked_fill, torch.clamp,
    torch.clip, torch.clamp_min, torch.clamp_max,
    "sub", "sub_", "mul", "mul_", "div", "div_", "maximum", "minimum", "fmax", "fmin", "pow", "pow_", "float_power",
    "remainder", "fmod", "atan2", "hypot", "copysign", "lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal",
    "greater", "greater_equal", "not_equal", "logical_and", "logical_or", "logical_xor", "where", "lerp", "lerp_",
    "addcmul", "addcmul_", "addcdiv", "addcdiv_", "masked_fill", "masked_fill_", "clamp", "clamp_", "clip",
    "clamp_min", "clamp_max", "expand_as", "multiply", "divide", "subtract",
}  # fmt: skip
ELEMENTWISE = ADDITIONS | OTHER_ELEMENTWISE
# Of these, the products and quotients, by which a weight of zero stays zero.
PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "multiply"}
QUOTIENTS = {operator.truediv, torch.div, torch.divide, torch.true_divide, "div", "divide"}
# torch.fx records `a += b` as operator.add, so a plain `a + b` has to count as one that may write into a.
IN_PLACE = {operator.add, operator.iadd, "add_"}
MATRIX_PRODUCTS = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__"}
RESHAPES = {"view", "reshape", torch.reshape, torch.flatten, "flatten", torch.unflatten, "unflatten"}
TRANSPOSED = ("mT", "mH", "T", "H")  # attributes
_PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")
PERMUTATIONS = {*_PERMUTATIONS, *(getattr(torch, name) for name in _PERMUTATIONS)}
# Functions that make one value of all along some dimensions, or two as a tuple: the values and their places.
_REDUCTIONS = (
    "mean", "sum", "amax", "amin", "std", "var", "max", "min", "prod", "median", "nanmedian", "mode", "norm",
    "logsumexp", "all", "any", "argmax", "argmin", "nansum", "nanmean", "count_nonzero", "std_mean", "var_mean",
    "aminmax",
)  # fmt: skip
REDUCTIONS = set(_REDUCTIONS) | {getattr(torch, name) for name in _REDUCTIONS}
# Functions that move values along some dimensions, or add them up along one: where their call names these, and which
# they are where it does not.
_ALONG_DIMS = {
    "flip": (1, None), "roll": (2, None), "cumsum": (1, None), "cumprod": (1, None), "logcumsumexp": (1, None),
    "cummax": (1, None), "cummin": (1, None), "sort": (1, -1), "argsort": (1, -1), "topk": (2, -1), "diff": (2, -1),
}  # fmt: skip
ALONG_DIMS = {**_ALONG_DIMS, **{getattr(torch, name): how for name, how in _ALONG_DIMS.items()}, F.normalize: (2, 1)}
SOFTMAX = {F.softmax, torch.softmax, "softmax", F.log_softmax, torch.log_softmax, "log_softmax", F.softmin}
CONVOLUTION_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
}  # fmt: skip
TRANSPOSED_FUNCTIONS = {F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
MIXING_FUNCTIONS = {F.local_response_norm}
MIXES = "divides by the spread over several channels, of which each is a part even where it is 0, so none can go"
OVER_CHANNELS = "is over its channels, of which each is a part, so none can go"
# Functions that make a tensor of a size that is written in the call, as `torch.zeros(x.shape)` or `x.new_zeros(n, c)`.
OF_SIZE = {
    torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, torch.full, "new_zeros", "new_ones", "new_empty",
    "new_full",
}  # fmt: skip
# Functions that make a tensor of numbers, one for each place: they have no channels.
OF_PLACES = {torch.arange, torch.linspace, torch.eye, torch.randperm}
# Functions that read the size of a map from a whole size: they ask no number of channels.
READ_MAP_SIZE = {F.affine_grid, torch.affine_grid_generator, *UNPOOLING}

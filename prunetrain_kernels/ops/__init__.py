"""Operators, one per file: maths, byte count and plain-PyTorch reference (the fused kernels come beside them)."""

from prunetrain_kernels.ops.group_lasso import (
    add_group_lasso_gradient_,
    group_lasso,
    slice_max_abs,
    slice_norms,
    slice_view,
)

__all__ = ["add_group_lasso_gradient_", "group_lasso", "slice_max_abs", "slice_norms", "slice_view"]

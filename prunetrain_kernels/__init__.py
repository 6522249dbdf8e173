"""CNNs that shrink while they train: PruneTrain (Lym et al., SC'19) for PyTorch.

The three lines of a trainer are `PruneTrain(...)`, `.regularize(loss)` and `.epoch_end()`; everything they are made of
is here too.
"""

import torch

from prunetrain_kernels.errors import (
    CheckpointError,
    DivergedError,
    InputError,
    PruneTrainError,
    PruneTrainWarning,
    RankLostError,
    RanksDifferError,
    TraceError,
    ZeroingError,
)
from prunetrain_kernels.graph import ChannelGraph, Keep, trace_channels
from prunetrain_kernels.prune.checkpoint import load_pruned, save_pruned
from prunetrain_kernels.prune.export import to_dense
from prunetrain_kernels.prune.program import export_program
from prunetrain_kernels.prune.reconfigure import Reconfiguration, reconfigure
from prunetrain_kernels.prune.shape import apply_shape, pruned_shape
from prunetrain_kernels.regularizer import GroupLasso, penalty_coefficient
from prunetrain_kernels.train.mini_batch import MiniBatch
from prunetrain_kernels.train.prunetrain import PruneReport, PruneTrain
from prunetrain_kernels.versions import VERSION, UntriedVersionWarning, warn_if_untried

__version__ = VERSION

__all__ = [
    "ChannelGraph", "CheckpointError", "DivergedError", "GroupLasso", "InputError", "Keep", "MiniBatch", "PruneReport",
    "PruneTrain", "PruneTrainError", "PruneTrainWarning", "RankLostError", "RanksDifferError", "Reconfiguration",
    "TraceError", "UntriedVersionWarning", "ZeroingError", "apply_shape", "export_program", "load_pruned",
    "penalty_coefficient", "pruned_shape", "reconfigure", "save_pruned", "to_dense", "trace_channels",
]  # fmt: skip

warn_if_untried(__version__, torch.__version__)

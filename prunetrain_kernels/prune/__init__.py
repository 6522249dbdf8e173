"""Pruning a model and its optimizer in place."""

from prunetrain_kernels.prune.changes import LayerChange, Reconfiguration
from prunetrain_kernels.prune.reconfigure import reconfigure, reconfiguring

__all__ = ["LayerChange", "Reconfiguration", "reconfigure", "reconfiguring"]

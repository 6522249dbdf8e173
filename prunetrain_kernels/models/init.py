"""The initial weights of every network in this folder: one function, so that networks differ in shape only."""

from torch import nn


def initialize(model: nn.Module) -> None:
    """Fills `model` in place: convolutions Kaiming-normal (fan_out, ReLU), batch norms gamma 1 and beta 0.

    No batch norm starts with gamma 0, the habit for the last one of a residual branch: group lasso acts from step 0,
    and a branch that begins with no gradient through its convolutions would be pruned before it had learnt anything.
    Linear layers keep PyTorch's default. Draws from the global CPU (or default-device) generator.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

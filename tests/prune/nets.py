"""Small networks of every shape that pruning must cope with, and ways to kill their channels."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunetrain_kernels import ChannelGraph, Keep, trace_channels


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives biases, BN affine parameters and running statistics values that are not trivially 0 or 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.affine:
                    uniform(module.weight, 0.5, 1.5)
                    uniform(module.bias, -0.5, 0.5)
                if module.track_running_stats:
                    uniform(module.running_mean, -0.3, 0.3)
                    uniform(module.running_var, 0.5, 1.5)
                    module.num_batches_tracked.fill_(7)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and module.bias is not None:
                uniform(module.bias, -0.5, 0.5)
    return model


def rest_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).weight.detach()


def kill(
    graph: ChannelGraph, model: nn.Module, share: float = 0.4, partly: float = 0.2, seed: int = 0
) -> list[set[int]]:
    """Zeroes random channels, in all readers and writers of each space, and others in all of them but one.

    Returns for each space the channels that are dead everywhere; at least one is left alive.
    """
    generator = torch.Generator().manual_seed(seed)
    dead: list[set[int]] = []
    for space in graph.spaces:
        order = torch.randperm(space.size, generator=generator).tolist()
        everywhere, in_some = int(share * space.size), int(partly * space.size)
        if space.frozen:
            everywhere = 0
        dead.append(set(order[:everywhere]))
        sides = [(name, "out") for name in space.producers] + [(name, "in") for name in space.consumers]
        for channel in order[: everywhere + in_some]:
            spared = int(torch.randint(len(sides), (1,), generator=generator))
            for i, (name, side) in enumerate(sides):
                if channel in dead[-1] or i != spared:
                    zero_slice(model, graph, name, side, channel)
    return dead


def zero_slice(model: nn.Module, graph: ChannelGraph, name: str, side: str, channel: int) -> None:
    """Sets a layer's slice of a channel of the space to zero; a gated layer may have none."""
    weight, block = rest_of(model, name), graph.layers[name].block
    for place in (graph.computed(name)[side == "out"] == channel).nonzero().flatten().tolist():
        if side == "out":
            weight[place] = 0
        else:
            weight[:, place * block : (place + 1) * block] = 0


def hold_masks(graph: ChannelGraph, keep: Keep, model: nn.Module) -> dict[str, Tensor]:
    """A mask for each layer that holds at zero whatever `keep` prunes, or leaves to gating."""
    masks = {}
    for layer in graph.layers.values():
        mask = torch.zeros_like(rest_of(model, layer.name))
        inputs, outputs = keep.live[layer.name]
        columns = [c * layer.block + b for c in inputs.tolist() for b in range(layer.block)]
        mask[outputs[:, None], torch.tensor(columns)[None, :]] = 1
        if layer.name in keep.removed:
            mask.zero_()
        masks[layer.name] = mask
    return masks


def forget_momentum(graph: ChannelGraph, keep: Keep, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Sets the momentum of all sparse slices to zero, as `reconfigure` does for those that stay."""
    for name, layer in graph.layers.items():
        state = optimizer.state.get(model.get_submodule(name).weight, {})
        for momentum in (state[key] for key in ("momentum_buffer", "exp_avg") if state.get(key) is not None):
            inputs, outputs = graph.computed(name)
            for place, channel in enumerate(inputs.tolist()):
                if keep.sparse[name].inputs[channel]:
                    momentum.narrow(layer.dims[0], place * layer.block, layer.block).zero_()
            for place, channel in enumerate(outputs.tolist()):
                if keep.sparse[name].outputs[channel]:
                    momentum.narrow(layer.dims[1], place, 1).zero_()


def twin_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A copy of a model together with its optimizer's state."""
    return copy.deepcopy((model, optimizer))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[Tensor],
    masks: dict[str, Tensor] | None = None,
    loss_of: Callable[[Tensor], Tensor] = lambda y: (y - 1).square().mean(),
) -> list[float]:
    losses = []
    for x in batches:
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        if masks:
            for name, mask in masks.items():
                gradient = model.get_submodule(name).weight.grad
                if gradient is not None:
                    gradient.mul_(mask)
        optimizer.step()
        if masks:
            with torch.no_grad():
                for name, mask in masks.items():
                    model.get_submodule(name).weight.mul_(mask)
        losses.append(loss.item())
    return losses


def warm_up(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, steps: int = 2) -> None:
    """A few steps, so that the optimizer has state."""
    train(model, optimizer, [x] * steps)


def snapshot(model: nn.Module, *optimizers: torch.optim.Optimizer) -> object:
    """Everything that an undone or refused change must leave bitwise as it was, object identities included."""
    tensors = [
        (name, id(t), t.detach().clone(), t.stride(), None if t.grad is None else t.grad.clone())
        for name, t in (*model.named_parameters(), *model.named_buffers())
    ]
    modules = [
        (name, id(m), type(m), m.training, {k: v for k, v in vars(m).items() if isinstance(v, int)})
        for name, m in model.named_modules()
    ]
    states = [
        (
            [[id(p) for p in group["params"]] for group in o.param_groups],
            {id(p): {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for p, s in o.state.items()},
        )
        for o in optimizers
    ]
    return tensors, modules, states, torch.get_rng_state()


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def traced(model: nn.Module, *x: Tensor) -> ChannelGraph:
    return trace_channels(model, x)


# -- networks ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """conv + BN stem, then blocks, pooling and a linear layer."""

    def __init__(self, *blocks: nn.Module, width: int = 8, dims: int = 2) -> None:
        super().__init__()
        conv, norm = CONV[dims], NORM[dims]
        self.stem = nn.Sequential(conv(3, width, 3, padding=1, bias=False), norm(width), nn.ReLU())
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).flatten(2).mean(2))


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class OutOfPlace(nn.Module):
    """Basic block; `norm` makes its batch norms."""

    def __init__(self, width: int = 8, dims: int = 2, norm: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        conv, norm = CONV[dims], norm or NORM[dims]
        self.conv1, self.bn1 = conv(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.bn2 = conv(width, width, 3, padding=1, bias=False), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class InPlace(nn.Module):
    """torchvision's way: one in-place ReLU module for all, `out += identity`, a projection where the stride is 2."""

    def __init__(self, width: int = 8, out: int = 8, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or width != out:
            self.downsample = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class WithBias(nn.Module):
    """No batch norm: the dead convolution's bias is the constant that stays. In or out of place."""

    def __init__(self, width: int = 8, in_place: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding="same")
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(torch.relu(self.conv1(x)))
        if self.in_place:
            out += x
            return out
        return F.relu_(out) + x


class PreActivation(nn.Module):
    """BN and ReLU in front of each convolution; the branch ends in a bare convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(out)))


class SqueezeExcite(nn.Module):
    """Depthwise convolution, PReLU and a gate of two 1x1 convolutions inside the branch."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, 12, 1, bias=False), nn.BatchNorm2d(12, affine=False)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.act = nn.PReLU(12)
        self.down, self.up = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.conv2, self.bn2 = nn.Conv2d(12, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.depthwise(self.bn1(self.conv1(x))))
        gate = torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(out, 1)))))
        return x + self.bn2(self.conv2(out * gate))


class Flattened(nn.Module):
    """Linear layers behind a flatten of 2 x 2 pixels, with a BatchNorm1d over the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.pool = nn.AdaptiveMaxPool2d(2)
        self.norm = nn.BatchNorm1d(24)
        self.fc1, self.fc2 = nn.Linear(24, 10), nn.Linear(10, 4)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv(x)))
        return self.fc2(self.drop(F.relu(self.fc1(self.norm(x.view(x.shape[0], -1))))))


def _norm(**options: object) -> Callable[[int], nn.Module]:
    return lambda width: nn.BatchNorm2d(width, **options)  # type: ignore[arg-type]


# name -> (network, shape of one input)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "out-of-place": (lambda: Residual(OutOfPlace(), OutOfPlace()), (3, 6, 6)),
    "in-place-bottleneck": (lambda: Residual(InPlace(8, 8), InPlace(8, 10, 2)), (3, 6, 6)),
    "bias-without-bn": (lambda: Residual(WithBias()), (3, 6, 6)),
    "bias-without-bn-in-place": (lambda: Residual(WithBias(in_place=True)), (3, 6, 6)),
    "pre-activation": (lambda: Residual(PreActivation(), PreActivation()), (3, 6, 6)),
    "squeeze-excite": (lambda: Residual(SqueezeExcite()), (3, 6, 6)),
    "bn-momentum-none": (lambda: Residual(OutOfPlace(norm=_norm(momentum=None))), (3, 6, 6)),
    "bn-not-affine": (lambda: Residual(OutOfPlace(norm=_norm(affine=False))), (3, 6, 6)),
    "bn-no-statistics": (lambda: Residual(OutOfPlace(norm=_norm(track_running_stats=False))), (3, 6, 6)),
    "bn-nothing": (lambda: Residual(OutOfPlace(norm=_norm(affine=False, track_running_stats=False))), (3, 6, 6)),
    "1d": (lambda: Residual(OutOfPlace(dims=1), dims=1), (3, 7)),
    "3d": (lambda: Residual(OutOfPlace(dims=3), dims=3), (3, 3, 4, 3)),
    "odd-width": (lambda: Residual(OutOfPlace(width=7), width=7), (3, 5, 5)),
    "flattened": (Flattened, (3, 6, 6)),
}
# the layer that ends a branch and can die, where there is one
DYING = {
    "out-of-place": "blocks.1.conv2",
    "in-place-bottleneck": "blocks.0.conv3",
    "bias-without-bn": "blocks.0.conv2",
    "bias-without-bn-in-place": "blocks.0.conv2",
    "pre-activation": "blocks.0.conv2",
    "squeeze-excite": "blocks.0.conv2",
    "bn-momentum-none": "blocks.0.conv2",
    "bn-not-affine": "blocks.0.conv2",
    "bn-no-statistics": "blocks.0.conv2",
    "bn-nothing": "blocks.0.conv2",
    "1d": "blocks.0.conv2",
    "3d": "blocks.0.conv2",
    "odd-width": "blocks.0.conv2",
}


def small_net(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A randomised network and a batch of five images."""
    torch.manual_seed(seed)
    build, shape = NETS[name]
    model, x = build(), torch.randn(5, *shape)
    model(x)  # sizes of the lazy linear layer
    return randomise(model, seed).to(dtype), x.to(dtype)

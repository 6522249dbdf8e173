"""Costs of a convolution under channel union and under each form of channel gating: bytes, FLOPs and, on a roof, time.

One training step of one layer, with the batch norm that reads it. E(c) is the bytes of c channels of a map, of the
input (i) or the output (o); a space has `full` channels, of which this layer computes `live`.

    side, form                          bytes, forward and backward                                    FLOPs by
    input   whole, or expanded weights  3 E_i(full): x twice, dx once                                   full
            implicit GEMM by index      4 E_i(full) + E_i(live): dx goes into zeros                     live
            index_select                4 E_i(full) + 5 E_i(live): the selection, and its derivative    live
    output  whole                       8 E_o(full): y written, read by the batch norm 4 times, dy      full
                                        written, read twice
            live, placed by batch norm  8 E_o(live)                                                     live
            live, scattered             3 E_o(live) + 2 E_o(live) + 2 E_o(full) + 5 E_o(full)           live
            live, index_copy            as scattered, and 2 E_o(full): zeros first, either way          live

In channels_last a selection by index reads whole sectors, so it counts as reading all channels (design section 5).
Channels are rounded up to a multiple of 8 where FLOPs are counted for time: what is computed for fewer is computed in
vain, in oneDNN's blocks and in tensor cores alike (design section 8).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from prunetrain_kernels.cost.roof import Roof

GRANULE = 8
# Kernels, or calls of operators, beyond the three that every convolution takes (forward and two gradients).
EXTRA_LAUNCHES = {"expanded": 4, "triton": 1, "naive": 4}
SCATTER_LAUNCHES = {"expanded": 2, "triton": 1, "naive": 4}

# The share of the device's arithmetic rate that each backend's convolution reaches. A library's is the measure of that
# rate, so 1. That of "triton" is not measured: by `bench predict` it reaches 0.1 to 0.3 of the tensor cores' rate, by
# shape, on an H200 and an A100. Suite `gating` measures it; until then the middle, so that `auto` takes it only where
# it saves most of the FLOPs, or where bytes decide.
EFFICIENCY = {"expanded": 1.0, "naive": 1.0, "triton": 0.2}


@dataclass(frozen=True)
class Form:
    """How a layer is computed.

    Attributes:
        gates_input, gates_output: whether only live channels are read, and written; with neither it is channel union.
        backend: that of `ops.conv2d` for a gated layer: "expanded", "triton" or "naive"; "" leaves it to the operator.
    """

    gates_input: bool = False
    gates_output: bool = False
    backend: str = "expanded"

    @property
    def gated(self) -> bool:
        """Whether it is gating of either side, and not channel union."""
        return self.gates_input or self.gates_output

    def __str__(self) -> str:
        sides = [name for name, gated in (("input", self.gates_input), ("output", self.gates_output)) if gated]
        how = f" ({self.backend})" if self.backend else ""
        return f"gating of {' and '.join(sides)}{how}" if sides else "union"


@dataclass(frozen=True)
class Convolution:
    """One convolution in one training step.

    Attributes:
        batch: images.
        map_in, map_out: height and width of input and output.
        kernel: height and width of the kernel.
        in_full, in_live, out_full, out_live: channels of its spaces, and those of them that it needs to compute.
        itemsize: bytes of an activation's element.
        places: the batch norm behind it can place its live output channels at no cost.
        input_gradient: the step needs dx: not for the network's first layer.
    """

    batch: int
    map_in: tuple[int, int]
    map_out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    in_full: int
    in_live: int
    out_full: int
    out_live: int
    itemsize: int = 4
    places: bool = False
    input_gradient: bool = True


def flops(conv: Convolution, form: Form, granule: int = 1) -> float:
    """FLOPs of one pass: the forward, or one of the two gradients; channels rounded up to multiples of `granule`."""
    narrow_in = form.gates_input and form.backend != "expanded"
    inputs = conv.in_live if narrow_in else conv.in_full
    outputs = conv.out_live if form.gates_output else conv.out_full
    inputs, outputs = (-(-c // granule) * granule for c in (inputs, outputs))
    pixels = conv.batch * conv.map_out[0] * conv.map_out[1]
    return 2.0 * pixels * inputs * outputs * conv.kernel[0] * conv.kernel[1]


class Traffic(NamedTuple):
    """Bytes of a training step.

    Attributes:
        kernels: of the convolution's own kernels.
        passes: of other passes over its input and output (batch norm's reads and writes of it).
        indexed: of passes that take or place channels by index outside of a fused kernel.
    """

    kernels: float
    passes: float
    indexed: float


def traffic(conv: Convolution, form: Form) -> Traffic:
    """Bytes that one training step of this convolution moves in this form."""
    pixels_in = conv.batch * conv.map_in[0] * conv.map_in[1] * conv.itemsize
    pixels_out = conv.batch * conv.map_out[0] * conv.map_out[1] * conv.itemsize
    in_full, in_live = pixels_in * conv.in_full, pixels_in * conv.in_live
    out_full, out_live = pixels_out * conv.out_full, pixels_out * conv.out_live
    kernels = passes = indexed = 0.0
    if not form.gates_input or form.backend == "expanded":
        kernels = 3 * in_full
    elif form.backend == "triton":
        kernels, passes = 3 * in_full, in_full + in_live
    else:
        kernels, indexed = 3 * in_live, 4 * in_full + 2 * in_live
    if not form.gates_output:
        kernels, passes = kernels + 3 * out_full, passes + 5 * out_full
    elif conv.places:
        kernels, passes = kernels + 3 * out_live, passes + 5 * out_live
    else:
        scattered = 2 * out_live + 2 * out_full
        kernels, passes = kernels + 3 * out_live, passes + 5 * out_full
        if form.backend == "triton":
            passes += scattered
        else:
            indexed += scattered + (2 * out_full if form.backend == "naive" else 0)
    return Traffic(float(kernels), float(passes), float(indexed))


@dataclass(frozen=True)
class RoofCost:
    """The least time of a training step of one layer on a device whose roof was measured.

    The convolution's three kernels take the time of their bytes or of their FLOPs, whichever is longer; every other
    pass takes the time of its bytes, at the rate of a copy or of a copy by index; every launch takes its start.
    How near to this a library's kernels come for a shape is not part of it; `MeasuredCost` measures that.

    Attributes:
        efficiency: by backend, the share of the arithmetic rate that its convolution reaches; 1 for one not named.
    """

    roof: Roof
    dtype: str = "fp32"
    efficiency: Mapping[str, float] = field(default_factory=lambda: EFFICIENCY, hash=False)

    def __call__(self, conv: Convolution, form: Form) -> float:
        """The least time of the step, in seconds."""
        rate = self.roof.tflop_s.get(self.dtype) or max(self.roof.tflop_s.values())
        kernels = 3 if conv.input_gradient else 2
        kernel_bytes, passes, indexed = traffic(conv, form)
        share = self.efficiency.get(form.backend, 1.0) if form.gated else 1.0
        arithmetic = kernels * flops(conv, form, GRANULE) / (rate * share * 1e12)
        moving = kernel_bytes / (self.roof.gb_s * 1e9)
        launches = 0
        if form.gates_input or (form.gated and form.backend == "naive"):
            launches += EXTRA_LAUNCHES[form.backend]
        if form.gates_output and not conv.places:
            launches += SCATTER_LAUNCHES[form.backend]
        start = launches * (self.roof.launch_us or 0.0) * 1e-6
        by_index = indexed / ((self.roof.index_gb_s or self.roof.gb_s) * 1e9)
        return max(moving, arithmetic) + passes / (self.roof.gb_s * 1e9) + by_index + start

    def __str__(self) -> str:
        index = f" ({self.roof.index_gb_s:.0f} by index)" if self.roof.index_gb_s is not None else ""
        return f"predicted at {self.roof.gb_s:.0f} GB/s{index}, {self.roof.tflop_s.get(self.dtype, 0):.2g} TFLOP/s"

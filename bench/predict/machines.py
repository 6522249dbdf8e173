"""What is known of a GPU without having one, each number with its public source.

    V100   NVIDIA Tesla V100 GPU Architecture, white paper WP-08608 (2017): SXM2, 16 GB
    A100   NVIDIA A100 Tensor Core GPU Architecture, white paper (2020), and the A100 80 GB data sheet (2021): SXM
    H200   NVIDIA H200 data sheet (2024) and H100 Tensor Core GPU Architecture, white paper (2022): SXM

SMs, clocks, registers, shared memory, L2 size, tensor-core rates (dense) and DRAM bandwidth are from these. The clock
is the one at which the white paper's tensor-core rate is SMs x FLOPs a cycle x clock: 1,530, 1,410 and 1,830 MHz. What
data sheets do not say:

    L2 bytes a cycle   A100 white paper: 5,120 for A100 and 2,048 for V100; for Hopper none is given: that of the A100
    SM bytes a cycle   64 from L2 to each SM, same white paper
    latency            of a load that misses L2, cycles: Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via
                       Microbenchmarking" (arXiv 1804.06826) 375; Luo et al., "Benchmarking and Dissecting the Nvidia
                       Hopper GPU Architecture" (arXiv 2402.13499) 466 (A100), 479 (H100). Others measure more (460
                       on a V100, 690 on a GH200: github.com/markdewing/AI_kernels); these are bounds from below
    mma.sync on Hopper 0.63 of the rate of wgmma: Luo et al., the same paper
    launch             0.5 us a kernel inside a CUDA graph: 3.4 us a kernel of 2.9 us, measured on a V100 in "Getting
                       Started with CUDA Graphs" (NVIDIA Technical Blog, 2019); taken for all three
    barrier            1 us for all programs of a launch to wait for each other: an assumption. Stores reach L2, an
                       addition goes there and back, a load finds that all have come: three to four times L2's
                       latency (0.15 us on Hopper, Luo et al.), and a hundred additions to one number in turn
    copied             0.9 of the data sheet's bandwidth is what a copy reaches: 4.3 of 4.8 TB/s on an H200 (design
                       section 7). The roof that shares are of is a copy's, as where a roof is measured (`bench roof`)
"""

from collections.abc import Mapping
from dataclasses import dataclass

from prunetrain_kernels.errors import InputError


@dataclass(frozen=True)
class Machine:
    """A GPU by its data sheet.

    Attributes:
        gb_s: DRAM bandwidth by the data sheet, GB/s (1e9).
        tflop_s: tensor-core rate by dtype, dense; fp32 as TF32. Without one, none.
        l2: bytes of the second-level cache; `l2_bytes` it delivers in a cycle, `sm_bytes` to one SM.
        latency: cycles of a load from DRAM.
        mma_share: of the tensor-core rate that mma.sync reaches.
        shared: bytes of shared memory of an SM.
    """

    name: str
    arch: int
    gb_s: float
    sms: int
    mhz: float
    tflop_s: Mapping[str, float]
    l2: int
    l2_bytes: int
    latency: int
    shared: int
    mma_share: float = 1.0
    sm_bytes: int = 64
    launch_us: float = 0.5
    barrier_us: float = 1.0
    copied: float = 0.9
    schedulers: int = 4
    registers: int = 65536
    warps: int = 64
    programs: int = 32

    @property
    def copy_gb_s(self) -> float:
        """What a copy reaches."""
        return self.gb_s * self.copied

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("fp16", "bf16", "fp32") if self.arch >= 80 else ("fp16", "fp32")

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.copy_gb_s:.0f} GB/s copied (data sheet {self.gb_s:.0f}), {self.sms} SMs at "
            f"{self.mhz:.0f} MHz, {self.tflop_s['fp16']:.0f} TFLOP/s fp16, L2 {self.l2 >> 20} MB"
        )


MACHINES = {
    "h200": Machine(
        "NVIDIA H200", 90, 4800, 132, 1830, {"fp16": 989.4, "bf16": 989.4, "fp32": 494.7},
        50 << 20, 5120, 479, 228 << 10, mma_share=0.63,
    ),
    "a100": Machine(
        "NVIDIA A100", 80, 2039, 108, 1410, {"fp16": 312, "bf16": 312, "fp32": 156}, 40 << 20, 5120, 466, 164 << 10
    ),
    "v100": Machine("NVIDIA V100", 70, 900, 80, 1530, {"fp16": 125}, 6 << 20, 2048, 375, 96 << 10),
}  # fmt: skip


def machine(name: str) -> Machine:
    """The GPU of that name.

    Raises:
        InputError: nothing is known of it.
    """
    if name.lower() not in MACHINES:
        raise InputError(f"nothing is known of a GPU called {name!r}; choose among {', '.join(MACHINES)}")
    return MACHINES[name.lower()]


def machine_of(device: str) -> Machine | None:
    """The GPU that a results file names, as in "NVIDIA H200"; None for any other device."""
    return next((m for key, m in MACHINES.items() if key in device.lower().replace("-", " ").split()), None)

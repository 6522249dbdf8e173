"""`python -m prunetrain_kernels`: which paths operators take on this machine, and why; with arguments, `prunetrain`."""

import os
import platform
import sys
from importlib.metadata import version

import torch

from prunetrain_kernels import __version__, cli
from prunetrain_kernels.errors import InputError
from prunetrain_kernels.ops import cuda_native, launch, native


def lines() -> list[str]:
    """The versions, the backend and the paths that are active, a line each.

    Raises:
        InputError: `PRUNETRAIN_BACKEND` names no backend.
    """
    why = native.problem()
    library = native.library()
    cpu = f"native library {library.name if library else ''}, {native.instruction_set()}" if why is None else ""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    kernels = f"Triton {version('triton')}" if launch.HAS_TRITON else "none: triton is not installed"
    if launch.INTERPRET:
        kernels += ", interpreted on the CPU (TRITON_INTERPRET=1)"
    return [
        f"prunetrain-kernels {__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        f"backend         {launch.backend()} (PRUNETRAIN_BACKEND={os.environ.get('PRUNETRAIN_BACKEND', '')})",
        f"on the CPU      {cpu or f'plain PyTorch: {why}'}; {torch.get_num_threads()} thread(s)",
        f"on a GPU        {kernels if launch.backend() != 'reference' else 'plain PyTorch'}",
        f"CUDA C++        {'built' if cuda_native.available() else 'not built'} (for comparisons in bench only)",
        f"GPUs            {', '.join(gpus) or 'none that this PyTorch can use'}",
    ]


def main() -> int:
    """Prints `lines`, and returns 0, or 2 for a wrong setting; with arguments runs the command that they are."""
    if sys.argv[1:]:
        return cli.main()
    try:
        print("\n".join(lines()))
    except InputError as error:
        print(f"prunetrain_kernels: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The version of this package, and which PyTorch it has been tried with."""

import re
import warnings

VERSION = "0.2.0"  # of this package
NEWEST_TRIED = (2, 15)  # docs/backends.md has what was run, and when


class UntriedVersionWarning(UserWarning):
    """The PyTorch that is installed is newer than the newest that this package was tried with."""


def warn_if_untried(package: str, torch: str) -> None:
    """Warns where `torch` is newer than `NEWEST_TRIED`, at the import of whoever imports the package.

    Only major and minor version are compared: what was tried with 2.14.1 holds for 2.14.2 and 2.14.1+cu130, and
    2.15.0a0+git is newer. A version that does not begin with numbers gives no warning.

    Args:
        package: version of this package.
        torch: `torch.__version__`, such as "2.15.0a0+git1234".
    """
    numbers = re.match(r"(\d+)\.(\d+)", torch)
    if numbers is None or (int(numbers[1]), int(numbers[2])) <= NEWEST_TRIED:
        return
    newest = ".".join(map(str, NEWEST_TRIED))
    warnings.warn(
        f"prunetrain_kernels {package} was tried with PyTorch up to {newest} only, and PyTorch {torch} is newer; "
        f"if something fails, try it with {newest} first.",
        UntriedVersionWarning,
        stacklevel=3,  # this function, the package's __init__, whoever imports it
    )

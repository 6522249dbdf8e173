"""What can go wrong, as exceptions that say what was wrong and what to do.

The command line turns every `PruneTrainError` into one line and exit code 2; anything else is a defect and keeps its
traceback.
"""


class PruneTrainError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(PruneTrainError, ValueError):
    """An argument, a file or a model that cannot be used as it is; the message names it and the way out."""


class TraceError(InputError):
    """The model's channels cannot be followed; the message names the operation.

    Attributes:
        at: the name of the call that failed, where it is one of a traced program; else empty.
    """

    at = ""


class CheckpointError(PruneTrainError, RuntimeError):
    """A checkpoint that cannot be written or read; an earlier one on disk is untouched."""


class DivergedError(PruneTrainError, ArithmeticError):
    """Training met a loss that is not a number; the last good checkpoint is kept."""


class ZeroingError(PruneTrainError, ArithmeticError):
    """Setting the sparse slices to zero would move the model's output too far; the reconfiguration was undone, and
    training can go on."""


class TrainingStopped(PruneTrainError):
    """A training ended between two steps because it was asked to; its checkpoint holds every step that it made.

    Attributes:
        number: the signal that asked, such as 15 for SIGTERM.
    """

    def __init__(self, message: str, number: int = 0) -> None:
        super().__init__(message)
        self.number = number


class RanksDifferError(PruneTrainError, RuntimeError):
    """Processes of a distributed training hold different values where they must agree; the message names which."""


class RankLostError(PruneTrainError, RuntimeError):
    """Another process of a distributed training has ended or does not answer; the last checkpoint is kept."""


class PruneTrainWarning(UserWarning):
    """Training can go on, but little or nothing will be pruned; the message says why and what helps."""

"""Training on several processes ("ranks"): who they are, what they must agree on, and what they send.

PyTorch's own engine does the work: `torchrun` starts one process per GPU (or CPU share), `DistributedDataParallel`
averages the gradients. What pruning adds is here: values that decide the network's shape are compared between ranks
before anything is changed, DDP's gradient buckets are rebuilt for the new shape, and sent bytes are counted where they
are sent. Ranks that differ, and a rank that is gone, end the job with one sentence each.
"""

import hashlib
import inspect
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from prunetrain_kernels.errors import InputError, PruneTrainError, RankLostError, RanksDifferError, TrainingStopped
from prunetrain_kernels.probe import first_line

TIMEOUT = 60.0  # seconds until a rank that does not answer is given up
WAIT_FOR_DATA = timedelta(days=1)  # the first process of a machine may have a whole data set to decode

Value = TypeVar("Value")


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that train one network together, as one of them sees them; by default it is alone.

    Attributes:
        rank, world: this process, 0 to world - 1, and how many there are.
        device: where what they tell each other must be: the CPU, or the GPU of a group that has NCCL alone.
        group: their process group; None for PyTorch's default one.
        owns_group: `close` ends the process group, because `of_environment` began it.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None
    owns_group: bool = False

    @classmethod
    def of(cls, group: Any = None) -> "Ranks":
        """The ranks of a process group that is there already, such as `ddp.process_group`."""
        on_cpu = "cpu:" in str(dist.get_backend_config(group)) or dist.get_backend(group) != "nccl"
        device = torch.device("cpu") if on_cpu else torch.device("cuda", torch.cuda.current_device())
        return cls(dist.get_rank(group), dist.get_world_size(group), device, group)

    @classmethod
    def of_environment(cls, *, on_gpu: bool, timeout: float = TIMEOUT) -> "Ranks":
        """The ranks that torchrun started, by its environment variables; alone without them.

        Args:
            on_gpu: gradients are on GPUs, so NCCL averages them; else gloo.
            timeout: seconds until a rank that does not answer is given up.

        Raises:
            RankLostError: the other processes were not there in time.
        """
        if dist.is_initialized():
            return cls.of()
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        try:
            # gloo for what they tell each other, so that no GPU has to be waited for
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise RankLostError(
                f"the {os.environ['WORLD_SIZE']} processes did not find each other within {timeout:g} s "
                f"({first_line(error)}): start all of them, with torchrun; if one only takes longer, give a longer "
                "--rank-timeout."
            ) from error
        return cls(dist.get_rank(), dist.get_world_size(), owns_group=True)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and shows progress."""
        return self.rank == 0

    def share(self, size: int) -> slice:
        """This rank's part of `size` items in a row: consecutive, and as equal as whole items can be."""
        return slice(size * self.rank // self.world, size * (self.rank + 1) // self.world)

    def close(self) -> None:
        """Ends the process group, after the last word."""
        if self.owns_group and dist.is_initialized():
            dist.destroy_process_group()

    # -- what they tell each other --------------------------------------------------------------------------------

    def wait(self) -> None:
        """Waits until all ranks have made this call."""
        if self.world > 1:
            self.sum(torch.zeros(1, device=self.device))

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks, float64, on the CPU."""
        total = values.detach().to(self.device, torch.float64)
        if self.world > 1:
            total = total.clone()
            with answering():
                dist.all_reduce(total, group=self.group)
        return total.cpu()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks, in the dtype and on the device of `value`; bitwise `value` where a rank is alone."""
        if self.world == 1:
            return value
        return (self.sum(value) / self.world).to(value.device, value.dtype)

    def least(self, number: int) -> int:
        """The smallest over ranks."""
        if self.world == 1:
            return number
        value = torch.tensor([number], device=self.device)
        with answering():
            dist.all_reduce(value, dist.ReduceOp.MIN, group=self.group)
        return int(value)

    def gather(self, values: Tensor) -> Tensor:
        """The values of each rank, one row for each, float64, on the CPU; all of one shape."""
        rows = torch.zeros(self.world, *values.shape, dtype=torch.float64, device="cpu")
        rows[self.rank] = values.detach().cpu()
        return self.sum(rows)

    def all_or_none(self, act: Callable[[], Value]) -> Value:
        """What `act`, which tells the other ranks nothing, returns here, if it succeeds on every rank.

        Raises:
            RankLostError: it failed on another rank; the message says which, and why. Where it failed on this rank, its
                own error.
        """
        failed: Exception | None = None
        try:
            result = act()
        except Exception as error:
            failed = error
        try:
            first = self.first_failure(failed)
        except RankLostError:
            if failed is not None:  # which says more
                raise failed from None
            raise
        if failed is not None:
            raise failed
        if first is not None:
            raise RankLostError(f"rank {first[0]} failed: {first[1]}")
        return result

    def first_failure(self, failed: Exception | None) -> tuple[int, str] | None:
        """The first rank that failed at a point that all ranks reach, and why, in a sentence; None where none did.

        Args:
            failed: what went wrong on this rank, if anything.
        """
        which = self.least(self.world if failed is None else self.rank)
        if which == self.world:
            return None
        return which, self.broadcast("" if failed is None else in_words(failed), which)

    def broadcast(self, value: Value, root: int = 0) -> Value:
        """The value of rank 0, or `root`: anything that can be pickled."""
        if self.world == 1:
            return value
        box = [value]
        with answering():
            dist.broadcast_object_list(box, self._in_default_group(root), group=self.group, device=self.device)
        return box[0]

    @torch.no_grad()
    def share_buffers(self, model: nn.Module) -> None:
        """Gives every rank rank 0's buffers: running statistics of batch norm differ until then."""
        if self.world == 1:
            return
        for buffer in model.buffers():
            sent = buffer.detach().to(self.device if self.device.type == "cuda" else buffer.device).contiguous()
            with answering():
                dist.broadcast(sent, self._root, group=self.group)
            buffer.copy_(sent)

    def agree(self, what: str, *parts: Any) -> None:
        """Compares a checksum of `parts` (tensors, bytes, or anything with a `repr`) between ranks.

        Raises:
            RanksDifferError: on every rank; says what differs, and on which ranks.
        """
        if self.world == 1:
            return
        checksums = torch.tensor([_number(what.encode()), _number(*parts)], device=self.device)
        of_ranks = [torch.empty_like(checksums) for _ in range(self.world)]
        with answering():
            dist.all_gather(of_ranks, checksums, group=self.group)
        subjects, sums = (list(column) for column in zip(*(row.tolist() for row in of_ranks), strict=True))
        if len(set(subjects)) > 1:
            raise RanksDifferError(
                f"ranks are at different points: rank {self.rank} compares {what}, {_odd(subjects)} something else; "
                "every rank must make the same calls, as often."
            )
        if len(set(sums)) > 1:
            raise RanksDifferError(
                f"{what} differ between the {self.world} ranks: {_odd(sums)} not what the others have; use the same "
                "options, data and software on every rank, and go on from the last checkpoint."
            )

    def agree_on_weights(self, model: nn.Module, *copies: nn.Module) -> None:
        """Compares all parameters, bit by bit. Raises RanksDifferError as `agree` does."""
        if self.world > 1:
            self.agree("the model's weights", *model.parameters())
        if self.world > 1 and copies:
            self.agree("the weights of the copies of the model", *(p for copy in copies for p in copy.parameters()))

    @property
    def _root(self) -> int:
        return self._in_default_group(0)

    def _in_default_group(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def one_after_the_other(ranks: Ranks, load: Callable[[], Value]) -> Value:
    """What `load` returns: first in one process of each machine, which may fill a cache that the others then read."""
    if ranks.world == 1:
        return load()
    patient = dist.new_group(timeout=WAIT_FOR_DATA, backend="gloo")
    leads = int(os.environ.get("LOCAL_RANK", ranks.rank)) == 0
    try:
        return load() if leads else _after(patient, load)
    finally:
        if leads:  # also where it failed: the others will then say why themselves
            with answering():
                dist.barrier(patient)


def _after(group: Any, load: Callable[[], Value]) -> Value:
    with answering():
        dist.barrier(group)
    return load()


def _number(*parts: Any) -> int:
    """A checksum of 63 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return int.from_bytes(digest.digest(), "little") >> 1


def _odd(values: list[int]) -> str:
    """The ranks that have another value than most, or than rank 0 where there is no majority, as part of a sentence."""
    (most, count), *_ = Counter(values).most_common()
    usual = most if 2 * count > len(values) else values[0]
    odd = [str(rank) for rank, value in enumerate(values) if value != usual]
    return f"rank {odd[0]} has" if len(odd) == 1 else f"ranks {', '.join(odd)} have"


# -- a rank that is gone -----------------------------------------------------------------------------------------------


@contextmanager
def answering(what_to_do: str = "go on from the last checkpoint, on any number of processes") -> Iterator[None]:
    """Turns PyTorch's error about a rank that has ended, or does not answer, into a RankLostError."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, PruneTrainError):
            raise
        if not (isinstance(error, dist.DistError) or "gloo" in text or "nccl" in text):
            raise
        if "timed out" in text or "timeout" in text:
            why = "does not answer (if it is only late, give a longer --rank-timeout)"
        else:
            why = "has ended"
        raise RankLostError(f"another rank {why}, so this one cannot train on: {what_to_do}.") from error


# -- why a rank ends ---------------------------------------------------------------------------------------------------

_WHY = "prunetrain_kernels/why"  # where, in the store by which the processes found each other
_UNTIL_TOLD = 2.0  # seconds in which a rank that has failed tells why


@contextmanager
def telling_why() -> Iterator[None]:
    """Has every rank of PyTorch's default group say why the first one failed, instead of that another one is gone."""
    try:
        yield
    except RankLostError as error:
        why = _why_another_failed()
        if why is None:
            raise
        raise RankLostError(
            f"{why} So this rank cannot train on: mend that, and go on from the last checkpoint, on any number of "
            "processes."
        ) from error
    except TrainingStopped:
        raise
    except BaseException as error:
        if not isinstance(error, RanksDifferError):
            _tell_why(error)
        raise


def in_words(error: BaseException) -> str:
    """One line about a failure, for those who do not see its traceback; ends with a full stop."""
    said = " ".join(str(error).split()) if isinstance(error, PruneTrainError) else first_line(error)
    kind = "" if isinstance(error, PruneTrainError) else type(error).__name__ + (": " if said else "")
    return f"{kind}{said}".rstrip(".") + "."


def _store() -> Any:
    """The store of PyTorch's default group; None where there is none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def _tell_why(error: BaseException) -> None:
    with suppress(Exception):  # whatever else is wrong, the error itself is what counts
        store = _store()
        if store is not None and not store.check([_WHY]):
            store.set(_WHY, f"{dist.get_rank()} {in_words(error)}")


def _why_another_failed() -> str | None:
    """The sentence that another rank left, if any did."""
    with suppress(Exception):
        store, until = _store(), time.monotonic() + _UNTIL_TOLD
        while store is not None and time.monotonic() < until:
            if store.check([_WHY]):
                rank, _, why = store.get(_WHY).decode("utf-8", "replace").partition(" ")
                return None if int(rank) == dist.get_rank() else f"rank {rank} failed: {why}"
            time.sleep(0.05)
    return None


# -- DistributedDataParallel -------------------------------------------------------------------------------------------


@dataclass(eq=False)
class SentBytes:
    """Bytes of gradients that this rank has given to be averaged over ranks, counted as DDP hands them over."""

    group: Any = None
    total: int = 0


def distributed(
    model: nn.Module, device: torch.device, ranks: Ranks
) -> tuple[DistributedDataParallel | None, SentBytes]:
    """The model for several ranks (None where one is alone), and the count of what it sends."""
    if ranks.world == 1:
        return None, SentBytes()
    ddp = DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    return ddp, count_sent_bytes(ddp)


def count_sent_bytes(ddp: DistributedDataParallel) -> SentBytes:
    """Registers DDP's usual all-reduce, with a counter in front. A DDP takes one communication hook only."""
    counter = SentBytes(ddp.process_group)
    ddp.register_comm_hook(counter, counting_allreduce_hook)
    return counter


def counting_allreduce_hook(state: SentBytes, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook: averages the bucket over `state.group`, and counts its bytes."""
    state.total += bucket.buffer().numel() * bucket.buffer().element_size()
    return allreduce_hook(state.group, bucket)


def check_rebuildable(ddp: DistributedDataParallel) -> None:
    """Raises InputError for a DDP whose buckets `rebuild_buckets` could not build anew."""
    for name, value in (
        ("mixed_precision", getattr(ddp, "mixed_precision", None)),
        ("delay_all_reduce_named_params", getattr(ddp, "_delay_all_reduce_params", None)),
        ("optimize_ddp = 'python_reducer'", getattr(ddp, "_use_python_reducer", False)),
    ):
        if value:
            raise InputError(
                f"a DistributedDataParallel with {name} cannot be pruned: it holds on to the parameters' shapes; leave "
                "that option out (torch.autocast does mixed precision)."
            )


def rebuild_buckets(ddp: DistributedDataParallel) -> None:
    """Has `ddp` find its module's parameters, and bucket their gradients, anew, in place; on all ranks at once.

    After a reconfiguration parameters have other shapes and other gradient accumulators, and some are gone: the old
    buckets would average nothing, in silence. The object stays, with its arguments, forward hooks and communication
    hook (whose own state is not touched: one that holds tensors of the buckets' shapes, as PowerSGD's does, has to be
    made anew by whoever registered it).

    Raises:
        InputError: as `check_rebuildable`.
    """
    check_rebuildable(ddp)
    hooks = list(ddp._comm_hooks)
    assert ddp.logger is not None
    built_in = "" if hooks else ddp.logger._get_ddp_logging_data().strs_map.get("comm_hook", "")
    arguments = _arguments(ddp)
    # First, because a reducer's own end takes its hooks off the parameters; two would average the same gradient twice.
    ddp.reducer = ddp.logger = None
    fresh = DistributedDataParallel(ddp.module, **arguments)
    of_any_module = vars(nn.Module())
    vars(ddp).update({name: value for name, value in vars(fresh).items() if name not in of_any_module})
    for hook, state in hooks:
        ddp.register_comm_hook(state, hook)
    if built_in.startswith("BuiltinCommHookType."):
        ddp._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, built_in.split(".")[1]))


def _arguments(ddp: DistributedDataParallel) -> dict[str, Any]:
    """What `ddp` was constructed with, as far as this PyTorch's constructor takes it."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    per_bucket = [cap / 2**20 for cap in getattr(ddp, "bucket_bytes_cap_list", ())]
    synced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    arguments = {
        "bucket_cap_mb": None if ddp.bucket_bytes_cap_default else ddp.bucket_bytes_cap / 2**20,
        "bucket_cap_mb_list": per_bucket or None,
        synced: getattr(ddp, synced),
        **{
            name: getattr(ddp, name)
            for name in (
                "device_ids", "output_device", "dim", "process_group", "find_unused_parameters", "static_graph",
                "gradient_as_bucket_view", "skip_all_reduce_unused_params", "batched_grad_copy",
            )
            if hasattr(ddp, name)
        },
    }  # fmt: skip
    return {name: value for name, value in arguments.items() if name in known}

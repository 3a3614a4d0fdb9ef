"""One job in several processes, as torchrun starts them: who this one is, and what all of them agree on.

Alone, every function does what is right for one process. Words between processes (signals, figures, errors) go over
gloo and the CPU, so that no GPU waits for them; gradients and what they are divided by go over NCCL where GPUs train.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is exported
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from detkit import config
from detkit.console import rank as rank
from detkit.console import ranks as ranks
from detkit.errors import Interrupted, UserError

# Setting up may take as long as the data set wants: nobody is taken for hung then.
_PATIENCE = timedelta(days=1)


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process, for a `device` of all. Raises UserError where there are fewer GPUs than processes."""
    if ranks() == 1 or device.type == "cpu":
        return device
    local = int(os.environ.get("LOCAL_RANK", rank()))
    if device.type != "cuda" or local >= torch.cuda.device_count():
        have = torch.cuda.device_count() if device.type == "cuda" else 1
        raise UserError(
            f"more processes than the {have} {device.type} device here: start fewer, or set train.device=cpu"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


@contextmanager
def group(device: torch.device, timeout: float) -> Iterator[None]:
    """Within, the processes are connected: by gloo, GPUs by NCCL. timeout: seconds after which a process that doesn't
    take its part is taken for hung."""
    if ranks() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = _meet()
    # A process that isn't there yet is not hung: it may have more to import, from a slower disk.
    store.set(f"here/{rank()}", "")
    store.wait([f"here/{each}" for each in range(ranks())], _PATIENCE)
    with contact():
        dist.init_process_group(
            backend, store=store, rank=rank(), world_size=ranks(), timeout=timedelta(seconds=timeout)
        )
    try:
        yield
    except Interrupted:
        dist.destroy_process_group()
        raise
    # Not after an error, for the others may be gone.
    dist.destroy_process_group()


def local_ranks() -> int:
    """How many processes of the job are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if ranks() > 1 else 1


def connected() -> bool:
    """Whether this is one of several connected processes."""
    return dist.is_available() and dist.is_initialized()


def _store() -> Any:
    """What the processes, and those that torchrun starts in their place after a failure, can all read."""
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)


def _key(name: str) -> str:
    return f"detkit/{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{name}"


def _restartable() -> bool:
    """Whether torchrun started this process, with a store that outlives it."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet() -> Any:
    """A store for these processes alone, in which nothing is left of those in whose place they were started: they would
    take the others' addresses for each other's. Kept by the first process."""
    if not _restartable():
        return next(rendezvous("env://", timeout=_PATIENCE))[0]
    place, store, key = os.environ["MASTER_ADDR"], _store(), _key("meeting")
    if is_first():
        own = TCPStore(place, 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
        store.set(key, str(own.port))
        return own
    while True:
        try:
            theirs = TCPStore(place, int(store.get(key)), is_master=False, timeout=timedelta(seconds=5))
        except dist.DistNetworkError:  # of an earlier first process: this one's is to come
            time.sleep(0.2)
            continue
        theirs.set_timeout(_PATIENCE)
        return theirs


def remember(folder: Path) -> None:
    """Keep the run's folder for the processes that torchrun starts in the place of these after a failure."""
    if _restartable() and is_first():
        _store().set(_key("run"), os.fspath(folder))


def remembered() -> Path | None:
    """The run's folder where these processes were started in the place of others that had one."""
    found = None
    if _restartable() and is_first():
        store = _store()
        found = store.get(_key("run")).decode() if store.check([_key("run")]) else None
    found = broadcast(found)
    return Path(found) if found else None


@contextmanager
def first_on_node(what: str) -> Iterator[None]:
    """The first process of each machine runs the block alone, the others after it: then they find its cache. However
    long that takes."""
    if not connected():
        yield
        return
    local = int(os.environ.get("LOCAL_RANK", rank()))
    node = os.environ.get("GROUP_RANK", "0")
    done = _key(f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{node}/{what}")
    if local:
        _store().wait([done], _PATIENCE)
    try:
        yield
    finally:
        if not local:
            _store().set(done, "1")


def gather(value: Any) -> list[Any]:
    """The value of each process, by rank; only the first process has more than its own."""
    if not connected():
        return [value]
    found: list[Any] | None = [None] * ranks() if is_first() else None
    dist.gather_object(value, found)
    return found or [value]


def broadcast(value: Any) -> Any:
    """The first process' value."""
    if not connected():
        return value
    held = [value]
    dist.broadcast_object_list(held)
    return held[0]


def add(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if connected():
        dist.all_reduce(values)
    return values


def copy_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: BatchNorm's statistics are its own in each."""
    if connected():
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


@contextmanager
def joint() -> Iterator[None]:
    """A UserError within, of any process, is raised by all of them at the block's end."""
    error = None  # its words alone: an exception kept here would keep what it came through, loaders for one
    try:
        yield
    except UserError as raised:
        error = str(raised)
    _raise_any(error)


def _raise_any(error: str | None) -> None:
    messages: list[str | None] = [error] * ranks()
    if connected():
        dist.all_gather_object(messages, error)
    for message in messages:
        if message:
            raise UserError(message)


class Word(NamedTuple):
    """What all processes know before a step. stop: the number of the signal that asks for an end, 0 if none does.
    waited: seconds that the slowest of them waited for data."""

    stop: int
    waited: float


def agree(stop: int = 0, waited: float = 0.0, error: str | None = None) -> Word:
    """Tell the other processes, and hear from them. error: of a UserError that this one has met. Raises it in all of
    them, and UserError where one is gone or hung."""
    said = torch.tensor([float(stop), waited, float(error is not None)], dtype=torch.float64)
    with contact():
        if connected():
            dist.all_reduce(said, dist.ReduceOp.MAX)
        if said[2]:
            _raise_any(error)
    return Word(int(said[0]), float(said[1]))


@contextmanager
def contact() -> Iterator[None]:
    """What torch raises within, where another process is gone or hung, becomes a UserError of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        lost = isinstance(error, dist.DistBackendError) or "gloo" in reason or "Timed out" in reason
        if ranks() == 1 or not lost:
            raise
        raise UserError(f"another process of this job is gone or hung (train.timeout): {reason[:200]}") from error


def wrap(model: nn.Module) -> nn.Module:
    """The model as all processes train it together: DistributedDataParallel, whose gradients are means over them."""
    return DistributedDataParallel(model) if connected() else model


def workers(wanted: int) -> int:
    """Loader processes of this process: so many, but no more than its share of the machine's cores."""
    return min(wanted, max(1, (os.cpu_count() or 1) // local_ranks()))


def scaled(settings: config.Config) -> config.Config:
    """The config of this many processes, by its rule `train.scaling`."""
    cfg, count = settings.train, ranks()
    if cfg.scaling == "none" or count == 1:
        return settings
    factor = count if cfg.scaling == "linear" else count**0.5
    optimizer = cfg.optimizer.model_copy(update={"lr": cfg.optimizer.lr * factor})
    changes = {"batch_size": cfg.images * count, "optimizer": optimizer, "scaling": "none"}
    return settings.model_copy(update={"train": cfg.model_copy(update=changes)})


def several_machines() -> bool:
    """Whether torchrun's variables speak of the job's machines."""
    return "PET_NNODES" in os.environ


def launch(words: list[str], processes: int, restarts: int) -> NoReturn:
    """Run ``detkit WORDS`` in so many processes on this machine under torchrun, which starts all of them anew after a
    failure, `restarts` times at most; end with the exit code of the first that failed. Other machines of the job are
    named by torchrun's own variables (PET_NNODES, PET_RDZV_ENDPOINT, ...), as Kubeflow sets them."""
    import logging
    import sys

    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what there is to say is said here
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", "-m", "detkit"]
    if not several_machines():
        options.insert(0, "--standalone")
    try:
        arguments = run.parse_args(options)  # type: ignore[no-untyped-call]
        arguments.training_script_args = words  # not parsed: some look like torchrun's own
        run.run(arguments)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)  # it has said why
        name = signal.Signals(-failure.exitcode).name
        how = "go on with  detkit train --resume  (--max-restarts does so by itself)"
        print(f"detkit: process {failure.local_rank} of {processes} was ended by {name}; {how}", file=sys.stderr)  # noqa: T201
        sys.exit(128 - failure.exitcode)
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except RendezvousError as error:
        print(f"detkit: the processes of this job don't find each other: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
    sys.exit(0)

"""Memory: what means that it is short, what is free, and how many images fit."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from detkit import distributed

# Share of the free memory that a batch may take: the rest is for what comes and goes, and for fragments.
_SHARE = 0.8
# What each says: CUDA's allocator has its own exception, those of the CPU and of MPS have words, and so has oneDNN.
_WORDS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "could not create a memory",
    "could not create a primitive",
    "bad_alloc",
)
_CGROUP, _SELF = Path("/sys/fs/cgroup"), Path("/proc/self")


def is_short(error: BaseException) -> bool:
    """Whether an exception of torch's means that there was not enough memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def release(error: BaseException, device: torch.device) -> None:
    """Give back the memory that an exception's frames hold."""
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fits(step: Callable[[], object], device: torch.device) -> bool:
    """Whether a step goes without running out of memory."""
    try:
        step()
    except (RuntimeError, MemoryError) as error:
        if not is_short(error):
            raise
        release(error, device)
        return False
    return True


def free(device: torch.device) -> int:
    """Bytes that this process can still take on a device; of the machine's memory, its share of what is free."""
    match device.type:
        case "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return torch.cuda.mem_get_info(device)[0] + unused
        case "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    rooms = [psutil.virtual_memory().available]
    try:  # a container's limit
        limit, used = ((_CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        rooms.append(int(limit) - int(used))
    except (OSError, ValueError):  # there is none, or it is "max"
        pass
    return min(rooms) // distributed.local_ranks()


def taken(step: Callable[[], object], device: torch.device) -> int:
    """Bytes by which a step raises what this process holds at its highest."""
    match device.type:
        case "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step()
            return torch.cuda.max_memory_allocated(device) - before
        case "mps":
            before = torch.mps.driver_allocated_memory()
            step()
            return torch.mps.driver_allocated_memory() - before
    with contextlib.suppress(OSError):
        (_SELF / "clear_refs").write_text("5")  # on Linux, the highest is from now on
    before = psutil.Process().memory_info().rss
    step()
    return _peak() - before


def _peak() -> int:
    """Bytes of memory that this process has held at most: on Linux since `taken` began, elsewhere ever."""
    with contextlib.suppress(OSError):
        lines = (_SELF / "status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    try:
        import resource
    except ImportError:
        return int(psutil.Process().memory_info().peak_wset)  # type: ignore[attr-defined]  # Windows' own
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if psutil.MACOS else most * 1024


def largest(step: Callable[[int], object], device: torch.device, limit: int) -> int:
    """The largest power of two of images, up to `limit`, at which a step takes no more than its share of the free
    memory; the same in all processes of the job. step: takes a number of images.

    Nothing is tried that might not fit, since a machine short of memory may end the process instead of refusing: twice
    the images take at most twice the memory.
    """
    room, count = _SHARE * free(device), 1
    while 2 * count <= limit:
        full = 2 * taken(lambda: step(count), device) > room  # noqa: B023 - called at once
        if distributed.add(torch.tensor(int(full))):
            break
        count *= 2
    return count

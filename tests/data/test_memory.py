"""Loader processes share the data set: what each keeps for itself stays the same over an epoch."""

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from detkit.config import Augment, Input
from detkit.data.dataset import TrainSet
from detkit.data.labels import DataSet
from tests.data.photos import save_image

PHOTOS = 200_000


def large(root: Path) -> DataSet:
    """Many photos, all of them the same file, with five objects each: 50 MB of columns."""
    save_image(root / "a.png")
    ends = np.arange(1, PHOTOS + 1)
    return DataSet(
        root=str(root), classes=("can",), findings=(),
        paths=np.tile(np.frombuffer(b"a.png", np.uint8), PHOTOS), path_ends=5 * ends,
        hw=np.tile(np.array([48, 64], np.int32), (PHOTOS, 1)),
        boxes=np.tile(np.array([2.0, 3, 20, 30]), (5 * PHOTOS, 1)), labels=np.zeros(5 * PHOTOS, np.int32),
        flags=np.zeros(5 * PHOTOS, np.uint8), box_ends=5 * ends,
    )  # fmt: skip


def own_megabytes() -> float:
    """Memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Dirty", "Private_Clean"))) / 1024


class Measured(Dataset[float]):
    """Reads samples all over the data set, and says what the process keeps for itself."""

    def __init__(self, samples: TrainSet) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return 4000

    def __getitem__(self, index: int) -> float:
        self.samples[index * (PHOTOS // len(self))]
        return own_megabytes() if index % 20 == 0 else -1.0


def private_megabytes(root: Path, method: str) -> list[float]:
    """What a loader process has for itself, 200 times over an epoch."""
    samples = TrainSet(large(root), Input(size=(32, 32)), Augment(crop=0, colour=0), seed=0)
    loader = DataLoader(Measured(samples), batch_size=50, num_workers=1, multiprocessing_context=method)
    return [float(value) for batch in loader for value in batch if value >= 0]


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's account of a process")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_memory_of_a_worker_stays_the_same_over_an_epoch(tmp_path: Path, method: str) -> None:
    # From a process of its own: a fork of pytest's shares all that earlier tests left, and each such
    # page counts as the worker's as soon as pytest's process, or a garbage collection, writes to it.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        measured = np.array(fresh.submit(private_megabytes, tmp_path, method).result())
    assert len(measured) == 200
    first, last = np.median(measured[10:30]), np.median(measured[-20:])
    assert last - first < 4, measured

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from detkit.config import Augment, Data, Input
from detkit.data import voc
from detkit.data.batch import Loader, collate
from detkit.data.dataset import EvalSet, Sample, TrainSet
from detkit.errors import UserError
from detkit.types import Batch
from tests.data.photos import make_voc

SMALL = Input(size=(32, 40))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("set"), train=11)


@pytest.fixture(scope="module")
def photos(root: Path) -> voc.DataSet:
    return voc.scan(Data(root=root), "train")


@pytest.fixture(scope="module")
def changed(photos: voc.DataSet) -> TrainSet:
    return TrainSet(photos, SMALL, Augment(mosaic=0.3, expand=0.3), 5)


def sample(count: int, index: int = 0) -> Sample:
    image = np.full((32, 40, 3), index, np.uint8)
    boxes = np.arange(4 * count, dtype=np.float32).reshape(count, 4)
    return Sample(image, boxes, np.arange(count), np.arange(count) == 0, None, index)


def same(one: Batch, other: Batch) -> bool:
    pairs = zip((one.images, one.index, *one.targets), (other.images, other.index, *other.targets), strict=True)
    return one.plans == other.plans and all(torch.equal(a, b) for a, b in pairs)


def order(loader: Loader, epoch: int, **options: int) -> list[list[int]]:
    return [batch.index.tolist() for batch in loader.epoch(epoch, **options)]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


@pytest.mark.parametrize(("counts", "padded"), [((0, 0), 1), ((1, 0), 1), ((2, 1), 2), ((3, 0), 4), ((5, 8), 8)])
def test_targets_are_padded_to_a_power_of_two(counts: tuple[int, int], padded: int) -> None:
    batch = collate([sample(count, index) for index, count in enumerate(counts)])
    assert batch.images.shape == (2, 3, 32, 40)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert [int(image.max()) for image in batch.images] == [0, 1]
    boxes, labels, ignore = batch.targets
    assert boxes.shape == (2, padded, 4)
    assert (boxes.dtype, labels.dtype, ignore.dtype) == (torch.float32, torch.int64, torch.bool)
    for row, count in enumerate(counts):
        assert labels[row].tolist() == list(range(count)) + [-1] * (padded - count)
        assert boxes[row, :count].flatten().tolist() == list(range(4 * count))
        assert not boxes[row, count:].any()
        assert ignore[row].tolist() == [place == 0 < count for place in range(padded)]
    assert batch.index.tolist() == [0, 1]


def test_batches_are_the_same_whatever_the_number_of_workers(changed: TrainSet) -> None:
    alone, helped = Loader(changed, 3, 0, seed=1), Loader(changed, 3, 2, seed=1)
    for epoch in (4, 0):  # persistent workers must notice that the epoch is another
        pairs = list(zip(alone.epoch(epoch), helped.epoch(epoch), strict=True))
        assert len(pairs) == len(alone) == len(helped) == 3
        assert all(same(*pair) for pair in pairs)
    closed = zip(alone.epoch(0, close=True), helped.epoch(0, close=True), strict=True)
    assert all(same(*pair) for pair in closed)
    next(helped.epoch(1))  # an epoch that is left early leaves nothing behind
    assert order(helped, 2) == order(alone, 2)


def test_the_order_depends_on_seed_and_epoch_alone(changed: TrainSet) -> None:
    loader = Loader(changed, 3, 0, seed=1)
    first = order(loader, 0)
    assert sorted(flat(first)) != flat(first)
    assert order(loader, 1) != first
    assert order(loader, 0) == first == order(Loader(changed, 3, 0, seed=1), 0)
    assert order(Loader(changed, 3, 0, seed=2), 0) != first


def test_an_epoch_may_be_taken_up_where_it_was_left(changed: TrainSet) -> None:
    loader = Loader(changed, 3, 0, seed=1)
    assert order(loader, 2, start=1) == order(loader, 2)[1:]
    assert order(loader, 2, start=3) == []
    assert len(order(loader, 2)) == 3


def test_training_leaves_out_a_last_small_batch_but_never_the_only_one(changed: TrainSet) -> None:
    assert [len(indices) for indices in order(Loader(changed, 4, 0, seed=0), 0)] == [4, 4]
    small = Loader(changed, 32, 0, seed=0)
    assert len(small) == 1
    assert sorted(order(small, 0)[0]) == list(range(11))


def test_evaluation_is_complete_and_in_order(photos: voc.DataSet) -> None:
    loader = Loader(EvalSet(photos, SMALL), 4, 0)
    batches = list(loader.epoch())
    assert len(loader) == 3
    assert flat([batch.index.tolist() for batch in batches]) == list(range(11))
    assert all(plan is not None and plan.source == (48, 64) for batch in batches for plan in batch.plans)


def test_an_epoch_may_have_another_canvas(changed: TrainSet) -> None:
    loader = Loader(changed, 4, 0, seed=0)
    assert [batch.images.shape[2:] for batch in loader.epoch(0, canvas=(64, 96))] == [(64, 96)] * 2
    assert next(loader.epoch(0)).images.shape[2:] == (32, 40)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_photo_is_one_line_from_a_worker_too(tmp_path: Path, workers: int) -> None:
    dataset = voc.scan(Data(root=make_voc(tmp_path)), "train")
    Path(dataset[2].path).write_bytes(b"\xff\xd8\xff")
    message = ""
    try:  # pytest.raises would keep the loader in a cycle, and its worker would end after 5 s only
        list(Loader(EvalSet(dataset, SMALL), 2, workers).epoch())
    except UserError as error:
        message = str(error)
    assert "p2.jpg" in message
    assert "\n" not in message


def test_samples_can_be_sent_to_a_spawned_process(changed: TrainSet) -> None:
    copy = pickle.loads(pickle.dumps(changed))
    assert np.array_equal(copy[3].image, changed[3].image)

import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from detkit.config import Augment, Data, Input, Train
from detkit.data.batch import Loader, collate, repeat_factors
from detkit.data.dataset import EvalSet, Key, Sample, TrainSet
from detkit.data.labels import DataSet
from detkit.data.pixels import Decoded, Files, in_memory, on_disk
from detkit.data.scan import scan
from detkit.errors import UserError
from detkit.types import DIFFICULT, Batch
from tests.data.photos import BOX, CAN, make_voc, save_xml

SMALL = Input(size=(32, 40))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_voc(tmp_path_factory.mktemp("set"), train=11)


@pytest.fixture(scope="module")
def photos(root: Path) -> DataSet:
    return scan(Data(root=root), "train")


@pytest.fixture(scope="module")
def changed(photos: DataSet) -> TrainSet:
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


def test_evaluation_is_complete_and_in_order(photos: DataSet) -> None:
    loader = Loader(EvalSet(photos, SMALL), 4, 0)
    batches = list(loader.epoch())
    assert len(loader) == 3
    assert flat([batch.index.tolist() for batch in batches]) == list(range(11))
    assert all(plan is not None and plan.source == (48, 64) for batch in batches for plan in batch.plans)


def test_an_epoch_may_have_another_canvas(changed: TrainSet) -> None:
    loader = Loader(changed, 4, 0, seed=0)
    sizes = {0: (64, 96), 1: (96, 32)}
    assert [batch.images.shape[2:] for batch in loader.epoch(0, canvas=sizes.__getitem__)] == [(64, 96), (96, 32)]
    assert [batch.images.shape[2:] for batch in loader.epoch(0, start=1, canvas=sizes.__getitem__)] == [(96, 32)]
    assert next(loader.epoch(0)).images.shape[2:] == (32, 40)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_photo_is_one_line_from_a_worker_too(tmp_path: Path, workers: int) -> None:
    dataset = scan(Data(root=make_voc(tmp_path)), "train")
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


def test_a_step_draws_its_canvas_from_the_seed_and_itself() -> None:
    def train(seed: int, **more: object) -> Train:
        plain = {"epochs": 4, "batch_size": 2, "optimizer": {"name": "sgd", "lr": 1}, "seed": seed}
        return Train.model_validate(plain | more)

    drawn = [train(0, multi_scale=(0.5, 1.5)).canvas((320, 256), 0, step) for step in range(200)]
    assert drawn == [train(0, multi_scale=(0.5, 1.5)).canvas((320, 256), 3, step) for step in range(200)]
    assert drawn != [train(1, multi_scale=(0.5, 1.5)).canvas((320, 256), 0, step) for step in range(200)]
    heights = {height for height, _ in drawn}
    assert heights == set(range(160, 481, 32))
    assert all(height % 32 == width % 32 == 0 and abs(height / 320 - width / 256) < 0.12 for height, width in drawn)
    assert train(0, multi_scale=(0.5, 1.5)).largest_canvas((320, 256)) == (480, 384)
    assert train(0, multi_scale=(0.5, 0.8)).largest_canvas((300, 256)) == (300, 256)
    # With both, the share of the epoch is the largest of its steps.
    both = train(0, multi_scale=(0.5, 1), progressive=((0.5, 0.5),))
    assert max(both.canvas((320, 256), 0, step) for step in range(100)) == (160, 128)
    with pytest.raises(ValueError, match="multi_scale"):
        train(0, multi_scale=(1.5, 0.5))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """20 photos: 'can' is in all of them, 'box' in the first two, and 'jar', difficult, in the third."""
    root = make_voc(tmp_path_factory.mktemp("uneven"), train=20, val=1)
    for index in range(20):
        objects = [CAN] + ([BOX] if index < 2 else []) + ([("jar", BOX[1])] if index == 2 else [])
        flags = [0] * (len(objects) - 1) + [DIFFICULT if index == 2 else 0]
        save_xml(root / "Annotations" / f"p{index}.xml", objects, flags=flags)
    return scan(Data(root=root), "train")


def test_repeat_factors_are_those_of_the_paper(uneven: DataSet) -> None:
    assert repeat_factors(uneven, 0.05).tolist() == [1] * 20
    expected = [(0.6 / 0.1) ** 0.5] * 2 + [1] * 18
    assert repeat_factors(uneven, 0.6).tolist() == pytest.approx(expected)


def test_rare_photos_are_seen_as_often_as_their_factor_says(uneven: DataSet) -> None:
    samples, factors = TrainSet(uneven, SMALL, Augment(colour=0), 0), repeat_factors(uneven, 0.6)
    loader = Loader(samples, 2, 0, seed=3, factors=factors)
    assert len(loader) == int(factors.sum()) // 2 == 11
    seen = np.zeros(20)
    for epoch in range(60):
        keys = keys_of(loader, epoch)
        assert len(set(keys)) == len(keys) == 22
        counts = np.bincount([key.index for key in keys], minlength=20)
        assert (counts <= np.ceil(factors)).all()
        seen += counts
    # What no batch takes is left out at random: 22 of 22.9.
    assert np.allclose(seen / 60, factors * 22 / factors.sum(), atol=0.15)


def keys_of(loader: Loader, epoch: int) -> list[Key]:
    loader._order.epoch = epoch
    return [key for keys in loader._order for key in keys]


def test_repeated_photos_come_in_an_order_of_seed_and_epoch(uneven: DataSet) -> None:
    samples, factors = TrainSet(uneven, SMALL, Augment(), 0), repeat_factors(uneven, 0.6)
    first, again = (Loader(samples, 4, workers, seed=3, factors=factors) for workers in (0, 2))
    assert all(same(*pair) for pair in zip(first.epoch(5), again.epoch(5), strict=True))
    assert order(first, 5, start=2) == order(first, 5)[2:]
    assert keys_of(first, 5) != keys_of(first, 6)
    assert keys_of(Loader(samples, 4, 0, seed=4, factors=factors), 5) != keys_of(first, 5)


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_workers_share_a_cache_of_decoded_photos(photos: DataSet, tmp_path: Path, where: str) -> None:
    files = Files(photos, reduced=True)

    def source() -> Decoded:
        if where == "ram":
            return in_memory(files, (48, 64), "stretch", 1, lambda *_: None)
        return on_disk(files, (48, 64), "stretch", [tmp_path / "a.pixels"], 1, lambda *_: None)

    # A cache of the photos' own size is what decoding in full gives.
    plain = Loader(TrainSet(photos, SMALL, Augment(mosaic=0.5), 0, Files(photos, False)), 3, 0, seed=0)
    cached = Loader(TrainSet(photos, SMALL, Augment(mosaic=0.5), 0, source()), 3, 2, seed=0)
    assert all(same(*pair) for pair in zip(plain.epoch(), cached.epoch(), strict=True))


def _numbers(source: Decoded, sums: "multiprocessing.Queue[int]") -> None:
    sums.put(sum(int(source(index, 1.0).image.sum()) for index in range(11)))


@pytest.mark.parametrize("where", ["ram", "disk"])
def test_a_spawned_process_sees_a_cache_of_decoded_photos(photos: DataSet, tmp_path: Path, where: str) -> None:
    files = Files(photos, reduced=True)
    if where == "ram":
        source = in_memory(files, (48, 64), "stretch", 1, lambda *_: None)
    else:
        source = on_disk(files, (48, 64), "stretch", [tmp_path / "a.pixels"], 1, lambda *_: None)
    context = multiprocessing.get_context("spawn")
    sums = context.Queue()
    process = context.Process(target=_numbers, args=(source, sums))
    process.start()
    assert sums.get(timeout=120) == sum(int(source(index, 1.0).image.sum()) for index in range(11))
    process.join()

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detkit import geometry, imaging
from detkit.config import Augment, Data, Input
from detkit.data.dataset import EvalSet, Key, Sample, TrainSet
from detkit.data.labels import DataSet
from detkit.data.pixels import Files, in_memory
from detkit.data.scan import scan
from detkit.errors import UserError
from detkit.types import CROWD, DIFFICULT, TRUNCATED
from tests.data.photos import BOX, CAN, MARKS, make_voc, marked_image, save_xml, seen

SMALL = Input(size=(32, 40))
EVERYTHING = Augment(flip=0.5, crop=0.5, expand=0.3, colour=0.5, mosaic=0.4, mixup=0.3, copy_paste=0.4)
NONE = {"flip": 0.0, "crop": 0.0, "expand": 0.0, "colour": 0.0}


@pytest.fixture
def photos(tmp_path: Path) -> DataSet:
    make_voc(tmp_path)
    save_xml(tmp_path / "Annotations" / "p0.xml", [CAN, BOX], flags=[DIFFICULT, TRUNCATED])
    save_xml(tmp_path / "Annotations" / "p2.xml", [])
    return scan(Data(root=tmp_path), "train")


def same(one: Sample, other: Sample) -> bool:
    names = ("image", "boxes", "labels", "ignore")
    return one.index == other.index and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.mark.parametrize("rule", ["stretch", "letterbox"])
def test_an_evaluation_sample_is_the_photo_on_the_canvas(photos: DataSet, rule: geometry.Rule) -> None:
    settings = Input(size=(32, 40), resize=rule)
    samples = EvalSet(photos, settings)
    assert len(samples) == 4
    sample, record = samples[1], photos[1]
    assert sample.plan == geometry.plan((48, 64), (32, 40), rule)
    expected = imaging.to_canvas(imaging.decode(record.path), sample.plan, imaging.fill(settings.mean))
    assert (sample.image == expected).all()
    assert sample.boxes.dtype == np.float32
    assert np.allclose(sample.plan.to_source(sample.boxes), record.boxes, atol=1e-4)
    assert (sample.labels == record.labels).all()
    assert sample.index == 1


def test_difficult_and_crowd_objects_are_ignored(photos: DataSet) -> None:
    assert EvalSet(photos, SMALL)[0].ignore.tolist() == [True, False]
    photos.flags[1] = CROWD
    assert EvalSet(photos, SMALL)[0].ignore.tolist() == [True, True]


def test_a_photo_without_objects_is_a_sample_too(photos: DataSet) -> None:
    for epoch in range(5):
        sample = TrainSet(photos, SMALL, Augment(crop=1, expand=1), 0)[Key(epoch, 2)]
        assert sample.boxes.shape == (0, 4)
        assert sample.labels.dtype == np.int64


def test_a_training_sample_depends_on_seed_epoch_and_index_alone(photos: DataSet) -> None:
    samples = TrainSet(photos, SMALL, EVERYTHING, 7)
    keys = [Key(epoch, index) for epoch in range(6) for index in range(4)]
    first = [samples[key] for key in keys]
    backwards = [TrainSet(photos, SMALL, EVERYTHING, 7)[key] for key in reversed(keys)]
    assert all(same(*pair) for pair in zip(first, reversed(backwards), strict=True))
    assert not all(same(*pair) for pair in zip(first[:4], first[4:8], strict=True))
    other = TrainSet(photos, SMALL, EVERYTHING, 8)
    assert not all(same(sample, other[key]) for sample, key in zip(first, keys, strict=True))


def test_training_samples_lie_on_the_canvas(photos: DataSet) -> None:
    samples = TrainSet(photos, SMALL, EVERYTHING, 0)
    for epoch in range(20):
        for index in range(4):
            sample = samples[Key(epoch, index)]
            assert sample.image.shape == (32, 40, 3)
            assert sample.image.flags.c_contiguous
            assert sample.plan is None
            assert (sample.boxes >= 0).all()
            assert (sample.boxes <= np.array([40, 32, 40, 32]) + 1e-3).all()
            assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()


def test_close_leaves_only_flip_and_colour(photos: DataSet) -> None:
    always = Augment(**NONE | {"crop": 1.0, "expand": 1.0}, mosaic=1, mixup=1, copy_paste=1)
    samples, plain = TrainSet(photos, SMALL, always, 0), EvalSet(photos, SMALL)
    for index in range(4):
        closed, expected = samples[Key(3, index, close=True)], plain[index]
        # Training's resize is evaluation's to one level.
        assert np.abs(closed.image.astype(int) - expected.image).max() <= 1
        assert np.allclose(closed.boxes, expected.boxes, atol=1e-5)
        assert (closed.labels == expected.labels).all()
        assert np.abs(samples[Key(3, index)].image.astype(int) - expected.image).max() > 1


def test_repeats_of_a_photo_in_one_epoch_differ(photos: DataSet) -> None:
    samples = TrainSet(photos, SMALL, Augment(crop=1), 0)
    assert same(samples[Key(1, 3)], samples[Key(1, 3, repeat=0)])
    assert not np.array_equal(samples[Key(1, 3)].image, samples[Key(1, 3, repeat=1)].image)


def marked_set(root: Path, hws: Sequence[tuple[int, int]], suffix: str = "jpg") -> DataSet:
    """Photos with an object of its own colour in the left and the right half."""
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets" / "Main").mkdir(parents=True)
    names = [f"c{label}" for label in range(len(MARKS))]
    (root / "classes.txt").write_text("\n".join(names))
    for index, (height, width) in enumerate(hws):
        labels = [2 * index % len(MARKS), (2 * index + 1) % len(MARKS)]
        top, bottom = height // 4, max(height // 4 + 1, height * 3 // 4)
        boxes = [(width // 8, top, width * 3 // 8, bottom), (width * 5 // 8, top, width * 7 // 8, bottom)]
        if width < 8:
            labels, boxes = labels[:1], [(0, top, width, bottom)]
        path = root / "JPEGImages" / f"p{index}.{suffix}"
        Image.fromarray(marked_image((height, width), boxes, labels)).save(path, quality=95, subsampling=0)
        objects = [(names[label], box) for label, box in zip(labels, boxes, strict=True)]
        save_xml(root / "Annotations" / f"p{index}.xml", objects, (height, width))
    (root / "ImageSets" / "Main" / "train.txt").write_text("".join(f"p{index}\n" for index in range(len(hws))))
    return scan(Data(root=root), "train")


SIZES = [(240, 320), (1003, 805), (64, 64), (480, 1201)]


@pytest.mark.parametrize("rule", ["stretch", "letterbox"])
@pytest.mark.parametrize("name", ["none", "flip", "crop", "expand", "mosaic", "mixup", "copy_paste", "all"])
@pytest.mark.parametrize("source", ["full", "reduced", "ram"])
def test_boxes_follow_the_pixels_from_the_file_to_the_sample(
    tmp_path: Path, rule: geometry.Rule, name: str, source: str
) -> None:
    data, canvas = marked_set(tmp_path, SIZES), Input(size=(96, 128), resize=rule)
    changing = [setting for setting in (*NONE, "mosaic", "mixup", "copy_paste") if setting != "colour"]
    chances = {setting: float(name in (setting, "all")) for setting in changing}
    files = Files(data, reduced=source != "full")
    pixels = in_memory(files, canvas.size, rule, 1, lambda *_: None) if source == "ram" else files
    samples = TrainSet(data, canvas, Augment(**chances, colour=0), 0, pixels)  # type: ignore[arg-type]
    told = 0
    for key in (Key(epoch, index) for epoch in range(6) for index in range(len(data))):
        sample = samples[key]
        assert sample.labels.dtype == np.int64
        alone = [np.count_nonzero(sample.labels == label) == 1 for label in sample.labels]
        for box, label, unique in zip(sample.boxes, sample.labels, alone, strict=True):
            x, y = ((box[:2] + box[2:]) / 2).astype(int)
            # Blended photos show at least 0.4 of each; a pasted piece may hide what is in the middle of an object.
            if name not in ("mixup", "copy_paste", "all"):
                assert np.abs(sample.image[y, x].astype(int) - MARKS[label]).max() <= 64
            # A colour may be seen more than once in a composition, or be a part of one that was left out.
            if name in ("none", "flip", "crop", "expand") and unique and (box[2:] - box[:2]).min() >= 3:
                found = seen(sample.image, int(label))
                assert found is not None
                # The cache has but the pixels of the canvas, of which a crop shows fewer, enlarged.
                assert np.abs(box - found).max() <= (2 if source == "ram" else 1)
                told += 1
    assert told > 20 or name in ("mosaic", "mixup", "copy_paste", "all")


def test_a_reduced_photo_is_nearly_the_full_one(tmp_path: Path) -> None:
    data, settings = marked_set(tmp_path, SIZES), Augment(crop=0.5, expand=0.3, mosaic=0.3, colour=0)
    full, reduced = (TrainSet(data, Input(size=(96, 128)), settings, 0, Files(data, flag)) for flag in (False, True))
    for key in (Key(epoch, index) for epoch in range(5) for index in range(len(data))):
        one, other = full[key], reduced[key]
        assert np.abs(one.image.astype(int) - other.image).mean() < 2
        assert (one.labels == other.labels).all()
        assert np.abs(one.boxes - other.boxes).max(initial=0) <= 1


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    st.tuples(st.integers(4, 64), st.integers(4, 64)),
    st.sampled_from(["stretch", "letterbox"]),
    st.integers(0, 1000),
)
@settings(max_examples=40)
def test_photos_of_any_size_become_samples(
    tmp_path_factory: pytest.TempPathFactory,
    hws: list[tuple[int, int]],
    canvas: tuple[int, int],
    rule: geometry.Rule,
    seed: int,
) -> None:
    data = marked_set(tmp_path_factory.mktemp("set"), hws)
    often = Augment(flip=0.5, crop=0.5, expand=0.5, expand_max=4, colour=0.5, mosaic=0.5, mixup=0.5, copy_paste=0.5)
    samples = TrainSet(data, Input(size=canvas, resize=rule), often, seed)
    for key in (Key(epoch, index) for epoch in range(4) for index in range(len(data))):
        sample = samples[key]
        assert sample.image.shape == (*canvas, 3)
        assert sample.image.flags.c_contiguous
        assert (sample.boxes >= 0).all()
        assert (sample.boxes <= np.tile(canvas[::-1], 2)).all()
        assert (sample.boxes[:, 2:] > sample.boxes[:, :2]).all()
        assert len(sample.boxes) == len(sample.labels) == len(sample.ignore)


@pytest.mark.parametrize("mosaic", [0, 1])
def test_an_epoch_may_have_another_canvas(photos: DataSet, mosaic: int) -> None:
    samples = TrainSet(photos, SMALL, Augment(mosaic=mosaic), 0)
    assert samples[Key(0, 1, canvas=(64, 96))].image.shape == (64, 96, 3)


def test_a_photo_that_has_gone_bad_is_named(photos: DataSet) -> None:
    Path(photos[1].path).write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"p1\.jpg"):
        EvalSet(photos, SMALL)[1]
    with pytest.raises(UserError, match=r"p1\.jpg"):
        TrainSet(photos, SMALL, Augment(), 0)[1]

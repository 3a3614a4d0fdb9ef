from pathlib import Path

import numpy as np
import pytest

from detkit import geometry, imaging
from detkit.config import Augment, Data, Input
from detkit.data import voc
from detkit.data.dataset import EvalSet, Key, Sample, TrainSet
from detkit.errors import UserError
from detkit.types import CROWD, DIFFICULT, TRUNCATED
from tests.data.photos import BOX, CAN, make_voc, save_xml

SMALL = Input(size=(32, 40))
EVERYTHING = Augment(flip=0.5, crop=0.5, expand=0.3, colour=0.5, mosaic=0.4)


@pytest.fixture
def photos(tmp_path: Path) -> voc.DataSet:
    make_voc(tmp_path)
    save_xml(tmp_path / "Annotations" / "p0.xml", [CAN, BOX], flags=[DIFFICULT, TRUNCATED])
    save_xml(tmp_path / "Annotations" / "p2.xml", [])
    return voc.scan(Data(root=tmp_path), "train")


def same(one: Sample, other: Sample) -> bool:
    names = ("image", "boxes", "labels", "ignore")
    return one.index == other.index and all(np.array_equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.mark.parametrize("rule", ["stretch", "letterbox"])
def test_an_evaluation_sample_is_the_photo_on_the_canvas(photos: voc.DataSet, rule: geometry.Rule) -> None:
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


def test_difficult_and_crowd_objects_are_ignored(photos: voc.DataSet) -> None:
    assert EvalSet(photos, SMALL)[0].ignore.tolist() == [True, False]
    photos.flags[1] = CROWD
    assert EvalSet(photos, SMALL)[0].ignore.tolist() == [True, True]


def test_a_photo_without_objects_is_a_sample_too(photos: voc.DataSet) -> None:
    for epoch in range(5):
        sample = TrainSet(photos, SMALL, Augment(crop=1, expand=1), 0)[Key(epoch, 2)]
        assert sample.boxes.shape == (0, 4)
        assert sample.labels.dtype == np.int64


def test_a_training_sample_depends_on_seed_epoch_and_index_alone(photos: voc.DataSet) -> None:
    samples = TrainSet(photos, SMALL, EVERYTHING, 7)
    keys = [Key(epoch, index) for epoch in range(6) for index in range(4)]
    first = [samples[key] for key in keys]
    backwards = [TrainSet(photos, SMALL, EVERYTHING, 7)[key] for key in reversed(keys)]
    assert all(same(*pair) for pair in zip(first, reversed(backwards), strict=True))
    assert not all(same(*pair) for pair in zip(first[:4], first[4:8], strict=True))
    other = TrainSet(photos, SMALL, EVERYTHING, 8)
    assert not all(same(sample, other[key]) for sample, key in zip(first, keys, strict=True))


def test_training_samples_lie_on_the_canvas(photos: voc.DataSet) -> None:
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


def test_close_turns_off_mosaic_crop_and_expand(photos: voc.DataSet) -> None:
    samples = TrainSet(photos, SMALL, Augment(flip=0, crop=1, expand=1, colour=0, mosaic=1), 0)
    plain = EvalSet(photos, SMALL)
    for index in range(4):
        assert same(samples[Key(3, index, close=True)], plain[index])
        assert not np.array_equal(samples[Key(3, index)].image, plain[index].image)


@pytest.mark.parametrize("mosaic", [0, 1])
def test_an_epoch_may_have_another_canvas(photos: voc.DataSet, mosaic: int) -> None:
    samples = TrainSet(photos, SMALL, Augment(mosaic=mosaic), 0)
    assert samples[Key(0, 1, canvas=(64, 96))].image.shape == (64, 96, 3)


def test_a_photo_that_has_gone_bad_is_named(photos: voc.DataSet) -> None:
    Path(photos[1].path).write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"p1\.jpg"):
        EvalSet(photos, SMALL)[1]
    with pytest.raises(UserError, match=r"p1\.jpg"):
        TrainSet(photos, SMALL, Augment(), 0)[1]

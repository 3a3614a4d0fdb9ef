"""Photos cut to tiles: what `runtime.tiles` looks at, for training and evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detkit import imaging
from detkit.config import Augment, Data, Input, Select, Tiles
from detkit.data import stats, synth, tiles
from detkit.data.dataset import EvalSet, TrainSet
from detkit.data.labels import DataSet
from detkit.data.pixels import Files, in_memory
from detkit.data.scan import scan
from detkit.errors import UserError
from detkit.types import DIFFICULT, Detections

SMALL = Tiles(size=(150, 200), overlap=60)
PLAIN = Augment(flip=0, crop=0, colour=0)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    folder = tmp_path_factory.mktemp("tiles") / "set"
    synth.synthesise(folder, train=4, val=0, size=(640, 480), seed=3, workers=1)
    found = scan(Data(root=folder), "train")
    return replace(found, flags=np.zeros_like(found.flags))  # none is difficult from the start


def boxes_of(data: DataSet, row: int) -> np.ndarray:
    first = int(data.box_ends[row - 1]) if row else 0
    return data.boxes[first : int(data.box_ends[row])]


def counted(data: DataSet, row: int) -> np.ndarray:
    """Objects of a part that are learnt, in pixels of the photo."""
    assert data.parts is not None
    record = data[row]
    return record.boxes[record.flags & DIFFICULT == 0] + np.tile(data.parts.windows[row, :2], 2)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tile=st.tuples(st.integers(40, 500), st.integers(40, 700)), share=st.floats(0, 0.4))
def test_each_object_is_whole_where_it_counts(photos: DataSet, tile: tuple[int, int], share: float) -> None:
    overlap = int(share * min(tile))
    parts = tiles.cut(photos, Tiles(size=tile, overlap=overlap))
    assert parts.parts is not None
    for photo in range(len(photos)):
        rows = np.flatnonzero(parts.parts.photos == photo)
        whole = {tuple(box) for row in rows for box in counted(parts, row).round(6).tolist()}
        assert {tuple(box) for box in boxes_of(photos, photo).round(6).tolist()} <= whole
    for row in range(len(parts)):
        record = parts[row]  # a Record refuses boxes that are empty or outside
        assert record.path == photos[int(parts.parts.photos[row])].path


def test_what_is_nearly_cut_away_goes(photos: DataSet) -> None:
    parts = tiles.cut(photos, SMALL)
    assert parts.parts is not None
    seen = gone = 0
    for row, photo in enumerate(parts.parts.photos.tolist()):
        x1, y1, x2, y2 = parts.parts.windows[row].tolist()
        if (y2 - y1, x2 - x1) != SMALL.size:
            continue
        own = boxes_of(photos, photo)
        clipped = np.clip(own, (x1, y1, x1, y1), (x2, y2, x2, y2))
        left = (clipped[:, 2:] - clipped[:, :2]).prod(1) / (own[:, 2:] - own[:, :2]).prod(1)
        kept = {tuple(box) for box in (boxes_of(parts, row) + np.array([x1, y1, x1, y1])).round(6).tolist()}
        assert {tuple(box) for box in clipped[left >= 0.5].round(6).tolist()} <= kept
        assert not kept & {tuple(box) for box in clipped[(left < 0.25) & (left > 0)].round(6).tolist()}
        seen, gone = seen + len(kept), gone + int(((left < 0.25) & (left > 0)).sum())
    assert seen > 50
    assert gone > 5


def test_in_the_whole_photo_only_what_no_tile_holds_is_learnt(photos: DataSet) -> None:
    parts = tiles.cut(photos, SMALL)
    assert parts.parts is not None
    for row, window in enumerate(parts.parts.windows.tolist()):
        if window == [0, 0, 640, 480]:
            found = counted(parts, row)
            longer = boxes_of(photos, int(parts.parts.photos[row]))
            assert len(found) == ((longer[:, 2:] - longer[:, :2]).max(1) > SMALL.overlap).sum() > 0
    with_all = tiles.cut(photos, SMALL, every=True).parts
    assert with_all is not None
    assert (with_all.windows == [0, 0, 640, 480]).all(1).sum() == len(photos)


def test_the_pixels_are_the_tiles(photos: DataSet) -> None:
    canvas = Input(size=SMALL.size, tiles=SMALL)
    evaluated, trained = EvalSet(photos, canvas), TrainSet(photos, canvas, PLAIN, 0)
    parts, learnt = evaluated.dataset.parts, trained.dataset.parts
    assert parts is not None
    assert learnt is not None
    kept = in_memory(Files(trained.dataset, reduced=True), SMALL.size, "stretch", 1, lambda *_: None)
    cached = TrainSet(trained.dataset, canvas, PLAIN, 0, kept)
    for row in (1, 2, 5, len(evaluated) - 1):
        x1, y1, x2, y2 = window = parts.windows[row].tolist()
        whole = imaging.decode(evaluated.dataset[row].path)
        assert (evaluated[row].image == whole[y1:y2, x1:x2]).all()
        (same,) = np.flatnonzero((learnt.windows == window).all(1) & (learnt.photos == parts.photos[row]))
        for sample in (trained[int(same)], cached[int(same)]):
            assert np.abs(sample.image.astype(int) - evaluated[row].image).mean() < 2  # another JPEG decoder
            np.testing.assert_allclose(sample.boxes, evaluated[row].boxes, atol=1e-4)


def test_reduced_photos_are_cut_in_the_same_place(photos: DataSet) -> None:
    """A tile on a canvas of a quarter of its size, from the JPEG at half its size, is what the full one gives."""
    canvas = Input(size=(38, 50), tiles=SMALL)
    full, reduced = (
        TrainSet(photos, canvas, PLAIN, 0, Files(tiles.cut(photos, SMALL), reduced=flag)) for flag in (False, True)
    )
    for row in range(0, len(full), 3):
        assert np.abs(full[row].image.astype(int) - reduced[row].image).mean() < 5
        np.testing.assert_allclose(full[row].boxes, reduced[row].boxes, atol=0.5)


def test_what_is_found_in_the_parts_is_what_is_found_in_the_photos(photos: DataSet) -> None:
    samples = EvalSet(photos, Input(size=(64, 64), tiles=SMALL))
    found = []
    for row in range(len(samples)):
        record = samples.dataset[row]
        scores = np.full(len(record.labels), 0.9, np.float32)
        found.append(Detections(record.boxes.astype(np.float32), scores, record.labels, record.hw))
    joined = samples.joined(found, Select(iou=0.6))
    assert len(joined) == len(photos)
    for photo, one in enumerate(joined):
        assert one.hw == (480, 640)
        np.testing.assert_allclose(sorted(one.boxes.tolist()), sorted(boxes_of(photos, photo).tolist()), atol=1e-3)


def test_what_an_exported_file_says_of_them(photos: DataSet) -> None:
    said = stats.photos(photos)
    sides = (photos.boxes[:, 2:] - photos.boxes[:, :2]).max(1)
    assert (said.size, said.tiled) == ((480, 640), False)
    assert (sides <= said.side).mean() == pytest.approx(0.99, abs=0.02)
    assert said.most == max(len(boxes_of(photos, row)) for row in range(len(photos)))
    said = stats.photos(tiles.cut(photos, SMALL), SMALL)
    assert (said.size, said.side, said.tiled) == ((150, 200), 60, True)


def test_without_tiles_nothing_changes_and_small_ones_are_refused(photos: DataSet) -> None:
    assert tiles.cut(photos, None) is photos
    parts = tiles.cut(photos, SMALL)
    assert tiles.cut(parts, SMALL) is parts
    with pytest.raises(UserError, match="twice the overlap"):
        tiles.cut(photos, Tiles(size=(100, 100), overlap=60))

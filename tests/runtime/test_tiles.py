"""Tiles: every object once. The oracle finds what a view shows of each object, however little."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from detkit.config import Select
from detkit.errors import UserError
from detkit.manifest import Manifest
from detkit.runtime import tiles
from detkit.types import Detections
from tests.runtime.conftest import manifest


class Oracle:
    """Finds, in any view of one photo, the part of each object that it shows. A view is recognised by its pixels, which
    hold their own places."""

    classes = ("a", "b")

    def __init__(self, boxes: NDArray[np.float32], labels: NDArray[np.int64], noise: float = 0.0) -> None:
        self.boxes, self.labels, self.noise, self.views = boxes, labels, noise, 0
        self.manifest: Manifest = manifest(classes=self.classes)

    def detect(self, images: list[NDArray[np.uint8]]) -> list[Detections]:
        return [self._one(image) for image in images]

    def _one(self, image: NDArray[np.uint8]) -> Detections:
        self.views += 1
        height, width = image.shape[:2]
        above, left, rest = map(int, image[0, 0])
        y, x = above << 4 | rest >> 4, left << 4 | rest & 15
        rng = np.random.default_rng((x, y))
        seen = np.clip(self.boxes - np.float32([x, y, x, y]), 0, np.float32([width, height, width, height]))
        shown = (seen[:, 2:] - seen[:, :2] >= 1).all(1)
        off = rng.normal(0, self.noise, seen.shape).astype(np.float32)
        scores = rng.uniform(0.5, 1, len(seen)).astype(np.float32)
        order = np.argsort(-scores[shown])
        return Detections(
            np.clip(seen + off, 0, np.float32([width, height] * 2))[shown][order],
            scores[shown][order],
            self.labels[shown][order],
            (height, width),
        )


def places(hw: tuple[int, int]) -> NDArray[np.uint8]:
    """A photo whose pixels say where they are: 12 bits each of row and column."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    return np.stack([y >> 4, x >> 4, (y & 15) << 4 | x & 15], 2).astype(np.uint8)


def shelf(rng: np.random.Generator, hw: tuple[int, int], count: int, most: int) -> NDArray[np.float32]:
    """Products side by side on boards, float32 [count, 4], with sides up to `most` that nearly touch."""
    boxes, x, y = [], 0.0, 0.0
    while len(boxes) < count:
        w, h = rng.uniform(most / 3, most, 2)
        if x + w > hw[1]:
            x, y = 0.0, y + most
        assert y + most <= hw[0], "more products than room"
        boxes.append((x, y + most - h, x + w, y + most))
        x += w + rng.uniform(0, 1.5)
    return np.array(boxes, np.float32)


def sure(found: Detections) -> NDArray[np.bool_]:
    return np.asarray(found.scores >= 0.3)


def rows(boxes: NDArray[np.float32], labels: NDArray[np.int64]) -> list[tuple[float, ...]]:
    return sorted((*box, label) for box, label in zip(boxes.round(2).tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize("count", [200, 400, 600])
def test_a_dense_shelf_is_counted_exactly(count: int) -> None:
    for seed in range(3):
        rng = np.random.default_rng((seed, count))
        hw = (1500, 2000)
        boxes, labels = shelf(rng, hw, count, 60), rng.integers(0, 2, count)
        found = tiles.Tiled(Oracle(boxes, labels), tiles.checked((400, 480), 60), sure).detect([places(hw)])[0]
        assert rows(found.boxes, found.labels) == rows(boxes, labels)
        assert (np.diff(found.scores) <= 0).all()


def test_boxes_that_are_a_little_off_change_no_count() -> None:
    rng = np.random.default_rng(0)
    boxes, labels = shelf(rng, (1500, 2000), 500, 60), rng.integers(0, 2, 500)
    tiling = tiles.checked((400, 480), 68)  # room for what noise adds
    found = tiles.Tiled(Oracle(boxes, labels, noise=0.5), tiling, sure).detect([places((1500, 2000))])[0]
    assert len(found) == 500


@settings(max_examples=60, deadline=None)
@given(
    hw=st.tuples(st.integers(20, 900), st.integers(20, 900)),
    tile=st.tuples(st.integers(40, 300), st.integers(40, 300)),
    share=st.floats(0, 0.4),
    seed=st.integers(0, 2**32 - 1),
    score=st.sampled_from([None, 0.3]),
)
def test_objects_of_any_size_in_photos_of_any_size(
    hw: tuple[int, int], tile: tuple[int, int], share: float, seed: int, score: float | None
) -> None:
    """Also those larger than the overlap, or than a tile."""
    tiling = tiles.checked(tile, int(share * min(tile)))
    rng = np.random.default_rng(seed)
    cells = [(x, y) for y in range(0, hw[0] - 4, 100) for x in range(0, hw[1] - 4, 100)]
    boxes = []
    for x, y in cells:  # one in each, so that none overlap
        room = np.minimum((98, 98), (hw[1] - x, hw[0] - y))
        side = np.maximum(rng.uniform(0.2, 1, 2) * room, 3)
        boxes.append((x, y, *np.minimum((x + side[0], y + side[1]), (hw[1], hw[0]))))
    corners, labels = np.array(boxes, np.float32), rng.integers(0, 2, len(boxes))
    found = tiles.Tiled(Oracle(corners, labels), tiling, sure if score else None).detect([places(hw)])[0]
    assert rows(found.boxes, found.labels) == rows(corners, labels)


@given(
    hw=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    tile=st.tuples(st.integers(40, 900), st.integers(40, 900)),
    share=st.floats(0, 0.45),
)
def test_tiles_cover_the_photo_and_overlap_enough(hw: tuple[int, int], tile: tuple[int, int], share: float) -> None:
    tiling = tiles.checked(tile, int(share * min(tile)))
    corners = tiling.corners(hw)
    assert (corners[:, :2] >= 0).all()
    assert (corners[:, 2:] <= hw[::-1]).all()
    for axis in (0, 1):
        starts, ends = np.unique(corners[:, 1 - axis]), np.unique(corners[:, 3 - axis])
        assert (starts[0], ends[-1]) == (0, hw[axis])
        assert (ends[:-1] - starts[1:] >= tiling.overlap + tiling.margin(axis)).all()
        assert (ends - starts == min(tile[axis], hw[axis])).all()


def test_a_photo_as_small_as_a_tile_is_looked_at_once() -> None:
    oracle = Oracle(np.array([[1, 2, 30, 40]], np.float32), np.zeros(1, np.int64))
    tiled = tiles.Tiled(oracle, tiles.checked((100, 200), 20))
    assert len(tiled.detect([places((100, 200))])[0]) == 1
    assert oracle.views == 1
    tiled.detect([places((101, 200))])
    assert oracle.views == 4  # two tiles and the whole


def test_what_no_look_shows_whole_is_counted_where_it_is_cut() -> None:
    """Objects longer than the overlap that the look at the whole photo, in which they are small, doesn't find."""
    boxes = np.array([[80, 20, 225, 90], [170, 120, 320, 190], [340, 20, 380, 60]], np.float32)
    labels = np.array([0, 1, 0])

    class Near(Oracle):
        def _one(self, image: NDArray[np.uint8]) -> Detections:
            found = super()._one(image)
            return found if image.shape[1] < 400 else found.above(1)

    for score, count in ((None, 1), (0.3, 3)):
        found = tiles.Tiled(Near(boxes, labels), tiles.checked((200, 220), 60), sure if score else None).detect(
            [places((200, 400))]
        )[0]
        assert len(found) == count
    assert sorted(found.labels.tolist()) == [0, 0, 1]
    for one, label in zip(found.boxes, found.labels, strict=True):
        (own,) = (box for box in boxes[labels == label] if (one[:2] >= box[:2]).all() and (one[2:] <= box[2:]).all())
        assert (one[2:] - one[:2]).prod() >= 0.5 * (own[2:] - own[:2]).prod()


def test_two_classes_in_one_place_are_two_objects_unless_the_model_says_otherwise() -> None:
    boxes = np.array([[150, 10, 190, 50]] * 2, np.float32)
    found = [
        Detections(boxes[:1] - np.float32([x, 0, x, 0]), np.float32([score]), np.array([label]), (200, 200))
        for x, score, label in ((0, 0.9, 0), (130, 0.8, 1))
    ]
    corners = np.array([[0, 0, 200, 200], [130, 0, 330, 200]])
    nothing = Detections(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), (200, 330))
    both = tiles.joined(found, corners, nothing, tiles.Tiling((200, 200), 60), Select())
    assert both.labels.tolist() == [0, 1]
    assert tiles.joined(
        found, corners, nothing, tiles.Tiling((200, 200), 60), Select(agnostic=True)
    ).labels.tolist() == [0]


@pytest.mark.parametrize("text", ["", "big", "640x", "640x480x3", "8", "64x-3"])
def test_tiles_that_are_none_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="tiles"):
        tiles.parse(text, None)


def test_tiles_as_the_command_line_has_them() -> None:
    assert tiles.parse("640x480", None) == ((480, 640), 120)
    assert tiles.parse("512", 64) == ((512, 512), 64)
    with pytest.raises(UserError, match="twice the overlap"):
        tiles.parse("512", 300)


PHOTOS = {"size": (480, 640), "side": 99.2, "most": 50}


def test_auto_is_as_the_photos_trained_on_were() -> None:
    own = manifest(photos=PHOTOS)
    assert tiles.chosen("auto", None, own, "m.onnx") == ((480, 640), 100)
    assert tiles.chosen("auto", 64, own, "m.onnx") == ((480, 640), 64)
    assert tiles.chosen(None, None, own, "m.onnx") is None
    assert tiles.chosen("512", None, own, "m.onnx") == ((512, 512), 128)
    close = manifest(photos={**PHOTOS, "side": 600})  # objects that fill the photo: half a tile is the most
    assert tiles.chosen("auto", None, close, "m.onnx") == ((480, 640), 232)
    with pytest.raises(UserError, match=r"m\.onnx doesn't say .* export it again, .* --tiles 640x480"):
        tiles.chosen("auto", None, manifest(), "m.onnx")
    with pytest.raises(UserError, match="--overlap"):
        tiles.chosen(None, 64, own, "m.onnx")


def test_a_model_trained_on_tiles_looks_at_tiles_unless_told_otherwise() -> None:
    own = manifest(photos={**PHOTOS, "side": 100, "tiled": True})
    assert tiles.chosen(None, None, own, "m.onnx") == ((480, 640), 100)
    assert tiles.chosen("off", None, own, "m.onnx") is None


def test_flips_fuse_both_looks() -> None:
    boxes = np.array([[10, 20, 50, 60], [100, 20, 150, 90]], np.float32)

    class Mirrored(Oracle):
        def _one(self, image: NDArray[np.uint8]) -> Detections:
            self.views += 1
            if self.views == 1:
                return Detections(boxes, np.float32([0.9, 0.8]), np.array([0, 1]), (100, 200))
            other = boxes[:1, [2, 1, 0, 3]] * np.float32([-1, 1, -1, 1]) + np.float32([200, 0, 200, 0])
            return Detections(other, np.float32([0.7]), np.array([0]), (100, 200))

    found = tiles.Flipped(Mirrored(boxes, np.array([0, 1]))).detect([places((100, 200))])[0]
    assert found.labels.tolist() == [0, 1]
    np.testing.assert_allclose(found.boxes, boxes, atol=1e-4)
    np.testing.assert_allclose(found.scores, [0.8, 0.4], atol=1e-6)  # seen once of twice: half as sure

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from detkit.config import Augment
from detkit.data import augment
from detkit.data.augment import Labelled

FILL = (10, 20, 30)
MARKS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]], np.uint8)


def marked(boxes: list[tuple[int, int, int, int]], hw: tuple[int, int] = (120, 160), first: int = 0) -> Labelled:
    """A grey photo with a rectangle of its own colour for each object; labels, from `first` on, are places in MARKS."""
    image = np.full((*hw, 3), 128, np.uint8)
    labels = np.arange(first, first + len(boxes))
    for label, (x1, y1, x2, y2) in zip(labels, boxes, strict=True):
        image[y1:y2, x1:x2] = MARKS[label]
    return Labelled(image, np.array(boxes, np.float64).reshape(-1, 4), labels, labels % 2 == 1)


def seen(image: NDArray[np.uint8], label: int, tolerance: int = 0) -> list[int] | None:
    """Where the mark of that label is in the image: x1 y1 x2 y2, None where it isn't."""
    near = (np.abs(image.astype(int) - MARKS[label]) <= tolerance).all(2)
    ys, xs = np.nonzero(near)
    return [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else None


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def spread() -> Labelled:
    return marked([(5, 5, 40, 50), (60, 10, 90, 40), (100, 60, 158, 118), (10, 70, 50, 110)])


def check_follow(before: Labelled, after: Labelled) -> None:
    """Every object lies exactly where its pixels are, and has kept its label and flag."""
    assert after.boxes.dtype == np.float64
    assert after.labels.dtype == np.int64
    assert after.ignore.dtype == np.bool_
    assert after.image.dtype == np.uint8
    assert len(after.boxes) == len(after.labels) == len(after.ignore)
    assert (after.ignore == before.ignore[after.labels]).all()
    for box, label in zip(after.boxes, after.labels, strict=True):
        assert box.tolist() == seen(after.image, int(label))


@given(st.integers(0, 2**32))
def test_boxes_follow_the_pixels_in_a_crop(seed: int) -> None:
    photo = spread()
    cropped = augment.crop(photo, rng(seed))
    check_follow(photo, cropped)
    assert len(cropped.boxes) >= 1
    # What is gone had its centre outside: less than half of it can be seen.
    for label in set(range(4)) - set(cropped.labels.tolist()):
        rest = seen(cropped.image, label)
        if rest is not None:
            full = photo.boxes[label]
            assert (rest[2] - rest[0] <= (full[2] - full[0]) / 2) or (rest[3] - rest[1] <= (full[3] - full[1]) / 2)


def test_crops_differ_and_reach_their_minimum_overlap() -> None:
    sizes = {augment.crop(spread(), rng(seed)).image.shape for seed in range(50)}
    assert len(sizes) > 40
    assert all(h >= 0.3 * 120 - 1 and w >= 0.3 * 160 - 1 for h, w, _ in sizes)
    assert all(0.45 <= (w / 160) / (h / 120) <= 2.2 for h, w, _ in sizes)


def test_a_photo_without_objects_or_without_a_fit_stays_whole() -> None:
    empty = marked([])
    assert augment.crop(empty, rng(0)).image is empty.image
    one_pixel = marked([(0, 0, 1, 1)], (1, 1))
    assert augment.crop(one_pixel, rng(0)).boxes.tolist() == [[0, 0, 1, 1]]


@given(st.integers(0, 2**32), st.floats(0.5, 4))
def test_boxes_follow_the_pixels_in_a_zoom_out(seed: int, largest: float) -> None:
    photo = spread()
    wide = augment.expand(photo, largest, FILL, rng(seed))
    check_follow(photo, wide)
    assert len(wide.boxes) == 4
    assert wide.image.shape[0] <= max(1, largest) * 120
    free = (wide.image == FILL).all(2)
    assert free.sum() == wide.image.shape[0] * wide.image.shape[1] - 120 * 160


def test_boxes_follow_the_pixels_in_a_flip() -> None:
    photo = spread()
    check_follow(photo, augment.flip(photo))
    again = augment.flip(augment.flip(photo))
    assert (again.image == photo.image).all()
    assert (again.boxes == photo.boxes).all()


@pytest.mark.parametrize("rule", ["stretch", "letterbox"])
def test_boxes_follow_the_pixels_onto_the_canvas(rule: str) -> None:
    photo = marked([(20, 20, 80, 60), (100, 80, 150, 110)])
    resized = augment.resize(photo, (240, 480), rule, FILL)  # type: ignore[arg-type]
    assert resized.image.shape == (240, 480, 3)
    for box, label in zip(resized.boxes, resized.labels, strict=True):
        assert np.abs(box - seen(resized.image, int(label), 120)).max() <= 2


@given(st.integers(0, 2**32), st.sampled_from(["stretch", "letterbox"]))
@settings(deadline=None)
def test_boxes_follow_the_pixels_in_a_mosaic(seed: int, rule: str) -> None:
    hws = [(120, 160), (200, 100), (90, 90), (128, 128)]
    photos = []
    for index, (height, width) in enumerate(hws):
        box = (width // 5, height // 5, width * 4 // 5, height * 4 // 5)
        photos.append(marked([box], (height, width), index))
    whole = augment.mosaic(photos, (128, 192), rule, FILL, rng(seed))  # type: ignore[arg-type]
    assert whole.image.shape == (128, 192, 3)
    assert (whole.boxes >= 0).all()
    assert (whole.boxes <= [192, 128, 192, 128]).all()
    assert (whole.ignore == (whole.labels % 2 == 1)).all()
    for box, label in zip(whole.boxes, whole.labels, strict=True):
        found = seen(whole.image, int(label), 110)
        assert found is not None
        assert np.abs(box - found).max() <= 2.5
        assert (box[2:] - box[:2]).min() >= 4


def test_a_mosaic_drops_what_is_hardly_left() -> None:
    photo = marked([(0, 0, 100, 100)], (100, 100))
    for seed in range(40):
        whole = augment.mosaic([photo] * 4, (100, 100), "stretch", FILL, rng(seed))
        assert len(whole.boxes) <= 4
        for x1, y1, x2, y2 in whole.boxes:
            assert (x2 - x1) * (y2 - y1) >= 0.25 * 50 * 50


def test_colour_changes_the_colours_and_is_decided_by_the_generator() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    kept = image.copy()
    image.flags.writeable = False
    first, again, other = (augment.colour(image, rng(seed)) for seed in (1, 1, 2))
    assert first.dtype == np.uint8
    assert first.shape == image.shape
    assert (first == again).all()
    assert (first != other).any()
    assert (first != image).any()
    assert (image == kept).all()


def test_settings_are_probabilities_and_close_leaves_only_the_flip() -> None:
    photo = spread()
    never = Augment(flip=0, crop=0, expand=0)
    always = Augment(flip=1, crop=1, expand=1)
    for seed in range(10):
        assert augment.geometric(photo, never, FILL, rng(seed), close=False) is photo
        closed = augment.geometric(photo, always, FILL, rng(seed), close=True)
        assert (closed.image == augment.flip(photo).image).all()
        changed = augment.geometric(photo, always, FILL, rng(seed), close=False)
        check_follow(photo, changed)
    flipped = sum(augment.geometric(photo, Augment(crop=0), FILL, rng(s), False) is not photo for s in range(200))
    assert 70 <= flipped <= 130

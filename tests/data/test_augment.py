from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from detkit import geometry
from detkit.config import Augment
from detkit.data import augment
from detkit.data.augment import Labelled, Objects, View
from detkit.data.pixels import Pixels
from tests.data.photos import MARKS, marked_image, seen

FILL = (128, 60, 190)
RULES = st.sampled_from(["stretch", "letterbox"])
SEEDS = st.integers(0, 2**32)
SIDES = st.tuples(st.integers(32, 200), st.integers(32, 200))


class Photo:
    """A grey photo with a rectangle of its own colour for each object; labels, from `first` on, are places in MARKS."""

    def __init__(
        self, boxes: list[tuple[int, int, int, int]], hw: tuple[int, int] = (120, 160), first: int = 0
    ) -> None:
        labels = np.arange(first, first + len(boxes))
        self.hw = hw
        self.objects = Objects(np.array(boxes, np.float64).reshape(-1, 4), labels, labels % 2 == 1)
        self.pixels = Pixels(marked_image(hw, boxes, labels), (0.0, 0.0, float(hw[1]), float(hw[0])))


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def spread() -> Photo:
    return Photo([(5, 5, 40, 50), (60, 10, 90, 40), (100, 60, 158, 118), (10, 70, 50, 110)])


@st.composite
def photos(draw: st.DrawFn) -> Photo:
    """Photos of any size with an object in up to four of their quarters."""
    height, width = draw(SIDES)
    boxes = []
    for top, left in ((0, 0), (0, width // 2), (height // 2, 0), (height // 2, width // 2))[: draw(st.integers(1, 4))]:
        x1, y1 = left + draw(st.integers(0, width // 4)), top + draw(st.integers(0, height // 4))
        boxes.append((x1, y1, x1 + draw(st.integers(4, width // 4 - 1)), y1 + draw(st.integers(4, height // 4 - 1))))
    return Photo(boxes, (height, width))


def check_follow(photo: Objects, canvas: Labelled) -> int:
    """Every object lies where its pixels are, to a pixel, and has kept its label and flag. Returns how many could be
    told: those of at least 3 pixels."""
    boxes, labels, ignore = canvas.objects
    assert (boxes.dtype, labels.dtype, ignore.dtype, canvas.image.dtype) == (np.float64, np.int64, np.bool_, np.uint8)
    assert len(boxes) == len(labels) == len(ignore)
    assert (ignore == photo.ignore[labels - photo.labels[0]]).all()
    height, width = canvas.image.shape[:2]
    assert (boxes >= 0).all()
    assert (boxes <= [width, height, width, height]).all()
    told = 0
    for box, label in zip(boxes, labels, strict=True):
        if (box[2:] - box[:2]).min() >= 3:
            found = seen(canvas.image, int(label))
            assert found is not None
            assert np.abs(box - found).max() <= 1
            told += 1
    return told


def laid(photo: Photo, view: View, keep: NDArray[np.bool_], canvas: tuple[int, int]) -> Labelled:
    return augment.lay(augment.blank(canvas, FILL), photo.pixels, photo.objects.chosen(keep), view)


@given(photos(), SIDES, RULES, SEEDS, st.sampled_from(["crop", "expand", "flip", "all", "none"]))
def test_boxes_follow_the_pixels_of_a_photo(
    photo: Photo, canvas: tuple[int, int], rule: geometry.Rule, seed: int, which: str
) -> None:
    chances = {name: float(which in (name, "all")) for name in ("crop", "expand", "flip")}
    settings = Augment(**chances, expand_max=3)  # type: ignore[arg-type]
    boxes = photo.objects.boxes
    view, keep = augment.single(photo.hw, boxes, settings, canvas, rule, rng(seed), close=False)
    check_follow(photo.objects, laid(photo, view, keep, canvas))
    assert view.mirrored == (which in ("flip", "all"))
    assert keep.all() or which in ("crop", "all")


def test_enough_objects_are_told_to_prove_it() -> None:
    settings, photo, told = Augment(crop=1, expand=1, flip=1), spread(), 0
    for seed in range(20):
        view, keep = augment.single(photo.hw, photo.objects.boxes, settings, (120, 160), "stretch", rng(seed), False)
        told += check_follow(photo.objects, laid(photo, view, keep, (120, 160)))
    assert told > 20


@given(SEEDS)
def test_a_crop_keeps_objects_by_their_centre(seed: int) -> None:
    boxes = spread().objects.boxes
    (x1, y1, x2, y2), keep = augment.crop((120, 160), boxes, rng(seed))
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert keep.any()
    assert (keep == ((centres > [x1, y1]) & (centres < [x2, y2])).all(1)).all()


def test_crops_differ_and_reach_their_minimum_overlap() -> None:
    crops = np.array([augment.crop((120, 160), spread().objects.boxes, rng(seed))[0] for seed in range(50)])
    assert len(np.unique(crops, axis=0)) > 40
    width, height = (crops[:, 2:] - crops[:, :2]).T
    assert (height >= 0.3 * 120 - 1).all()
    assert (width >= 0.3 * 160 - 1).all()
    ratio = (width / 160) / (height / 120)
    assert ((ratio >= 0.45) & (ratio <= 2.2)).all()


def test_a_photo_without_objects_or_without_a_fit_stays_whole() -> None:
    assert augment.crop((120, 160), np.empty((0, 4)), rng(0))[0] == (0, 0, 160, 120)
    assert augment.crop((1, 1), np.array([[0, 0, 1, 1.0]]), rng(0))[0] == (0, 0, 1, 1)


@given(SEEDS, st.floats(0.5, 4))
def test_a_zoom_out_holds_the_photo(seed: int, largest: float) -> None:
    (height, width), (left, top) = augment.expand((120, 160), largest, rng(seed))
    assert 0 <= top <= height - 120
    assert 0 <= left <= width - 160
    assert height <= max(1, largest) * 120


@pytest.mark.parametrize("rule", ["stretch", "letterbox"])
def test_what_is_left_free_has_the_fill_colour(rule: geometry.Rule) -> None:
    photo = spread()
    view, keep = augment.single(photo.hw, photo.objects.boxes, Augment(crop=0, expand=1), (90, 96), rule, rng(3), False)
    canvas = laid(photo, view, keep, (90, 96))
    free = (canvas.image == FILL).all(2)
    assert free.sum() == 90 * 96 - view.hw[0] * view.hw[1] > 0


@given(SEEDS, RULES, SIDES, st.floats(0, 1))
def test_boxes_follow_the_pixels_in_a_mosaic(
    seed: int, rule: geometry.Rule, canvas: tuple[int, int], flip: float
) -> None:
    parts = []
    for label, (height, width) in enumerate([(120, 160), (200, 100), (90, 90), (128, 128)]):
        parts.append(Photo([(width // 5, height // 5, width * 4 // 5, height * 4 // 5)], (height, width), label))
    views = augment.tiles([part.hw for part in parts], Augment(flip=flip), canvas, rule, rng(seed))
    whole = augment.blank(canvas, FILL)
    for part, view in zip(parts, views, strict=True):
        whole = augment.lay(whole, part.pixels, part.objects, view, strict=True)
    everything = Objects(*(np.concatenate(fields) for fields in zip(*(part.objects for part in parts), strict=True)))
    check_follow(everything, whole)
    boxes, labels, _ = whole.objects
    assert (boxes[:, 2:] - boxes[:, :2]).min(initial=9) >= 4
    for box, label in zip(boxes, labels, strict=True):
        view, full = views[label], parts[label].objects.boxes[0]
        whole_area = np.prod(full[2:] - full[:2]) * view.scale[0] * view.scale[1]
        assert np.prod(box[2:] - box[:2]) >= 0.24 * whole_area


@given(photos(), photos(), SIDES, RULES, SEEDS)
def test_pasted_objects_lie_where_they_are_pasted_and_hide_what_is_behind(
    photo: Photo, donor: Photo, canvas: tuple[int, int], rule: geometry.Rule, seed: int
) -> None:
    donor = Photo(donor.objects.boxes.astype(int).tolist(), donor.hw, 4)
    view, keep = augment.single(photo.hw, photo.objects.boxes, Augment(crop=0), canvas, rule, rng(seed), close=False)
    ground = laid(photo, view, keep, canvas)
    views = augment.pieces(donor.hw, donor.objects, Augment(), canvas, rule, rng(seed))
    assert 1 <= len(views) <= 3
    ground = ground._replace(objects=augment.occlude(ground.objects, [piece.place for piece in views]))
    behind = len(ground.objects.boxes)
    for piece in views:
        ground = augment.lay(ground, donor.pixels, donor.objects, piece, strict=True)
    assert len(ground.objects.boxes) >= behind + len(views)
    assert (np.sort(ground.objects.labels[behind:]) >= 4).all()
    for box, label, ignore in zip(*ground.objects, strict=True):
        assert not ignore or label < 4 or label % 2 == 1
        found = seen(ground.image, int(label))
        if (box[2:] - box[:2]).min() >= 3 and np.count_nonzero(ground.objects.labels == label) == 1:
            assert found is not None
            assert np.abs(box - found).max() <= 1


RECTANGLES = st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(1, 40), st.integers(1, 40))


@given(RECTANGLES, st.lists(RECTANGLES, min_size=1, max_size=3))
def test_a_hidden_object_shrinks_to_what_is_seen_or_goes(
    given_box: tuple[int, int, int, int], given_covers: list[tuple[int, int, int, int]]
) -> None:
    x, y, width, height = given_box
    covers: list[tuple[int, int, int, int]] = []
    for left, top, w, h in given_covers:
        place = (left, top, left + w, top + h)
        if not any(place[0] < c[2] and c[0] < place[2] and place[1] < c[3] and c[1] < place[3] for c in covers):
            covers.append(place)
    photo = Photo([(x, y, x + width, y + height)], (100, 100))
    image = photo.pixels.image.copy()
    for x1, y1, x2, y2 in covers:
        image[y1:y2, x1:x2] = MARKS[3]
    left_over = (image == MARKS[0]).all(2).sum() / (width * height)
    after = augment.occlude(photo.objects, covers)
    found = seen(image, 0)
    if len(after.boxes):
        assert after.boxes[0].tolist() == found
        assert left_over == 1 or left_over >= 0.25
    else:
        assert found is None or left_over < 0.25 or min(found[2] - found[0], found[3] - found[1]) < 4


def test_an_object_that_nothing_hides_stays_however_small() -> None:
    objects = Photo([(5, 5, 7, 7), (40, 40, 60, 60)]).objects
    assert augment.occlude(objects, [(50, 30, 70, 70)]).boxes.tolist() == [[5, 5, 7, 7], [40, 40, 50, 60]]
    assert augment.occlude(objects, []).boxes.tolist() == objects.boxes.tolist()


def test_ignored_objects_are_not_pasted() -> None:
    photo = Photo([(10, 10, 30, 30)], first=1)
    assert augment.pieces(photo.hw, photo.objects, Augment(), (64, 64), "stretch", rng(0)) == []


@given(SEEDS)
def test_a_mixed_photo_shows_the_objects_of_both(seed: int) -> None:
    one, other = Photo([(10, 10, 40, 50)]), Photo([(90, 60, 150, 110)], first=2)
    photos = [Labelled(photo.pixels.image, photo.objects) for photo in (one, other)]
    mixed = augment.mixup(photos[0], photos[1], rng(seed))
    assert mixed.objects.labels.tolist() == [0, 2]
    assert mixed.objects.labels.dtype == np.int64
    # Both are grey beside their objects, so what is not grey is an object, and well visible.
    marks = np.abs(mixed.image.astype(int) - 128).max(2) >= 0.4 * 127 - 1
    for half, box in ((slice(0, 80), mixed.objects.boxes[0]), (slice(80, 160), mixed.objects.boxes[1])):
        ys, xs = np.nonzero(marks[:, half])
        assert box.tolist() == [xs.min() + half.start, ys.min(), xs.max() + 1 + half.start, ys.max() + 1]


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
    whole = View((0, 0, 160, 120), (0, 0, 160, 120))

    def view(settings: Augment, seed: int, close: bool = False) -> View:
        boxes = spread().objects.boxes
        return augment.single((120, 160), boxes, settings, (120, 160), "stretch", rng(seed), close)[0]

    never, always = Augment(flip=0, crop=0, expand=0), Augment(flip=1, crop=1, expand=1)
    for seed in range(10):
        assert view(never, seed) == whole
        assert view(always, seed, close=True) == whole._replace(mirrored=True)
        changed = view(always, seed)
        assert changed.window != whole.window
        assert changed.place != whole.place
    assert 70 <= sum(view(Augment(crop=0), seed).mirrored for seed in range(200)) <= 130


@given(photos(), st.integers(1, 4), st.booleans())
def test_a_view_asks_for_no_more_pixels_than_it_needs(photo: Photo, factor: int, mirrored: bool) -> None:
    assume(min(photo.hw) >= 8 * factor)
    hw = (photo.hw[0] // factor, photo.hw[1] // factor)
    view = View((0, 0, photo.hw[1], photo.hw[0]), (0, 0, hw[1], hw[0]), mirrored)
    assert view.step == pytest.approx(min(photo.hw[0] / hw[0], photo.hw[1] / hw[1]))


def test_only_this_file_knows_albumentations() -> None:
    package = Path(augment.__file__).parent.parent
    knowing = [path.name for path in package.rglob("*.py") if "import albumentations" in path.read_text("utf-8")]
    assert knowing == []  # by name, when it is needed
    named = {path.name for path in package.rglob("*.py") if 'need("albumentations")' in path.read_text("utf-8")}
    assert named == {"augment.py"}

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from detkit.data.labels import Annotation, Columns, DataSet, Labels, from_annotations

OBJECT = st.tuples(st.sampled_from(["can", "box", "jar"]), st.lists(st.floats(-9, 99), min_size=4, max_size=4))
PHOTO = st.none() | st.lists(OBJECT, max_size=4)


def annotation(objects: list[tuple[str, list[float]]]) -> Annotation:
    count = len(objects)
    boxes = np.array([box for _, box in objects], np.float64).reshape(-1, 4)
    lines = np.arange(1, count + 1, dtype=np.int32)
    return Annotation("a.jpg", (3, 4), tuple(name for name, _ in objects), boxes, np.full(count, 2, np.uint8), lines)


def make(photos: list[list[tuple[str, list[float]]] | None]) -> Labels:
    return from_annotations([None if photo is None else annotation(photo) for photo in photos])


def contents(labels: Labels) -> list[list[tuple[str, list[float]]]]:
    result = []
    for photo in range(len(labels)):
        own = labels.photos == photo
        names = [labels.vocabulary[name] for name in labels.names[own]]
        result.append(list(zip(names, labels.boxes[own].tolist(), strict=True)))
    return result


def as_read(photos: list[list[tuple[str, list[float]]] | None]) -> list[list[tuple[str, list[float]]]]:
    return [photo or [] for photo in photos]


@given(st.lists(PHOTO, max_size=6), st.lists(PHOTO, max_size=6))
def test_joined_is_one_after_the_other(
    one: list[list[tuple[str, list[float]]] | None], other: list[list[tuple[str, list[float]]] | None]
) -> None:
    joined = make(one).joined(make(other))
    assert contents(joined) == as_read(one + other)
    assert (joined.hw[:, 0] > 0).tolist() == [photo is not None for photo in one + other]


@given(st.lists(PHOTO, max_size=6), st.data())
def test_take_takes_photos_in_any_order(
    photos: list[list[tuple[str, list[float]]] | None], data: st.DataObject
) -> None:
    rows = data.draw(st.permutations(range(len(photos))))
    rows = rows[: data.draw(st.integers(0, len(rows)))]
    places = data.draw(st.lists(st.integers(0, len(rows)), max_size=2))
    for place in places:
        rows.insert(place, -1)  # a photo without annotation
    taken = make(photos).take(np.array(rows, np.int64))
    assert contents(taken) == [(photos[row] or []) if row >= 0 else [] for row in rows]
    assert len(taken.flags) == len(taken.lines) == len(taken.names)


def test_remarks_move_with_their_photo() -> None:
    columns = Columns()
    for name in ("a", "b", "c"):
        columns.remark("odd value", 7, name)
        columns.end()
    taken = columns.labels().take(np.array([2, -1, 0]))
    assert [(remark.photo, remark.what) for remark in taken.remarks] == [(0, "c"), (2, "a")]
    joined = taken.joined(columns.labels())
    assert [(remark.photo, remark.what) for remark in joined.remarks][2:] == [(3, "a"), (4, "b"), (5, "c")]


@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6), st.data())
def test_taken_photos_are_those_of_before(photos: list[list[int]], data: st.DataObject) -> None:
    names = [f"{'ü' * index}{index}.jpg" for index in range(len(photos))]
    labels = np.array(list(chain(*photos)), np.int32)
    corners = np.arange(2 * len(labels), dtype=np.float64).reshape(-1, 2)
    whole = DataSet(
        root="root", classes=tuple("abcdefghij"), findings=(),
        paths=np.frombuffer("".join(names).encode(), np.uint8), path_ends=np.cumsum([len(n.encode()) for n in names]),
        hw=np.arange(90, 90 + 2 * len(photos), dtype=np.int32).reshape(-1, 2), boxes=np.hstack([corners, corners + 1]),
        labels=labels, flags=(labels % 3).astype(np.uint8), box_ends=np.cumsum([len(photo) for photo in photos]),
    )  # fmt: skip
    rows = data.draw(st.lists(st.sampled_from(range(len(photos))), unique=True))
    part = whole.take(np.array(rows, np.int64))
    assert len(part) == len(rows)
    assert part.classes == whole.classes
    for index, row in enumerate(rows):
        one, other = part[index], whole[row]
        assert (one.path, one.hw) == (other.path, other.hw)
        for name in ("boxes", "labels", "flags"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))

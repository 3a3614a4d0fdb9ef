"""Random data sets through random formats, and damaged files into every reader: nothing crashes, nothing is lost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detkit.data import convert
from detkit.data.labels import Photo
from detkit.errors import UserError
from tests.data.convert.sets import Row, annotation, make, rows
from tests.data.convert.test_convert import HELD, ORDERED
from tests.data.photos import save_image

SIZES = ((1, 1), (48, 64), (333, 701))
NAME = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cn", "Zl", "Zp"]), min_size=1, max_size=8).map(str.strip)
# Corners in any order, in and out of the photo, with up to 9 decimals.
NUMBER = st.one_of(
    st.integers(-50, 800).map(float),
    st.integers(-(10**10), 10**12).map(lambda number: number / 10**9),
    st.sampled_from([0.0, 0.1, 1 / 4, 64.0, 47.999999, 0.000001]),
)
OBJECT = st.tuples(st.integers(0, 3), st.tuples(NUMBER, NUMBER, NUMBER, NUMBER), st.integers(0, 15))
PHOTO = st.one_of(st.none(), st.lists(OBJECT, max_size=4))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    for hw in SIZES:
        for name in ("a", "sub/a", "b c"):
            save_image(root / f"{hw[0]}/{name}.png", hw)
    return root


def upright(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    return min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)


def check_chain(
    tmp: Path, photos: Path, formats: list[str], hw: tuple[int, int], classes: list[str], found: list[Any]
) -> None:
    """Write the photos, convert them from format to format; every object must come out as it went in."""
    content: dict[str, list[Row] | None] = {}
    for name, known in zip(("a", "sub/a", "b c"), found, strict=False):
        objects = None if known is None else [(classes[k % len(classes)], box, flags) for k, box, flags in known]
        content[f"{hw[0]}/{name}.png"] = objects
    source = [Photo(name, "", None if known is None else annotation(known, hw)) for name, known in content.items()]
    convert.write(formats[0], {"train": source[:2], "val": source[2:]}, classes, photos, tmp / "0", "link")
    held, ordered = HELD[formats[0]], formats[0] in ORDERED
    for index, format_name in enumerate(formats[1:], 1):
        convert.convert(
            tmp / str(index - 1), tmp / str(index), format_name, source_format=formats[index - 1], images="link"
        )
        held, ordered = held & HELD[format_name], ordered or format_name in ORDERED
    read = convert.read(formats[-1], tmp / str(len(formats) - 1), None).photos
    objects = [row for known in content.values() if known is not None for row in known]
    expected = sorted((label, upright(box) if ordered else box, flags & held) for label, box, flags in objects)
    assert sorted(row for photo in read if photo.annotation for row in rows(photo)) == expected
    assert sum(photo.annotation is not None for photo in read) == sum(known is not None for known in content.values())


def chains(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    given_ = given(
        st.lists(st.sampled_from(convert.FORMATS), min_size=1, max_size=3),
        st.sampled_from(SIZES),
        st.lists(NAME.filter(bool), min_size=1, max_size=4, unique=True),
        st.lists(PHOTO, min_size=1, max_size=3).filter(any),
    )
    return lambda test: settings(max_examples=examples, suppress_health_check=list(HealthCheck))(given_(test))


@chains(60)
def test_no_object_is_lost(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, formats: Any, hw: Any, classes: Any, found: Any
) -> None:
    check_chain(tmp_path_factory.mktemp("x"), photos, formats, hw, classes, found)


@pytest.mark.slow
@chains(5000)
def test_no_object_is_lost_in_5000_cases(
    tmp_path_factory: pytest.TempPathFactory, photos: Path, formats: Any, hw: Any, classes: Any, found: Any
) -> None:
    check_chain(tmp_path_factory.mktemp("x"), photos, formats, hw, classes, found)


# --- damaged files

SPLICE = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(
        [b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r\n", b'"', b",", b";", b"{", b"}", b"[", b"]", b"<", b">",
         b"&", b"-", b"9" * 400, b"1e999", b"NaN", b"null", b"true", b"[" * 5000, b"../" * 50, b"\\", b"%", b"*",
         b"!!", b": ", b"0", b"-1", b"<!DOCTYPE a>", b"\xe9"]
    ),
)  # fmt: skip
EDIT = st.tuples(st.floats(0, 1), st.integers(0, 40), SPLICE)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small data set in each format."""
    root = tmp_path_factory.mktemp("sound")
    first, second = make(root / "in", {
        "a.png": [("can", (1.0, 2.0, 30.5, 40.0), 0), ("box", (0.1, 0.2, 3.3, 4.0), 5)], "sub/b.png": []
    })  # fmt: skip
    for name in convert.FORMATS:
        convert.write(name, {"train": [first], "val": [second]}, ("can", "box"), root / "in", root / name, "link")
    return {name: root / name for name in convert.FORMATS}


def check_damage(tmp: Path, root: Path, format_name: str, which: int, edits: list[tuple[float, int, bytes]]) -> None:
    """Damage one of the data set's files, read it in every way there is, and mend the file."""
    texts = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix != ".png")
    path = texts[which % len(texts)]
    whole = content = path.read_bytes()
    for place, length, splice in edits:
        at = int(place * len(content))
        content = content[:at] + splice + content[at + length :]
    path.write_bytes(content)
    try:
        for reading in (lambda: convert.sniff(root), lambda: convert.splits(format_name, root)):
            _or_refused(reading)
        for split in (None, "train", "val"):
            found = _or_refused(lambda split=split: convert.read(format_name, root, split))
            if found is not None:
                _write_again(tmp, root, found)
    finally:
        path.write_bytes(whole)


def _or_refused(reading: Callable[[], Any]) -> Any:
    """What it gives, None where it is refused in one line."""
    try:
        return reading()
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    return None


def _write_again(tmp: Path, root: Path, found: convert.Source) -> None:
    """What could be read can be written, and comes back whole."""
    out = tmp / f"{len(list(tmp.iterdir()))}"
    classes = tuple(
        dict.fromkeys([*found.classes, *(n for p in found.photos if p.annotation for n in p.annotation.names)])
    )
    if _or_refused(lambda: convert.write("coco", {"": found.photos}, classes, root, out, "none")) is None:
        return
    again = convert.read("coco", out, None).photos
    assert [rows(photo) for photo in again if photo.annotation] == [
        rows(photo) for photo in found.photos if photo.annotation
    ]


def damages(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    given_ = given(st.sampled_from(convert.FORMATS), st.integers(0, 20), st.lists(EDIT, min_size=1, max_size=4))
    return lambda test: settings(max_examples=examples, suppress_health_check=list(HealthCheck))(given_(test))


@damages(150)
def test_damaged_files_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, sound: dict[str, Path], format_name: str, which: int, edits: Any
) -> None:
    check_damage(tmp_path_factory.mktemp("x"), sound[format_name], format_name, which, edits)


@pytest.mark.slow
@damages(5000)
def test_damaged_files_are_read_or_refused_in_5000_cases(
    tmp_path_factory: pytest.TempPathFactory, sound: dict[str, Path], format_name: str, which: int, edits: Any
) -> None:
    check_damage(tmp_path_factory.mktemp("x"), sound[format_name], format_name, which, edits)

import io
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance

from detkit.data import similar, synth
from detkit.errors import UserError
from tests.data.photos import save_image


@pytest.fixture(scope="module")
def shelves() -> list[Image.Image]:
    return [synth.render(7, index, (320, 240)).image for index in range(6)]


def encoded(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


CHANGES = {
    "same": lambda image: image,
    "encoded anew": lambda image: encoded(image, 40),
    "smaller": lambda image: image.resize((200, 150)),
    "stretched a little": lambda image: image.resize((330, 240)),
    "lighter": lambda image: image.point(lambda level: min(255, level + 5)),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.8),
    "cut": lambda image: image.crop((2, 2, 318, 238)),
}


def hashed(images: list[Image.Image]) -> NDArray[np.uint64]:
    return np.stack([similar.fingerprint(np.asarray(image)) for image in images])


@pytest.mark.parametrize("change", CHANGES)
def test_only_a_photo_s_own_copies_are_near(shelves: list[Image.Image], change: str) -> None:
    hashes = hashed([*shelves, *(CHANGES[change](image) for image in shelves)])
    count = len(shelves)
    assert similar.pairs(hashes).tolist() == [[index, index + count] for index in range(count)]
    assert similar.groups(hashes).tolist() == [*range(count), *range(count)]


def package(colour: str) -> Image.Image:
    image = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(image).rectangle((70, 20, 130, 180), colour)
    return image


def test_packages_of_one_shape_on_white_are_told_apart_by_their_colour() -> None:
    hashes = hashed([package("#b03030"), package("#3030b0"), package("#b83434")])
    assert similar.pairs(hashes).tolist() == [[0, 2]]


def test_blank_photos_are_near_to_nothing() -> None:
    grey = np.full((40, 60, 3), 200, np.uint8)
    noise = grey + np.random.default_rng(0).integers(0, 3, grey.shape, dtype=np.uint8)
    hashes = np.stack([similar.fingerprint(image) for image in (grey, noise, grey // 2)])
    assert not hashes.any()
    assert similar.pairs(hashes).shape == (0, 2)
    assert similar.groups(hashes).tolist() == [0, 1, 2]


def brute_force(hashes: NDArray[np.uint64], most: int) -> list[list[int]]:
    def near(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> bool:
        apart = [(int(a) ^ int(b)).bit_count() for a, b in zip(one, other, strict=True)]
        return apart[0] <= most and apart[1] <= 2 * most and apart[2] <= most

    return [[i, j] for i, j in combinations(range(len(hashes)), 2) if near(hashes[i], hashes[j])]


def components(count: int, pairs: list[list[int]]) -> list[int]:
    group = list(range(count))
    for _ in range(count):
        for i, j in pairs:
            group[i] = group[j] = min(group[i], group[j])
    return group


@st.composite
def crowds(draw: st.DrawFn) -> NDArray[np.uint64]:
    """Hashes around a few centres, so that distances lie on both sides of every threshold, and some are equal."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, centres = draw(st.integers(1, 40)), draw(st.integers(1, 4))
    flips = rng.random((count, 3 * 64)) < draw(st.sampled_from([0.0, 0.02, 0.05, 0.1]))
    return rng.integers(1, 2**63, (centres, 3), dtype=np.uint64)[rng.integers(centres, size=count)] ^ np.packbits(
        flips, axis=1
    ).view(np.uint64)


@given(crowds(), st.integers(0, 64))
def test_pairs_and_groups_are_those_of_brute_force(hashes: NDArray[np.uint64], most: int) -> None:
    expected = brute_force(hashes, most)
    assert similar.pairs(hashes, most).tolist() == expected
    assert similar.groups(hashes, most).tolist() == components(len(hashes), expected)


def test_pairs_among_thousands_are_those_planted() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64 - 1, (5000, 3), dtype=np.uint64)
    bits = np.zeros((1000, 3 * 64), np.bool_)
    for row, start in enumerate(rng.integers(0, 57, 1000)):
        bits[row, start : start + 8] = True  # as many as may differ
    hashes[4000:] = hashes[:1000] ^ np.packbits(bits, axis=1).view(np.uint64)
    assert similar.pairs(hashes).tolist() == [[index, index + 4000] for index in range(1000)]
    assert not len(similar.pairs(hashes, 7))


def test_many_copies_make_one_group() -> None:
    hashes = np.full((20_000, 3), 12345, np.uint64)
    assert not similar.groups(hashes).any()


def test_no_photo() -> None:
    none = np.zeros((0, 3), np.uint64)
    assert similar.pairs(none).shape == (0, 2)
    assert similar.groups(none).shape == (0,)


def test_files_hash_alike_in_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save_image(tmp_path / f"{index}.png", seed=index) for index in range(5)]
    monkeypatch.setattr(similar, "_FEW", 2)
    calls: list[tuple[int, int]] = []
    alone = similar.fingerprints(paths, workers=1, progress=lambda *step: calls.append(step))
    assert calls == [(index + 1, 5) for index in range(5)]
    np.testing.assert_array_equal(alone, similar.fingerprints(paths, workers=2))
    np.testing.assert_array_equal(alone, hashed([Image.open(path) for path in paths]))


def test_a_damaged_photo_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    with pytest.raises(UserError, match=r"bad\.jpg"):
        similar.fingerprints([tmp_path / "bad.jpg"])

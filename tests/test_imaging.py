import contextlib
import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from detkit import geometry, imaging
from detkit.errors import UserError

RED, WHITE = [255, 0, 0], [255, 255, 255]


def picture(hw: tuple[int, int] = (20, 40)) -> Image.Image:
    """A red corner at the top left."""
    pixels = np.zeros((*hw, 3), np.uint8)
    pixels[: hw[0] // 2, : hw[1] // 4] = RED
    return Image.fromarray(pixels)


def jpeg(hw: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (*hw, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


JPEG = jpeg()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_exif_says(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"x.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (imaging.decode(path) == expected).all()
    assert imaging.size(path) == imaging.check(path).hw == expected.shape[:2]
    applied = 1 if suffix == "tiff" else orientation  # Pillow itself turns TIFF
    assert imaging.orientation(path) == imaging.orientation(path.read_bytes()) == applied
    assert imaging.check(path).orientation == applied


def test_every_mode_becomes_rgb(tmp_path: Path) -> None:
    def decoded(image: Image.Image, suffix: str = "png", **options: object) -> list[int]:
        path = tmp_path / f"x.{suffix}"
        image.save(path, **options)
        result = imaging.decode(path)
        assert result.dtype == np.uint8
        assert result.shape == (20, 40, 3)
        return result[2, 2].tolist()

    assert decoded(picture()) == RED
    assert decoded(picture().convert("P")) == RED
    assert decoded(picture().convert("L")) == [76, 76, 76]
    assert decoded(Image.new("1", (40, 20), 1)) == WHITE
    assert decoded(Image.new("RGBA", (40, 20), (255, 0, 0, 0))) == WHITE
    assert decoded(Image.new("RGBA", (40, 20), (255, 0, 0, 255))) == RED
    assert decoded(Image.new("LA", (40, 20), (0, 0))) == WHITE
    assert decoded(picture(), transparency=(255, 0, 0)) == WHITE
    assert decoded(picture().convert("P"), transparency=picture().convert("P").getpixel((2, 2))) == WHITE
    assert decoded(Image.fromarray(np.full((20, 40), 65535, np.uint16))) == WHITE
    assert decoded(Image.fromarray(np.full((20, 40), 0x1234, np.uint16)), "tif") == [0x12] * 3
    assert decoded(Image.new("CMYK", (40, 20), (0, 255, 255, 0)), "tif") == RED
    assert np.allclose(decoded(Image.new("CMYK", (40, 20), (0, 255, 255, 0)), "jpg"), RED, atol=3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif"])
def test_a_cut_off_file_is_one_clear_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    for read in (imaging.decode, imaging.check):
        with pytest.raises(UserError, match=f"cut.{suffix}") as caught:
            read(path)
        assert "\n" not in str(caught.value)


def test_what_follows_the_end_of_a_jpeg_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(JPEG + b"made by a camera" * 100)
    assert imaging.check(path) == ((64, 64), 1)


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for read in (imaging.decode, imaging.size, imaging.check):
        with pytest.raises(UserError, match=r"x\.jpg: not an image"):
            read(path)
    with pytest.raises(UserError, match="image: not an image"):
        imaging.decode(content)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image"):
        imaging.decode(tmp_path / "gone.jpg")
    with pytest.raises(UserError, match=str(tmp_path)):
        imaging.decode(tmp_path)


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(UserError, match="megapixels"):
        imaging.decode(JPEG, max_pixels=4095)
    assert imaging.decode(JPEG, max_pixels=4096).shape == (64, 64, 3)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    started = time.perf_counter()
    with pytest.raises(UserError, match="megapixels"):
        imaging.decode(bomb + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    assert time.perf_counter() - started < 1


@given(st.integers(0, len(JPEG) - 1), st.binary(max_size=8), st.booleans())
def test_damage_gives_an_image_or_a_user_error(place: int, damage: bytes, cut: bool) -> None:
    content = JPEG[:place] + damage + (b"" if cut else JPEG[place + len(damage) :])
    with contextlib.suppress(UserError):
        assert imaging.decode(content).dtype == np.uint8


def test_the_canvas_is_pillows_antialiased_bilinear() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    canvas = imaging.to_canvas(image, geometry.plan((90, 60), (32, 48), "stretch"), (1, 2, 3))
    expected = Image.fromarray(image).resize((48, 32), Image.Resampling.BILINEAR)
    assert (canvas == np.asarray(expected)).all()


def test_a_letterbox_is_filled_at_the_right_or_bottom() -> None:
    image = np.full((90, 60, 3), 200, np.uint8)
    plan = geometry.plan((90, 60), (45, 48), "letterbox")
    canvas = imaging.to_canvas(image, plan, (1, 2, 3))
    assert canvas.shape == (45, 48, 3)
    assert plan.inner == (45, 30)
    assert (canvas[:, :30] == 200).all()
    assert (canvas[:, 30:] == (1, 2, 3)).all()


def test_a_photo_of_the_canvas_size_stays_as_it_is() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    assert (imaging.to_canvas(image, geometry.plan((30, 20), (30, 20), "stretch"), (0, 0, 0)) == image).all()


def test_the_fill_is_the_mean_colour() -> None:
    assert imaging.fill((0.0, 0.5, 1.0)) == (0, 128, 255)

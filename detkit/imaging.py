"""Photos in: any file Pillow reads becomes RGB uint8 as a person sees it, or one clear error. And onto the canvas."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from detkit.errors import UserError
from detkit.geometry import ResizePlan

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif")
# Pillow's own limit, from which it warns: 256 MiB as RGB.
MAX_PIXELS = 89_478_485

# Formats of pictures only: Pillow would also run Ghostscript on an EPS file that is named .jpg.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
# What Pillow's decoders raise on files that are cut off or damaged.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, EOFError, struct.error, zlib.error)
_ORIENTATION = 0x0112
_KINDS_OF_PIXELS = {"L": "greyscale", "1": "greyscale", "P": "palette", "CMYK": "CMYK", "YCCK": "CMYK"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def _opened(source: str | Path | bytes, max_pixels: int) -> Iterator[tuple[Image.Image, IO[bytes]]]:
    """The image, its header read, and its file. All that goes wrong inside the block becomes a UserError."""
    name = "image" if isinstance(source, bytes) else str(source)
    try:
        with (
            io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file,
            Image.open(file, formats=_FORMATS) as image,
        ):
            if image.width * image.height > max_pixels:
                raise Image.DecompressionBombError
            yield image, file
    except Image.DecompressionBombError:
        raise UserError(f"{name}: more than {max_pixels / 1e6:.0f} megapixels; make it smaller") from None
    except FileNotFoundError:
        raise UserError(f"{name}: no such image") from None
    except (UnidentifiedImageError, KeyError):  # KeyError: this build of Pillow lacks one of the formats
        raise UserError(f"{name}: not an image that can be read") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name}: damaged or cut-off image ({reason[:100]})") from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied, 1 to 8; 1 where there is none."""
    if image.format == "TIFF":
        return 1  # Pillow applies it itself, in the size and when it loads
    try:
        # The base class's method: PNG's own decodes the pixels to look for EXIF behind them.
        orientation = int(Image.Image.getexif(image).get(_ORIENTATION, 1))
        return orientation if orientation in _TURNS else 1
    except _DAMAGE:
        return 1


def _upright_size(image: Image.Image, orientation: int) -> tuple[int, int]:
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels; save it with 8 or 16 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):  # convert("RGB") would clip at 255
        return Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def picture(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in Pillow's own form, RGB, as `decode` gives it: for what would only make one of the array again."""
    with _opened(source, max_pixels) as (image, _):
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def decode(source: str | Path | bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """The image as uint8 [H, W, 3] RGB, turned as EXIF says; transparency on white, 16 bits reduced to 8.

    source: a path, or the file's content. Raises UserError, one line naming the file, where it is missing, no image,
    cut off, or has more than `max_pixels`.
    """
    return np.asarray(picture(source, max_pixels=max_pixels))


def size(path: str | Path) -> tuple[int, int]:
    """Height and width as `decode` would give them, from the header alone. Raises UserError."""
    with _opened(path, MAX_PIXELS) as (image, _):
        return _upright_size(image, _orientation(image))


def orientation(source: str | Path | bytes) -> int:
    """The EXIF orientation, 1 to 8, that `decode` applies; 1 where there is none. Raises UserError."""
    with _opened(source, MAX_PIXELS) as (image, _):
        return _orientation(image)


class Header(NamedTuple):
    """What an image file says of itself: height and width after its EXIF orientation (1 to 8) is applied."""

    hw: tuple[int, int]
    orientation: int


def check(path: str | Path) -> Header:
    """The header, and the file's end: a file that was cut off raises UserError, without decoding whole ones.

    A JPEG, PNG or WebP that ends as its format says is taken as whole; any other file is decoded to find out.
    """
    with _opened(path, MAX_PIXELS) as (image, file):
        orientation = _orientation(image)
        header = Header(_upright_size(image, orientation), orientation)
        if not _ends_well(file, image.format):
            image.load()
        return header


class Inspection(NamedTuple):
    """What decoding the whole file tells: its format, 'JPEG', 'PNG' and so on; the kind of its pixels, '' for RGB with
    8 bits, else 'greyscale', 'palette', 'transparent', 'CMYK' or '16-bit'; the image, uint8 [h, w, 3]."""

    format: str
    pixels: str
    image: NDArray[np.uint8]


def inspect(content: bytes, least: int) -> Inspection:
    """Read a whole image file. The image is as `decode` gives it; but of a JPEG at its own 1/2, 1/4 or 1/8 where that
    leaves `least` pixels a side, which finds a file that is cut off all the same. Raises UserError."""
    with _opened(content, MAX_PIXELS) as (image, _):
        deep = image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))
        image.draft(None, (least, least))
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _to_rgb(image)
        mode = "transparent" if image.has_transparency_data else _KINDS_OF_PIXELS.get(image.mode, "")
        kind = "JPEG" if image.format == "MPO" else str(image.format)
        return Inspection(kind, "16-bit" if deep else mode, np.asarray(rgb if turn is None else rgb.transpose(turn)))


def _ends_well(file: IO[bytes], kind: str | None) -> bool:
    length = file.seek(0, io.SEEK_END)
    file.seek(max(0, length - 64))
    tail = file.read()
    if kind in ("JPEG", "MPO"):
        return tail.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    if kind == "PNG":
        return tail.endswith(b"IEND\xaeB`\x82")
    if kind == "WEBP":
        file.seek(4)
        return length >= int.from_bytes(file.read(4), "little") + 8
    return False


def to_canvas(
    image: NDArray[np.uint8] | Image.Image, plan: ResizePlan, fill: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """The image, uint8 [H, W, 3] or a `picture`, resized by antialiased bilinear onto the plan's canvas; uint8
    [h, w, 3].

    fill: the RGB colour of what a letterbox leaves free.
    """
    height, width = plan.inner
    if plan.inner != plan.source:
        whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image = whole.resize((width, height), Image.Resampling.BILINEAR)
    image = np.asarray(image)
    if plan.inner == plan.canvas:
        return image
    canvas = np.empty((*plan.canvas, 3), np.uint8)
    canvas[:] = fill
    canvas[:height, :width] = image
    return canvas


def fill(mean: tuple[float, float, float]) -> tuple[int, int, int]:
    """The mean colour, of values in 0..1, as RGB uint8: what padding is painted with."""
    red, green, blue = (round(255 * value) for value in mean)
    return red, green, blue

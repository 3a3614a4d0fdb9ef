"""HTML pages that are one file: text, tables and thumbnails, with nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from detkit import __version__
from detkit.errors import need
from detkit.files import atomic_write

_MARK, _EDGE, _BACKGROUND = "#ff2d95", "#ffffff", "#8c8c8c"
_LEAST = 6  # pixels: a box that is smaller on the thumbnail is drawn as large as this, or nobody would see it


@cache
def _environment() -> Any:
    jinja2 = need("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["version"] = __version__
    return environment


def render(template: str, **values: object) -> str:
    """The page that a template of detkit/templates makes of the values; text in them is escaped.

    Templates extend base.html: blocks `title`, `style`, `lead` (the paragraph below the title) and `content`. It styles
    tables, `div.scroll` around wide ones, `div.thumbs` of `figure`s, `details`, `div.facts`, `span.badge` with the
    class error, change, note or good.
    """
    return str(_environment().get_template(template).render(**values))


def write(path: str | Path, template: str, **values: object) -> None:
    """`render` into a file, whole or not at all. Raises UserError where it can't be written."""
    # Bytes in a file's name that are no UTF-8 have no place in a page.
    atomic_write(path, render(template, **values).encode("utf-8", "replace"))


def thumbnail(image: NDArray[np.uint8], boxes: Iterable[Sequence[float]] = (), side: int = 160) -> str:
    """The photo as a data URI: a JPEG, its longer side `side` pixels or less, with the boxes drawn.

    image: uint8 [H, W, 3]. boxes: each x1 y1 x2 y2 in pixels of the image, in any order; where one sticks out, the
    thumbnail shows up to half a photo of what lies beyond the edge. A tiny box is drawn larger than it is.
    """
    height, width = image.shape[:2]
    edges = [(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) for x1, y1, x2, y2 in boxes]
    left, top = (max(min(0.0, *(box[i] for box in edges), 0.0), -half) for i, half in ((0, width / 2), (1, height / 2)))
    right, bottom = (
        min(max(size, *(box[i] for box in edges), size), 1.5 * size) for i, size in ((2, width), (3, height))
    )
    scale = min(1.0, side / max(right - left, bottom - top))
    canvas = Image.new("RGB", tuple(max(1, round(scale * n)) for n in (right - left, bottom - top)), _BACKGROUND)
    small = Image.fromarray(image)
    small.thumbnail((max(1, round(scale * width)), max(1, round(scale * height))), Image.Resampling.BILINEAR)
    canvas.paste(small, (round(-scale * left), round(-scale * top)))
    pen = ImageDraw.Draw(canvas)
    for box in edges:
        spots = [scale * (value - origin) for value, origin in zip(box, (left, top, left, top), strict=True)]
        _frame(pen, spots, canvas.size)
    return _jpeg(canvas)


def data_uri(image: NDArray[np.uint8]) -> str:
    """The picture, uint8 [H, W, 3], as a data URI: a JPEG."""
    return _jpeg(Image.fromarray(image))


def _jpeg(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _frame(pen: ImageDraw.ImageDraw, box: Sequence[float], limits: tuple[int, int]) -> None:
    """A frame that is seen on light and dark, inside the picture whatever the box."""
    corners = []
    for low, high, limit in ((box[0], box[2], limits[0]), (box[1], box[3], limits[1])):
        low, high = (min(max(round(value), 0), limit - 1) for value in (low, high))
        if high - low < _LEAST:
            low = max(0, min((low + high - _LEAST) // 2, limit - 1 - _LEAST))
            high = min(low + _LEAST, limit - 1)
        corners.append((low, high))
    (x1, x2), (y1, y2) = corners
    pen.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=_EDGE, width=4)
    pen.rectangle((x1, y1, x2, y2), outline=_MARK, width=2)

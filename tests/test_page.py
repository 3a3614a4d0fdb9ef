import base64
import io
import re
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from detkit import page
from detkit.errors import UserError

GREEN = np.zeros((90, 120, 3), np.uint8) + np.array([0, 160, 0], np.uint8)


def picture(uri: str) -> np.ndarray:
    head, _, content = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB")).astype(int)


def marked(image: np.ndarray) -> list[int]:
    """Where the frame is drawn: x1 y1 x2 y2."""
    red, green, blue = np.moveaxis(image, 2, 0)
    ys, xs = np.nonzero((red > 190) & (green < 130) & (blue > 90) & (blue < 220))
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def test_a_thumbnail_is_the_photo_made_small_with_its_box() -> None:
    image = picture(page.thumbnail(GREEN, [(30, 15, 90, 60)], side=60))
    assert image.shape == (45, 60, 3)
    assert np.abs(image[40, 3] - (0, 160, 0)).max() < 16
    assert np.abs(np.array(marked(image)) - (15, 8, 45, 30)).max() <= 2


def test_a_thumbnail_is_never_larger_than_the_photo() -> None:
    assert picture(page.thumbnail(GREEN, side=500)).shape == GREEN.shape


def test_a_box_beyond_the_edge_is_seen_beyond_it() -> None:
    image = picture(page.thumbnail(GREEN, [(130, 20, 160, 50)], side=160))
    assert image.shape == (90, 160, 3)
    assert marked(image)[0] >= 125
    assert np.abs(image[85, 150] - 140).max() < 16  # grey: no photo there


def test_a_tiny_box_is_drawn_large_enough_to_be_seen() -> None:
    x1, y1, x2, y2 = marked(picture(page.thumbnail(GREEN, [(60, 45, 60, 45)])))
    assert min(x2 - x1, y2 - y1) >= 6
    assert abs((x1 + x2) / 2 - 60) <= 2
    assert abs((y1 + y2) / 2 - 45) <= 2


CORNER = st.one_of(st.integers(-50, 300), st.sampled_from([-1e9, 1e9, 0.0]))


@given(
    hw=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    boxes=st.lists(st.tuples(CORNER, CORNER, CORNER, CORNER), max_size=3),
    side=st.integers(1, 50),
)
@settings(deadline=None, max_examples=60)
def test_any_box_on_any_photo(hw: tuple[int, int], boxes: list[tuple[float, ...]], side: int) -> None:
    image = picture(page.thumbnail(np.zeros((*hw, 3), np.uint8), boxes, side))
    assert max(image.shape[:2]) <= side


FACTS = {"root": "<b>&", "photos": 1, "annotations": 1, "objects": 1, "classes": {"<script>": 1}, "splits": {}}


def test_what_is_put_into_a_page_is_escaped() -> None:
    text = page.render("audit.html", facts=FACTS, kinds=[], verdict="1 < 2", leaks=())
    assert "<title>Audit of &lt;b&gt;&amp;</title>" in text
    assert "1 &lt; 2" in text
    assert "<script" not in text


def test_a_value_that_is_missing_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="verdict"):
        page.render("audit.html", facts=FACTS, kinds=[], leaks=())


def test_a_page_refers_to_nothing_outside_itself() -> None:
    text = page.render("audit.html", facts=FACTS, kinds=[], verdict="", leaks=())
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)|url\(|@import|<script", text)


def test_names_that_are_no_unicode_are_written(tmp_path: Path) -> None:
    page.write(tmp_path / "a.html", "audit.html", facts=FACTS, kinds=[], verdict="caf\udce9", leaks=())
    assert "caf?" in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/a\.html|a\.html: can't be written"):
        page.write(tmp_path / "file" / "a.html", "audit.html", facts=FACTS, kinds=[], verdict="", leaks=())

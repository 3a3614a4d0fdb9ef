import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit.geometry import Rule, plan

SIDE = st.integers(1, 6000)
CANVAS = st.integers(1, 1500)
UNIT = st.floats(0, 1)


@given(SIDE, SIDE, CANVAS, CANVAS, st.sampled_from(["stretch", "letterbox"]), st.lists(st.tuples(*[UNIT] * 4)))
def test_there_and_back_is_where_it_was(
    h: int, w: int, ch: int, cw: int, rule: Rule, shares: list[tuple[float, float, float, float]]
) -> None:
    there = plan((h, w), (ch, cw), rule)
    boxes = np.array(shares).reshape(-1, 4) * [w, h, w, h]
    on_canvas = there.to_canvas(boxes)
    assert on_canvas.shape == boxes.shape
    assert (on_canvas >= 0).all()
    assert (on_canvas <= np.array([cw, ch, cw, ch]) * (1 + 1e-12)).all()
    assert np.allclose(there.to_source(on_canvas), boxes, rtol=1e-9, atol=1e-9)


@given(SIDE, SIDE, CANVAS, CANVAS)
def test_a_letterbox_fits_and_keeps_the_aspect_ratio_to_the_pixel(h: int, w: int, ch: int, cw: int) -> None:
    inner_h, inner_w = plan((h, w), (ch, cw), "letterbox").inner
    assert 1 <= inner_h <= ch
    assert 1 <= inner_w <= cw
    assert inner_h == ch or inner_w == cw
    scale = min(ch / h, cw / w)
    assert abs(inner_h - max(1, h * scale)) <= 0.5
    assert abs(inner_w - max(1, w * scale)) <= 0.5


@given(SIDE, SIDE, st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 4)))
def test_what_comes_back_lies_in_the_photo(h: int, w: int, boxes: list[tuple[float, float, float, float]]) -> None:
    back = plan((h, w), (300, 200), "letterbox").to_source(np.array(boxes))
    assert (back >= 0).all()
    assert (back <= [w, h, w, h]).all()


@pytest.mark.parametrize("rule", ["stretch", "letterbox"])
def test_no_boxes_give_no_boxes(rule: Rule) -> None:
    there = plan((10, 20), (30, 40), rule)
    assert there.to_canvas(np.zeros((0, 4))).shape == there.to_source(np.array([])).shape == (0, 4)


def test_a_stretched_photo_fills_the_canvas() -> None:
    boxes = plan((100, 50), (200, 200), "stretch").to_canvas(np.array([[0, 0, 50, 100], [10, 10, 20, 20]]))
    assert boxes.tolist() == [[0, 0, 200, 200], [40, 20, 80, 40]]

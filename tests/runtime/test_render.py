import numpy as np
import pytest
from numpy.typing import NDArray

from detkit.runtime import render
from detkit.types import Detections

CLASSES = ("milk", "Żurek łódzki", "牛奶", "a" * 80, "", "tab\tnew\nline")


def grey(height: int, width: int) -> NDArray[np.uint8]:
    return np.full((height, width, 3), 128, np.uint8)


def found(boxes: list[list[float]], hw: tuple[int, int], scores: list[float] | None = None) -> Detections:
    count = len(boxes)
    ranks = np.linspace(0.95, 0.3, count) if scores is None else np.array(scores)
    labels = np.arange(count) % len(CLASSES)
    return Detections(np.array(boxes, np.float32).reshape(-1, 4), ranks.astype(np.float32), labels, hw)


def test_a_box_is_drawn_in_its_class_colour_and_the_photo_is_left_alone() -> None:
    image = grey(300, 400)
    drawn = render.draw(image, found([[100, 100, 300, 250]], (300, 400)), CLASSES)
    assert (image == 128).all()
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert drawn[200, 100].tolist() == drawn[249, 150].tolist() == drawn[200, 299].tolist() == [0xE6, 0x9F, 0x00]
    assert (drawn[130:230, 130:280] == 128).all()  # the product stays visible
    assert (drawn[:70] == 128).all()
    assert (drawn[80:100, 100:140] != 128).any()  # the tag, above the box


def test_drawing_is_deterministic() -> None:
    boxes = np.random.default_rng(0).uniform(0, 200, (40, 2, 2))
    one = found(np.concatenate((boxes.min(1), boxes.max(1) + 5), 1).tolist(), (205, 205))
    first, second = (render.draw(grey(205, 205), one, CLASSES) for _ in range(2))
    assert (first == second).all()


def test_nothing_found_or_nothing_sure_enough_leaves_the_photo() -> None:
    image = grey(50, 60)
    assert (render.draw(image, found([], (50, 60)), CLASSES) == image).all()
    assert (render.draw(image, found([[5, 5, 40, 40]], (50, 60), [0.4]), CLASSES, score=0.5) == image).all()


@pytest.mark.parametrize("hw", [(1, 1), (3, 2), (10, 5000), (5000, 10), (200, 200), (3000, 4000)])
def test_any_size_and_any_box(hw: tuple[int, int]) -> None:
    height, width = hw
    boxes = [[0, 0, width, height], [width - 0.3, height - 0.2, width, height], [0, 0, 0.1, 0.1],
             [width / 4, height / 4, width / 2, height / 2], [0, 0, width, 0.5], [0, 0, width, height]]  # fmt: skip
    image = grey(*hw)
    drawn = render.draw(image, found([*map(list, boxes)], hw), CLASSES)
    assert drawn.shape == image.shape
    assert (drawn != image).any()


def test_lines_and_letters_grow_with_the_photo() -> None:
    def inked(side: int) -> tuple[int, int]:
        box = [side * 0.2, side * 0.4, side * 0.8, side * 0.8]
        drawn = render.draw(grey(side, side), found([box], (side, side)), CLASSES)
        changed = (drawn != 128).any(2)
        return int(changed[round(side * 0.6), : side // 2].sum()), int(changed[: round(side * 0.4)].any(1).sum())

    (thin, low), (thick, high) = inked(200), inked(4000)
    assert (thin, low) == (3, 13)  # 2 px of colour, 1 of contrast; 11 px letters
    assert thick >= 15
    assert high >= 80


def tags(one: Detections, classes: tuple[str, ...]) -> list[tuple[str, NDArray[np.int64]]]:
    style = render._style(one)
    font = render.ImageFont.load_default(style.font)
    boxes = [render._pixels(box, one.hw) for box in one.boxes]
    placed = render._place(one, boxes, classes, style, font, scores=True)
    return [(tag.text, np.array(tag.box)) for tag in placed if tag is not None]


def test_forty_tags_on_a_shelf_do_not_cover_each_other() -> None:
    boxes = [[x, y, x + 58, y + 80] for y in range(40, 480, 110) for x in range(5, 640, 63)][:40]
    one = found(boxes, (480, 640))
    placed = tags(one, ("cola_classic", "tea", "jam_strawberry", "oil", "rice", "yoghurt_blueberry"))
    assert len(placed) == 40
    rectangles = [rectangle for _, rectangle in placed]
    covered = [render._common(np.array(rectangles[:i]), r) for i, r in enumerate(rectangles) if i]
    assert max(covered) <= 0.1 * min((r[2] - r[0]) * (r[3] - r[1]) for r in rectangles)
    assert all(((r >= 0) & (r <= (640, 480) * 2)).all() for r in rectangles)
    assert "tea 93" in dict(placed)


def test_a_crowd_of_tiny_boxes_is_not_buried_under_tags() -> None:
    corners = np.random.default_rng(1).uniform(0, 450, (200, 2))
    boxes = np.concatenate((corners, corners + 30), 1).tolist()
    placed = tags(found(boxes, (480, 480)), ("milk", "tea", "oil", "rice", "cola_classic", "jam"))
    assert 50 < len(placed) < 200


def test_a_lone_tag_says_class_and_score() -> None:
    assert [text for text, _ in tags(found([[9, 30, 90, 80]], (100, 200), [0.997]), CLASSES)] == ["milk 99"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [("cola", "cola"), ("Żółć", "Zolc"), ("Crème brûlée", "Creme brulee"), ("Weißwurst", "Weisswurst"),
     ("牛奶", "#7"), ("milk 牛奶", "#7"), ("", "#7"), ("a\nb", "#7")],
)  # fmt: skip
def test_names_the_font_lacks(name: str, shown: str) -> None:
    assert render.plain(name, 7) == shown


def test_colours_are_fixed_distinct_and_legible() -> None:
    assert render.colour(0) == render.colour(len(render.PALETTE)) == (0xE6, 0x9F, 0x00)
    assert len({render.colour(i) for i in range(24)}) == 24

    def luminance(rgb: tuple[int, int, int]) -> float:
        parts = [(c / 255 / 12.92 if c < 11 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in rgb]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    for rgb in map(render.colour, range(24)):
        light, dark = sorted((luminance(rgb), luminance(render.ink(rgb))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA


def test_contact_sheet_fills_its_width() -> None:
    red, tall = np.full((50, 100, 3), (255, 0, 0), np.uint8), np.full((300, 100, 3), (0, 255, 0), np.uint8)
    sheet = render.contact_sheet([red, tall, red, tall, red], 2, 640)
    assert sheet.shape[1] == 640
    assert sheet.dtype == np.uint8
    rows = (sheet[:, 5] != 255).any(1)
    assert (np.diff(rows.astype(int)) == 1).sum() == 2  # three rows, set apart
    assert sheet[5, 638].tolist() == [0, 255, 0]
    assert (sheet[-5, -50:] == 255).all()  # the short last row is not blown up
    assert render.contact_sheet([red], 4, 200).shape == (100, 200, 3)
    with pytest.raises(ValueError, match="no images"):
        render.contact_sheet([], 2, 100)

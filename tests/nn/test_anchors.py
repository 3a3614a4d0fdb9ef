"""Default boxes against torchvision's DefaultBoxGenerator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList

from detkit.nn.anchors import default_boxes, shapes

SCALES = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)
RATIOS = ((2.0,), (2.0, 3.0), (2.0, 3.0), (2.0, 3.0), (2.0,), (2.0,))
STEPS = (8.0, 16.0, 32.0, 64.0, 100.0, 300.0)
GRIDS = ((38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1))
CPU = torch.device("cpu")


def reference(size: int, grids: tuple, scales: tuple, ratios: tuple, steps: tuple) -> Tensor:
    generator = DefaultBoxGenerator([list(level) for level in ratios], scales=list(scales), steps=list(steps))
    maps = [torch.zeros(1, 1, *grid) for grid in grids]
    return generator(ImageList(torch.zeros(1, 3, size, size), [(size, size)]), maps)[0]


def test_the_papers_8732_boxes_are_torchvisions() -> None:
    got = default_boxes((300, 300), GRIDS, STEPS, SCALES, RATIOS, True, CPU)
    assert got.shape == (8732, 4)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, reference(300, GRIDS, SCALES, RATIOS, STEPS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [64, 320, 512])
def test_other_levels_are_torchvisions(size: int) -> None:
    grids, steps = tuple((size // s, size // s) for s in (8, 16, 32)), (8.0, 16.0, 32.0)
    arguments = (grids, (0.1, 0.4, 0.95, 1.4), ((), (1.5,), (2.0, 5.0)), steps)
    wanted = reference(size, *arguments)
    grids, scales, ratios, steps = arguments
    got = default_boxes((size, size), grids, steps, scales, ratios, True, CPU)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)


def test_without_the_extra_square_the_others_stay() -> None:
    both = default_boxes((300, 300), GRIDS, STEPS, SCALES, RATIOS, True, CPU)
    one = default_boxes((300, 300), GRIDS, STEPS, SCALES, RATIOS, False, CPU)
    keep = []
    for (rows, columns), ratios in zip(GRIDS, RATIOS, strict=True):
        keep += [shape != 1 for _ in range(rows * columns) for shape in range(2 + 2 * len(ratios))]
    assert torch.equal(one, both[torch.tensor(keep)])


def test_boxes_lie_row_by_row_on_a_canvas_that_is_no_square() -> None:
    got = default_boxes((64, 128), ((2, 4),), (32.0,), (0.25, 0.5), ((4.0,),), False, CPU).view(2, 4, 3, 4)
    centres = (got[..., :2] + got[..., 2:]) / 2
    sizes = got[..., 2:] - got[..., :2]
    for row in range(2):
        for column in range(4):
            torch.testing.assert_close(
                centres[row, column], torch.tensor([[column + 0.5, row + 0.5]]).mul(32).expand(3, 2)
            )
    # Sides are shares of the root of the area, square boxes are square, and none is longer than the canvas.
    side = 0.25 * (64 * 128) ** 0.5
    wanted = torch.tensor([[side, side], [side * 2, side / 2], [side / 2, side * 2]])
    torch.testing.assert_close(sizes, wanted.expand(2, 4, 3, 2))
    large = default_boxes((64, 128), ((2, 4),), (32.0,), (1.0, 1.0), ((4.0,),), False, CPU)
    assert (large[:, 2] - large[:, 0]).max().item() == 128
    assert (large[:, 3] - large[:, 1]).max().item() == 64


def test_shapes_keep_their_area() -> None:
    for level, sides in enumerate(shapes(SCALES, RATIOS, True)):
        assert len(sides) == 2 + 2 * len(RATIOS[level])
        areas = [width * height for width, height in sides]
        assert areas[1] == pytest.approx(SCALES[level] * SCALES[level + 1])
        assert [areas[0], *areas[2:]] == pytest.approx([SCALES[level] ** 2] * (len(sides) - 1))


def test_what_is_changed_does_not_come_back() -> None:
    arguments = ((300, 300), GRIDS, STEPS, SCALES, RATIOS, True, CPU)
    default_boxes(*arguments).zero_()
    assert default_boxes(*arguments).any()


def test_a_level_without_boxes_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        default_boxes((300, 300), GRIDS[:5], STEPS, SCALES, RATIOS, True, CPU)

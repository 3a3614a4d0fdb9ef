"""Default boxes (SSD, Liu 2016, section 2.2), also called anchors or priors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

Grids = tuple[tuple[int, int], ...]
Ratios = tuple[tuple[float, ...], ...]


def shapes(scales: Sequence[float], ratios: Ratios, extra_square: bool) -> list[list[tuple[float, float]]]:
    """Width and height of each level's default boxes, as shares of the canvas side: the square of this level's scale,
    the square between this scale and the next, then each ratio both ways up."""
    levels = []
    for level, level_ratios in enumerate(ratios):
        scale, after = scales[level], scales[level + 1]
        sides = [(scale, scale)]
        if extra_square:
            sides.append(((scale * after) ** 0.5,) * 2)
        for ratio in level_ratios:
            root = ratio**0.5
            sides += [(scale * root, scale / root), (scale / root, scale * root)]
        levels.append(sides)
    return levels


@lru_cache(maxsize=64)
def _default_boxes(
    canvas: tuple[int, int],
    grids: Grids,
    steps: tuple[float, ...],
    scales: tuple[float, ...],
    ratios: Ratios,
    extra_square: bool,
) -> np.ndarray:
    height, width = canvas
    side = (height * width) ** 0.5
    levels = []
    for (rows, columns), step, level in zip(grids, steps, shapes(scales, ratios, extra_square), strict=True):
        sizes = np.minimum(np.array(level) * side, [width, height])
        y, x = np.meshgrid((np.arange(rows) + 0.5) * step, (np.arange(columns) + 0.5) * step, indexing="ij")
        centres = np.stack([x, y], -1)[:, :, None]
        levels.append(np.concatenate([centres - sizes / 2, centres + sizes / 2], -1).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def default_boxes(
    canvas: tuple[int, int],
    grids: Grids,
    steps: tuple[float, ...],
    scales: tuple[float, ...],
    ratios: Ratios,
    extra_square: bool,
    device: torch.device,
) -> Tensor:
    """Default boxes [A, 4] float32, in pixels, ordered by level, row, column, shape.

    canvas: height and width of the canvas that scales are shares of: always the configured one. On a smaller training
    canvas the boxes keep their pixels, as the convolutions' receptive fields do. grids: rows and columns of each level.
    steps: pixels between centres. A box is cut to the canvas's sides, not moved into it (as in torchvision).
    """
    return torch.tensor(_default_boxes(canvas, grids, steps, scales, ratios, extra_square), device=device)

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


@lru_cache(maxsize=64)
def _grid_anchors(
    hw: tuple[int, int],
    grids: Grids,
    strides: tuple[int, ...],
    sizes: Ratios,
    ratios: tuple[float, ...],
    centre: float,
) -> np.ndarray:
    roots = np.sqrt(ratios)[:, None]
    levels = []
    for grid, stride, level in zip(grids, strides, sizes, strict=True):
        half = np.stack([level / roots, level * roots], -1).reshape(-1, 2) / 2
        shape = np.concatenate([-half, half], 1).round()
        # A map of every other cell may have fewer cells than its stride says; torchvision then puts them closer.
        steps = [min(stride, -(-side // 32) * 32 // cells) for side, cells in zip(hw, grid, strict=True)]
        rows, columns = ((np.arange(cells) + centre) * step for cells, step in zip(grid, steps, strict=True))
        y, x = np.meshgrid(rows, columns, indexing="ij")
        levels.append((np.stack([x, y, x, y], -1)[:, :, None] + shape).reshape(-1, 4))
    return np.concatenate(levels).astype(np.float32)


def grid_anchors(
    hw: tuple[int, int],
    grids: Grids,
    strides: tuple[int, ...],
    sizes: Ratios,
    ratios: tuple[float, ...],
    centre: float,
    device: torch.device,
) -> Tensor:
    """Anchors of a region proposal network (Ren 2015) [A, 4] float32, in pixels, ordered by level, row, column, ratio,
    size; from the centre to each edge a whole number of pixels, as in torchvision.

    hw: height and width of the canvas. grids: rows and columns of each level. strides: pixels between its cells.
    sizes: root of the anchors' areas on each level, in pixels. ratios: height over width. centre: place in the cell.
    """
    return torch.tensor(_grid_anchors(hw, grids, strides, sizes, ratios, centre), device=device)


@lru_cache(maxsize=64)
def _cells(grids: Grids, strides: tuple[int, ...]) -> np.ndarray:
    levels = []
    for (rows, columns), stride in zip(grids, strides, strict=True):
        y, x = np.meshgrid((np.arange(rows) + 0.5) * stride, (np.arange(columns) + 0.5) * stride, indexing="ij")
        levels.append(np.stack([x, y, np.full_like(x, stride)], -1).reshape(-1, 3))
    return np.concatenate(levels).astype(np.float32)


def cells(grids: Grids, strides: tuple[int, ...], device: torch.device) -> Tensor:
    """Centre x, centre y and stride of each cell, in pixels: [A, 3] float32, ordered by level, row, column."""
    return torch.tensor(_cells(grids, strides), device=device)


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

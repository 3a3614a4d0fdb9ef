"""Features of regions: RoIAlign over the levels of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from detkit.nn.boxes import area
from detkit.nn.contract import Feats


def levels_of(boxes: Tensor, strides: Sequence[int], side: float) -> Tensor:
    """The level that the features of boxes [..., 4] are taken from (FPN, Lin 2017, equation 1): int64 [...].

    strides: of the levels, finest first, each twice the one before. side: of a box whose features have stride 16.
    """
    finest, coarsest = (stride.bit_length() - 1 for stride in (strides[0], strides[-1]))
    # The addend is torchvision's: a box of exactly `side` belongs to the coarser level, whatever rounding does.
    exact = 4 + torch.log2(area(boxes).sqrt() / side) + 1e-6
    return exact.floor().clamp(finest, coarsest).long() - finest


def _taps(start: Tensor, side: Tensor, most: Tensor, size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Along one axis of regions that begin at `start` [N] and are `side` [N] long, in cells, on maps of `most` [N]
    cells: those that each cell of features is a weighted sum of, int64 [N, size, 2 * samples], and the weights."""
    step = (side / size)[:, None, None]
    cells, parts = (torch.arange(count, device=start.device) for count in (size, samples))
    at = start[:, None, None] + cells[:, None] * step + (parts + 0.5) * step / samples
    last = most[:, None, None] - 1
    inside = (at >= -1) & (at <= last + 1)
    at = torch.minimum(at.clamp(min=0), last)
    low = at.floor()
    high_weight = at - low
    index = torch.stack((low, torch.minimum(low + 1, last)), 3).long()
    weight = torch.stack((1 - high_weight, high_weight), 3) * inside[..., None] / samples
    return index.flatten(2), weight.flatten(2)


def _weighted_sums(
    feats: Sequence[Tensor], boxes_BP4: Tensor, levels_BP: Tensor, strides: Sequence[int], size: int, samples: int
) -> Tensor:
    B, P = levels_BP.shape
    channels, device = feats[0].shape[1], boxes_BP4.device
    table = torch.cat([feat.permute(0, 2, 3, 1).reshape(-1, channels) for feat in feats]).float()
    rows, columns, begin = [], [], [0]
    for feat in feats:
        rows.append(feat.shape[2])
        columns.append(feat.shape[3])
        begin.append(begin[-1] + B * feat.shape[2] * feat.shape[3])
    levels = levels_BP.flatten()
    height, width, first, stride = (
        torch.tensor(values, device=device)[levels] for values in (rows, columns, begin[:-1], list(strides))
    )
    cells = boxes_BP4.flatten(0, 1).float() / stride[:, None]
    # A region is taken to be a cell wide at least.
    sides = (cells[:, 2:] - cells[:, :2]).clamp(min=1)
    y, down = _taps(cells[:, 1], sides[:, 1], height, size, samples)
    x, across = _taps(cells[:, 0], sides[:, 0], width, size, samples)
    image = torch.arange(B, device=device).repeat_interleave(P)
    first = first + image * height * width
    # [N, row, column, tap down, tap across]
    index = (first[:, None, None] + y * width[:, None, None])[:, :, None, :, None] + x[:, None, :, None, :]
    weight = down[:, :, None, :, None] * across[:, None, :, None, :]
    taps = (2 * samples) ** 2
    found = F.embedding_bag(index.view(-1, taps), table, per_sample_weights=weight.view(-1, taps), mode="sum")
    return found.view(-1, size, size, channels).permute(0, 3, 1, 2)


@torch.library.custom_op("detkit::pyramid_align", mutates_args=())
def _op(
    feats: Sequence[Tensor], boxes: Tensor, levels: Tensor, strides: Sequence[int], size: int, samples: int
) -> Tensor:
    """One op, so that torch.export doesn't look inside: its ONNX form is RoiAlign (see detkit.export)."""
    return _weighted_sums(feats, boxes, levels, strides, size, samples)


@_op.register_fake
def _(
    feats: Sequence[Tensor],
    boxes: Tensor,
    levels: Tensor,  # noqa: ARG001
    strides: Sequence[int],  # noqa: ARG001
    size: int,
    samples: int,  # noqa: ARG001
) -> Tensor:
    count = boxes.shape[0] * boxes.shape[1]
    found = boxes.new_empty((count, size, size, feats[0].shape[1]), dtype=torch.float32)
    return found.permute(0, 3, 1, 2)


def pyramid_align(
    feats: Feats, boxes_BP4: Tensor, levels_BP: Tensor, strides: Sequence[int], size: int, samples: int
) -> Tensor:
    """RoIAlign (He 2017) of each box on its level, as torchvision's: float32 [B * P, C, size, size]; no gradient of the
    boxes.

    boxes: pixels of the input canvas. levels: index into `feats`. samples: along each side of a cell of features. It is
    a sparse weighted sum of the maps' cells, all levels in one, whose shapes don't depend on where the boxes are; over
    channels in a row, it is some seven times as fast on a CPU as torchvision's operator, forwards and backwards.
    """
    given = (list(feats), boxes_BP4, levels_BP, list(strides), size, samples)
    # The operator has no derivative of its own. Export traces with gradients allowed, but of maps that need none.
    return _weighted_sums(*given) if any(feat.requires_grad for feat in feats) else _op(*given)


def rois(boxes_BP4: Tensor) -> Tensor:
    """Boxes [B, P, 4] in the form of torchvision's operators: image and box [B * P, 5], of the boxes' dtype."""
    image = torch.arange(boxes_BP4.shape[0], device=boxes_BP4.device, dtype=boxes_BP4.dtype)
    return torch.cat([image[:, None, None].expand(-1, boxes_BP4.shape[1], 1), boxes_BP4], 2).flatten(0, 1)

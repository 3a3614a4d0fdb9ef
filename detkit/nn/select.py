"""Which candidates become detections: clip, top-k, NMS a class. The only NMS; detkit.export translates it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from detkit.config import Select
from detkit.nn.contract import Decoded

THINNEST = 1e-2  # pixels of a side: the overlap of thinner boxes is noise


@torch.library.custom_op("detkit::suppress", mutates_args=())
def suppress(boxes_Bk4: Tensor, scores_Bk: Tensor, iou: float, score: float, keep: int) -> Tensor:
    """Greedy NMS of each image, whatever the class: float32 [B, k], the scores, with 0 for what goes.

    A box stays if its score is above `score`, no better box that stays overlaps it by an IoU above `iou`, and it is
    among the best `keep` of those. Of equal scores, the one with the lower index is better.
    One op, so that torch.export doesn't look inside: its ONNX form is NonMaxSuppression with its batch axis (see
    detkit.export). One NMS over the boxes of all images was measured to be quadratic in B.
    """
    kept = torch.zeros_like(scores_Bk)
    for boxes, scores, out in zip(boxes_Bk4, scores_Bk, kept, strict=True):
        above = (scores > score).nonzero().squeeze(1)
        best = above[nms(boxes[above], scores[above], iou)[:keep]]
        out[best] = scores[best]
    return kept


@suppress.register_fake
def _(boxes_Bk4: Tensor, scores_Bk: Tensor, iou: float, score: float, keep: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(scores_Bk)


def _best_pairs(scores_BAC: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best (candidate, class) pairs of each image, by index: scores [B, k], candidates and classes int64 [B, k]."""
    A, C = scores_BAC.shape[1:]
    # An image's k best pairs are among its k best candidates; so the long top-k is over A, not over A * C.
    # Sorted by index, equal scores stand in one order whichever top-k found them.
    rows_Ba = scores_BAC.amax(2).topk(min(most, A), dim=1, sorted=False).indices.sort(dim=1).values
    flat = scores_BAC.gather(1, rows_Ba[..., None].expand(-1, -1, C)).flatten(1)
    pairs = flat.topk(min(most, flat.shape[1]), dim=1, sorted=False).indices.sort(dim=1).values
    return flat.gather(1, pairs), rows_Ba.gather(1, pairs // C), pairs % C


def _apart(boxes_Bk4: Tensor, labels_Bk: Tensor, classes: int, hw: tuple[int, int]) -> Tensor:
    """The boxes with each class on a canvas of its own, so that NMS sees no overlap between classes.

    The canvases lie on a near-square lattice: in one row, the coordinates of many classes would lose float32 precision.
    """
    across = math.ceil(math.sqrt(classes))
    x = (labels_Bk % across) * (hw[1] + 1)
    y = (labels_Bk // across) * (hw[0] + 1)
    return boxes_Bk4 + torch.stack((x, y, x, y), dim=2)


def _survivors(decoded: Decoded, rule: Select, hw: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the best (candidate, class) pairs of each image, k in all: boxes [B, k, 4], scores with 0 for what goes
    [B, k], labels [B, k]."""
    scores_BAC = decoded.scores.float()
    classes = scores_BAC.shape[2]
    scores, rows, labels = _best_pairs(scores_BAC, rule.candidates)
    sets = decoded.boxes.shape[2]
    places = rows if sets == 1 else rows * sets + labels
    boxes = decoded.boxes.flatten(1, 2).gather(1, places[..., None].expand(-1, -1, 4)).float()
    x1, y1, x2, y2 = boxes.unbind(2)
    boxes = torch.stack((x1.clamp(0, hw[1]), y1.clamp(0, hw[0]), x2.clamp(0, hw[1]), y2.clamp(0, hw[0])), dim=2)
    scores = scores * (boxes[..., 2:] - boxes[..., :2] >= THINNEST).all(2)
    if rule.nms == "none":
        return boxes, torch.where(scores > rule.score, scores, 0), labels
    rivals = boxes if rule.agnostic or classes == 1 else _apart(boxes, labels, classes, hw)
    return boxes, suppress(rivals, scores, rule.iou, rule.score, rule.keep), labels


def select(
    decoded: Decoded, rule: Select, hw: tuple[int, int], levels: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """The detections of each image, best first.

    decoded: boxes [B, A, D, 4] in pixels of the input canvas of height and width `hw`, scores [B, A, C] in [0, 1].
    levels: numbers of candidates, A in all: each of these groups then has a top-k and an NMS of its own (RPN).
    Returns boxes float32 [B, K, 4] (clipped to the canvas), scores float32 [B, K], labels int64 [B, K];
    K = min(rule.room, rule.candidates of each level, A * C). Where the score is 0 there is no detection: box and label
    are 0. Scores must be above rule.score; a box with no area on the canvas goes, and so does one with hardly any.
    """
    if levels:
        sizes = list(levels)
        parts = zip(torch.split(decoded.boxes, sizes, 1), torch.split(decoded.scores, sizes, 1), strict=True)
        each = [_survivors(Decoded(*part), rule, hw) for part in parts]
        boxes, scores, labels = (torch.cat(tensors, 1) for tensors in zip(*each, strict=True))
    else:
        boxes, scores, labels = _survivors(decoded, rule, hw)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    scores, order = scores[:, : rule.room], order[:, : rule.room]
    nothing = scores == 0
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)).masked_fill(nothing[..., None], 0)
    return boxes, scores, labels.gather(1, order).masked_fill(nothing, 0)

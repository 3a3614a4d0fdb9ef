"""Which candidate answers for which object. Vectorised over the batch and over padded ground truth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from detkit.nn.boxes import Planes, iou, plane_iou, planes
from detkit.types import Targets

# Pairs of an object and a candidate that are looked at together: on the CPU as many as its caches hold (2 to 5 times as
# fast as all at once), elsewhere as many as keep the extra memory below some 150 MB.
_PAIRS = {"cpu": 1 << 18}
_MOST_PAIRS = 1 << 21


class Match(NamedTuple):
    """For each candidate: object int64 [B, A], an index into the padded ground truth (0 where there is none);
    positive bool [B, A]; ignore bool [B, A]: neither positive nor negative; quality float32 [B, A]: what the score
    of the object's class should be, 0 where not positive."""

    object: Tensor
    positive: Tensor
    ignore: Tensor
    quality: Tensor


def _overlaps(boxes: Tensor, targets: Targets) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """IoU with candidates [B, A, 4] or [1, A, 4] of some objects at a time: which, of the padded ground truth;
    float [B, g, A], -1 for padding and ignored objects; and float [B, A], the largest with an ignored one, None where
    none is known to be."""
    truth = Planes(*(plane[..., None] for plane in planes(targets.boxes)))
    candidates = Planes(*(plane[:, None] for plane in planes(boxes)))
    objects_BG = targets.labels >= 0
    other_BG = ~objects_BG | targets.ignore
    B, G = objects_BG.shape
    # Where asking costs no waiting for the device: padding of the whole batch is left out, and so are ignored objects.
    asks = boxes.device.type == "cpu"
    if asks:
        G = max(1, int((objects_BG.any(0) * torch.arange(1, G + 1)).max()))
    step = max(1, _PAIRS.get(boxes.device.type, _MOST_PAIRS) // max(1, B * boxes.shape[1]))
    for first in range(0, G, step):
        some = slice(first, min(first + step, G))
        overlap = plane_iou(Planes(*(plane[:, some] for plane in truth)), candidates)
        ignored, absent = targets.ignore[:, some, None], other_BG[:, some, None]
        cover = None if asks and not ignored.any() else (overlap * ignored).amax(1)
        yield some, overlap if asks and not absent.any() else overlap.masked_fill_(absent, -1), cover


def match_priors(priors_A4: Tensor, targets: Targets, threshold: float) -> Match:
    """SSD's matching (section 2.2): a default box is positive for the object that it overlaps most if the IoU reaches
    `threshold`; besides, each object has its best default box whatever the IoU. Quality is 1."""
    real_BG = (targets.labels >= 0) & ~targets.ignore
    best_BA = priors_A4.new_full((real_BG.shape[0], len(priors_A4)), -1.0)
    object_BA, owner_BA = torch.zeros_like(best_BA, dtype=torch.int64), torch.zeros_like(best_BA, dtype=torch.int64)
    ignore = torch.zeros_like(best_BA, dtype=torch.bool)
    order_BG = torch.arange(1, real_BG.shape[1] + 1, device=priors_A4.device) * real_BG
    for some, overlap, cover in _overlaps(priors_A4[None], targets):
        if cover is not None:
            ignore |= cover > threshold
        value, index = overlap.max(1)
        object_BA = torch.where(value > best_BA, index + some.start, object_BA)
        best_BA = torch.maximum(best_BA, value)
        # The best default box of each object is forced; where two objects want the same one, the later one has it.
        owner_BA.scatter_reduce_(1, overlap.argmax(2), order_BG[:, some], "amax")
    object_BA = torch.where(owner_BA > 0, owner_BA - 1, object_BA)
    positive = (best_BA >= threshold) | (owner_BA > 0)
    return Match(object_BA * positive, positive, ignore & ~positive, positive.float())


@torch.no_grad()
def match_regions(
    boxes: Tensor, targets: Targets, low: float, high: float, best_too: bool = False
) -> tuple[Tensor, Tensor]:
    """Faster R-CNN's matching (Ren 2015, section 3.1.2) of candidates [B, A, 4] or [1, A, 4], pixels: which are
    positive and which are ignored, bool [B, A].

    Positive are those whose IoU with an object reaches `high` and, with `best_too`, those that overlap some object as
    much as any candidate does. Ignored are others whose IoU with an object, ignored ones included, reaches `low`.
    """
    best = boxes.new_full((targets.labels.shape[0], boxes.shape[1]), -1.0)
    covered, positive = torch.zeros_like(best), torch.zeros_like(best, dtype=torch.bool)
    for _, overlap, cover in _overlaps(boxes, targets):
        best = torch.maximum(best, overlap.amax(1))
        if cover is not None:
            covered = torch.maximum(covered, cover)
        if best_too:
            peak = overlap.amax(2, keepdim=True)
            # No overlap at all is no reason.
            positive |= (overlap == peak.masked_fill(peak <= 0, 2)).any(1)
    positive |= best >= high
    return positive, (torch.maximum(best, covered) >= low) & ~positive


@torch.no_grad()
def owners(boxes_BN4: Tensor, targets: Targets) -> Tensor:
    """The object that each box overlaps most: int64 [B, N], an index into the padded ground truth; any, where there is
    none. All pairs at once, so it is for few boxes."""
    others_BG = (targets.labels < 0) | targets.ignore
    return iou(boxes_BN4[:, :, None], targets.boxes[:, None]).masked_fill(others_BG[:, None], -1).argmax(2)


@torch.no_grad()
def match_aligned(boxes_BA4: Tensor, scores_BAC: Tensor, centres_A2: Tensor, targets: Targets, top: int) -> Match:
    """Task-aligned assignment (TOOD, Feng 2021): an object's candidates are the `top` ones, with their centre inside
    it, of highest score^0.5 * IoU^6 of what they predict now; a candidate that several objects want goes to the
    one it overlaps most. Quality is the alignment, scaled so that an object's best equals its best IoU.

    boxes, scores: the predictions, decoded and in [0, 1]. centres: of the candidates' cells, in pixels.
    """
    (B, G), A = targets.labels.shape, len(centres_A2)
    truth = Planes(*(plane[..., None] for plane in planes(targets.boxes)))
    x, y = centres_A2.T.contiguous()
    scores_BCA = scores_BAC.transpose(1, 2).contiguous()
    labels_BG1 = targets.labels.clamp(min=0)[..., None]
    ignore = torch.zeros_like(boxes_BA4[..., 0], dtype=torch.bool)
    # Each object's best k candidates, their IoU (-1 where not chosen) and alignment.
    overlap_BGk = boxes_BA4.new_full((B, G, min(top, A)), -1.0)
    align_BGk, index_BGk = torch.zeros_like(overlap_BGk), torch.zeros_like(overlap_BGk, dtype=torch.int64)
    for some, overlap, cover in _overlaps(boxes_BA4, targets):
        if cover is not None:
            ignore |= cover > 0.5
        part = Planes(*(plane[:, some] for plane in truth))
        score = scores_BCA.gather(1, labels_BG1[:, some].expand_as(overlap))
        align = score.clamp_(min=1e-9).sqrt_() * overlap.square().pow(3)
        inside = (x > part.x1) & (x < part.x2) & (y > part.y1) & (y < part.y2)
        # Inside, ranked by alignment with a floor, so that candidates without any overlap yet still count; far below
        # the alignment of a one-pixel object with a large box. An object too small to hold any centre takes the
        # nearest one: the first of those outside, ranked by distance.
        apart = (x - (part.x1 + part.x2) / 2).square_() + (y - (part.y1 + part.y2) / 2).square_()
        best = torch.where(inside, align + 1e-30, -apart).topk(min(top, A), 2)
        chosen = best.values > 0
        chosen[..., 0] = True
        index_BGk[:, some] = best.indices
        overlap_BGk[:, some] = torch.where(chosen, overlap.gather(2, best.indices), -1.0)
        align_BGk[:, some] = align.gather(2, best.indices)

    index_BN, overlap_BN = index_BGk.flatten(1), overlap_BGk.flatten(1)
    best_BA = torch.full_like(boxes_BA4[..., 0], -1).scatter_reduce(1, index_BN, overlap_BN, "amax")
    wins_BN = (overlap_BN >= 0) & (overlap_BN == best_BA.gather(1, index_BN))
    object_N = torch.arange(G, device=x.device).repeat_interleave(min(top, A))
    nobody = torch.full_like(best_BA, G, dtype=torch.int64)
    object_BA = nobody.scatter_reduce(1, index_BN, torch.where(wins_BN, object_N, G), "amin")
    positive = object_BA < G
    owned_BGk = (wins_BN & (object_BA.gather(1, index_BN) == object_N)).view_as(align_BGk)

    align_BGk, overlap_BGk = align_BGk * owned_BGk, overlap_BGk * owned_BGk
    quality_BGk = align_BGk / align_BGk.amax(2, keepdim=True).clamp(min=1e-30) * overlap_BGk.amax(2, keepdim=True)
    quality = torch.zeros_like(best_BA).scatter_reduce(1, index_BN, quality_BGk.flatten(1), "amax")
    return Match(object_BA.masked_fill(~positive, 0), positive, ignore & ~positive, quality)

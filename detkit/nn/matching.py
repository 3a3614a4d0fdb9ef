"""Which candidate answers for which object. Vectorised over the batch and over padded ground truth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detkit.nn.boxes import iou
from detkit.types import Targets


class Match(NamedTuple):
    """For each candidate: object int64 [B, A], an index into the padded ground truth (0 where there is none);
    positive bool [B, A]; ignore bool [B, A]: neither positive nor negative; quality float32 [B, A]: what the score
    of the object's class should be, 0 where not positive."""

    object: Tensor
    positive: Tensor
    ignore: Tensor
    quality: Tensor


def _ignored(overlap_BGA: Tensor, targets: Targets, threshold: float) -> Tensor:
    """Candidates that mostly cover an ignored object [B, A]."""
    return (overlap_BGA * targets.ignore[..., None]).amax(1) > threshold


def match_priors(priors_A4: Tensor, targets: Targets, threshold: float) -> Match:
    """SSD's matching (section 2.2): a default box is positive for the object that it overlaps most if the IoU reaches
    `threshold`; besides, each object has its best default box whatever the IoU. Quality is 1."""
    real_BG = (targets.labels >= 0) & ~targets.ignore
    overlap_BGA = iou(targets.boxes[:, :, None], priors_A4[None, None])
    candidates_BGA = overlap_BGA.masked_fill(~real_BG[..., None], -1)
    best_BA, object_BA = candidates_BGA.max(1)
    positive = best_BA >= threshold
    # The best default box of each object is forced; where two objects want the same one, the later one has it.
    forced_BG = candidates_BGA.argmax(2)
    order_BG = torch.arange(1, real_BG.shape[1] + 1, device=priors_A4.device) * real_BG
    owner_BA = torch.zeros_like(object_BA).scatter_reduce(1, forced_BG, order_BG, "amax")
    object_BA = torch.where(owner_BA > 0, owner_BA - 1, object_BA)
    positive = positive | (owner_BA > 0)
    ignore = _ignored(overlap_BGA, targets, threshold) & ~positive
    return Match(object_BA * positive, positive, ignore, positive.float())


@torch.no_grad()
def match_aligned(
    boxes_BA4: Tensor, scores_BAC: Tensor, centres_A2: Tensor, targets: Targets, top: int, power: float = 6.0
) -> Match:
    """Task-aligned assignment (TOOD, Feng 2021): an object's candidates are the `top` ones, with their centre inside
    it, of highest score^0.5 * IoU^power of what they predict now; a candidate that several objects want goes to the
    one it overlaps most. Quality is the alignment, scaled so that an object's best equals its best IoU.

    boxes, scores: the predictions, decoded and in [0, 1]. centres: of the default boxes, in pixels.
    """
    real_BG = (targets.labels >= 0) & ~targets.ignore
    overlap_BGA = iou(targets.boxes[:, :, None], boxes_BA4[:, None])
    low, high = targets.boxes[:, :, None, :2], targets.boxes[:, :, None, 2:]
    inside_BGA = ((centres_A2 > low) & (centres_A2 < high)).all(-1) & real_BG[..., None]
    # An object too small to hold any centre takes the nearest one.
    distance_BGA = (centres_A2 - (low + high) / 2).square().sum(-1)
    nearest_BGA = torch.zeros_like(inside_BGA).scatter(2, distance_BGA.argmin(2, keepdim=True), True)
    inside_BGA = inside_BGA | (nearest_BGA & (real_BG & ~inside_BGA.any(2))[..., None])

    labels_BG = targets.labels.clamp(min=0)
    score_BGA = scores_BAC.transpose(1, 2).gather(1, labels_BG[..., None].expand_as(overlap_BGA))
    align_BGA = (score_BGA.clamp(min=1e-9).sqrt() * overlap_BGA.pow(power)) * inside_BGA
    # Ranked with a floor, so that candidates without any overlap yet still count as candidates; far below the
    # alignment of a one-pixel object with a large box.
    best = (align_BGA + 1e-30 * inside_BGA).topk(min(top, align_BGA.shape[2]), 2)
    chosen_BGA = torch.zeros_like(inside_BGA).scatter(2, best.indices, best.values > 0)

    wanted_BGA = torch.where(chosen_BGA, overlap_BGA, -1.0)
    value_BA, object_BA = wanted_BGA.max(1)
    positive = value_BA >= 0
    owned_BGA = torch.zeros_like(chosen_BGA).scatter(1, object_BA[:, None], positive[:, None])
    align_BGA = align_BGA * owned_BGA
    peak_BG1 = align_BGA.amax(2, keepdim=True)
    iou_BG1 = (overlap_BGA * owned_BGA).amax(2, keepdim=True)
    quality = (align_BGA / peak_BG1.clamp(min=1e-30) * iou_BG1).amax(1)
    ignore = _ignored(overlap_BGA, targets, 0.5) & ~positive
    return Match(object_BA * positive, positive, ignore, quality)

"""Losses of dense heads, as sums and denominators (see contract.Losses)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from detkit.nn.boxes import encode, giou
from detkit.nn.contract import Losses
from detkit.nn.matching import Match, match_aligned, match_priors
from detkit.types import Targets


def _matched(match: Match, targets: Targets) -> tuple[Tensor, Tensor]:
    """Boxes [B, A, 4] and labels [B, A] of the object that each candidate answers for (any, where it is negative)."""
    boxes = targets.boxes.gather(1, match.object[..., None].expand(-1, -1, 4))
    return boxes, targets.labels.gather(1, match.object).clamp(min=0)


def multibox_loss(
    logits_BAK: Tensor,
    offsets_BA4: Tensor,
    priors_A4: Tensor,
    targets: Targets,
    *,
    threshold: float,
    negatives: float,
    variances: tuple[float, float],
    smoothing: float = 0.0,
) -> Losses:
    """SSD's loss (Liu 2016, section 2.2): smooth L1 on the offsets of positives, softmax cross-entropy on positives
    and on the hardest negatives, `negatives` a positive in each image; both over the number of positives.

    logits: float [B, A, 1 + C], background first. offsets: float [B, A, 4]. priors: float [A, 4], pixels.
    """
    match = match_priors(priors_A4, targets, threshold)
    boxes, labels = _matched(match, targets)
    positive = match.positive
    wanted = encode(torch.where(positive[..., None], boxes, priors_A4), priors_A4, variances)
    box = F.smooth_l1_loss(offsets_BA4.float(), wanted, reduction="none").sum(-1)
    classes = torch.where(positive, labels + 1, 0)
    # Classes last: over a transposed view it takes twice as long.
    each = F.cross_entropy(
        logits_BAK.float().flatten(0, 1), classes.flatten(), reduction="none", label_smoothing=smoothing
    )
    entropy = each.view_as(classes)
    with torch.no_grad():
        hardness = entropy.masked_fill(positive | match.ignore, float("-inf"))
        hardest, order = hardness.sort(1, descending=True)
        taken = torch.arange(hardness.shape[1], device=hardness.device) < negatives * positive.sum(1, keepdim=True)
        negative = torch.zeros_like(positive).scatter_(1, order, taken & hardest.isfinite())
    count = positive.sum().float()
    sums = {"class": (entropy * (positive | negative)).sum(), "box": (box * positive).sum()}
    return Losses(sums, {"class": count, "box": count})


class Aligned(NamedTuple):
    """What task-aligned assignment makes of predictions. entropy: the class loss, summed. boxes: float32 [B, A, 4], of
    the object that each candidate answers for. quality: float32 [B, A], the score that is wanted of it, and so the
    weight of its box; 0 where it answers for none."""

    entropy: Tensor
    boxes: Tensor
    quality: Tensor


def align(
    logits_BAC: Tensor, boxes_BA4: Tensor, centres_A2: Tensor, targets: Targets, *, top: int, smoothing: float = 0.0
) -> Aligned:
    """Task-aligned assignment (TOOD, Feng 2021), and binary cross-entropy with the alignment as the wanted score.

    logits: float [B, A, C]. boxes: float32 [B, A, 4], decoded, pixels. centres: [A, 2], pixels.
    """
    logits = logits_BAC.float()
    scores = logits.detach().sigmoid()
    match = match_aligned(boxes_BA4.detach(), scores, centres_A2, targets, top)
    boxes, labels = _matched(match, targets)
    quality = match.quality * (1 - smoothing)
    # A negative's loss is scaled down by the square of its score, so that the many easy ones do not drown the rest.
    weight = scores.square_().mul_(0.75 * ~match.ignore[..., None])
    wanted = (quality > 0)[..., None]
    weight.scatter_(2, labels[..., None], weight.gather(2, labels[..., None]).masked_fill_(wanted, 0))
    own = logits.gather(2, labels[..., None])
    entropy = (F.softplus(logits) * weight).sum() + ((F.softplus(own) - own * quality[..., None]) * wanted).sum()
    return Aligned(entropy, boxes, quality)


def aligned_loss(
    logits_BAC: Tensor,
    boxes_BA4: Tensor,
    centres_A2: Tensor,
    targets: Targets,
    *,
    top: int,
    smoothing: float = 0.0,
    box_weight: float = 1.0,
) -> Losses:
    """Task-aligned loss: the classes' as in `align`, and GIoU on the decoded boxes of positives weighted by the
    alignment; both over the sum of wanted scores. Arguments as there."""
    found = align(logits_BAC, boxes_BA4, centres_A2, targets, top=top, smoothing=smoothing)
    box = (1 - giou(boxes_BA4, found.boxes)) * found.quality
    count = found.quality.sum()
    return Losses({"class": found.entropy, "box": box_weight * box.sum()}, {"class": count, "box": count})

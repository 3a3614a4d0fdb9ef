"""Modern YOLO head: one anchor-free candidate a cell, decoupled branches, task-aligned assignment, sides of boxes as
distributions."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detkit.config import YOLO
from detkit.nn.anchors import cells
from detkit.nn.boxes import ciou
from detkit.nn.contract import ClassRows, Decoded, Feats, FeatureMaps, Head, Losses
from detkit.nn.losses import align
from detkit.nn.matching import Match, match_aligned
from detkit.nn.necks import conv
from detkit.types import Targets


class Outputs(NamedTuple):
    """logits: float [B, A, C]. sides: float [B, A, 4, bins], logits of the distances from the cell's centre to the
    left, top, right and bottom edge, in strides. cells: float32 [A, 3], centre x, centre y and stride in pixels of the
    input canvas."""

    logits: Tensor
    sides: Tensor
    cells: Tensor


class YOLOHead(Head):
    """See the module. Each level has its own two branches: classes, and the box."""

    def __init__(self, settings: YOLO, below: FeatureMaps, classes: int) -> None:
        super().__init__()
        self.settings, self.strides, self.classes = settings, below.strides, classes
        self.scores = nn.ModuleList(self._branch(cin, classes) for cin in below.channels)
        self.sides = nn.ModuleList(self._branch(cin, 4 * settings.bins) for cin in below.channels)
        # Scores start at 0.01 (focal loss, Lin 2017, section 4.1): nearly every candidate is background. Sides start
        # near 2.3 strides: a box of 4.6 is what a level is for, and it overlaps objects enough to be assigned to them.
        near = -0.35 * torch.arange(settings.bins, dtype=torch.float32).repeat(4)
        for branches, bias in ((self.scores, torch.full((classes,), -math.log(99))), (self.sides, near)):
            for branch in branches:
                nn.init.normal_(branch[-1].weight, std=0.01)  # type: ignore[index]
                branch[-1].bias.data.copy_(bias)  # type: ignore[index]

    def _branch(self, cin: int, cout: int) -> nn.Module:
        cfg = self.settings
        widths = [cin] + [cfg.channels] * cfg.convs
        towers = [conv(before, after, 3) for before, after in pairwise(widths)]
        return nn.Sequential(*towers, nn.Conv2d(widths[-1], cout, 1))

    def forward(self, feats: Feats, hw: tuple[int, int], targets: Targets | None = None, rng: Any = None) -> Outputs:  # noqa: ARG002
        """Feature maps -> Outputs."""
        logits = [self._flat(branch(feat), 1) for branch, feat in zip(self.scores, feats, strict=True)]
        sides = [self._flat(branch(feat), 4) for branch, feat in zip(self.sides, feats, strict=True)]
        grids = tuple((int(feat.shape[-2]), int(feat.shape[-1])) for feat in feats)
        where = cells(grids, self.strides, feats[0].device)
        return Outputs(torch.cat(logits, 1).flatten(2), torch.cat(sides, 1), where)

    @staticmethod
    def _flat(level: Tensor, parts: int) -> Tensor:
        """[B, parts * n, h, w] -> [B, h * w, parts, n]."""
        B, channels = level.shape[:2]
        return level.permute(0, 2, 3, 1).reshape(B, -1, parts, channels // parts)

    def _boxes(self, sides: Tensor, where: Tensor) -> Tensor:
        """Expected boxes float32 [..., 4] of sides [..., 4, bins] in cells [..., 3]."""
        values = torch.arange(self.settings.bins, dtype=torch.float32, device=sides.device)
        distance = (sides.float().softmax(-1) * values).sum(-1) * where[..., 2:]
        centre = where[..., :2]
        return torch.cat([centre - distance[..., :2], centre + distance[..., 2:]], -1)

    def loss(self, outputs: Outputs, targets: Targets) -> Losses:
        """Quality-aware cross-entropy of classes; complete IoU of boxes and distribution focal loss of their sides
        (Li 2020), both weighted by the alignment; all over the sum of alignments."""
        cfg, where = self.settings, outputs.cells
        with torch.no_grad():
            predicted = self._boxes(outputs.sides, where)
        top = cfg.top_candidates
        found = align(outputs.logits, predicted, where[:, :2], targets, top=top, smoothing=cfg.smoothing)
        # No more candidates than these answer for an object; boxes and sides of the others cost nothing, so they need
        # not be computed.
        most = min(top * targets.labels.shape[1], len(where))
        quality, rows = found.quality.topk(most, dim=1, sorted=False)
        sides = outputs.sides.gather(1, rows[..., None, None].expand(-1, -1, *outputs.sides.shape[2:])).float()
        wanted = found.boxes.gather(1, rows[..., None].expand(-1, -1, 4))
        own = where[rows]
        box = 1 - ciou(self._boxes(sides, own), wanted)
        dfl = distribution_focal_loss(sides, self._distances(wanted, own)).mean(-1)
        count = found.quality.sum()
        sums = {
            "class": cfg.class_weight * found.entropy,
            "box": cfg.box_weight * (box * quality).sum(),
            "dfl": cfg.dfl_weight * (dfl * quality).sum(),
        }
        return Losses(sums, dict.fromkeys(sums, count))

    def places(self, outputs: Outputs) -> Tensor:
        """The cells."""
        centre, half = outputs.cells[:, :2], outputs.cells[:, 2:] / 2
        return torch.cat([centre - half, centre + half], 1)

    def match(self, outputs: Outputs, targets: Targets) -> Match:
        """By what is predicted."""
        boxes, scores = self._boxes(outputs.sides, outputs.cells), outputs.logits.float().sigmoid()
        return match_aligned(boxes, scores, outputs.cells[:, :2], targets, self.settings.top_candidates)

    def _distances(self, boxes: Tensor, where: Tensor) -> Tensor:
        """The sides of boxes [..., 4] as seen from cells [..., 3], in strides, within what the bins reach: [..., 4]."""
        centre = where[..., :2]
        distances = torch.cat([centre - boxes[..., :2], boxes[..., 2:] - centre], -1) / where[..., 2:]
        return distances.clamp(0, self.settings.bins - 1)

    def decode(self, outputs: Outputs) -> Decoded:
        """Outputs -> candidates, in pixels of the input canvas; not clipped to it."""
        return Decoded(self._boxes(outputs.sides, outputs.cells)[:, :, None], outputs.logits.float().sigmoid())

    def class_layers(self) -> dict[str, ClassRows]:
        """The last layer of each level's class branch."""
        return {f"scores.{i}.{self.settings.convs}": ClassRows(0) for i in range(len(self.scores))}


def distribution_focal_loss(logits: Tensor, values: Tensor) -> Tensor:
    """Cross-entropy with the two bins beside each value, weighted by how near they are (Li 2020, equation 6).

    logits: float [..., bins], of the values 0, 1, 2 and so on. values: float [...], 0 to bins - 1. Returns [...].
    """
    lower = values.detach().floor().clamp(max=logits.shape[-1] - 2)
    upper = values - lower
    two = lower.long()[..., None] + torch.arange(2, device=logits.device)
    likely = logits.log_softmax(-1).gather(-1, two)
    return -(likely[..., 0] * (1 - upper) + likely[..., 1] * upper)

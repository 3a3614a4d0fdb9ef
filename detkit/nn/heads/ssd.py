"""SSD head (Liu 2016): default boxes on every level, class scores and box offsets by convolution."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detkit.config import SSD
from detkit.nn.anchors import default_boxes, shapes
from detkit.nn.boxes import decode
from detkit.nn.contract import ClassRows, Decoded, Feats, FeatureMaps, Head, Losses
from detkit.nn.losses import aligned_loss, multibox_loss
from detkit.nn.matching import Match, match_aligned, match_priors
from detkit.nn.necks import separable
from detkit.types import Targets


class Outputs(NamedTuple):
    """logits: float [B, A, 1 + C] with background first (multibox), or [B, A, C] (aligned). offsets: float [B, A, 4].
    priors: float32 [A, 4], pixels of the input canvas."""

    logits: Tensor
    offsets: Tensor
    priors: Tensor


class SSDHead(Head):
    """See the module. Predictors are named and ordered as torchvision's: [B, boxes * classes, h, w] a level."""

    reference = "SSD300_VGG16_Weights.COCO_V1"

    def __init__(self, settings: SSD, below: FeatureMaps, classes: int, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.settings, self.canvas = settings, canvas
        sides = shapes(settings.scales, settings.ratios, settings.extra_square)
        if len(sides) != len(below.channels):
            raise ValueError(
                f"{len(sides)} levels of default boxes for {len(below.channels)} feature maps; "
                "change model.head.ratios or model.neck.levels"
            )
        self.steps = settings.spacing(below.strides)
        self.multibox = settings.loss == "multibox"
        self.logits = classes + self.multibox
        self.tower = nn.ModuleList(
            nn.Sequential(*(separable(width, width) for _ in range(settings.tower))) for width in below.channels
        )
        per_cell = [len(level) for level in sides]
        levels = list(zip(below.channels, per_cell, strict=True))
        self.scores = nn.ModuleList(nn.Conv2d(width, boxes * self.logits, 3, padding=1) for width, boxes in levels)
        self.offsets = nn.ModuleList(nn.Conv2d(width, boxes * 4, 3, padding=1) for width, boxes in levels)
        for layer in (*self.scores, *self.offsets):
            assert isinstance(layer, nn.Conv2d)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        if not self.multibox:
            for layer in self.scores:
                # Scores start at 0.01 (focal loss, Lin 2017, section 4.1): nearly every candidate is background.
                nn.init.normal_(layer.weight, std=0.01)  # type: ignore[arg-type]
                nn.init.constant_(layer.bias, -math.log(99))  # type: ignore[arg-type]

    def forward(self, feats: Feats, hw: tuple[int, int], targets: Targets | None = None, rng: Any = None) -> Outputs:  # noqa: ARG002
        """Feature maps of a canvas `hw` -> Outputs."""
        towers = [tower(feat) for tower, feat in zip(self.tower, feats, strict=True)]
        logits = [self._flat(layer(feat), self.logits) for layer, feat in zip(self.scores, towers, strict=True)]
        offsets = [self._flat(layer(feat), 4) for layer, feat in zip(self.offsets, towers, strict=True)]
        cfg = self.settings
        grids = tuple((int(feat.shape[-2]), int(feat.shape[-1])) for feat in feats)
        device = feats[0].device
        priors = default_boxes(self.canvas, grids, self.steps, cfg.scales, cfg.ratios, cfg.extra_square, device)
        return Outputs(torch.cat(logits, 1), torch.cat(offsets, 1), priors)

    @staticmethod
    def _flat(level: Tensor, last: int) -> Tensor:
        """[B, boxes * last, h, w] -> [B, h * w * boxes, last]."""
        return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, last)

    def loss(self, outputs: Outputs, targets: Targets) -> Losses:
        """The paper's loss or the task-aligned one; boxes of `targets` in pixels of the input canvas."""
        cfg = self.settings
        if self.multibox:
            return multibox_loss(
                outputs.logits,
                outputs.offsets,
                outputs.priors,
                targets,
                threshold=cfg.match_iou,
                negatives=cfg.negatives,
                variances=cfg.variances,
                smoothing=cfg.smoothing,
            )
        return aligned_loss(
            outputs.logits,
            self._boxes(outputs),
            self._centres(outputs),
            targets,
            top=cfg.top_candidates,
            smoothing=cfg.smoothing,
            box_weight=cfg.box_weight,
        )

    def places(self, outputs: Outputs) -> Tensor:
        """The default boxes."""
        return outputs.priors

    def match(self, outputs: Outputs, targets: Targets) -> Match:
        """By overlap, or by what is predicted (aligned)."""
        if self.multibox:
            return match_priors(outputs.priors, targets, self.settings.match_iou)
        scores, centres = outputs.logits.float().sigmoid(), self._centres(outputs)
        return match_aligned(self._boxes(outputs), scores, centres, targets, self.settings.top_candidates)

    @staticmethod
    def _centres(outputs: Outputs) -> Tensor:
        return (outputs.priors[:, :2] + outputs.priors[:, 2:]) / 2

    def _boxes(self, outputs: Outputs) -> Tensor:
        return decode(outputs.offsets.float(), outputs.priors, self.settings.variances)

    def decode(self, outputs: Outputs) -> Decoded:
        """Outputs -> candidates, in pixels of the input canvas; not clipped to it."""
        logits = outputs.logits.float()
        scores = logits.softmax(-1)[..., 1:] if self.multibox else logits.sigmoid()
        return Decoded(self._boxes(outputs)[:, :, None], scores)

    def class_layers(self) -> dict[str, ClassRows]:
        """A group a default box; before the classes, the background (multibox)."""
        return {f"scores.{i}": ClassRows(int(self.multibox)) for i in range(len(self.scores))}

"""YOLO as first published (You Only Look Once, Redmon 2016): each cell of a coarse grid predicts a few boxes and one
class distribution, from fully connected layers, learnt by squared errors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detkit.config import YOLOv1
from detkit.errors import UserError
from detkit.nn.boxes import area, iou
from detkit.nn.contract import ClassRows, Decoded, Feats, FeatureMaps, Head, Losses
from detkit.nn.matching import Match
from detkit.nn.necks import conv
from detkit.types import Targets


class Outputs(NamedTuple):
    """boxes: float [B, N, P, 5], of each of the N = S * S cells and its P boxes: centre x and y in the cell (0 to 1),
    square roots of width and height as shares of the canvas, confidence. classes: float [B, N, C], probabilities given
    an object. Cells are ordered by row, column. Neither is bounded: the last layer is linear."""

    boxes: Tensor
    classes: Tensor


class YOLOv1Head(Head):
    """See the module: 3x3 convolutions on the last map, down to the grid, then two fully connected layers."""

    def __init__(self, settings: YOLOv1, below: FeatureMaps, classes: int, canvas: tuple[int, int]) -> None:
        super().__init__()
        self.settings, self.classes, self.canvas = settings, classes, canvas
        cells, stride, width = settings.grid, below.strides[-1], settings.channels
        halvings = {math.log2(side / stride / cells) for side in canvas}
        shrink = int(max(halvings))
        if halvings != {shrink} or shrink < 0:
            fitting = " or ".join(str(cells * stride * 2**n) for n in range(3))
            raise ValueError(f"a grid of {cells}x{cells} cells needs a canvas of {fitting} pixels; change input.size")
        layers = [conv(below.channels[-1], width, 3)]
        layers += [conv(width, width, 3, stride=2) for _ in range(shrink)]
        self.convs = nn.Sequential(*layers, conv(width, width, 3), conv(width, width, 3))
        outputs = cells**2 * (settings.boxes * 5 + classes)
        self.hidden = nn.Sequential(
            nn.Linear(cells**2 * width, settings.hidden), nn.LeakyReLU(0.1, inplace=True), nn.Dropout(settings.dropout)
        )
        self.predict = nn.Linear(settings.hidden, outputs)
        # Boxes start in the middle of their cell, the predictors of a cell with different sizes: were they equal, the
        # first would be the better one for every object, and the others would never learn.
        nn.init.normal_(self.predict.weight, std=0.01)
        sides = ((torch.arange(settings.boxes) + 1) / (settings.boxes + 1)).sqrt()
        start = torch.stack([*torch.full((2, settings.boxes), 0.5), sides, sides, torch.zeros_like(sides)], 1)
        bias = torch.cat([start.flatten(), torch.full((classes,), 1 / classes)])
        self.predict.bias.data.copy_(bias.repeat(cells**2))

    def forward(self, feats: Feats, hw: tuple[int, int], targets: Targets | None = None, rng: Any = None) -> Outputs:  # noqa: ARG002
        """Feature maps -> Outputs. Raises UserError unless the canvas `hw` is the configured one."""
        cfg = self.settings
        if hw != self.canvas:
            given, wanted = (f"{height}x{width}" for height, width in (hw, self.canvas))
            raise UserError(
                f"a canvas of {given}: yolo_v1 accepts only its input.size, {wanted} (height x width); "
                "set train.progressive=[] and train.multi_scale=null"
            )
        grid = self.convs(feats[-1])
        hidden = self.hidden(grid.flatten(1))
        raw = self.predict(hidden).reshape(len(hidden), cfg.grid**2, cfg.boxes * 5 + self.classes)
        boxes, classes = raw.split((cfg.boxes * 5, self.classes), 2)
        return Outputs(boxes.reshape(*boxes.shape[:2], cfg.boxes, 5), classes)

    def _corners(self, device: torch.device) -> Tensor:
        """Left and top edge of each cell, in cells: [N, 1, 2]."""
        place = torch.arange(self.settings.grid**2, device=device)
        return torch.stack([place % self.settings.grid, place // self.settings.grid], 1)[:, None].float()

    def _canvas(self, device: torch.device) -> Tensor:
        """Width and height in pixels."""
        return torch.tensor(self.canvas[::-1], dtype=torch.float32, device=device)

    def _boxes(self, outputs: Outputs) -> Tensor:
        """[B, N, P, 4] in pixels of the canvas."""
        raw = outputs.boxes.float()
        canvas = self._canvas(raw.device)
        centre = (raw[..., :2] + self._corners(raw.device)) * (canvas / self.settings.grid)
        half = raw[..., 2:4].clamp(min=0).square() * (canvas / 2)
        return torch.cat([centre - half, centre + half], -1)

    def _places(self, boxes: Tensor) -> Tensor:
        """The cell that holds the centre of each of boxes [..., 4]: int64 [...]."""
        cells = self.settings.grid
        centre = (boxes[..., :2] + boxes[..., 2:]) / 2 / self._canvas(boxes.device) * cells
        column, row = centre.long().clamp(0, cells - 1).unbind(-1)
        return row * cells + column

    def places(self, outputs: Outputs) -> Tensor:
        """The cells, each as often as it has boxes."""
        corners = self._corners(outputs.boxes.device).expand(-1, self.settings.boxes, -1).flatten(0, 1)
        return torch.cat([corners, corners + 1], 1) * (self._canvas(corners.device) / self.settings.grid).repeat(2)

    @torch.no_grad()
    def match(self, outputs: Outputs, targets: Targets) -> Match:
        """A cell answers for the object whose centre it holds, with the box that overlaps it most; of several objects,
        for the largest, and of equal ones for the first. Where only an ignored object has its centre, the cell's
        confidences cost nothing. Quality is the IoU of that box.
        """
        cfg = self.settings
        (B, G), N = targets.labels.shape, cfg.grid**2
        real_BG = (targets.labels >= 0) & ~targets.ignore
        place_BG = self._places(targets.boxes)
        size_BG = torch.where(real_BG, area(targets.boxes), -1.0)
        largest_BN = torch.full((B, N), -1.0, device=size_BG.device).scatter_reduce(1, place_BG, size_BG, "amax")
        first_BG = torch.where(
            real_BG & (size_BG == largest_BN.gather(1, place_BG)), torch.arange(G).to(size_BG.device), G
        )
        nobody_BN = torch.full((B, N), G, device=size_BG.device)
        object_BN = nobody_BN.scatter_reduce(1, place_BG, first_BG, "amin")
        full_BN = object_BN < G
        object_BN = object_BN.masked_fill(~full_BN, 0)
        ignored_BN = torch.zeros_like(full_BN, dtype=torch.int64).scatter_reduce(
            1, place_BG, targets.ignore.long(), "amax"
        )

        truth_BN4 = targets.boxes.gather(1, object_BN[..., None].expand(-1, -1, 4))
        overlap_BNP = iou(self._boxes(outputs), truth_BN4[:, :, None])
        best_BNP = torch.zeros_like(overlap_BNP, dtype=torch.bool).scatter(2, overlap_BNP.argmax(2, keepdim=True), True)
        answers_BNP = best_BNP & full_BN[..., None]
        spared_BNP = (~full_BN & (ignored_BN > 0))[..., None].expand_as(answers_BNP)
        objects_BNP = object_BN[..., None].expand_as(answers_BNP)
        parts = (objects_BNP, answers_BNP, spared_BNP, overlap_BNP * answers_BNP)
        return Match(*(part.flatten(1) for part in parts))

    def loss(self, outputs: Outputs, targets: Targets) -> Losses:
        """The paper's: sums of squared errors, over the number of images."""
        cfg, match = self.settings, self.match(outputs, targets)
        B, N = outputs.classes.shape[:2]
        answers_BNP, spared_BNP, overlap_BNP = (
            part.view(B, N, cfg.boxes).float() for part in (match.positive, match.ignore, match.quality)
        )
        object_BN, full_BN = match.object.view(B, N, -1)[..., 0], answers_BNP.amax(2)
        truth_BN4 = targets.boxes.gather(1, object_BN[..., None].expand(-1, -1, 4))
        canvas = self._canvas(truth_BN4.device)
        centre = (truth_BN4[..., None, :2] + truth_BN4[..., None, 2:]) / 2 / canvas * cfg.grid
        roots = ((truth_BN4[..., None, 2:] - truth_BN4[..., None, :2]) / canvas).clamp(min=0).sqrt()
        wanted = torch.cat([centre - self._corners(canvas.device), roots], -1)

        raw = outputs.boxes.float()
        off_BNP = (raw[..., :4] - wanted).square().sum(-1)
        unsure_BNP = (raw[..., 4] - overlap_BNP).square()
        empty_BNP = (1 - answers_BNP) * (1 - spared_BNP)
        label_BN1 = targets.labels.gather(1, object_BN).clamp(min=0)[..., None]
        classes = outputs.classes.float()
        wrong_BN = (classes - torch.zeros_like(classes).scatter(2, label_BN1, 1.0)).square().sum(-1)
        sums = {
            "class": (wrong_BN * full_BN).sum(),
            "box": cfg.box_weight * (off_BNP * answers_BNP).sum(),
            "object": (unsure_BNP * answers_BNP).sum(),
            "empty": cfg.empty_weight * (raw[..., 4].square() * empty_BNP).sum(),
        }
        return Losses(sums, dict.fromkeys(sums, torch.full_like(sums["box"], B)))

    def decode(self, outputs: Outputs) -> Decoded:
        """Outputs -> candidates, by cell and box, in pixels of the input canvas; not clipped to it. A score is
        confidence times class probability."""
        sure = outputs.boxes[..., 4].float().clamp(0, 1)
        scores = sure[..., None] * outputs.classes.float().clamp(0, 1)[:, :, None]
        return Decoded(self._boxes(outputs).flatten(1, 2)[:, :, None], scores.flatten(1, 2))

    def class_layers(self) -> dict[str, ClassRows]:
        """A group a cell; before the classes, its boxes."""
        return {"predict": ClassRows(self.settings.boxes * 5)}

    def remark(self, boxes_N4: Tensor, photo_N: Tensor) -> str | None:
        """How many objects share a cell with a larger one, and so can't be learnt."""
        cells = photo_N * self.settings.grid**2 + self._places(boxes_N4)
        shared = len(cells) - len(torch.unique(cells))
        if not shared:
            return None
        return (
            f"yolo_v1: {shared} of {len(cells)} objects ({shared / len(cells):.1%}) share a cell of the "
            f"{self.settings.grid}x{self.settings.grid} grid with a larger one and can't be learnt; a finer "
            "model.head.grid or the head yolo can"
        )

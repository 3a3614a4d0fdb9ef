"""The detector, and the two wrappers that replace a train/eval switch: Trainable for losses, Predictor for boxes."""

from __future__ import annotations

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from detkit import config
from detkit.errors import UserError
from detkit.nn import backbones, heads, layers, necks
from detkit.nn.contract import Feats, Losses
from detkit.nn.select import select
from detkit.types import Batch, Targets


def _hw(images: Tensor) -> tuple[int, int]:
    """The height and width of images [B, 3, H, W]."""
    return int(images.shape[-2]), int(images.shape[-1])


class Detector(nn.Module):
    """Backbone, neck and head, and the normalisation before them.

    forward: images uint8 [B, 3, H, W] RGB -> the head's own Outputs.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: config.Model, canvas: config.Input, classes: int) -> None:
        super().__init__()
        # Random weights are not worth keeping: without loaded ones nothing is frozen.
        loose = {"freeze": 0, "frozen_bn": False} if model.weights == "none" else {}
        self.backbone = backbones.build(model.backbone.model_copy(update=loose))
        self.neck = necks.build(model.neck, self.backbone)
        try:
            self.head = heads.build(model.head, self.neck, classes, canvas.size)
        except ValueError as error:
            raise UserError(f"model.head: {error}") from None
        self._restyle(model)
        for name, values in (("mean", canvas.mean), ("std", canvas.std)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1) * 255, persistent=False)

    def _restyle(self, model: config.Model) -> None:
        """Exchange norms and activations, and draw initial weights, where the settings say so."""
        for part in (self.neck, self.head, *([] if model.backbone.own_layers else [self.backbone])):
            if model.norm == "group":
                layers.group_norms(part)
            elif model.norm == "sync_bn":
                layers.sync_norms(part)
            if model.activation and not layers.exchange_activations(part, model.activation) and part is self.backbone:
                raise UserError(
                    f"model.activation={model.activation}: that of {part.name} is fixed; set model.backbone.own_layers"
                )
        if model.init:
            layers.initialise(self.backbone, model.init)
            layers.initialise(self.neck, model.init)
        self.frozen = model.norm == "frozen" and model.weights != "none"
        self.hold(self.backbone.freeze)
        self.dropout = nn.Dropout2d(model.dropout)

    def quicken(self) -> None:
        """Let torch.compile make kernels of backbone and neck, for each shape of images its own."""
        # Canvases of many sizes, and parts that are frozen or set free, are compiled in their turn.
        torch._dynamo.config.recompile_limit = 64
        for part in (self.backbone, self.neck):
            part.compile(dynamic=False)

    def hold(self, freeze: int) -> None:
        """Keep the first `freeze` stages of the backbone as they are from now on, and the norms that are frozen."""
        self.backbone.hold(freeze, self.backbone.frozen_bn)
        for norm in layers.batch_norms(self) if self.frozen else ():
            norm.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but frozen norms stay in eval mode."""
        super().train(mode)
        for norm in layers.batch_norms(self) if self.frozen else ():
            norm.eval()
        return self

    def forward(self, images: Tensor, targets: Targets | None = None, rng: Any = None) -> Any:
        """images uint8 [B, 3, H, W] -> the head's Outputs."""
        return self.head(self.features(images), _hw(images), targets, rng)

    def features(self, images: Tensor) -> Feats:
        """images uint8 [B, 3, H, W] -> the maps that the head gets."""
        feats: Feats = self.neck(self.backbone(self.normalise(images)))
        return tuple(map(self.dropout, feats)) if self.dropout.p else feats

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] RGB -> float32, less the mean, over the standard deviation."""
        return (images.to(self.mean.dtype) - self.mean) / self.std


class Trainable(nn.Module):
    """A detector as DDP wraps it: Batch -> Losses. Every parameter takes part in every batch's graph."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Batch, rng: Any = None) -> Losses:
        """The losses of a batch, as sums and denominators."""
        outputs = self.detector(batch.images, batch.targets, rng)
        return self.detector.head.loss(outputs, batch.targets)


class Predictor(nn.Module):
    """What eval, predict and export run: images uint8 [B, 3, H, W] -> boxes [B, K, 4], scores [B, K], labels [B, K].

    Boxes in pixels of the input canvas; score 0 is padding. It owns a copy of the detector in eval mode, so that the
    one in training is never touched; `follow` brings new weights.
    """

    def __init__(self, detector: Detector, rule: config.Select) -> None:
        super().__init__()
        self.detector = copy.deepcopy(detector).eval().requires_grad_(False)
        self.rule = rule

    @torch.no_grad()
    def follow(self, detector: Detector, decay: float) -> None:
        """Move the weights and statistics towards the detector's: an exponential moving average. 0 takes them over."""
        pairs = zip(self.detector.state_dict().values(), detector.state_dict().values(), strict=True)
        floats = [(mine, other) for mine, other in pairs if mine.is_floating_point()]
        torch._foreach_lerp_([mine for mine, _ in floats], [other for _, other in floats], 1 - decay)

    def train(self, mode: bool = True) -> Predictor:  # noqa: ARG002
        """Stay in eval mode whatever is asked for."""
        return super().train(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        return select(self.detector.head.decode(self.detector(images)), self.rule, _hw(images))

    def measure(self, batch: Batch) -> tuple[tuple[Tensor, Tensor, Tensor], Losses]:
        """What `forward` gives for the batch's images, and the losses, from one pass through backbone and neck. What a
        head draws by chance for its losses depends on the images' places in the data set alone."""
        images, targets, hw = batch.images, batch.targets, _hw(batch.images)
        head, feats = self.detector.head, self.detector.features(images)
        outputs = head(feats, hw)
        drawn = head(feats, hw, targets, batch.index) if head.two_stage else outputs
        return select(head.decode(outputs), self.rule, hw), head.loss(drawn, targets)

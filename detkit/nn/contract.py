"""What backbones, necks and heads agree on. Shape letters: B batch, G padded ground truth, A candidates, D box sets a
candidate (1, or C where boxes are class-specific), C classes without background, K kept, H W canvas, h w a level."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from detkit.nn.matching import Match
from detkit.types import Targets

Feats = tuple[Tensor, ...]


class Decoded(NamedTuple):
    """Candidates of a batch: boxes float32 [B, A, D, 4] in pixels of the input canvas, scores float32 [B, A, C] in
    [0, 1]; float32 under autocast too."""

    boxes: Tensor
    scores: Tensor


class Losses(NamedTuple):
    """Each part of the loss as a sum and what it is to be divided by, both float32 scalars, so that ranks and
    micro-batches add up to what one big batch gives."""

    sums: dict[str, Tensor]
    denoms: dict[str, Tensor]


class ClassRows(NamedTuple):
    """How the outputs of a layer belong to classes: in groups (of a default box, say), each of so many slots `before`
    those of the C classes, of `rows` outputs a slot."""

    before: int
    rows: int = 1


class FeatureMaps(Protocol):
    """A backbone or a neck: it states the channels and strides (pixels) of the maps that it returns, finest first."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


class Head(nn.Module):
    """A detection head. `Outputs` is the head's own NamedTuple of raw tensors.

    reference: torchvision's name of the weights of the detector that this head was made like, if there is one.
    two_stage: whether only Outputs made with targets have losses.
    """

    reference: str | None = None
    two_stage = False

    def forward(self, feats: Feats, hw: tuple[int, int], targets: Targets | None = None, rng: Any = None) -> Any:
        """Feature maps of a canvas of height and width `hw` -> the head's Outputs."""
        raise NotImplementedError

    def loss(self, outputs: Any, targets: Targets) -> Losses:
        """Outputs and ground truth -> the parts of the loss."""
        raise NotImplementedError

    def decode(self, outputs: Any) -> Decoded:
        """Outputs -> candidates."""
        raise NotImplementedError

    def places(self, outputs: Any) -> Tensor:
        """Where each of its A candidates looks: its default box, anchor or cell, float32 [A, 4], pixels of the input
        canvas. Of a head with two stages, those of the first."""
        raise NotImplementedError

    def match(self, outputs: Any, targets: Targets) -> Match:
        """Which of these candidates answer for which object, as the loss has it."""
        raise NotImplementedError

    def class_layers(self) -> dict[str, ClassRows]:
        """The layers whose outputs belong to classes, by their names in the head."""
        raise NotImplementedError

    def remark(self, boxes_N4: Tensor, photo_N: Tensor) -> str | None:  # noqa: ARG002
        """What its user should know about learning these objects with this head, in one line; None: nothing.

        boxes: float [N, 4] in pixels of the input canvas, those of a whole data set. photo: int64 [N], whose they are.
        """
        return None

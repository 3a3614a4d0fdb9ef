"""What backbones, necks and heads agree on. Shape letters: B batch, G padded ground truth, A candidates, D box sets a
candidate (1, or C where boxes are class-specific), C classes without background, K kept, H W canvas, h w a level."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

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


class FeatureMaps(Protocol):
    """A backbone or a neck: it states the channels and strides (pixels) of the maps that it returns, finest first."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


class Head(Protocol):
    """A detection head. `Outputs` is the head's own NamedTuple of raw tensors."""

    def forward(self, feats: Feats, hw: tuple[int, int], targets: Targets | None = None, rng: Any = None) -> Any:
        """Feature maps of a canvas of height and width `hw` -> the head's Outputs."""
        ...

    def loss(self, outputs: Any, targets: Targets) -> Losses:
        """Outputs and ground truth -> the parts of the loss."""
        ...

    def decode(self, outputs: Any) -> Decoded:
        """Outputs -> candidates."""
        ...

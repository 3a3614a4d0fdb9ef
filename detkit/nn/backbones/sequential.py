"""Networks that torchvision writes as one sequence, ``features``: AlexNet (Krizhevsky 2012), MobileNetV2 (Sandler 2018)
and V3 (Howard 2019), EfficientNet (Tan & Le 2019) and ConvNeXt (Liu 2022)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn
from torchvision.models import get_model

from detkit.nn.backbones.base import Chain, Shrinking

# Where each family's sequence is cut into stages; the last ends at stride 32. Left out after it: the 1x1 convolution
# that serves the classifier.
CUTS = {
    "alexnet": (0, 2, 5, 12, 13),
    "mobilenet_v2": (0, 2, 4, 7, 14, 18),
    "mobilenet_v3_large": (0, 2, 4, 7, 13, 16),
    "mobilenet_v3_small": (0, 1, 2, 4, 9, 12),
    "efficientnet": (0, 2, 3, 4, 6, 8),
    "convnext": (0, 2, 4, 6, 8),
}


class Sequence(Chain):
    """A network of CUTS. Maps: the last layer's at each of strides 4, 8, 16 and 32; AlexNet's before each pool, and
    pool5. Stages: strides 2 (but for AlexNet and ConvNeXt) to 32.

    options: of torchvision's builder, such as `width_mult`.
    """

    def __init__(self, name: str, strides: tuple[int, ...], **options: Any) -> None:
        super().__init__(name, strides)
        cuts = CUTS[name if name in CUTS else name.partition("_")[0]]
        self.cuts = cuts[: len(cuts) - (32 // strides[-1]).bit_length() + 1]
        self.features: nn.Sequential = get_model(name, weights=None, **options).features[: self.cuts[-1]]
        self.channels = tuple(_width(self.features[:cut]) for cut in self.cuts[-len(strides) :])

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The layers of `features`, cut into stages."""
        layers = list(self.features)
        return [layers[start:stop] for start, stop in pairwise(self.cuts)]


class AlexNet(Shrinking, Sequence):
    """AlexNet: its pools have no padding."""


def _width(layers: nn.Module) -> int:
    """The channels that come out: each network's last convolution has as many."""
    return [layer.out_channels for layer in layers.modules() if isinstance(layer, nn.Conv2d)][-1]

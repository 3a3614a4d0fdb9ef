"""MobileNetV2 (Sandler 2018)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torchvision.models import mobilenet_v2

from detkit.nn.backbones.base import Chain


class MobileNetV2(Chain):
    """MobileNetV2's bottlenecks. Maps: the last bottleneck at each of strides 8, 16 and 32.

    Left out: features.18, the 1x1 convolution to 1280 channels that serves the classifier. Stages: strides 2 to 32.
    """

    def __init__(self, name: str, width: float) -> None:
        super().__init__(name)
        self.features: nn.Sequential = mobilenet_v2(weights=None, width_mult=width).features[:18]
        self.channels = tuple(self.features[last].out_channels for last in (6, 13, 17))

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The layers at strides 2, 4, 8, 16, 32."""
        layers = list(self.features)
        return [layers[start:stop] for start, stop in pairwise((0, 2, 4, 7, 14, 18))]

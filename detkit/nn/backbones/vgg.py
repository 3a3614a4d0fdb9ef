"""VGG 11, 13, 16 and 19, with and without BatchNorm (Simonyan & Zisserman 2015)."""

from __future__ import annotations

from itertools import pairwise

from torch import nn
from torchvision.models import vgg

from detkit.nn.backbones.base import Chain

LAYERS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}


class VGG(Chain):
    """VGG's convolutions. Maps: conv3 (stride 4), conv4 (8) and conv5 (16), each before its pool, and pool5 (32).

    The third pool rounds up, as in SSD: 300 pixels become 150, 75, 38, 19. Stages: conv1 to conv5, and pool5.
    """

    def __init__(self, name: str, strides: tuple[int, ...]) -> None:
        super().__init__(name, strides)
        self.channels = tuple(256 if stride == 4 else 512 for stride in strides)
        depth, _, norm = name.partition("_")
        # torchvision's VGG would also allocate the classifier: 120 million weights.
        self.features = vgg.make_layers(vgg.cfgs[LAYERS[depth]], batch_norm=norm == "bn")
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        pools = [module for module in self.features if isinstance(module, nn.MaxPool2d)]
        pools[2].ceil_mode = True
        if strides[-1] < 32:
            self.features = self.features[: self._pools[strides[-1].bit_length() - 1]]

    @property
    def _pools(self) -> list[int]:
        return [i for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d)]

    @property
    def stages(self) -> list[list[nn.Module]]:
        """conv1, pool1 + conv2, ..., pool4 + conv5, pool5."""
        layers = list(self.features)
        return [layers[start:stop] for start, stop in pairwise([0, *self._pools, len(layers)])]

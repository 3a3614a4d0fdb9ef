"""ResNet 18, 34, 50 and 101 (He 2016)."""

from __future__ import annotations

from torch import nn
from torchvision.models import get_model

from detkit.nn.backbones.base import Chain


class ResNet(Chain):
    """ResNet without its classifier. Maps: layer1 to layer4 (C2 to C5; strides 4, 8, 16, 32).

    Stages: the stem, then layer1 to layer4.
    """

    def __init__(self, name: str, strides: tuple[int, ...]) -> None:
        super().__init__(name, strides)
        network = get_model(name, weights=None)
        layers = [f"layer{i}" for i in range(1, strides[-1].bit_length() - 1)]
        for key in ("conv1", "bn1", "relu", "maxpool", *layers):
            self.add_module(key, network.get_submodule(key))
        widest: int = network.fc.in_features
        self.channels = tuple(widest * stride // 32 for stride in strides)

    @property
    def stages(self) -> list[list[nn.Module]]:
        """conv1 + bn1 + relu, maxpool + layer1, layer2, layer3, layer4."""
        stem, layers = list(self.children())[:3], list(self.children())[3:]
        return [stem, layers[:2], *([layer] for layer in layers[2:])]

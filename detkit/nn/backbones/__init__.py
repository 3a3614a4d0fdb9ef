"""Networks from image to feature maps. A new one: a file here, its name in config.Backbone, a case in `build`."""

from __future__ import annotations

from detkit import config
from detkit.nn.backbones.base import Chain
from detkit.nn.backbones.mobilenet import MobileNetV2
from detkit.nn.backbones.resnet import ResNet
from detkit.nn.backbones.vgg import VGG


def build(settings: config.Backbone) -> Chain:
    """The backbone of these settings, with random weights; what is to be frozen is already held."""
    match settings.name:
        case "resnet18" | "resnet34" | "resnet50" | "resnet101":
            backbone: Chain = ResNet(settings.name)
        case "mobilenet_v2":
            backbone = MobileNetV2(settings.name, settings.width)
        case _:
            backbone = VGG(settings.name)
    backbone.hold(settings.freeze, settings.frozen_bn)
    return backbone

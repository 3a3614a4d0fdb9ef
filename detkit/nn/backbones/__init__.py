"""Networks from image to feature maps. A new one: a file here, its name in config.Backbone, a case in `build`."""

from __future__ import annotations

from detkit import config
from detkit.nn.backbones.base import Backbone
from detkit.nn.backbones.csp import CSPNet
from detkit.nn.backbones.inception import Inception
from detkit.nn.backbones.resnet import ResNet
from detkit.nn.backbones.sequential import AlexNet, Sequence
from detkit.nn.backbones.timm import Timm
from detkit.nn.backbones.vgg import VGG


def build(settings: config.Backbone) -> Backbone:
    """The backbone of these settings, with random weights; what is to be frozen is already held."""
    match settings.name:
        case "resnet18" | "resnet34" | "resnet50" | "resnet101":
            backbone: Backbone = ResNet(settings.name, settings.strides)
        case "googlenet" | "inception_v3":
            backbone = Inception(settings.name, settings.strides)
        case "alexnet":
            backbone = AlexNet(settings.name, settings.strides)
        case "csp":
            backbone = CSPNet(settings.name, settings.strides, settings.width)
        case "mobilenet_v2":
            backbone = Sequence(settings.name, settings.strides, width_mult=settings.width)
        case name if name.startswith("vgg"):
            backbone = VGG(name, settings.strides)
        case name if settings.timm is None:
            backbone = Sequence(name, settings.strides)
        case _:
            backbone = Timm(settings.timm, settings.strides)
    backbone.hold(settings.freeze, settings.frozen_bn)
    return backbone

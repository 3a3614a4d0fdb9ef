"""Every backbone: the maps it promises, torchvision's names and numbers, and what stays frozen."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import nn
from torchvision.models import get_model, vgg
from torchvision.models.feature_extraction import create_feature_extractor

from detkit import config
from detkit.nn import backbones
from detkit.nn.backbones.vgg import LAYERS

NAMES = get_args(config.Backbone.model_fields["name"].annotation)
WITH_BN = [name for name in NAMES if "vgg" not in name or name.endswith("bn")]
NODES = {"resnet": ("layer2", "layer3", "layer4"), "mobile": ("features.6", "features.13", "features.17")}


def build(name: str, **settings: object) -> backbones.Chain:
    return backbones.build(config.Backbone(name=name, **settings))


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_as_stated_and_gradients_reach_everything(name: str) -> None:
    backbone = build(name)
    maps = backbone(torch.randn(2, 3, 32, 64))
    assert [feat.shape[1] for feat in maps] == list(backbone.channels)
    assert [tuple(feat.shape[2:]) for feat in maps] == [(32 // s, 64 // s) for s in backbone.strides]
    sum(feat.square().mean() for feat in maps).backward()
    assert [key for key, weight in backbone.named_parameters() if weight.grad is None] == []


def reference(name: str) -> tuple[nn.Module, list[str]]:
    """torchvision's network with random weights, and the names of the three maps inside it."""
    if not name.startswith("vgg"):
        return get_model(name, weights=None).eval(), list(NODES[name[:6]])
    # VGG's own constructor would allocate a classifier of 120 million weights.
    depth, _, norm = name.partition("_")
    theirs = nn.Sequential(OrderedDict(features=vgg.make_layers(vgg.cfgs[LAYERS[depth]], batch_norm=norm == "bn")))
    pools = [i for i, layer in enumerate(theirs.features) if isinstance(layer, nn.MaxPool2d)]
    return theirs.eval(), [f"features.{i}" for i in (pools[3] - 1, pools[4] - 1, pools[4])]


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_state_dict_gives_torchvision_maps(name: str) -> None:
    theirs, nodes = reference(name)
    ours = build(name).eval()
    absent, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert absent == []
    assert {key.rpartition(".")[0].rpartition(".")[0] for key in unexpected} <= {"", "classifier", "features.18"}
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        wanted = create_feature_extractor(theirs, nodes)(image).values()
        for ours_map, theirs_map in zip(ours(image), wanted, strict=True):
            torch.testing.assert_close(ours_map, theirs_map)


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_vgg_has_torchvisions_features(name: str) -> None:
    with torch.device("meta"):
        theirs = get_model(name, weights=None).features
    ours = build(name).features
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]


def test_vgg_maps_of_ssd300() -> None:
    shapes = [tuple(feat.shape[1:]) for feat in build("vgg16").eval()(torch.zeros(1, 3, 300, 300))]
    assert shapes == [(512, 38, 38), (512, 19, 19), (512, 9, 9)]


@pytest.mark.parametrize("name", ["vgg11", "vgg11_bn", "resnet18", "mobilenet_v2"])
def test_frozen_stages_stay_as_loaded(name: str) -> None:
    backbone = build(name, freeze=2)
    backbone.train()
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.SGD([weight for weight in backbone.parameters() if weight.requires_grad], lr=1.0)
    sum(feat.square().mean() for feat in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {key for key, value in backbone.state_dict().items() if not value.equal(before[key])}
    layers = [layer for stage in backbone.stages[:2] for layer in stage]
    inside = {id(tensor) for layer in layers for tensor in layer.state_dict(keep_vars=True).values()}
    held = {key for key, tensor in backbone.state_dict(keep_vars=True).items() if id(tensor) in inside}
    assert held
    assert changed
    assert not held & changed


def test_freezing_everything_leaves_nothing_to_train() -> None:
    assert not any(weight.requires_grad for weight in build("mobilenet_v2", freeze=5).parameters())
    assert not any(weight.requires_grad for weight in build("vgg11_bn", freeze=5).parameters())


@pytest.mark.parametrize("name", WITH_BN)
def test_frozen_bn_survives_train(name: str) -> None:
    backbone = copy.deepcopy(build(name, frozen_bn=True))
    backbone.eval()
    backbone.train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert backbone.training
    assert not any(norm.training or norm.weight.requires_grad or norm.bias.requires_grad for norm in norms)
    assert all(conv.weight.requires_grad for conv in backbone.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "mobilenet_v2"])
def test_stages_halve_the_resolution_and_leave_nothing_out(name: str) -> None:
    backbone = build(name).eval()
    inside = {id(weight) for stage in backbone.stages for layer in stage for weight in layer.parameters()}
    assert inside == {id(weight) for weight in backbone.parameters()}
    x, sizes = torch.zeros(1, 3, 64, 64), []
    for stage in backbone.stages:
        for layer in stage:
            x = layer(x)
        sizes.append(x.shape[-1])
    assert all(fine == 2 * coarse for fine, coarse in pairwise(sizes))


def test_an_exchanged_layer_is_the_one_that_runs() -> None:
    backbone = nn.SyncBatchNorm.convert_sync_batchnorm(build("vgg11_bn"))
    assert any(isinstance(layer, nn.SyncBatchNorm) for stage in backbone.stages for layer in stage)

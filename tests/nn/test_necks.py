"""Every neck on every kind of backbone: the maps are as stated, whatever the canvas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detkit import config
from detkit.errors import UserError
from detkit.nn import backbones, necks
from detkit.nn.contract import Feats

CANVASES = ((64, 64), (96, 160), (100, 75), (129, 200), (300, 300))
NECKS = (
    config.PAN(channels=8),
    config.PAN(channels=8, levels=5),
    config.FPN(channels=8, levels=3),
    config.FPN(channels=8, levels=5),
    config.SSDExtras(levels=2),
    config.SSDExtras(levels=3),
    config.SSDExtras(levels=6),
)


def name(settings: config.Settings) -> str:
    return "-".join(str(value) for value in settings.model_dump().values())


class Below:
    """The sizes of a backbone's maps, without its work: strides that round up (ResNet), or VGG's pools."""

    channels, strides = (12, 16, 20), (8, 16, 32)

    def __init__(self, vgg: bool) -> None:
        self.vgg = vgg

    def maps(self, hw: tuple[int, int], batch: int = 2) -> Feats:
        feats, sides = [], hw
        for stride in (2, 4, 8, 16, 32):
            down = self.vgg and stride != 8
            sides = tuple(side // 2 if down else -(-side // 2) for side in sides)
            if stride in self.strides:
                feats.append(torch.randn(batch, self.channels[len(feats)], *sides))
        return tuple(feats)


@pytest.mark.parametrize("hw", CANVASES)
@pytest.mark.parametrize("vgg", [False, True])
def test_the_stand_in_has_the_sizes_of_real_backbones(hw: tuple[int, int], vgg: bool) -> None:
    with torch.device("meta"):
        real = backbones.build(config.Backbone(name="vgg11" if vgg else "resnet18"))
        maps = real(torch.zeros(1, 3, *hw))
    assert [feat.shape[2:] for feat in maps] == [feat.shape[2:] for feat in Below(vgg).maps(hw)]


@pytest.mark.parametrize("hw", CANVASES)
@pytest.mark.parametrize("vgg", [False, True])
@pytest.mark.parametrize("settings", NECKS, ids=name)
def test_channels_and_strides_are_as_stated(settings: config.Neck, vgg: bool, hw: tuple[int, int]) -> None:
    below = Below(vgg)
    neck = necks.build(settings, below)
    maps = neck(below.maps(hw))
    assert len(maps) == len(neck.channels) == len(neck.strides) == settings.levels
    assert [feat.shape[1] for feat in maps] == list(neck.channels)
    for feat, stride in zip(maps, neck.strides, strict=True):
        for cells, side in zip(feat.shape[2:], hw, strict=True):
            # The cells cover the canvas, but for less than one at the edge.
            assert abs(cells * stride - side) < stride
    assert all(feat.isfinite().all() for feat in maps)


@pytest.mark.parametrize("settings", [*NECKS, config.SSDExtras(levels=6, reduced_fc=True)], ids=name)
def test_gradients_reach_every_parameter_and_every_map(settings: config.Neck) -> None:
    below = Below(vgg=True)
    neck = necks.build(settings, below)
    feats = [feat.requires_grad_() for feat in below.maps((300, 300))]
    sum(feat.square().mean() for feat in neck(feats)).backward()
    assert [key for key, weight in neck.named_parameters() if weight.grad is None] == []
    used = settings.levels if settings.name == "ssd_extras" else 3
    used = 2 if getattr(settings, "reduced_fc", False) else min(used, 3)
    assert all(feat.grad is not None and feat.grad.any() for feat in feats[:used])


@pytest.mark.parametrize("settings", [config.PAN(channels=8), config.FPN(channels=8, levels=3)], ids=name)
def test_a_pyramid_mixes_all_levels_from_the_top_down(settings: config.Neck) -> None:
    """The finest map sees what only the coarsest backbone map holds."""
    below = Below(vgg=False)
    neck = necks.build(settings, below).eval()
    feats = below.maps((64, 64))
    other = (*feats[:2], feats[2] + 1)
    assert not torch.equal(neck(feats)[0], neck(other)[0])


def test_pan_mixes_from_the_bottom_up_too() -> None:
    below = Below(vgg=False)
    feats = below.maps((64, 64))
    other = (feats[0] + 1, *feats[1:])
    pan, fpn = (necks.build(settings, below).eval() for settings in (config.PAN(channels=8), config.FPN(channels=8)))
    assert not torch.equal(pan(feats)[2], pan(other)[2])
    assert torch.equal(fpn(feats)[2], fpn(other)[2])


def test_the_papers_neck_on_300_pixels() -> None:
    below = Below(vgg=True)
    neck = necks.build(config.SSDExtras(levels=6, reduced_fc=True), below)
    maps = neck(below.maps((300, 300)))
    assert [tuple(feat.shape[2:]) for feat in maps] == [(38, 38), (19, 19), (10, 10), (5, 5), (3, 3), (1, 1)]
    assert neck.channels == (12, 1024, 512, 256, 256, 256) == tuple(feat.shape[1] for feat in maps)


def test_l2_norm_has_the_learnt_length() -> None:
    below = Below(vgg=True)
    neck = necks.build(config.SSDExtras(levels=6, reduced_fc=True), below)
    first = neck(below.maps((300, 300)))[0]
    torch.testing.assert_close(first.norm(dim=1), torch.full_like(first[:, 0], 20.0))
    nn.init.constant_(neck.scale, 3.0)
    first = neck(below.maps((300, 300)))[0]
    torch.testing.assert_close(first.norm(dim=1), torch.full_like(first[:, 0], 3.0))


def test_a_canvas_too_small_for_the_paper_s_neck_is_one_line():
    settings = config.load("ssd_vgg.yaml").model
    backbone = backbones.build(settings.backbone)
    neck = necks.build(settings.neck, backbone)
    with pytest.raises(UserError, match=r"input\.size is too small"):
        neck(backbone(torch.zeros(1, 3, 128, 128)))

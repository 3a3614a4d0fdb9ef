"""What stands between backbone and head: more feature maps, or better mixed ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detkit.config import FPN, PAN, SSDExtras
from detkit.errors import UserError
from detkit.nn.contract import Feats, FeatureMaps


class Neck(nn.Module):
    """Maps the backbone's feature maps to the head's: see contract.FeatureMaps."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


def conv(cin: int, cout: int, kernel: int = 1, stride: int = 1, *, norm: bool = True, act: bool = True) -> nn.Module:
    """Convolution, BatchNorm, ReLU: output size is the input's over `stride`, rounded up."""
    layers: list[nn.Module] = [nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=not norm)]
    if norm:
        layers.append(nn.BatchNorm2d(cout))
    if act:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def separable(cin: int, cout: int, kernel: int = 5, stride: int = 1) -> nn.Module:
    """Depthwise then pointwise convolution, each with BatchNorm and ReLU (MobileNet, Howard 2017)."""
    depthwise = nn.Conv2d(cin, cin, kernel, stride, kernel // 2, groups=cin, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(cin), nn.ReLU(inplace=True), conv(cin, cout))


class Extras(Neck):
    """SSD's neck (Liu 2016, figure 2): backbone maps and ever smaller ones by stride-2 convolutions.

    With `reduced_fc` (VGG, as in the paper): the stride-8 map is L2-normalised with a learnt scale, the stride-16 one
    passes a dilated fc6 and fc7, and from the fifth level on convolutions are 3x3 without padding.
    """

    def __init__(self, settings: SSDExtras, below: FeatureMaps) -> None:
        super().__init__()
        self.reduced_fc = settings.reduced_fc
        used = min(2 if settings.reduced_fc else len(below.channels), settings.levels)
        channels, strides = list(below.channels[:used]), list(below.strides[:used])
        self.extra = nn.ModuleList()
        if settings.reduced_fc:
            self.scale = nn.Parameter(torch.full((channels[0],), 20.0))
            relu = nn.ReLU(inplace=True)
            fc6 = nn.Conv2d(channels[1], 1024, 3, padding=6, dilation=6)
            self.extra.append(nn.Sequential(nn.MaxPool2d(3, 1, 1), fc6, relu, nn.Conv2d(1024, 1024, 1), relu))
            channels[1] = 1024
        for level in range(used, settings.levels):
            wide = 512 if level == 2 else 256
            valid = settings.reduced_fc and level >= 4
            self.extra.append(self._shrink(channels[-1], wide, valid=valid, norm=not settings.reduced_fc))
            channels.append(wide)
            strides.append(strides[-1] * (1 if valid else 2))
        self.used = used
        self.channels, self.strides = tuple(channels), tuple(strides)
        for module in self.extra.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def _shrink(cin: int, cout: int, *, valid: bool, norm: bool) -> nn.Module:
        """1x1 to half the channels, then 3x3: without padding, or with stride 2."""
        last = nn.Conv2d(cout // 2, cout, 3, stride=1 if valid else 2, padding=0 if valid else 1, bias=not norm)
        first = nn.Conv2d(cin, cout // 2, 1, bias=not norm)
        if norm:
            return nn.Sequential(
                first, nn.BatchNorm2d(cout // 2), nn.ReLU(True), last, nn.BatchNorm2d(cout), nn.ReLU(True)
            )
        return nn.Sequential(first, nn.ReLU(inplace=True), last, nn.ReLU(inplace=True))

    def forward(self, feats: Feats) -> Feats:
        """Backbone maps -> `levels` maps, finest first."""
        maps = list(feats[: self.used])
        extra = list(self.extra)
        if self.reduced_fc:
            maps[0] = self.scale.view(1, -1, 1, 1) * F.normalize(maps[0])
            maps[1] = extra.pop(0)(maps[1])
        for shrink in extra:
            if self.reduced_fc and len(maps) >= 4 and min(maps[-1].shape[-2:]) < 3:
                raise UserError(
                    f"input.size is too small for model.neck.levels={len(self.channels)}: 300 fits 6 levels"
                )
            maps.append(shrink(maps[-1]))
        return tuple(maps)


def _larger(feats: list[Tensor], coarser: nn.ModuleList) -> list[Tensor]:
    for layer in coarser:
        feats.append(layer(feats[-1]))
    return feats


def _up(coarse: Tensor, fine: Tensor) -> Tensor:
    return F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")


class FeaturePyramid(Neck):
    """FPN (Lin 2017): laterals, a top-down pass, a 3x3 convolution on each map; coarser maps by stride-2 ones."""

    def __init__(self, settings: FPN, below: FeatureMaps) -> None:
        super().__init__()
        width, given = settings.channels, len(below.channels)
        self.laterals = nn.ModuleList(conv(cin, width, act=False) for cin in below.channels)
        self.smooth = nn.ModuleList(conv(width, width, 3, act=False) for _ in range(given))
        self.coarser = nn.ModuleList(conv(width, width, 3, 2) for _ in range(settings.levels - given))
        self.channels, self.strides = _pyramid(settings, below)

    def forward(self, feats: Feats) -> Feats:
        """Backbone maps at strides 8, 16, 32 -> `levels` maps of `channels`, finest first."""
        maps = [lateral(feat) for lateral, feat in zip(self.laterals, feats, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            maps[level] = maps[level] + _up(maps[level + 1], maps[level])
        return tuple(_larger([smooth(feat) for smooth, feat in zip(self.smooth, maps, strict=True)], self.coarser))


class PathAggregation(Neck):
    """PAN (Liu 2018): an FPN's top-down pass, then a bottom-up one; by separable 5x5 convolutions, so it is light."""

    def __init__(self, settings: PAN, below: FeatureMaps) -> None:
        super().__init__()
        width, given = settings.channels, len(below.channels)
        self.laterals = nn.ModuleList(conv(cin, width) for cin in below.channels)
        self.coarser = nn.ModuleList(separable(width, width, stride=2) for _ in range(settings.levels - given))
        steps = settings.levels - 1
        self.top_down = nn.ModuleList(separable(2 * width, width) for _ in range(steps))
        self.down = nn.ModuleList(separable(width, width, stride=2) for _ in range(steps))
        self.bottom_up = nn.ModuleList(separable(2 * width, width) for _ in range(steps))
        self.channels, self.strides = _pyramid(settings, below)

    def forward(self, feats: Feats) -> Feats:
        """Backbone maps at strides 8, 16, 32 -> `levels` maps of `channels`, finest first."""
        maps = _larger([lateral(feat) for lateral, feat in zip(self.laterals, feats, strict=True)], self.coarser)
        for level in reversed(range(len(maps) - 1)):
            maps[level] = self.top_down[level](torch.cat([maps[level], _up(maps[level + 1], maps[level])], 1))
        for level in range(len(maps) - 1):
            coarse = maps[level + 1]
            # VGG's pools round down, a stride-2 convolution up.
            down = self.down[level](maps[level])[..., : coarse.shape[-2], : coarse.shape[-1]]
            maps[level + 1] = self.bottom_up[level](torch.cat([coarse, down], 1))
        return tuple(maps)


def _pyramid(settings: FPN | PAN, below: FeatureMaps) -> tuple[tuple[int, ...], tuple[int, ...]]:
    strides: Sequence[int] = below.strides
    more = [strides[-1] * 2**i for i in range(1, settings.levels - len(strides) + 1)]
    return (settings.channels,) * settings.levels, (*strides, *more)


def build(settings: SSDExtras | PAN | FPN, below: FeatureMaps) -> Neck:
    """The neck for a backbone that gives the maps of `below`."""
    match settings:
        case SSDExtras():
            return Extras(settings, below)
        case PAN():
            return PathAggregation(settings, below)
        case FPN():
            return FeaturePyramid(settings, below)

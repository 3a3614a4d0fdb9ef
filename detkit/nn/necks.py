"""What stands between backbone and head: more feature maps, or better mixed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detkit import config
from detkit.config import FPN, PAN, NoNeck, SSDExtras
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


class CSP(nn.Module):
    """Cross stage partial block (Wang 2020): half of the channels pass by, the other half goes through `depth` residual
    pairs of 3x3 convolutions, and the steps between are handed on too (as in ELAN, Wang 2022)."""

    def __init__(self, cin: int, cout: int, depth: int = 1) -> None:
        super().__init__()
        half = cout // 2
        self.aside, self.enter = conv(cin, half), conv(cin, half)
        self.steps = nn.ModuleList(nn.Sequential(conv(half, half, 3), conv(half, half, 3)) for _ in range(depth))
        self.leave = conv((2 + depth) * half, cout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, cin, h, w] -> [B, cout, h, w]."""
        parts = [self.aside(x), self.enter(x)]
        for step in self.steps:
            parts.append(parts[-1] + step(parts[-1]))
        out: Tensor = self.leave(torch.cat(parts, 1))
        return out


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
    """FPN (Lin 2017): laterals, a top-down pass, a 3x3 convolution on each map; coarser maps by stride-2 convolutions,
    or every other cell."""

    def __init__(self, settings: FPN, below: FeatureMaps) -> None:
        super().__init__()
        width, given, norm = settings.channels, len(below.channels), settings.norm == "batch"
        self.channels, self.strides = _pyramid(settings, below)
        self.laterals = nn.ModuleList(conv(cin, width, act=False, norm=norm) for cin in below.channels)
        self.smooth = nn.ModuleList(conv(width, width, 3, act=False, norm=norm) for _ in range(given))
        more = settings.levels - given
        if settings.coarser == "pool":
            self.coarser = nn.ModuleList(nn.MaxPool2d(1, 2) for _ in range(more))
        else:
            self.coarser = nn.ModuleList(conv(width, width, 3, 2, norm=norm) for _ in range(more))
        if not norm:
            # No ReLU follows: torch's own initialisation would shrink the values threefold a layer.
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_uniform_(layer.weight, a=1)
                    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, feats: Feats) -> Feats:
        """Backbone maps -> `levels` maps of `channels`, finest first."""
        maps = [lateral(feat) for lateral, feat in zip(self.laterals, feats, strict=True)]
        for level in reversed(range(len(maps) - 1)):
            maps[level] = maps[level] + _up(maps[level + 1], maps[level])
        return tuple(_larger([smooth(feat) for smooth, feat in zip(self.smooth, maps, strict=True)], self.coarser))


class PathAggregation(Neck):
    """PAN (Liu 2018): an FPN's top-down pass, then a bottom-up one; by separable 5x5 convolutions or by CSP blocks."""

    def __init__(self, settings: PAN, below: FeatureMaps) -> None:
        super().__init__()
        width, given = settings.channels, len(below.channels)
        block: Callable[[int, int], nn.Module] = CSP if settings.block == "csp" else separable
        shrink = partial(conv, kernel=3, stride=2) if settings.block == "csp" else partial(separable, stride=2)
        self.laterals = nn.ModuleList(conv(cin, width) for cin in below.channels)
        self.coarser = nn.ModuleList(shrink(width, width) for _ in range(settings.levels - given))
        steps = settings.levels - 1
        self.top_down = nn.ModuleList(block(2 * width, width) for _ in range(steps))
        self.down = nn.ModuleList(shrink(width, width) for _ in range(steps))
        self.bottom_up = nn.ModuleList(block(2 * width, width) for _ in range(steps))
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


class Plain(Neck):
    """The backbone's maps as they are."""

    def __init__(self, below: FeatureMaps) -> None:
        super().__init__()
        self.channels, self.strides = below.channels, below.strides

    def forward(self, feats: Feats) -> Feats:
        """Maps -> the same."""
        return feats


def _pyramid(settings: FPN | PAN, below: FeatureMaps) -> tuple[tuple[int, ...], tuple[int, ...]]:
    strides: Sequence[int] = below.strides
    if settings.levels < len(strides):
        raise UserError(f"model.neck.levels={settings.levels}: the backbone alone has {len(strides)}")
    more = [strides[-1] * 2**i for i in range(1, settings.levels - len(strides) + 1)]
    return (settings.channels,) * settings.levels, (*strides, *more)


def build(settings: config.Neck, below: FeatureMaps) -> Neck:
    """The neck for a backbone that gives the maps of `below`."""
    match settings:
        case SSDExtras():
            return Extras(settings, below)
        case PAN():
            return PathAggregation(settings, below)
        case FPN():
            return FeaturePyramid(settings, below)
        case NoNeck():
            return Plain(below)

"""What all backbones share: a chain of stages, whose last three outputs are the maps; freezing counts those stages."""

from __future__ import annotations

from typing import Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detkit.nn.contract import Feats


class Chain(nn.Module):
    """A backbone as a chain of stages, each at half the resolution of the one before.

    name: torchvision's name of the network. channels, strides: of the three maps that `forward` returns, finest first;
    strides in pixels. Modules and parameters are called as in torchvision's classification network.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...] = (8, 16, 32)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.freeze = 0
        self.frozen_bn = False

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The layers of each stage, from the image on. Read from the module tree at each call, so that a layer that
        was exchanged (SyncBatchNorm, quantisation) is the one that runs."""
        raise NotImplementedError

    def forward(self, x_B3HW: Tensor) -> Feats:
        """Feature maps float [B, channels[i], ~H / strides[i], ~W / strides[i]] of normalised images."""
        x, maps = x_B3HW, []
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
            maps.append(x)
        return tuple(maps[-len(self.channels) :])

    def hold(self, freeze: int, frozen_bn: bool) -> None:
        """Keep the first `freeze` stages as they are and, with `frozen_bn`, every BatchNorm's statistics and affine
        parameters: no gradients, and eval mode whatever `train` is told."""
        self.freeze, self.frozen_bn = freeze, frozen_bn
        for module in self._held():
            module.requires_grad_(False)
        self.train(self.training)

    def _held(self) -> list[nn.Module]:
        held = [layer for stage in self.stages[: self.freeze] for layer in stage]
        if self.frozen_bn:
            held += [module for module in self.modules() if isinstance(module, _BatchNorm)]
        return held

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but what is held stays in eval mode."""
        super().train(mode)
        for module in self._held():
            module.eval()
        return self

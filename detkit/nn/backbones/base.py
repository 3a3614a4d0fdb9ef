"""What all backbones share: the maps that they state, and what is held while the rest trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from detkit.errors import UserError
from detkit.nn.contract import Feats


class Backbone(nn.Module):
    """A network from image to feature maps.

    name: the network's, in torchvision or timm. channels, strides: of the maps that `forward` returns, finest first;
    strides in pixels. What comes after the last map is left out.
    """

    channels: tuple[int, ...]

    def __init__(self, name: str, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.name, self.strides = name, strides
        self.freeze = 0
        self.frozen_bn = False
        self._switched_off: list[str] = []  # parameters, by `hold`

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The layers of each stage, from the image on. Read from the module tree at each call, so that a layer that
        was exchanged (SyncBatchNorm, quantisation) is the one that runs."""
        raise NotImplementedError

    def forward(self, x_B3HW: Tensor) -> Feats:
        """Feature maps float [B, channels[i], ~H / strides[i], ~W / strides[i]] of normalised images."""
        raise NotImplementedError

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A classification network's state dict by the names that its tensors have in this module."""
        return state

    def hold(self, freeze: int, frozen_bn: bool) -> None:
        """Keep the first `freeze` stages as they are and, with `frozen_bn`, every BatchNorm's statistics and affine
        parameters: no gradients, and eval mode whatever `train` is told. What an earlier call held and this
        one does not is free again."""
        own = dict(self.named_parameters())
        for name in self._switched_off:
            own[name].requires_grad_(True)
        self.freeze, self.frozen_bn = freeze, frozen_bn
        held = {parameter for module in self._held() for parameter in module.parameters()}
        self._switched_off = [name for name, parameter in own.items() if parameter in held and parameter.requires_grad]
        for name in self._switched_off:
            own[name].requires_grad_(False)
        self.train(self.training)

    def _held(self) -> list[nn.Module]:
        held = [layer for stage in self.stages[: self.freeze] for layer in stage] if self.freeze else []
        if self.frozen_bn:
            held += [module for module in self.modules() if isinstance(module, _BatchNorm)]
        return held

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train, but what is held stays in eval mode."""
        super().train(mode)
        for module in self._held():
            module.eval()
        return self


class Chain(Backbone):
    """A backbone as a chain of stages, each at half the resolution of the one before (AlexNet's first at a quarter).
    The last ones' outputs are the maps. Modules and parameters are called as in torchvision's classification network.
    """

    def forward(self, x_B3HW: Tensor) -> Feats:
        """See Backbone."""
        x, maps = x_B3HW, []
        for stage in self.stages:
            for layer in stage:
                x = layer(x)
            maps.append(x)
        return tuple(maps[-len(self.strides) :])


class Shrinking(Chain):
    """A chain some of whose convolutions or pools have no padding, so that its maps lose cells on all sides."""

    def forward(self, x_B3HW: Tensor) -> Feats:
        """See Backbone; maps as `whole` makes them. Raises UserError where the canvas is too small to leave any."""
        hw = (int(x_B3HW.shape[-2]), int(x_B3HW.shape[-1]))
        with fitting(self.name, hw):
            return whole(super().forward(x_B3HW), hw, self.strides)


@contextmanager
def fitting(name: str, hw: tuple[int, int]) -> Iterator[None]:
    """Within, the complaint that nothing is left of a map, or that it can't be divided, is a UserError about a canvas
    `hw`."""
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        small = "input size" in str(error) or "utput size is too small" in str(error)
        if small or isinstance(error, AssertionError):
            raise UserError(
                f"model.backbone: {name} can't take a canvas of {list(hw)} pixels: it is too small, or no multiple of "
                "64; change input.size, or the shares in train.progressive and train.multi_scale"
            ) from None
        raise


def whole(maps: Sequence[Tensor], hw: tuple[int, int], strides: tuple[int, ...]) -> Feats:
    """The maps with a cell for each `strides[i]` pixels of a canvas `hw`, begun ones included.

    Zeros take the places of cells that layers without padding lost, on all sides alike, so that each of the others
    lies where heads believe it to be, to half a cell.
    """
    padded = []
    for feat, stride in zip(maps, strides, strict=True):
        rows, columns = (-(-side // stride) - cells for side, cells in zip(hw, feat.shape[2:], strict=True))
        border = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        padded.append(F.pad(feat, border) if rows or columns else feat)
    return tuple(padded)

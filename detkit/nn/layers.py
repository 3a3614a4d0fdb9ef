"""Norms, activations and initial weights of a network that is already built, by the settings of config.Model.

Layers are exchanged in the module tree, so that a network needs no argument for them and its copies and exports have
what it has. Names stay, and so do a norm's scale and shift: weights load as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detkit.config import Activation, Init
from detkit.errors import need

ACTIVATIONS: dict[Activation, Callable[[bool], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": lambda inplace: nn.LeakyReLU(0.1, inplace),
    "elu": lambda inplace: nn.ELU(inplace=inplace),
    "selu": nn.SELU,
    "silu": nn.SiLU,
    "gelu": lambda inplace: nn.GELU(),  # noqa: ARG005 - there is none in place
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
}
# Not those that are gates, such as the sigmoid of squeeze-and-excitation.
EXCHANGEABLE = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish)

INITS: dict[Init, Callable[[Tensor], Tensor]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "kaiming_normal": partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu"),
    "orthogonal": nn.init.orthogonal_,
    "normal": partial(nn.init.normal_, std=0.01),
    "trunc_normal": partial(nn.init.trunc_normal_, std=0.02),
}


def _children(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every layer inside with its parent and its name there: a layer that is used twice, twice."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            yield parent, name, child


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """Every BatchNorm inside, of whatever kind."""
    return [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]


def group_norms(module: nn.Module) -> None:
    """Exchange every BatchNorm inside for GroupNorm (Wu & He 2018) of 32 groups, or as many as divide the channels."""
    for parent, name, old in _children(module):
        if isinstance(old, _BatchNorm):
            shape = (math.gcd(32, old.num_features), old.num_features)
            if hasattr(old, "act"):  # timm's norms with the activation inside
                new: nn.Module = need("timm.layers").GroupNormAct(shape[1], shape[0], eps=old.eps)
                new.drop, new.act = old.drop, old.act
            else:
                new = nn.GroupNorm(*shape, eps=old.eps)
            new.weight, new.bias = old.weight, old.bias
            setattr(parent, name, new)


def sync_norms(module: nn.Module) -> None:
    """Exchange every BatchNorm inside for SyncBatchNorm: statistics over the batches of all GPUs."""
    for parent, name, old in _children(module):
        if isinstance(old, _BatchNorm):
            convert = need("timm.layers").convert_sync_batchnorm if hasattr(old, "act") else _convert
            setattr(parent, name, convert(old))


_convert = nn.SyncBatchNorm.convert_sync_batchnorm


def exchange_activations(module: nn.Module, wanted: Activation) -> int:
    """Exchange every activation inside for the one wanted, in place where the old one was; returns how many."""
    count = 0
    for parent, name, old in _children(module):
        if isinstance(old, EXCHANGEABLE):
            setattr(parent, name, ACTIVATIONS[wanted](getattr(old, "inplace", False)))
            count += 1
    return count


def initialise(module: nn.Module, wanted: Init) -> None:
    """Draw the weights of every convolution and fully connected layer inside anew; their biases become 0."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            INITS[wanted](layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

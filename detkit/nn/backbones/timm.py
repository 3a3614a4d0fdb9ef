"""Any network of timm that gives feature maps (``features_only``)."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from detkit.errors import UserError, nearest, need
from detkit.nn.backbones.base import Backbone, fitting, whole
from detkit.nn.contract import Feats


class Timm(Backbone):
    """timm's network of that name, as far as the last map. Stages, for freezing: each ends where timm has a map.

    A tag after a dot (``resnet18.a1_in1k``) chooses among its pretrained weights. Raises UserError where timm is not
    installed, has no such network, or none with maps at these strides.
    """

    def __init__(self, name: str, strides: tuple[int, ...]) -> None:
        super().__init__(name, strides)
        timm, where = need("timm"), f"model.backbone.model={name}"
        if not timm.is_model(name):
            raise UserError(
                f"{where}: timm {timm.__version__} has no such model{nearest(name, timm.list_models())}; "
                "its docs list them"
            )
        with torch.device("meta"):
            info = self._create(name).feature_info.info
        places = {level["reduction"]: place for place, level in enumerate(info)}
        if absent := [stride for stride in strides if stride not in places]:
            raise UserError(
                f"{where}: has feature maps at strides {', '.join(map(str, places))}, none at "
                f"{', '.join(map(str, absent))}: take another model, or set model.backbone.strides"
            )
        self.places = tuple(places[stride] for stride in strides)
        self.channels = tuple(info[place]["num_chs"] for place in self.places)
        self.net = self._create(name, out_indices=self.places)
        self.channels_last = str(getattr(self.net, "output_fmt", "")).endswith("NHWC")
        settings = self.net.pretrained_cfg
        self.only = tuple(settings["input_size"][1:]) if settings.get("fixed_input_size") else None
        # Some of its feature networks keep layers that no map asked for depends on.
        for key in self._idle(settings["input_size"]):
            self.net.get_parameter(key).requires_grad_(False)

    def _idle(self, size: tuple[int, int, int]) -> list[str]:
        """The parameters that no map depends on, found on a copy without data."""
        with torch.device("meta"):
            net = self._create(self.name, out_indices=self.places)
            torch.stack([feat.sum() for feat in net(torch.zeros(2, *size))]).sum().backward()  # type: ignore[no-untyped-call]
        return [key for key, parameter in net.named_parameters() if parameter.grad is None]

    @staticmethod
    def _create(name: str, **options: Any) -> Any:
        with warnings.catch_warnings(action="ignore"):  # on names of old
            try:
                return need("timm").create_model(name, features_only=True, **options)
            except (RuntimeError, AssertionError, AttributeError, TypeError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise UserError(f"model.backbone.model={name}: timm gives no feature maps of it: {reason}") from None

    def forward(self, x_B3HW: Tensor) -> Feats:
        """See Backbone. Raises UserError for another canvas than the only one that the network takes."""
        hw = (int(x_B3HW.shape[-2]), int(x_B3HW.shape[-1]))
        if self.only not in (None, hw):
            raise UserError(
                f"model.backbone.model={self.name}: takes only input.size={list(self.only or ())}, not {list(hw)}, and "
                "neither train.progressive nor train.multi_scale"
            )
        with fitting(self.name, hw):
            maps = self.net(x_B3HW)
        if self.channels_last:
            maps = [feat.permute(0, 3, 1, 2) for feat in maps]
        return whole(maps, hw, self.strides)

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The modules between one map and the next, in the order in which timm registers them, which is that of their
        use."""
        named = [(_bare(name) + ".", module) for name, module in self.net.named_modules() if name]
        ends = [level["module"] + "." for level in self.net.feature_info.info[: self.places[-1] + 1]]
        stages, stops = [], []
        for end in ends:
            inside = [i for i, (name, _) in enumerate(named) if name.startswith((end, end.replace(".", "_", 1)))]
            if not inside:
                raise UserError(
                    f"model.backbone.freeze: the stages of {self.name} can't be told apart; set it to 0, "
                    "train.unfreeze to [], and train.optimizer.layer_decay to 1"
                )
            stops.append(inside[-1] + 1)
        for start, stop in pairwise((0, *stops)):
            stage = {module: None for _, module in named[start:stop]}
            stages.append([module for module in stage if stage.keys() >= {*module.modules()}])
        return stages

    def own_names(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's classification network's tensors by ours: its feature network writes ``layer_0`` for ``layer.0``."""
        ours = {_flat(_bare(name)): name for name in self.net.state_dict()}
        return {f"net.{ours[_flat(name)]}" if _flat(name) in ours else name: state[name] for name in state}

    def download(self) -> dict[str, Tensor]:
        """The pretrained weights, as timm gets them: from their server, or the cache of it. Raises UserError."""
        timm = need("timm")
        try:
            net = timm.create_model(self.name, features_only=True, out_indices=self.places, pretrained=True)
        except Exception as error:  # noqa: BLE001 - the hub's client raises many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
            source = timm.get_pretrained_cfg(self.name)
            origin = source and (source.hf_hub_id or source.url)
            raise UserError(
                f"timm's weights of {self.name}: not to be had ({reason}): fetch {origin or 'some'} on a machine with "
                "internet and set model.weights=PATH to the file, or train from scratch with model.weights=none"
            ) from None
        state: dict[str, Tensor] = net.state_dict()
        return {f"net.{name}": tensor for name, tensor in state.items()}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _bare(name: str) -> str:
    """A name inside the network, without what timm's wrappers put before it."""
    return name.removeprefix("body.").removeprefix("model.")

"""Weights that were trained before: files and downloads with torchvision's key names, and our own checkpoints of other
classes, put into a detector of ours."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum, get_model_weights, get_weight
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from detkit import config
from detkit.errors import UserError, nearest
from detkit.nn.backbones.base import Backbone
from detkit.nn.backbones.timm import Timm
from detkit.nn.contract import ClassRows
from detkit.nn.detector import Detector

SUFFIXES = (".pth", ".pt", ".safetensors")

# torchvision's ssd300_vgg16 -> our detector with VGG16 and SSD's own neck. It cuts VGG at the fourth pool
# (features.23), so that conv5 is numbered anew in extra.0; fc6 and fc7 follow there as number 7.
REFERENCE = {
    "backbone.features.": "backbone.features.",
    "backbone.scale_weight": "neck.scale",
    **{f"backbone.extra.0.{i}.": f"backbone.features.{23 + i}." for i in (1, 3, 5)},
    "backbone.extra.0.7.": "neck.extra.0.",
    **{f"backbone.extra.{i}.": f"neck.extra.{i}." for i in range(1, 6)},
    "head.classification_head.module_list.": "head.scores.",
    "head.regression_head.module_list.": "head.offsets.",
}


# torchvision's fasterrcnn_resnet50_fpn and its _v2 -> our detector with ResNet50, FPN and the head of Faster R-CNN.
REFERENCE_RCNN = {
    "backbone.body.": "backbone.",
    "backbone.fpn.inner_blocks.": "neck.laterals.",
    "backbone.fpn.layer_blocks.": "neck.smooth.",
    "rpn.head.conv.": "head.rpn.convs.",
    "rpn.head.cls_logits.": "head.rpn.scores.",
    "rpn.head.bbox_pred.": "head.rpn.offsets.",
    "roi_heads.box_head.fc6.": "head.box.fc1.",
    "roi_heads.box_head.fc7.": "head.box.fc2.",
    **{f"roi_heads.box_head.{i}.": f"head.box.conv{i + 1}." for i in range(4)},
    "roi_heads.box_head.5.": "head.box.fc1.",
    "roi_heads.box_predictor.cls_score.": "head.scores.",
    "roi_heads.box_predictor.bbox_pred.": "head.offsets.",
}
# Before version 0.13 these convolutions were no sequences.
OLD_RCNN = re.compile(r"^(rpn\.head\.conv|backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$")
# VGG's classifier, which Faster R-CNN's own paper keeps as its fully connected layers.
VGG_CLASSIFIER = {"classifier.0.": "head.box.fc1.", "classifier.3.": "head.box.fc2."}
# Trained when torchvision's FrozenBatchNorm2d added no epsilon to the variance; torchvision takes it off when loading.
WITHOUT_EPSILON = FasterRCNN_ResNet50_FPN_Weights.COCO_V1
EPSILON = 1e-5


@dataclass(frozen=True, slots=True)
class Classes:
    """What became of the classes of a checkpoint: those that the detector has too are kept, whatever their places."""

    kept: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]

    @classmethod
    def compared(cls, before: Sequence[str], now: Sequence[str]) -> Classes:
        """Those of a checkpoint with those of a detector."""
        kept = tuple(name for name in now if name in before)
        new = tuple(name for name in now if name not in before)
        return cls(kept, new, tuple(name for name in before if name not in now))

    def __str__(self) -> str:
        """A line for each of the three."""
        parts = {"kept": self.kept, "new": self.new, "dropped": self.dropped}
        return "\n".join(f"classes {word}: {len(names)}  {', '.join(names)}".rstrip() for word, names in parts.items())


@dataclass(frozen=True, slots=True)
class Report:
    """What was loaded. source: the file or the weights' name. loaded: number of tensors. missing: the detector's
    tensors that the source lacks. mismatched: those that it has in another shape, or with no class of the detector.
    Both are as initialised. unexpected: the source's tensors that were not used. classes: where the source says
    which it was trained for."""

    source: str
    loaded: int
    missing: tuple[str, ...]
    mismatched: tuple[str, ...]
    unexpected: tuple[str, ...]
    classes: Classes | None = None

    def __str__(self) -> str:
        parts = [f"weights: {self.loaded} tensors from {self.source}"]
        if self.missing:
            parts.append(f"as initialised: {_groups(self.missing)}")
        if self.mismatched:
            parts.append(f"as initialised, since the classes or boxes differ: {_groups(self.mismatched)}")
        if self.unexpected:
            parts.append(f"not used: {_groups(self.unexpected)}")
        return "; ".join(parts)


def _groups(names: Iterable[str]) -> str:
    """``head.scores (12), neck (8)``: how many tensors there are of each part."""
    parts = Counter(".".join(name.split(".")[: 2 if name.startswith("head.") else 1]) for name in names)
    return ", ".join(f"{part} ({count})" for part, count in parts.items())


def load(detector: Detector, model: config.Model, classes: Sequence[str] = ()) -> Report | None:
    """Put the weights that ``model.weights`` means (see config.Model) into `detector`, whatever their precision.

    classes: the detector's. Of a checkpoint, which names its own, the outputs for classes of the same name are kept;
    those for others stay as initialised. Returns what was loaded and what was not, or None for 'none'. Raises
    UserError, and changes nothing, where they can't be had or don't cover the whole backbone: a backbone is never
    loaded in part.
    """
    if model.weights == "none":
        return None
    if model.weights.endswith(SUFFIXES):
        source, state = model.weights, _read(Path(model.weights))
    elif isinstance(detector.backbone, Timm):
        if model.weights != "imagenet":
            raise UserError(
                f"model.weights={model.weights}: with a backbone of timm it is none, imagenet (what timm has for it) "
                f"or a file ({', '.join(SUFFIXES)})"
            )
        source, state = f"timm's {detector.backbone.name}", detector.backbone.download()
    else:
        wanted = _hub(model.weights, model.backbone.name, detector.head.reference)
        source, state = str(wanted), _download(wanted)
    if source == str(WITHOUT_EPSILON) or Path(source).name == Path(WITHOUT_EPSILON.url).name:
        state = {key: value.float() - EPSILON if key.endswith("running_var") else value for key, value in state.items()}
    own = {name: tensor for name, tensor in detector.state_dict().items() if not name.endswith("num_batches_tracked")}
    given = _renamed(state, own, detector.backbone)
    trained = _class_names(Path(model.weights)) if classes and source == model.weights else None
    if trained:
        for name, rows in _class_tensors(detector):
            if name in given:
                given[name] = _by_class(given[name], own[name], rows, trained, classes)
    missing = tuple(name for name in own if name not in given)
    mismatched = tuple(name for name in own if name in given and given[name].shape != own[name].shape)
    bad = [name for name in (*missing, *mismatched) if name.startswith("backbone.")]
    if bad:
        raise UserError(
            f"model.weights={model.weights}: not weights of the backbone {model.backbone.name}: {len(bad)} of its "
            f"tensors are absent or of another shape, such as {', '.join(bad[:3])}"
        )
    fitting = {name: given[name] for name in own if name not in missing and name not in mismatched}
    detector.load_state_dict(fitting, strict=False)
    known = detector.state_dict().keys()
    unexpected = tuple(name for name in given if name not in known)
    compared = Classes.compared(trained, classes) if trained else None
    return Report(source, len(fitting), missing, mismatched, unexpected, compared)


def _class_names(path: Path) -> tuple[str, ...] | None:
    """The classes of one of detkit's checkpoints; None for other files."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        told = (file.metadata() or {}).get("classes")
    try:
        return told and tuple(json.loads(told))
    except (ValueError, TypeError):
        raise UserError(f"model.weights={path}: what it says of its classes is damaged; take another file") from None


def _class_tensors(detector: Detector) -> Iterator[tuple[str, ClassRows]]:
    """The names of the tensors whose first axis belongs to classes."""
    for layer, rows in detector.head.class_layers().items():
        for name, _ in detector.head.get_submodule(layer).named_parameters():
            yield f"head.{layer}.{name}", rows


def _by_class(theirs: Tensor, ours: Tensor, rows: ClassRows, before: Sequence[str], now: Sequence[str]) -> Tensor:
    """`ours` with what belongs to classes that both have, or to none, taken from `theirs`.

    before, now: the classes of each. Returns an empty tensor where the layers are not alike, or have nothing in common.
    """
    pairs = [(i, before.index(name)) for i, name in enumerate(now) if name in before]
    groups = len(ours) // ((rows.before + len(now)) * rows.rows)
    alike = theirs.shape == (groups * (rows.before + len(before)) * rows.rows, *ours.shape[1:])
    if not alike or not (pairs or rows.before):
        return ours.new_empty(0)
    common = [(i, i) for i in range(rows.before)] + [(rows.before + i, rows.before + j) for i, j in pairs]
    to, source = (list(places) for places in zip(*common, strict=True))
    merged = ours.clone()
    slots, given = (each.view(groups, -1, rows.rows, *each.shape[1:]) for each in (merged, theirs.to(ours)))
    slots[:, to] = given[:, source]
    return merged


def _renamed(state: dict[str, Tensor], own: dict[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """The state dict by our names: of a reference detector, of a detector of ours, or of a classification network
    (whose classifier nobody here asks for, but Faster R-CNN on VGG). own: the detector's tensors."""
    if "backbone.scale_weight" in state:
        return {_ours(name, REFERENCE): tensor for name, tensor in state.items()}
    if "rpn.head.cls_logits.weight" in state:
        now = {OLD_RCNN.sub(_sequence, name): tensor for name, tensor in state.items()}
        return {_ours(name, REFERENCE_RCNN): tensor for name, tensor in now.items()}
    if any(name.startswith("backbone.") for name in state):
        return state
    fitting = {
        theirs: ours
        for theirs, ours in VGG_CLASSIFIER.items()
        if (name := f"{theirs}weight") in state
        and (mine := own.get(f"{ours}weight")) is not None
        and state[name].shape == mine.shape
    }
    return {_ours(name, fitting, "backbone."): tensor for name, tensor in backbone.own_names(state).items()}


def _sequence(old: re.Match[str]) -> str:
    return f"{old[1]}.0.{'0.' if 'rpn' in old[1] else ''}{old[2]}"


def _ours(name: str, names: dict[str, str], otherwise: str = "") -> str:
    for theirs, ours in names.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return otherwise + name


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file. Nothing but tensors is unpickled."""
    if not path.is_file():
        raise UserError(f"model.weights={path}: no such file")
    state: Any
    try:
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - torch and safetensors raise many kinds for a damaged file
        raise UserError(
            f"model.weights={path}: can't be read as weights: it is damaged, or a pickle of more than tensors, "
            "which could run code and is refused"
        ) from None
    for wrapper in ("model", "state_dict"):  # checkpoints of torchvision's training scripts, and of many others
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"model.weights={path}: not a state dict: expected tensors by name")
    return state


def _hub(spec: str, backbone: str, reference: str | None) -> WeightsEnum:
    """The torchvision weights that a setting means, for a detector with that backbone and a head made like that."""
    try:
        own = get_model_weights(backbone)
    except ValueError:
        raise UserError(f"model.weights={spec}: nobody publishes weights of {backbone}: set none, or a file") from None
    if spec == "imagenet":
        return own.DEFAULT
    if spec == "torchvision":
        if reference is None:
            raise UserError("model.weights=torchvision: torchvision has no detector with this head; set it to imagenet")
        return get_weight(reference)
    try:
        return get_weight(spec)
    except (ValueError, KeyError, AttributeError):
        known = ("none", "imagenet", "torchvision", *map(str, own))
        raise UserError(
            f"model.weights={spec}: neither a file ({', '.join(SUFFIXES)}) nor weights of torchvision"
            f"{nearest(spec, known)}; for {backbone} there are: {', '.join(known)}"
        ) from None


def _download(wanted: WeightsEnum) -> dict[str, Tensor]:
    """The state dict from torchvision's server, or from torch.hub's cache of it."""
    try:
        state: dict[str, Tensor] = wanted.get_state_dict(
            progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except (OSError, HTTPException, RuntimeError) as error:
        reason = str(getattr(error, "reason", None) or error or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{wanted}: the download failed ({reason}): fetch {wanted.url} on a machine with internet and set "
            "model.weights=PATH to the file, or train from scratch with model.weights=none"
        ) from None
    return state

"""What is measured of a run while it trains: losses, gradients, updates, speed; and, at an evaluation, dead channels,
histograms, sample photos and precision-recall curves.

Norms are added up on the device and fetched once a row, so that no step waits for them. A run has about `ROWS` rows of
steps whatever its length, and one a step at its beginning, where most goes wrong.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from detkit import imaging, matches, metrics, report
from detkit.data import stats
from detkit.data.labels import DataSet
from detkit.errors import need
from detkit.loggers import Histogram, Loggers
from detkit.nn.detector import Detector
from detkit.nn.layers import EXCHANGEABLE, batch_norms
from detkit.runtime import render
from detkit.types import Detections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS, FIRST = 1000, 64
GROUPS = ("backbone", "neck", "head")
# What is added up on the device, by step.
_SUMS = ("grad", "grad_first", "clipped", "finite", *(f"grad_{group}" for group in GROUPS))
_MOVES = tuple(f"update_{group}" for group in GROUPS)
_COLUMNS = (*(name for name in _SUMS if name != "finite"), "grad_max", *_MOVES, "skipped", "img_s", "data_wait")
CHANNELS = (*(f"dead_{group}" for group in GROUPS), "dead_most", "alike")
_STILL = 1e-6  # a channel is dead whose values differ by less than this share of the layer's largest
_ALIKE = 1e-3  # channels are alike whose least, largest and mean value differ by less than such a share
_BINS = 64
_PHOTOS, _SIDE = 4, 320  # samples at an evaluation, and the longer side of each in pixels


def memory(device: torch.device) -> float:
    """The most memory in MiB that this process has had: of the device, for a CPU of the machine; NaN where none can
    tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    if sys.platform == "win32":
        return math.nan
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _flat(parameter: Tensor) -> Tensor:
    """A view of all values, in whatever order they lie."""
    parameter = parameter.detach()
    strides = parameter.stride()
    order = sorted(range(parameter.ndim), key=lambda axis: -strides[axis])
    return parameter.permute(order).flatten()


class Watch:
    """The figures of the steps since the last row.

    steps: of the whole run. clip_norm: what gradients are clipped to; 0: they are not.
    """

    def __init__(self, detector: Detector, steps: int, clip_norm: float) -> None:
        self.steps, self.clip_norm = steps, clip_norm
        self._group = {p: i for i, group in enumerate(GROUPS) for p in getattr(detector, group).parameters()}
        self._every = max(1, math.ceil(steps / ROWS))
        self._live: list[nn.Parameter] = []
        self._places = torch.empty(0)  # the group of each of them, int64 on the device
        self._trained: set[int] = set()  # those groups
        self._first = 0  # the first matrix among them
        self._flat: list[Tensor] = []  # they as vectors, which see all that is done to them
        self._parts: list[slice] = []  # where each group lies, those vectors put together
        self._before: Tensor | None = None  # the weights before this step
        self._lrs = (math.nan, math.nan)  # of the head and of the backbone's first layers, in the last step
        self._clear()

    def _clear(self) -> None:
        self._sums: Tensor | None = None  # float32 [len(_SUMS)]
        self._most: Tensor | None = None  # float32 []: the largest norm of a gradient
        self._moved: Tensor | None = None  # float32 [len(GROUPS)]
        self._losses: dict[str, float] = {}
        self._host = dict.fromkeys(("loss_max", "steps", "left_out", "images", "waited", "seconds"), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Of plain values: a row begun."""
        tensors = {"sums": self._sums, "most": self._most}
        fetched = {name: None if tensor is None else tensor.tolist() for name, tensor in tensors.items()}
        return fetched | {"losses": dict(self._losses), "host": dict(self._host)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that row."""
        device = next(iter(self._group)).device
        sums, most = (None if state[k] is None else torch.tensor(state[k], device=device) for k in ("sums", "most"))
        self._sums, self._most, self._losses, self._host = sums, most, dict(state["losses"]), dict(state["host"])

    def ends_row(self, step: int) -> bool:
        """Whether a row ends with the step of that number (from 1)."""
        return step <= FIRST or step % self._every == 0 or step == self.steps

    @torch.no_grad()
    def gradients(self, step: int) -> Tensor:
        """Measure the gradients, whole and unscaled, of the step of that number (from 1), and clip them; returns their
        norm before, float32 []."""
        live = [parameter for parameter in self._group if parameter.grad is not None]
        if len(live) != len(self._live):  # some have been frozen or set free
            places = [self._group[parameter] for parameter in live]
            self._live, self._trained = live, set(places)
            self._flat = [_flat(parameter) for parameter in live]
            ends = np.cumsum(
                [0, *(sum(p.numel() for p, at in zip(live, places, strict=True) if at == g) for g in range(3))]
            )
            self._parts = [slice(*pair) for pair in pairwise(ends.tolist())]
            self._places = torch.tensor(places, device=live[0].device)
            self._first = next((i for i, parameter in enumerate(live) if parameter.ndim > 1), 0)
        norms = torch.stack(torch._foreach_norm([p.grad for p in live if p.grad is not None]))
        total: Tensor = torch.linalg.vector_norm(norms)
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(live, self.clip_norm, total)
        finite = total.isfinite()
        clipped = total > (self.clip_norm or math.inf)
        values = torch.cat([torch.stack([total, norms[self._first], clipped, finite]), self._by_group(norms)])
        values = torch.where(finite, values, 0)  # the scaler leaves out a step that is not
        self._sums = values if self._sums is None else self._sums + values
        self._most = values[0] if self._most is None else torch.maximum(self._most, values[0])
        self._before = torch.cat(self._flat) if self.ends_row(step) else None
        return total

    def _by_group(self, norms: Tensor) -> Tensor:
        """Norms of the live parameters, float32 [P] -> of each group, float32 [len(GROUPS)]."""
        squares = torch.zeros(len(GROUPS), device=norms.device)
        return squares.index_add_(0, self._places, norms.square()).sqrt()

    @torch.no_grad()
    def moved(self, lrs: Sequence[float]) -> None:
        """Measure how far the step has moved the weights, where a row ends with it. lrs: of the optimiser's groups."""
        self._lrs = (lrs[-1], lrs[0])
        if self._before is not None:
            moves = torch.cat(self._flat).sub_(self._before)
            norms = [[vector[part].norm() for part in self._parts] for vector in (moves, self._before)]
            self._moved = torch.stack(norms[0]) / torch.stack(norms[1])
            self._before = None

    def left_out(self, losses: Mapping[str, float]) -> None:
        """Note that a step is left out whose losses, or gradients, are not finite."""
        for name in losses:
            self._losses.setdefault(name, 0.0)
        self._host["left_out"] += 1

    def step(
        self, step: int, losses: Mapping[str, float], *, images: int, waited: float, seconds: float
    ) -> dict[str, float] | None:
        """Note the step of that number; returns the row that ends with it, if one does.

        losses: none of a step that was left out. images: of the step. waited: for data, of all its `seconds`.
        """
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0.0) + value
        host = self._host
        host["loss_max"] = max(host["loss_max"], sum(losses.values()))
        for name, value in (("steps", 1), ("images", images), ("waited", waited), ("seconds", seconds)):
            host[name] += value
        if not self.ends_row(step):
            return None
        assert self._sums is not None
        assert self._most is not None
        assert self._moved is not None
        fetched = torch.cat([self._sums, self._most[None], self._moved]).tolist()
        values = dict(zip((*_SUMS, "grad_max", *_MOVES), fetched, strict=True))
        finite = values["finite"]
        for name in _SUMS:
            values[name] /= host["steps"] if name == "clipped" else finite or math.nan
        for place, group in enumerate(GROUPS):
            if place not in self._trained:
                values[f"grad_{group}"] = values[f"update_{group}"] = math.nan
        values["skipped"] = max(host["steps"] - finite, host["left_out"])
        values["img_s"], values["data_wait"] = (host[name] / host["seconds"] for name in ("images", "waited"))
        counted = host["steps"] - host["left_out"] or math.nan
        means = {name: total / counted for name, total in self._losses.items()}
        row = self._row(means, host["loss_max"] or math.nan, values)
        self._clear()
        return row

    def broken(self, losses: Mapping[str, float]) -> dict[str, float]:
        """The row of a step that can't be done, for its losses are not finite."""
        return self._row(losses, math.nan, {})

    def _row(self, losses: Mapping[str, float], loss_max: float, values: Mapping[str, float]) -> dict[str, float]:
        lr, lr_backbone = self._lrs
        return {
            "lr": lr,
            "lr_backbone": lr_backbone,
            **{f"loss_{name}": value for name, value in losses.items()},
            "loss_max": loss_max,
            **{name: values.get(name, math.nan) for name in _COLUMNS},
            "memory": memory(next(iter(self._group)).device),
        }


class Seen:
    """What the activations of a detector gave. shares: of the channels that were dead or alike (`CHANNELS`).
    histograms: of their outputs, if wanted."""

    def __init__(self, histograms: bool) -> None:
        self._wanted = histograms
        self.histograms: dict[str, Histogram] = {}
        # Least, largest and summed value of each channel, by layer and number of channels.
        self._layers: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}

    def note(self, layer: str, output: Tensor) -> None:
        """Note a layer's output, [B, C, h, w] or [N, C]; one that is used on many maps is one layer, but for maps with
        other numbers of channels, as a ResNet50's blocks have."""
        others = [axis for axis in range(output.ndim) if axis != 1]
        output = output.detach().float()
        low, high, total = output.amin(others), output.amax(others), output.sum(others)
        key = layer, output.shape[1]
        if key in self._layers:
            before = self._layers[key]
            low, high, total = torch.minimum(before[0], low), torch.maximum(before[1], high), before[2] + total
        self._layers[key] = low, high, total
        if self._wanted and f"activations/{layer}" not in self.histograms:
            self.histograms[f"activations/{layer}"] = _histogram(output)

    @property
    def shares(self) -> dict[str, float]:
        """dead: of all channels of a group, and of those of the layer that has most, those that gave one and the same
        for all that was seen. alike: of all, those that gave what another of their layer gave. NaN where there are no
        activations."""
        dead, channels, alike = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0), 0
        most = math.nan
        for (layer, _), (low, high, total) in self._layers.items():
            still = high - low <= _STILL * torch.maximum(high.abs(), low.abs()).max()
            live = torch.stack([low, high, total], 1)[~still]
            live = (live / live.abs().amax(0, keepdim=True).clamp(min=1e-30) / _ALIKE).round() if len(live) else live
            count, group = int(still.sum()), layer.partition(".")[0]
            alike += len(live) - len(np.unique(live.cpu().numpy(), axis=0))
            dead[group], channels[group] = dead[group] + count, channels[group] + len(low)
            most = max(0.0 if math.isnan(most) else most, count / len(low))
        shares = {f"dead_{g}": dead[g] / channels[g] if channels[g] else math.nan for g in GROUPS}
        known = sum(channels.values())
        return shares | {"dead_most": most, "alike": alike / known if known else math.nan}


def _histogram(values: Tensor) -> Histogram:
    values = values.detach().float()
    values = values[values.isfinite()]
    low, high = (float(values.min()), float(values.max())) if values.numel() else (0.0, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, _BINS, low, high).cpu().numpy().astype(np.int64)
    total, squares = float(values.double().sum()), float(values.double().square().sum())
    return Histogram(counts, np.linspace(low, high, _BINS + 1), total, squares)


@contextmanager
def first_batch(detector: Detector) -> Iterator[list[Tensor]]:
    """Within, the first images that the detector is given are put into the list, normalised: float32 [B, 3, H, W]."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if not kept:
            kept.append(given[0])

    handle = detector.backbone.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()


@torch.no_grad()
def look(averaged: Detector, trained: Detector, images: Tensor, histograms: bool) -> Seen:
    """One pass of the averaged detector over normalised images, its activations watched. BatchNorm takes the batch's
    statistics where it does so in training: early in a run the running ones are far off, and silence channels that are
    alive. Nothing of the detector is changed."""
    seen = Seen(histograms)
    handles: list[RemovableHandle] = []
    for name, layer in averaged.named_modules():
        if isinstance(layer, EXCHANGEABLE):
            note = lambda _layer, _given, output, name=name: seen.note(name, output)  # noqa: E731
            handles.append(layer.register_forward_hook(note))
    pairs = zip(batch_norms(averaged), batch_norms(trained), strict=True)
    live = [norm for norm, other in pairs if other.training]
    for norm in live:
        norm.training, norm.track_running_stats = True, False
    try:
        averaged.head(averaged.neck(averaged.backbone(images)), (int(images.shape[-2]), int(images.shape[-1])))
    finally:
        for norm in live:
            norm.training, norm.track_running_stats = False, True
        for handle in handles:
            handle.remove()
    return seen


def weights(detector: Detector) -> dict[str, Histogram]:
    """Histograms of the matrices and convolutions."""
    return {f"weights/{name}": _histogram(p) for name, p in detector.named_parameters() if p.ndim > 1}


def samples(data: DataSet, found: Sequence[Detections], score: float) -> dict[str, NDArray[np.uint8]]:
    """A few photos, the same each time: the ground truth on the left, on the right detections of at least `score`.
    Photos that can't be decoded are no reason to stop."""
    filled = np.flatnonzero(np.diff(data.box_ends, prepend=0))
    chosen = np.unique(np.linspace(0, len(filled) - 1, min(_PHOTOS, len(filled))).round().astype(np.int64))
    pictures = {}
    for number, index in enumerate(filled[chosen].tolist(), 1):
        record = data[index]
        truth = Detections(
            record.boxes.astype(np.float32), np.ones(len(record.labels), np.float32), record.labels, record.hw
        )
        image = Image.fromarray(imaging.decode(record.path))
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        pixels = np.array(image)
        best = found[index].above(max(score, found[index].scores[: 2 * len(truth)].min(initial=1)))  # early on any
        pair = [
            render.draw(pixels, _scaled(each, pixels.shape[:2]), data.classes, scores=scored)
            for each, scored in ((truth, False), (best, True))
        ]
        pictures[f"samples/{number}"] = render.contact_sheet(pair, 2, 2 * pixels.shape[1])
    return pictures


def _scaled(found: Detections, hw: tuple[int, ...]) -> Detections:
    """The detections on the photo made smaller."""
    factor = np.tile([hw[1] / found.hw[1], hw[0] / found.hw[0]], 2).astype(np.float32)
    return Detections(found.boxes * factor, found.scores, found.labels, (hw[0], hw[1]))


def precision_recall(data: DataSet, found: Sequence[Detections]) -> Figure:
    """Precision over recall at IoU 0.5: the mean over classes, and each class."""
    need("matplotlib")
    from matplotlib.figure import Figure

    pool = matches.pool([data[i] for i in range(len(data))], found, data.classes)
    figure = Figure(figsize=(7.5, 4.5), dpi=80)
    axes = figure.add_axes((0.09, 0.12, 0.65, 0.8))  # a layout that is worked out takes longer than all the rest
    report.draw_curves(axes, metrics.curves(pool, matches.match(pool, (0.5,)).state[0, 0]))
    return figure


def objects(**splits: DataSet) -> str:
    """How many objects of each class each split has to learn or to find, as JSON."""
    counts = {
        split: np.bincount(data.labels[stats.measured(data)], minlength=len(data.classes)).tolist()
        for split, data in splits.items()
    }
    names = next(iter(splits.values())).classes
    tree = {name: {split: counts[split][label] for split in splits} for label, name in enumerate(names)}
    return json.dumps(tree, ensure_ascii=False, indent=1) + "\n"


def record(
    log: Loggers, step: int, data: DataSet, figures: Mapping[str, Any], found: Sequence[Detections], pictures: bool
) -> None:
    """Hand on what an evaluation gave beside its means: AP by class and the number of detections of each from the score
    of the best F1; sample photos and precision-recall curves, if wanted."""
    labels = np.concatenate([np.zeros(0, np.int64), *(each.above(figures["score"]).labels for each in found)])
    counts = np.bincount(labels, minlength=len(data.classes)).tolist()
    pairs = figures["per_class"]
    ap = {f"AP/{name}": pairs[name][0] if pairs[name] else math.nan for name in data.classes}
    log.scalars("classes", step, ap | {f"found/{n}": count for n, count in zip(data.classes, counts, strict=True)})
    if pictures:
        log.images(step, samples(data, found, figures["score"]))
        log.figures(step, {"precision_recall": precision_recall(data, found)})

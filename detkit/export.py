"""A trained detector as one ONNX file, checked against torch before it is given its name."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxscript import opset18
from rich.console import Console
from torch import Tensor, nn
from torchvision.ops import box_iou

from detkit import checkpoint, config
from detkit.data import cache
from detkit.data.dataset import EvalSet
from detkit.errors import UserError
from detkit.files import atomic_write
from detkit.manifest import KEY, Manifest
from detkit.nn.detector import Predictor
from detkit.runtime.session import INPUT, OUTPUTS

op: Any = opset18  # onnxscript's annotations forbid the constants that its operators take

PHOTOS = 8  # of the validation split, on which the file is checked
IOU, SLACK = 0.99, 1e-3  # boxes are the same from that IoU on; scores and overlaps, up to that difference


def _suppress(boxes: Any, scores: Any, iou: float, score: float, keep: int) -> Any:
    """detkit::suppress in ONNX. NonMaxSuppression's rows are (image, class, box); there is one class."""
    rows = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, [1]), [keep], [iou], [score])
    places = op.Gather(rows, [0, 2], axis=1)
    return op.ScatterND(op.ConstantOfShape(op.Shape(scores)), places, op.GatherND(scores, places))


def _stable_sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001
    """aten::sort.stable, which torch.onnx lacks: of equal values, ONNX's TopK puts the lower index first."""
    return op.TopK(x, op.Gather(op.Shape(x), [dim]), axis=dim, largest=int(descending), sorted=1)


def _pyramid_align(feats: Any, boxes: Any, levels: Any, strides: Any, size: int, samples: int) -> Any:
    """detkit::pyramid_align in ONNX: RoiAlign of each level's boxes, put back into their places."""
    shape = op.Shape(boxes)
    images = op.Range(0, op.Gather(shape, 0), 1)
    image = op.Reshape(op.Expand(op.Unsqueeze(images, [1]), op.Slice(shape, [0], [2])), [-1])
    boxes, levels = op.Reshape(boxes, [-1, 4]), op.Reshape(levels, [-1])
    cells = op.Slice(op.Shape(feats[0]), [1], [2])
    side = op.Constant(value_ints=[size])
    found = op.ConstantOfShape(op.Concat(op.Shape(levels), cells, side, side, axis=0))
    for level, (feat, stride) in enumerate(zip(feats, strides, strict=True)):
        places = op.Reshape(op.NonZero(op.Equal(levels, op.Constant(value_int=level))), [-1])
        aligned = op.RoiAlign(
            feat, op.Gather(boxes, places), op.Gather(image, places), output_height=size, output_width=size,
            sampling_ratio=samples, spatial_scale=1 / stride, coordinate_transformation_mode="output_half_pixel",
        )  # fmt: skip
        found = op.ScatterND(found, op.Unsqueeze(places, [1]), aligned)
    return found


def _roi_pool(x: Any, boxes: Any, scale: float, rows: int, columns: int) -> Any:
    """torchvision::roi_pool, of which onnxscript's own form takes other arguments. Its second output, where the maxima
    were, serves gradients only."""
    pooled = op.MaxRoiPool(x, boxes, pooled_shape=[rows, columns], spatial_scale=scale)
    return pooled, pooled


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.detkit.suppress.default: _suppress,
    torch.ops.aten.sort.stable: _stable_sort,
    torch.ops.torchvision.roi_pool.default: _roi_pool,
    torch.ops.detkit.pyramid_align.default: _pyramid_align,
}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch.onnx prints, warns and logs; errors still raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _strip(message: Any) -> None:
    """Clear metadata and doc strings at every depth: torch puts stack traces with this machine's paths there."""
    for name in ("metadata_props", "doc_string"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                _strip(inner)


def graph(module: nn.Module, inputs: Mapping[str, Tensor]) -> onnx.ModelProto:
    """The ONNX graph of a module in eval mode whose outputs are boxes, scores and labels.

    inputs: a name and an example for each argument of `forward`; the first dimension of each is the batch, and free.
    The example must have 2 or more of it: what torch sees broadcast from 1 to 1, it leaves out for good.
    Opset 18, IR 10; without metadata.
    """
    with _quiet():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            verbose=False,
            opset_version=18,
            external_data=False,
            input_names=list(inputs),
            output_names=list(OUTPUTS),
            dynamic_shapes=tuple({0: "batch"} for _ in inputs),
            custom_translation_table=TRANSLATIONS,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    model.ir_version = 10
    return model


@dataclass(frozen=True, slots=True)
class Check:
    """How ONNX Runtime compares with torch. detections: those of torch that were compared. ties: how many of them are
    another box of an object in ONNX Runtime, since NMS chose among equals. box, score: the largest differences of the
    others, in pixels of the input canvas and as such."""

    detections: int
    ties: int
    box: float
    score: float


class _Found(NamedTuple):
    """The detections of one image, padding left out."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def above(self, floor: float) -> _Found:
        return _Found(*(part[self.scores > floor] for part in self))

    def overlaps(self, others: _Found) -> Tensor:
        """IoU [N, M]; 0 between classes."""
        iou: Tensor = box_iou(self.boxes, others.boxes)
        return iou * (self.labels[:, None] == others.labels)

    def same(self, others: _Found) -> Tensor:
        """Which are one detection: bool [N, M]."""
        return (self.overlaps(others) > IOU) & ((self.scores[:, None] - others.scores).abs() <= SLACK)

    def last(self, others: _Found, room: int) -> Tensor:
        """Which may have been cut off at the end of `others`, a list with room for so many: bool [N]."""
        if len(others.scores) < room:
            return torch.zeros_like(self.scores, dtype=torch.bool)
        return self.scores <= others.scores.min() + SLACK


def _images(outputs: tuple[Tensor, ...]) -> list[_Found]:
    return [_Found(*parts).above(0) for parts in zip(*outputs, strict=True)]


def _wrong(onnx_: _Found, torch_: _Found, pool: _Found, rule: config.Select, floor: float) -> int:
    """How many detections of an image are wrong in ONNX Runtime.

    pool: torch's candidates before NMS. Rounding may let NMS choose another of two nearly equal boxes, and so on along
    a row of them. So what must hold is: each box of ONNX Runtime is a candidate of torch's, none overlaps another more
    than the rule allows or is less sure, and each detection of torch's is there, or one that overlaps it and is at
    least as sure.
    """
    ours, theirs = onnx_.above(floor), torch_.above(floor)
    invented = ~ours.same(pool).any(1) & ~ours.last(pool, rule.candidates)
    doubled = (ours.overlaps(ours).triu(1) > rule.iou + SLACK).any(1)
    winner = (theirs.overlaps(onnx_) > rule.iou - SLACK) & (onnx_.scores > theirs.scores[:, None] - SLACK)
    lost = ~theirs.same(onnx_).any(1) & ~winner.any(1) & ~theirs.last(onnx_, rule.keep)
    unsure = onnx_.scores < rule.score - SLACK
    return int((invented | doubled).sum() + lost.sum() + unsure.sum())


@torch.inference_mode()
def check(model: bytes, predictor: Predictor, photos: Tensor) -> Check:
    """Run an ONNX file and the predictor on the same images, in batches of 1, 3 (one of them blank) and 8.

    photos: uint8 [N, 3, H, W], N >= 1, on the input canvas. Compared are the detections above 0.05, or above half the
    best score where that is less. Raises ValueError, saying what differs, unless they find the same.
    """
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    rule = predictor.rule
    unselected = copy.copy(predictor)
    unselected.rule = rule.model_copy(update={"nms": "none"})
    if rule.nms == "none":
        rule = rule.model_copy(update={"iou": 1.0, "keep": rule.room})
    cycle = photos[torch.arange(12) % len(photos)]
    found: list[tuple[_Found, _Found, _Found]] = []
    for batch in (cycle[:1], torch.stack((cycle[1], torch.full_like(cycle[0], 127), cycle[2])), cycle[3:11]):
        outputs = tuple(map(torch.from_numpy, session.run(list(OUTPUTS), {INPUT: batch.numpy()})))
        expected = predictor(batch)
        for name, ours, theirs in zip(OUTPUTS, outputs, expected, strict=True):
            if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
                raise ValueError(f"{name}: {ours.dtype} {[*ours.shape]}, not {theirs.dtype} {[*theirs.shape]}")
        found += zip(_images(outputs), _images(expected), _images(unselected(batch)), strict=True)
    best = max((float(theirs.scores.max()) for _, theirs, _ in found if len(theirs.scores)), default=0.0)
    floor = max(min(0.05, best / 2), rule.score + SLACK)
    wrong = sum(_wrong(*image, rule, floor) for image in found)
    result = _differences(found, floor)
    if wrong:
        raise ValueError(f"{wrong} detections differ, of {result.detections} with a score above {floor:.3g}")
    return result


def _differences(found: list[tuple[_Found, _Found, _Found]], floor: float) -> Check:
    count, same, box, score = 0, 0, 0.0, 0.0
    for ours, all_theirs, _ in found:
        theirs = all_theirs.above(floor)
        mine, other = theirs.same(ours).nonzero().unbind(1)
        count += len(theirs.scores)
        same += int(theirs.same(ours).any(1).sum())
        if len(mine):
            box = max(box, float((theirs.boxes[mine] - ours.boxes[other]).abs().max()))
            score = max(score, float((theirs.scores[mine] - ours.scores[other]).abs().max()))
    return Check(count, count - same, box, score)


def export(predictor: Predictor, manifest: Manifest, path: Path, photos: Tensor) -> Check:
    """Write the predictor, on the CPU, as one ONNX file with the manifest inside: input images uint8 [B, 3, H, W] RGB
    on the canvas, outputs as Predictor's.

    photos: uint8 [N, 3, H, W], N >= 1, on the canvas: what `check` runs. Raises UserError, and writes nothing, where
    ONNX Runtime finds something else than torch.
    """
    model = graph(predictor.eval(), {INPUT: torch.zeros(2, 3, *manifest.size, dtype=torch.uint8)})
    onnx.helper.set_model_props(model, {KEY: manifest.to_json()})
    content = model.SerializeToString()
    try:
        result = check(content, predictor, photos)
    except ValueError as error:
        raise UserError(f"{path}: not written, for ONNX Runtime and torch disagree: {error}") from None
    atomic_write(path, content)
    return result


def run(
    model: str | None, out: Path | None, root: Path | None, console: Console, nms: Literal["hard", "none"] = "hard"
) -> Path:
    """Export a run's best checkpoint, or the checkpoint `model`, to `out` (default: beside it), and say how it went.

    It is checked on photos of the run's validation split, or that of the data set in `root`. nms: 'none' leaves that
    to what comes after; else as the run's config says. Returns the ONNX file. Raises UserError.
    """
    source = checkpoint.find(model)
    trained = checkpoint.read(source)
    if nms == "none":
        trained = trained.without_nms()
    path = out or source.with_suffix(".onnx")
    if path.suffix != ".onnx":
        raise UserError(f"--out {path}: name a file that ends in .onnx")
    data = trained.data(root)
    dataset = cache.load(data, data.val)
    samples = EvalSet(dataset, trained.config.input)
    if not len(samples):
        raise UserError(f"{data.root}: no photos in '{data.val}' to check the export on")
    chosen = np.unique(np.linspace(0, len(samples) - 1, PHOTOS).astype(int))
    photos = torch.from_numpy(np.stack([samples[int(i)].image.transpose(2, 0, 1) for i in chosen]))
    result = export(trained.predictor(), trained.manifest(), path, photos)
    agreed = (
        f"agree on {result.detections} detections ({result.ties} near ties), boxes to {result.box:.1g} px and scores "
        f"to {result.score:.1g}"
        if result.detections
        else "find nothing there, so this shows little: the detector may need more training"
    )
    console.print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB. Checked on {len(photos)} photos in batches of 1, 3 and 8: "
        f"ONNX Runtime and torch {agreed}",
        highlight=False,
        markup=False,
    )
    return path

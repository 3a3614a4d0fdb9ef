"""A trained detector as one ONNX file, in fp32 or coarser, proven against torch before it is given its name."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnxscript import opset18
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from detkit import __version__, checkpoint
from detkit.console import counting
from detkit.data import cache, tiles
from detkit.data.labels import DataSet
from detkit.errors import UserError
from detkit.files import atomic_write, require_writable
from detkit.gate import (
    BATCHES,
    IOU,
    PHOTOS,
    SLACK,
    Photo,
    Report,
    Series,
    Subject,
    gate,
    measure,
    odd,
    photo,
    real,
    session,
)
from detkit.imagegraph import wrap
from detkit.manifest import KEY, Golden, Manifest, Precision, seal
from detkit.quantize import Half, Int8, fit
from detkit.runtime.session import INPUT, OUTPUTS
from detkit.runtime.verify import TOLERANCES, Tolerance, compare, golden, scene
from detkit.snippets import write as write_snippets

op: Any = opset18  # onnxscript's annotations forbid the constants that its operators take

Input = Literal["canvas", "image"]

SCENES, GOLDEN = 16, 3  # made-up photos that are tried, and kept
CALIBRATION = 100  # training photos that set the ranges of int8
BLAMED = 32  # validation photos on which layers are compared
ROUNDS = 20  # of the latency
NONSENSE = -1.0  # stands for the mean AP of boxes or scores that can't be
REFUSED = ".refused.json"  # ends the report of what did not get its name


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
    rows, found = [], []
    for level, (feat, stride) in enumerate(zip(feats, strides, strict=True)):
        rows.append(op.Reshape(op.NonZero(op.Equal(levels, op.Constant(value_int=level))), [-1]))
        aligned = op.RoiAlign(
            feat, op.Gather(boxes, rows[-1]), op.Gather(image, rows[-1]), output_height=size, output_width=size,
            sampling_ratio=samples, spatial_scale=1 / stride, coordinate_transformation_mode="output_half_pixel",
        )  # fmt: skip
        found.append(aligned)
    # Each box's place in the rows of all levels. To scatter the features themselves takes longer.
    order = op.Concat(*rows, axis=0)
    place = op.ScatterElements(order, order, op.Range(0, op.Gather(op.Shape(order), 0), 1))
    return op.Gather(op.Concat(*found, axis=0), place)


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
class Plan:
    """What is to be exported. inputs: the kinds of file. nms: 'none' leaves that to what comes after. max_ap_drop: the
    most mean AP that coarser numbers may cost. photos: of the validation split, that the gate looks at; 0: all."""

    inputs: tuple[Input, ...] = ("canvas",)
    precision: Precision = "fp32"
    nms: Literal["hard", "none"] = "hard"
    max_ap_drop: float = 0.01
    photos: int = PHOTOS


@dataclass(frozen=True, slots=True, eq=False)
class _Ground:
    """What a file is tried on: photos of the validation split at `index`, and odd ones."""

    dataset: DataSet
    index: list[int]
    series: list[Series]


def _written(model: onnx.ModelProto, manifest: Manifest) -> bytes:
    """The file's content: the model with the manifest inside and its digest at the end."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    onnx.helper.set_model_props(whole, {KEY: manifest.to_json()})
    return seal(whole.SerializeToString())


def _files(model: onnx.ModelProto, manifest: Manifest, inputs: Sequence[Input]) -> dict[Input, Subject]:
    """A file of each kind, to be tried."""
    files: dict[Input, Subject] = {}
    for kind in inputs:
        own = manifest.model_copy(update={"input": kind})
        files[kind] = Subject((wrap(model, own) if kind == "image" else model).SerializeToString(), own)
    return files


def goldens(content: bytes, manifest: Manifest) -> tuple[Golden, ...]:
    """Made-up photos, up to three, in which the model finds something, and the same without ONNX Runtime's optimiser:
    those it is surest of. For an image file they are of several sizes."""
    height, width = manifest.size
    sizes = [manifest.size]
    if manifest.input == "image":
        sizes += [(2 * height + 1, 2 * width), (height, 3 * width), (height // 2 + 1, width // 2)]
    subject, plain = Subject(content, manifest), Subject(content, manifest)
    plain.session = session(content, ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
    iou, score = TOLERANCES[manifest.precision]
    tight = Tolerance((1 + iou) / 2, score / 2)
    found: list[tuple[float, Golden]] = []
    for seed in range(SCENES):
        made = photo(scene(seed, sizes[seed % len(sizes)]), manifest)
        (outputs,) = subject.run([made])
        one = golden(seed, subject.detections(outputs, made.plan), manifest.nms.score + score)
        found.append((max(one.scores, default=0.0), one))
    chosen: list[Golden] = []
    for best, one in sorted(found, key=lambda pair: -pair[0]):
        made = photo(scene(one.seed, one.size), manifest)
        (outputs,) = plain.run([made])
        off = compare(plain.detections(outputs, made.plan), one, tight)
        if best and not off.lost and not off.more and len(chosen) < GOLDEN:
            chosen.append(one)
    return tuple(chosen)


def run(
    model: str | None,
    out: Path | None,
    root: Path | None,
    console: Console,
    plan: Plan = Plan(),
) -> list[Path]:
    """Export a run's best checkpoint, or the checkpoint `model`, and say how it went.

    out: the canvas file, default beside the checkpoint; the image file is NAME-image.onnx beside it, the gate's report
    NAME.report.json. They are tried on the validation split of the run, or of the data set in `root`. Returns the ONNX
    files. Raises UserError and writes no ONNX file then; where they were refused, NAME.refused.json says why.
    """
    source = checkpoint.find(model)
    if source.suffix == ".onnx":
        raise UserError(f"{source}: is exported already: name a run or a checkpoint")
    trained = checkpoint.read(source)
    if plan.nms == "none":
        trained = trained.without_nms()
    path = _named(source, out, plan.precision)
    for kind in plan.inputs:
        require_writable(_path(path, kind))
    manifest = trained.manifest().model_copy(update={"precision": plan.precision})
    ground = _ground(trained, root, manifest, plan.photos)
    predictor = trained.predictor().eval()
    with console.status("tracing"):
        network = graph(predictor, {INPUT: torch.zeros(2, 3, *manifest.size, dtype=torch.uint8)})
    exact = manifest.model_copy(update={"precision": "fp32"})
    files = _files(network, exact, plan.inputs)
    with counting(console, "ONNX Runtime beside torch") as progress:
        named = {_called(path, kind, plan.precision): subject for kind, subject in files.items()}
        report = gate(named, predictor, ground.series, ground.dataset, ground.index, progress)
    console.print(report.table())
    said = _said(report, ground)
    if report.failures:
        _refuse(path, said, f"ONNX Runtime and torch disagree: {'; '.join(report.failures)}")
    if plan.precision != "fp32":
        network = _coarser(network, manifest, plan, trained, root, ground, report.torch, said, path, console)
        files = _files(network, manifest, plan.inputs)
    written, snippets = list[Path](), list[Path]()
    proven = [
        each.manifest.model_copy(update={"golden": goldens(each.content, each.manifest)}) for each in files.values()
    ]
    for (kind, subject), own in zip(files.items(), proven, strict=True):
        target = _path(path, kind)
        content = _written(onnx.load_from_string(subject.content), own)
        atomic_write(target, content)
        said["files"][target.name] = {
            "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "golden photos": len(own.golden)
        }  # fmt: skip
        written.append(target)
        _say(target, own, console)
        snippets += write_snippets(target)
    _report(path, said)
    path.with_suffix(REFUSED).unlink(missing_ok=True)
    agreed = sum(check.detections for check in report.checks)
    console.print(
        f"ONNX Runtime and torch agree on {agreed} detections in {len(ground.index)} of {len(ground.dataset)} "
        f"validation photos and in {len(ground.series) - 1} kinds of odd ones, in batches of 1, 3 and 8; "
        f"mAP {report.torch:.4f}"
        if agreed
        else "ONNX Runtime and torch find nothing there, so this shows little: the detector may need more training",
        highlight=False,
    )
    console.print("programs that use it: " + ", ".join(map(str, snippets)), highlight=False, markup=False)
    for program in [one for one in snippets if one.suffix == ".py"][:1]:
        console.print(program.read_text(encoding="utf-8"), highlight=False, markup=False, soft_wrap=True)
    return written


def _named(source: Path, out: Path | None, precision: Precision) -> Path:
    """The canvas file's path."""
    if out is None:
        mark = "" if precision == "fp32" else f"-{precision}"
        return source.with_name(f"{source.stem}{mark}.onnx")
    if out.suffix != ".onnx":
        raise UserError(f"--out {out}: name a file that ends in .onnx")
    return out.with_name(out.name.removesuffix(".onnx").removesuffix("-image") + ".onnx")


def _path(canvas: Path, kind: Input) -> Path:
    return canvas if kind == "canvas" else canvas.with_name(f"{canvas.stem}-image.onnx")


def _called(canvas: Path, kind: Input, precision: Precision) -> str:
    """What is tried beside torch: the file itself, or what it is in fp32, from which the coarser is made."""
    name = _path(canvas, kind).name
    return name if precision == "fp32" else f"{name} in fp32"


def _ground(trained: checkpoint.Checkpoint, root: Path | None, manifest: Manifest, most: int) -> _Ground:
    data = trained.data(root)
    dataset = cache.load(data, data.val)
    if not len(dataset):
        raise UserError(f"{data.root}: no photos in '{data.val}' to check the export on")
    if dataset.classes != trained.classes:
        difference = checkpoint.class_difference(dataset.classes, trained.classes)
        raise UserError(f"{data.root}: its classes are not those of {trained.path}: {difference}")
    dataset = tiles.cut(dataset, trained.config.input.tiles)
    index = _spread(len(dataset), most)
    return _Ground(dataset, index, [real(dataset, index, manifest), *odd(manifest)])


def _spread(count: int, most: int) -> list[int]:
    """So many of `count`, evenly; 0: all."""
    places = np.linspace(0, count - 1, min(most or count, count)).astype(int)
    return [int(place) for place in np.unique(places)]


def _report(path: Path, said: dict[str, Any], suffix: str = ".report.json") -> Path:
    """Write the report of that canvas file; returns its path."""
    file = path.with_suffix(suffix)
    atomic_write(file, json.dumps(said, indent=1) + "\n")
    return file


def _refuse(path: Path, said: dict[str, Any], why: str) -> NoReturn:
    """Write the report, beside that of an older file, with the reason, and raise UserError."""
    report = _report(path, said | {"refused": why}, REFUSED)
    raise UserError(f"{path}: not written: {why}; {report.name} has it all")


def _said(report: Report, ground: _Ground) -> dict[str, Any]:
    """The report for JSON: what was tried, with what, and how it went."""
    names = [Path(ground.dataset[i].path).name for i in ground.index]
    checks = [check for check in report.checks if check.series == ground.series[0].name]
    return {
        "detkit": __version__,
        "torch": torch.__version__,
        "onnxruntime": ort.__version__,
        "opset": 18,
        "validation photos": {"tried": len(ground.index), "of": len(ground.dataset)},
        "batches": list(BATCHES),
        "tolerance": {"iou": IOU, "score": SLACK, "mAP": SLACK},
        "checks": [asdict(check) for check in report.checks],
        "photos that differ": sorted({names[i] for check in checks for i in check.places}),
        "mAP": {"torch": report.torch, **report.files},
        "files": {},
    }


def _say(path: Path, manifest: Manifest, console: Console) -> None:
    takes = {
        "canvas": f"batches on the canvas, uint8 [B, 3, {manifest.size[0]}, {manifest.size[1]}]",
        "image": "one photo of any size, uint8 [height, width, 3]",
    }
    golden = f"{len(manifest.golden)} golden photos for  detkit verify {path}"
    console.print(
        f"{path}: {path.stat().st_size / 1e6:.1f} MB, {manifest.precision}, takes {takes[manifest.input]}; "
        f"{golden if manifest.golden else 'finds nothing in made-up photos, so detkit verify has none to repeat'}",
        highlight=False,
        markup=False,
    )


def _coarser(
    network: onnx.ModelProto,
    manifest: Manifest,
    plan: Plan,
    trained: checkpoint.Checkpoint,
    root: Path | None,
    ground: _Ground,
    exact: float,
    said: dict[str, Any],
    path: Path,
    console: Console,
) -> onnx.ModelProto:
    """The network in fp16 or int8; `said` is told what that changes. exact: the mean AP in fp32. Raises UserError where
    it costs more mean AP than is allowed, naming the parts of the detector that are to blame."""
    with console.status("calibrating" if plan.precision == "int8" else "converting"):
        numbers = Half(network) if plan.precision == "fp16" else Int8(network, _calibration(trained, root, manifest))

    def measured(model: onnx.ModelProto) -> float:
        subject = Subject(model.SerializeToString(), manifest)
        with counting(console, f"measuring {plan.precision}") as progress, contextlib.suppress(ValueError):
            return measure(subject, ground.series, ground.dataset, ground.index, progress)
        return NONSENSE

    some = [ground.series[0].make(i) for i in _spread(len(ground.index), BLAMED)]
    least = max(exact - plan.max_ap_drop, 0.0)
    with counting(console, "comparing layers") as progress:
        fitted = fit(numbers, least, measured, some, manifest, progress)
    contents = [one.SerializeToString() for one in (network, fitted.model)]
    before, after = latencies(contents, some[0])
    said["precision"] = {
        "precision": plan.precision,
        "bytes": [len(content) for content in contents],
        "ms": [round(before, 3), round(after, 3)],
        "mAP": [exact, fitted.value],
        "max_ap_drop": plan.max_ap_drop,
        "fp32 parts": list(fitted.spare),
        "changes": dict(fitted.blame),
    }
    if fitted.value < least:
        worst = ", ".join(f"{name} ({change:.2f})" for name, change in fitted.blame[:3])
        value = "numbers that can't be" if fitted.value == NONSENSE else f"{fitted.value:.4f}"
        why = (
            f"{plan.precision} lowers mAP from {exact:.4f} to {value}, by more than --max-ap-drop "
            f"{plan.max_ap_drop:g}, even with {len(fitted.spare)} of {len(fitted.blame)} parts in fp32; to blame, by "
            f"the share of detections that each alone changes: {worst}"
        )
        _refuse(path, said, why)
    table = Table(
        "", "fp32", plan.precision, title=escape(f"{path.name}, on the CPU, one thread"), title_justify="left"
    )
    table.add_row("MB", *(f"{len(content) / 1e6:.2f}" for content in contents))
    table.add_row("ms a photo, network and NMS", f"{before:.1f}", f"{after:.1f}")
    table.add_row("mAP", f"{exact:.4f}", f"{fitted.value:.4f}")
    console.print(table)
    if fitted.spare:
        console.print(f"left in fp32, for they change most: {', '.join(fitted.spare)}", highlight=False)
    if exact <= plan.max_ap_drop:
        doubt = f"mAP in fp32 is within --max-ap-drop {plan.max_ap_drop:g} of nothing, so this shows little"
        console.print(f"{doubt}: check it on photos like those that it was trained on", style="yellow", highlight=False)
    if after > before:
        console.print(f"{plan.precision} is no faster than fp32 on this CPU", style="yellow", highlight=False)
    return fitted.model


def _calibration(trained: checkpoint.Checkpoint, root: Path | None, manifest: Manifest) -> Iterator[NDArray[np.uint8]]:
    """Photos of the training split on the canvas."""
    data = trained.data(root)
    dataset = tiles.cut(cache.load(data, data.train), trained.config.input.tiles)
    series = real(dataset, _spread(len(dataset), CALIBRATION), manifest)
    return (series.make(i).canvas for i in range(series.length))


def latencies(contents: Sequence[bytes], example: Photo) -> list[float]:
    """Milliseconds that each canvas file takes for a photo, with one thread: the best of some rounds, in turn."""
    sessions = [session(content, threads=1) for content in contents]
    best = [math.inf] * len(sessions)
    batch = example.canvas[None]
    for _ in range(ROUNDS):
        for i, each in enumerate(sessions):
            start = time.perf_counter()
            each.run(None, {INPUT: batch})
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best

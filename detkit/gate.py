"""The gate before an ONNX file gets its name: that it finds what torch finds, on photos real and odd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torchvision.ops import box_iou

from detkit import config, imagegraph, metrics
from detkit.data import tiles
from detkit.data.labels import DataSet
from detkit.geometry import ResizePlan
from detkit.manifest import Manifest
from detkit.nn.detector import Predictor
from detkit.runtime import merge
from detkit.runtime.session import IMAGE, INPUT, OUTPUTS, detections, onto_canvas
from detkit.runtime.verify import scene
from detkit.types import Detections

# Boxes are the same from that IoU on; scores, overlaps and the mean AP, up to that difference.
IOU, SLACK = 0.99, 1e-3
BATCHES = (1, 3, 8)
PHOTOS = 1000  # of the validation split, spread evenly, unless the user says
HUGE = (6000, 8000)

Array = NDArray[Any]
Progress = Callable[[int, int], None]


class Photo(NamedTuple):
    """image: uint8 [h, w, 3]. plan: how it lies on the canvas. canvas: uint8 [3, H, W], as Pillow resizes it."""

    image: NDArray[np.uint8]
    plan: ResizePlan
    canvas: NDArray[np.uint8]


class Series(NamedTuple):
    """Photos that are made when they are looked at; `batches`: how many at a time, the last of them over and over."""

    name: str
    length: int
    make: Callable[[int], Photo]
    batches: tuple[int, ...] = (1,)

    def chunks(self) -> Iterator[list[int]]:
        """Which photos in which batch. Where there are too few for one batch of each size, they come again."""
        total = max(self.length, sum(self.batches))
        start = turn = 0
        while start < total:
            size = self.batches[min(turn, len(self.batches) - 1)]
            yield [i % self.length for i in range(start, min(start + size, total))]
            start, turn = start + size, turn + 1


def photo(image: NDArray[np.uint8], manifest: Manifest) -> Photo:
    """A photo, uint8 [h, w, 3], and how it lies on the canvas."""
    return Photo(image, *onto_canvas(image, manifest))


def real(dataset: DataSet, index: Sequence[int], manifest: Manifest) -> Series:
    """Those photos of a data set."""

    def make(i: int) -> Photo:
        return photo(tiles.image(dataset, index[i]), manifest)

    return Series("validation photos", len(index), make, BATCHES)


def odd(manifest: Manifest) -> list[Series]:
    """Blank photos, one of a single pixel, one of 48 megapixels, and thin ones."""
    blanks = [np.full((*manifest.size, 3), shade, np.uint8) for shade in (0, 127, 255)]
    step = 10
    sizes = {"1 x 1": (1, 1), "thin, 1000 x 7": (7, 1000), "7 x 1000": (1000, 7)}
    series = [Series("blank", len(blanks), lambda i: photo(blanks[i], manifest), BATCHES)]
    for name, hw in sizes.items():
        series.append(Series(name, 1, lambda _, hw=hw: photo(scene(1, hw), manifest)))  # type: ignore[misc]
    small = scene(2, (HUGE[0] // step, HUGE[1] // step))
    series.append(Series("8000 x 6000", 1, lambda _: photo(small.repeat(step, 0).repeat(step, 1), manifest)))
    return series


class Found(NamedTuple):
    """The detections of one image, padding left out, in pixels of what the file takes: the canvas, or the photo."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def above(self, floor: float) -> Found:
        """Those with a better score."""
        return Found(*(part[self.scores > floor] for part in self))

    def overlaps(self, others: Found, agnostic: bool = False) -> Tensor:
        """IoU [N, M]; 0 between classes, unless agnostic."""
        iou: Tensor = box_iou(self.boxes, others.boxes)
        return iou if agnostic else iou * (self.labels[:, None] == others.labels)

    def same(self, others: Found) -> Tensor:
        """Which are one detection: bool [N, M]."""
        return (self.overlaps(others) > IOU) & ((self.scores[:, None] - others.scores).abs() <= SLACK)

    def last(self, others: Found, room: int) -> Tensor:
        """Which may have been cut off at the end of `others`, a list with room for so many: bool [N]."""
        if len(others.scores) < room:
            return torch.zeros_like(self.scores, dtype=torch.bool)
        return self.scores <= others.scores.min() + SLACK


class Subject:
    """An ONNX file under test."""

    def __init__(self, content: bytes, manifest: Manifest) -> None:
        self.content, self.manifest = content, manifest
        self.session = session(content)
        self.photos = manifest.input == "image"

    @cached_property
    def _before(self) -> Any:
        return session(imagegraph.before(self.manifest).SerializeToString())

    def sees(self, photo: Photo) -> NDArray[np.uint8]:
        """The canvas, uint8 [3, H, W], as the network in the file has it.

        Raises ValueError where that is more than a level from Pillow's, on which the detector was measured.
        """
        if not self.photos:
            return photo.canvas
        canvas: NDArray[np.uint8] = self._before.run([INPUT], {IMAGE: photo.image})[0][0]
        most = int(np.abs(canvas.astype(np.int16) - photo.canvas).max())
        if most > 1:
            raise ValueError(f"a photo of {photo.plan.source} is resized otherwise, by up to {most} levels of 255")
        return canvas

    def run(self, photos: Sequence[Photo]) -> list[tuple[Array, ...]]:
        """What the file says of each: boxes, scores and labels."""
        if self.photos:
            return [tuple(self.session.run(list(OUTPUTS), {IMAGE: photo.image})) for photo in photos]
        batch = np.stack([photo.canvas for photo in photos])
        return list(zip(*self.session.run(list(OUTPUTS), {INPUT: batch}), strict=True))

    def found(self, outputs: tuple[Array, ...], plan: ResizePlan, *, torchs: bool = False) -> Found:
        """Outputs of the file, or of torch for one image on the canvas, in the file's own pixels."""
        if self.photos and torchs:
            outputs = _arrays(detections(plan, *outputs))
        return Found(*map(torch.from_numpy, outputs)).above(0)

    def detections(self, outputs: tuple[Array, ...], plan: ResizePlan) -> Detections:
        """What the runtime makes of the file's outputs."""
        boxes, scores, labels = outputs
        if self.photos:
            return merge.merge(Detections(boxes, scores, labels, plan.source), "hard", self.manifest.nms)
        return _merged(plan, outputs, self.manifest.nms)


def session(content: bytes, level: Any = ort.GraphOptimizationLevel.ORT_ENABLE_ALL, threads: int = 0) -> Any:
    """ONNX Runtime on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.intra_op_num_threads = threads
    return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def _arrays(found: Detections) -> tuple[Array, ...]:
    return found.boxes, found.scores, found.labels


def _merged(plan: ResizePlan, outputs: tuple[Array, ...], rule: config.Select) -> Detections:
    return merge.merge(detections(plan, *outputs), "hard", rule)


def _run(predictor: Predictor, canvases: Sequence[NDArray[np.uint8]]) -> list[tuple[Array, ...]]:
    outputs = predictor(torch.from_numpy(np.stack(canvases)))
    return list(zip(*(output.numpy() for output in outputs), strict=True))


@dataclass
class Check:
    """How a file compares with torch on one series of photos. detections: those of torch that were compared. ties: how
    many of them are another box of an object in ONNX Runtime, since NMS chose among equals. wrong: how many differ;
    places: in which photos of the series. box, score: the largest differences of the others, in pixels of what the file
    takes, and as such."""

    file: str
    series: str
    photos: int
    detections: int = 0
    ties: int = 0
    wrong: int = 0
    places: list[int] = field(default_factory=list)
    box: float = 0.0
    score: float = 0.0


@dataclass
class Report:
    """What the gate saw. torch: its mean AP; files: that of each. failures: what is wrong, a line each."""

    checks: list[Check]
    torch: float = 0.0
    files: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def table(self) -> Table:
        """The checks, a row each."""
        table = Table("file", "photos", title="ONNX Runtime beside torch", title_justify="left")
        for name in ("number", "detections", "near ties", "wrong", "boxes, px", "scores"):
            table.add_column(name, justify="right")
        for check in self.checks:
            figures = (
                check.photos,
                check.detections,
                check.ties,
                check.wrong,
                f"{check.box:.1g}",
                f"{check.score:.1g}",
            )
            table.add_row(escape(check.file), check.series, *map(str, figures), style="red" if check.wrong else None)
        return table


@dataclass(frozen=True, slots=True)
class _Pair:
    """What a file and torch found in one photo of a series."""

    check: Check
    subject: Subject
    series: Series
    index: int
    plan: ResizePlan
    ours: Found
    theirs: Found


@torch.inference_mode()
def gate(
    subjects: dict[str, Subject],
    predictor: Predictor,
    series: Sequence[Series],
    dataset: DataSet | None = None,
    index: Sequence[int] = (),
    progress: Progress | None = None,
) -> Report:
    """Run ONNX files, by name, and the predictor on the same photos, and compare what they find.

    series: the photos; the first are those of `dataset` at `index`, on which the mean AP of each file must be within
    1e-3 of torch's. What is wrong is in the report's `failures`, a line each; nothing is raised.
    """
    predictor = predictor.eval()
    pairs: list[_Pair] = []
    report = Report([Check(name, each.name, each.length) for name in subjects for each in series])
    checks = {(check.file, check.series): check for check in report.checks}
    theirs: dict[int, Detections] = {}
    ours: dict[str, dict[int, Detections]] = {name: {} for name in subjects}
    for each, chunk in _walk(series, progress):
        photos = [each.make(i) for i in chunk]
        wanted = _run(predictor, [photo.canvas for photo in photos])
        if each is series[0]:
            theirs |= {i: _merged(p.plan, o, predictor.rule) for i, p, o in zip(chunk, photos, wanted, strict=True)}
        for name, subject in subjects.items():
            try:
                outputs = subject.run(photos)
                expected = _expected(subject, photos, wanted, predictor)
                pairs += _pairs(checks[name, each.name], subject, each, chunk, photos, outputs, expected)
            except ValueError as error:
                report.failures.append(f"{name}, {each.name}: {error}")
                return report
            if each is series[0]:
                ours[name] |= {i: subject.detections(o, p.plan) for i, p, o in zip(chunk, photos, outputs, strict=True)}
    _judge(pairs, predictor, report)
    if dataset is None:
        return report
    report.torch = _mean_ap(dataset, index, theirs)
    for name in subjects:
        report.files[name] = value = _mean_ap(dataset, index, ours[name])
        if abs(value - report.torch) > SLACK:
            report.failures.append(f"{name}: mAP {value:.4f}, but torch's is {report.torch:.4f}")
    return report


def measure(
    subject: Subject,
    series: Sequence[Series],
    dataset: DataSet,
    index: Sequence[int],
    progress: Progress | None = None,
) -> float:
    """The mean AP of a file on the first series, the photos of `dataset` at `index`.

    Raises ValueError where what it says of any photo of any series can't be.
    """
    found: dict[int, Detections] = {}
    for each, chunk in _walk(series, progress):
        photos = [each.make(i) for i in chunk]
        outputs = subject.run(photos)
        for boxes, scores, labels in outputs:
            known = (labels >= 0).all() and (labels < len(dataset.classes)).all()
            if not (np.isfinite(boxes).all() and np.isfinite(scores).all() and known):
                raise ValueError(f"{each.name}: boxes, scores or labels that can't be")
        if each is series[0]:
            found |= {i: subject.detections(o, p.plan) for i, p, o in zip(chunk, photos, outputs, strict=True)}
    return _mean_ap(dataset, index, found)


def _walk(series: Sequence[Series], progress: Progress | None) -> Iterator[tuple[Series, list[int]]]:
    """Each series' batches."""
    total, done = sum(len(chunk) for each in series for chunk in each.chunks()), 0
    for each in series:
        for chunk in each.chunks():
            yield each, chunk
            done += len(chunk)
            if progress:
                progress(done, total)


def _mean_ap(dataset: DataSet, index: Sequence[int], found: dict[int, Detections]) -> float:
    records = [dataset[i] for i in index]
    return float(metrics.coco_ap(records, [found[i] for i in range(len(index))], dataset.classes)["mAP"])


def _expected(
    subject: Subject, photos: Sequence[Photo], wanted: list[tuple[Array, ...]], predictor: Predictor
) -> list[tuple[Array, ...]]:
    """What torch says of the canvases that the file sees."""
    canvases = [subject.sees(photo) for photo in photos]
    if all(np.array_equal(canvas, photo.canvas) for canvas, photo in zip(canvases, photos, strict=True)):
        return wanted
    return _run(predictor, canvases)


def _pairs(
    check: Check,
    subject: Subject,
    series: Series,
    chunk: Sequence[int],
    photos: Sequence[Photo],
    outputs: Sequence[tuple[Array, ...]],
    expected: Sequence[tuple[Array, ...]],
) -> Iterator[_Pair]:
    for i, photo, ours, theirs in zip(chunk, photos, outputs, expected, strict=True):
        if not subject.photos:
            for name, one, other in zip(OUTPUTS, ours, theirs, strict=True):
                if one.shape != other.shape or one.dtype != other.dtype:
                    raise ValueError(f"{name}: {one.dtype} {[*one.shape]}, not {other.dtype} {[*other.shape]}")
        pair = (subject.found(ours, photo.plan), subject.found(theirs, photo.plan, torchs=True))
        yield _Pair(check, subject, series, i, photo.plan, *pair)


def _judge(pairs: Sequence[_Pair], predictor: Predictor, report: Report) -> None:
    """Compare all pairs, count into their checks, and name what fails."""
    best = max((float(pair.theirs.scores.max()) for pair in pairs if len(pair.theirs.scores)), default=0.0)
    # Below 0.05, or half the best score where that is less, rounding decides what is a detection.
    floor = max(min(0.05, best / 2), predictor.rule.score + SLACK)
    candidates = copy.copy(predictor)
    candidates.rule = predictor.rule.model_copy(update={"nms": "none"})
    for pair in pairs:
        check, theirs = pair.check, pair.theirs.above(floor)
        same = theirs.same(pair.ours)
        found = same.any(1)
        check.detections += len(theirs.scores)
        mine, other = same.nonzero().unbind(1)
        if len(mine):
            check.box = max(check.box, float((theirs.boxes[mine] - pair.ours.boxes[other]).abs().max()))
            check.score = max(check.score, float((theirs.scores[mine] - pair.ours.scores[other]).abs().max()))
        check.ties += int((~found).sum())
        known = pair.ours.above(floor).same(pair.theirs).any(1)
        unsure = pair.ours.scores < predictor.rule.score - SLACK
        if not found.all() or not known.all() or unsure.any():
            photo = pair.series.make(pair.index)
            (outputs,) = _run(candidates, [pair.subject.sees(photo)])
            pool = pair.subject.found(outputs, pair.plan, torchs=True)
            wrong = _wrong(pair.ours, pair.theirs, pool, predictor.rule, floor)
            check.wrong += wrong
            check.places += [pair.index] if wrong else []
    for check in report.checks:
        if check.wrong:
            what = f"{check.wrong} detections differ, of {check.detections} with a score above {floor:.3g}"
            report.failures.append(f"{check.file}, {check.series}: {what}")


def _wrong(ours: Found, theirs: Found, pool: Found, rule: config.Select, floor: float) -> int:
    """How many detections of an image are wrong in ONNX Runtime.

    pool: torch's candidates before NMS. Rounding may let NMS choose another of two nearly equal boxes, and so on along
    a row of them. So what must hold is: each box of ONNX Runtime is a candidate of torch's, none overlaps another more
    than the rule allows or is less sure, and each detection of torch's is there, or one that overlaps it and is at
    least as sure.
    """
    iou, keep = (1.0, rule.room) if rule.nms == "none" else (rule.iou, rule.keep)
    everything = ours
    ours, theirs = ours.above(floor), theirs.above(floor)
    invented = ~ours.same(pool).any(1) & ~ours.last(pool, rule.candidates)
    doubled = (ours.overlaps(ours, rule.agnostic).triu(1) > iou + SLACK).any(1)
    rivals = theirs.overlaps(everything, rule.agnostic) > iou - SLACK
    winner = rivals & (everything.scores > theirs.scores[:, None] - SLACK)
    lost = ~theirs.same(everything).any(1) & ~winner.any(1) & ~theirs.last(everything, keep)
    unsure = everything.scores < rule.score - SLACK
    return int((invented | doubled).sum() + lost.sum() + unsure.sum())

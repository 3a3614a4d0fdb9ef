"""What is measured: a run, a checkpoint, an .onnx file or detections in a file, on the photos of a split."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from detkit import config, found, imaging, matches
from detkit.checkpoint import TorchSession, class_difference, find, pick_device, read
from detkit.config import Device
from detkit.console import counting
from detkit.data import cache
from detkit.data.labels import DataSet
from detkit.errors import UserError
from detkit.manifest import Decision, Manifest
from detkit.matches import Pool
from detkit.runtime import merge, tiles
from detkit.runtime.predict import Detector
from detkit.runtime.session import Session
from detkit.types import Detections, Record

BATCH = 8  # photos decoded at a time
ANY = "any class"


@dataclass(frozen=True, slots=True)
class Where:
    """On which photos, and how. root, split, file_format: of the data set; default: the run's. ids: the COCO
    annotations that a file's ids are of. class_agnostic: an object counts as found whatever class it was given, and
    NMS is between classes too. nms: what becomes of boxes that overlap."""

    root: Path | None = None
    split: str | None = None
    file_format: str | None = None
    ids: Path | None = None
    class_agnostic: bool = False
    device: Device = "auto"
    nms: merge.Kind = "hard"


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A model's detections on a split. names: of the photos, paths relative to root; manifest: the model's, None for
    detections from a file; path: its file."""

    path: Path
    root: Path
    split: str
    classes: tuple[str, ...]
    names: tuple[str, ...]
    records: list[Record]
    found: list[Detections]
    manifest: Manifest | None

    @property
    def name(self) -> str:
        """What it is called: its run, or its file."""
        return self.path.parent.name if self.path.suffix == ".safetensors" else self.path.name

    @property
    def decision(self) -> Decision | None:
        """How the model decides what is shown; None where it has none, or one that fits other classes."""
        decision = self.manifest.decision if self.manifest else None
        return decision if decision and len(decision.thresholds) in (0, len(self.classes)) else None

    def pool(self) -> Pool:
        """In columns."""
        return matches.pool(self.records, self.found, self.classes)


def measured(model: str | None, where: Where, console: Console) -> Source:
    """The detections of a model, or those in a file, on the photos of a split. Raises UserError."""
    suffix = Path(model).suffix.lower() if model is not None else ""
    if suffix in found.SUFFIXES:
        return _from_file(Path(model or ""), where, console)
    if suffix == ".onnx":
        return _from_onnx(Path(model or ""), where, console)
    return _from_checkpoint(model, where, console)


def detector(source: Source, where: Where) -> Detector | None:
    """What detects, once more; None where the detections are from a file."""
    if source.manifest is None:
        return None
    if source.path.suffix == ".onnx":
        return Session(source.path, device=where.device, nms=where.nms)
    return TorchSession(source.path, where.device, where.nms)


def _from_checkpoint(model: str | None, where: Where, console: Console) -> Source:
    from detkit.data.batch import Loader
    from detkit.data.dataset import EvalSet
    from detkit.evaluate import detect

    trained = read(find(model))
    if where.nms != "hard":
        trained = trained.without_nms()
    settings = trained.config
    data = trained.data(where.root)
    dataset, split = _split(data, where, console)
    _same_classes(dataset, trained.classes, trained.path)
    device = pick_device(where.device)
    predictor = trained.predictor().to(device)
    if where.class_agnostic:
        predictor.rule = predictor.rule.model_copy(update={"agnostic": True})
    samples = EvalSet(dataset, settings.input)
    with closing(Loader(samples, settings.train.images, settings.train.workers)) as loader:
        detections = detect(predictor, loader, device, console, where.nms)
    return _source(trained.path, dataset, split, detections, where, trained.manifest())


def _from_onnx(path: Path, where: Where, console: Console) -> Source:
    session = Session(path, device=where.device, nms=where.nms)
    if where.class_agnostic and session.manifest.nms.nms != "none":
        raise UserError(
            f"{path}: its NMS is by class; export it with --nms none, or measure the run with --class-agnostic"
        )
    dataset, split = _split(_named(where, path), where, console)
    _same_classes(dataset, session.classes, path)
    detections: list[Detections] = []
    looks = tiles.chosen(None, None, session.manifest, str(path))
    detector = tiles.Tiled(session, looks) if looks else session
    with counting(console, "evaluating") as progress:
        for start in range(0, len(dataset), BATCH):
            places = range(start, min(start + BATCH, len(dataset)))
            detections += detector.detect([imaging.decode(dataset[i].path) for i in places])
            progress(len(detections), len(dataset))
    return _source(path, dataset, split, detections, where, session.manifest)


def _from_file(path: Path, where: Where, console: Console) -> Source:
    dataset, split = _split(_named(where, path), where, console)
    result = found.read(path, dataset, where.ids)
    for remark in result.remarks:
        console.print(remark, style="yellow", highlight=False, markup=False)
    return _source(path, dataset, split, result.detections, where, None)


def _named(where: Where, path: Path) -> config.Data:
    if where.root is None:
        raise UserError(f"{path}: name the data set that it is to be measured on, by --data")
    return config.Data(root=where.root)


def _split(data: config.Data, where: Where, console: Console) -> tuple[DataSet, str]:
    if where.file_format:
        data = data.model_copy(update={"format": where.file_format})
    split = where.split or data.val
    dataset = cache.load_split(data, split, console)
    if not len(dataset):
        raise UserError(f"{data.root}: no photos in '{split}' to measure on")
    return dataset, split


def _same_classes(dataset: DataSet, classes: Sequence[str], path: Path) -> None:
    if dataset.classes != tuple(classes):
        difference = class_difference(dataset.classes, classes)
        raise UserError(f"{dataset.root}: its classes are not those of {path}: {difference}")


def _source(
    path: Path, dataset: DataSet, split: str, detections: list[Detections], where: Where, manifest: Manifest | None
) -> Source:
    records, classes = [dataset[i] for i in range(len(dataset))], dataset.classes
    if where.class_agnostic:
        records = [replace(each, labels=np.zeros_like(each.labels)) for each in records]
        detections = [replace(each, labels=np.zeros_like(each.labels)) for each in detections]
        classes = (ANY,)
    names = tuple(dataset.name(i) for i in range(len(dataset)))
    return Source(path, Path(dataset.root), split, classes, names, records, detections, manifest)

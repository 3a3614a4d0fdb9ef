"""Runs and checkpoints: weights as safetensors with the config, the classes and the figures beside them."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from detkit import __version__, config, imaging
from detkit.config import Data
from detkit.errors import UserError
from detkit.files import atomic_file, atomic_write
from detkit.manifest import Decision, Manifest, Photos
from detkit.nn.detector import Detector, Predictor
from detkit.runtime import merge
from detkit.runtime.session import Raw, detect_with
from detkit.types import Detections

BEST, LAST, STATE = "best.safetensors", "last.safetensors", "state.pt"
PREVIOUS = "state.previous.pt"
# A state's first line: this and the SHA-256 of the rest.
_HEAD, _DIGITS = b"detkit state, sha256 ", 64


def pick_device(wanted: config.Device) -> torch.device:
    """The device that the setting means. Raises UserError where it is not to be had."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name in have if have[name]))
    if not have[wanted]:
        raise UserError(f"device {wanted}: torch finds no such device here; use auto or cpu")
    return torch.device(wanted)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A trained detector: the run's config, its classes, the weights, the epoch, the validation figures (none where the
    run was stopped before it measured them), which detections are shown (None: those from the best F1 on), and what it
    was trained on (None: not said)."""

    path: Path
    config: config.Config
    classes: tuple[str, ...]
    weights: dict[str, Tensor]
    epoch: int
    metrics: dict[str, Any]
    decision: Decision | None = None
    photos: Photos | None = None

    def without_nms(self) -> Checkpoint:
        """The same detector, which leaves its candidates as they are."""
        rule = self.config.model.select.model_copy(update={"nms": "none"})
        model = self.config.model.model_copy(update={"select": rule})
        return replace(self, config=self.config.model_copy(update={"model": model}))

    def predictor(self) -> Predictor:
        """The detector with these weights, ready to predict."""
        detector = Detector(self.config.model, self.config.input, len(self.classes))
        detector.load_state_dict(self.weights)
        return Predictor(detector, self.config.model.select)

    def data(self, root: Path | None) -> Data:
        """Where the run's photos are; or the same settings for the data set in `root`, whose classes are its own."""
        settings = self.config.data
        return settings if root is None else settings.model_copy(update={"root": root, "classes": None})

    def manifest(self) -> Manifest:
        """What an exported file says of itself."""
        canvas = self.config.input
        return Manifest(
            detkit=__version__,
            name=self.config.name,
            classes=self.classes,
            size=canvas.size,
            resize=canvas.resize,
            mean=canvas.mean,
            std=canvas.std,
            fill=imaging.fill(canvas.mean),
            score=self.metrics.get("score", 0.3),
            decision=self.decision,
            nms=self.config.model.select,
            sha256=hashlib.sha256(self.path.read_bytes()).hexdigest(),
            photos=self.photos,
            metrics={name: value for name, value in self.metrics.items() if name != "per_class"},
        )


class TorchSession:
    """A checkpoint that detects as runtime.Session does an ONNX file: photos in, Detections in their pixels out.

    nms: what becomes of boxes that overlap (see runtime.merge). threads: torch's on the CPU; 0: as it has it.
    """

    def __init__(self, path: Path, device: config.Device = "auto", nms: merge.Kind = "hard", threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        trained = read(path) if nms == "hard" else read(path).without_nms()
        self.nms = nms
        self.manifest = trained.manifest()
        self.device = pick_device(device)
        self.predictor = trained.predictor().to(self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is an index into them."""
        return self.manifest.classes

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each image, uint8 [h, w, 3] RGB of any size, in its own pixels, best first."""
        return detect_with(self._run, self.manifest, images, self.nms)

    @torch.inference_mode()
    def _run(self, images_B3HW: NDArray[np.uint8]) -> Raw:
        outputs = self.predictor(torch.from_numpy(images_B3HW).to(self.device))
        return Raw(*(output.cpu().numpy() for output in outputs))


def write(
    path: Path,
    weights: dict[str, Tensor],
    settings: config.Config,
    classes: tuple[str, ...],
    epoch: int,
    metrics: dict[str, Any],
    decision: Decision | None = None,
    photos: Photos | None = None,
) -> None:
    """Write a checkpoint, atomically."""
    metadata = {
        "detkit": __version__,
        "config": config.dump(settings),
        "classes": json.dumps(classes),
        "epoch": str(epoch),
        "metrics": json.dumps(metrics),
    }
    if decision:
        metadata["decision"] = decision.model_dump_json()
    if photos:
        metadata["photos"] = photos.model_dump_json()
    plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    atomic_write(path, save(plain, metadata | {"sha256": _digest(plain, metadata)}))


def _digest(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 of all that a checkpoint says."""
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises UserError where the file is not one of detkit's, or not as it was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read as a checkpoint ({error})") from None
    if "detkit" not in metadata:
        raise UserError(f"{path}: not a checkpoint of detkit; for weights alone use --set model.weights={path}")
    if metadata.pop("sha256", None) != _digest(weights, metadata):
        raise UserError(f"{path}: damaged: it is not as it was written (its digest differs); take another checkpoint")
    try:
        settings = config.parse(yaml.safe_load(metadata["config"]), f"{path} (config)")
        classes = tuple(json.loads(metadata["classes"]))
        figures = json.loads(metadata["metrics"])
        decision = Decision.model_validate_json(metadata["decision"]) if "decision" in metadata else None
        photos = Photos.model_validate_json(metadata["photos"]) if "photos" in metadata else None
        return Checkpoint(path, settings, classes, weights, int(metadata["epoch"]), figures, decision, photos)
    except (KeyError, ValueError, TypeError, yaml.YAMLError):
        raise UserError(f"{path}: what it says of itself is damaged; take another checkpoint") from None


def find(model: str | os.PathLike[str] | None, runs: Path = Path("runs")) -> Path:
    """The file that `model` means: itself, a run folder's best (or last) checkpoint, or, for None, that of the newest
    run. Raises UserError where there is none."""
    if model is None:
        found = [path for path in (_of_run(run) for run in runs.glob("*/")) if path]
        if not found:
            raise UserError(f"{runs}: no trained run yet; train one with  detkit train --config ssd_mobilenet.yaml")
        return max(found, key=lambda path: path.stat().st_mtime_ns)
    path = Path(model)
    if path.is_dir():
        inside = _of_run(path)
        if inside is None:
            raise UserError(f"{path}: a folder without {BEST} or {LAST}; is it a run of detkit?")
        return inside
    if not path.is_file():
        raise UserError(f"{path}: no such model file or run folder")
    return path


def _of_run(run: Path) -> Path | None:
    return next((run / name for name in (BEST, LAST) if (run / name).is_file()), None)


def newest_stopped(runs: Path = Path("runs")) -> Path:
    """The folder of the run whose state was saved last. Raises UserError where there is none."""
    states = [*runs.glob(f"*/{STATE}"), *runs.glob(f"*/{PREVIOUS}")]
    if not states:
        raise UserError(f"{runs}: no run to resume")
    return max(states, key=lambda path: path.stat().st_mtime_ns).parent


def class_difference(data: Sequence[str], model: Sequence[str]) -> str:
    """In words, what classes the data have and the model doesn't, and the reverse."""
    more, fewer = sorted(set(data) - set(model)), sorted(set(model) - set(data))
    parts = []
    for word, names in (("also", more), ("no", fewer)):
        if names:
            parts.append(f"{word} {', '.join(names[:5])}" + f" and {len(names) - 5} more" * (len(names) > 5))
    return "; ".join(parts) or "another order"


class _Digested(io.RawIOBase):
    """Writes through to a file, and keeps the digest of what was written, and the error that kept it from it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write what resuming needs (weights, optimiser, counters), atomically; the state before it stays as PREVIOUS.
    Raises UserError where it can't be written: then the one there stays as it was."""
    with atomic_file(path) as file:
        file.write(_HEAD + b"0" * _DIGITS + b"\n")
        through = _Digested(file)
        try:
            torch.save(state, cast("IO[bytes]", through))
        except RuntimeError:
            # torch ends its archive in any case, and speaks of that where the disk is full.
            if through.error is None:
                raise
            raise through.error from None
        file.seek(len(_HEAD))
        file.write(through.digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())  # from here on nothing but names changes
        if path.exists():
            path.replace(path.with_name(PREVIOUS))


def read_state(run: Path) -> tuple[dict[str, Any], str]:
    """What `write_state` wrote into a run's folder, nothing but tensors and plain values admitted; and what there is
    to say of it: where the last state is damaged, it is the one before. Raises UserError where both are."""
    said = ""
    for name in (STATE, PREVIOUS):
        path = run / name
        if not path.is_file():
            continue
        try:
            return _read_state(path), said
        except UserError as error:
            said = said or str(error)
    raise UserError(said or f"{run}: nothing to resume: it has no {STATE}")


def _read_state(path: Path) -> dict[str, Any]:
    try:
        content = memoryview(path.read_bytes())
        head, rest = bytes(content[: len(_HEAD) + _DIGITS + 1]), content[len(_HEAD) + _DIGITS + 1 :]
        if head != _HEAD + hashlib.sha256(rest).hexdigest().encode() + b"\n":
            raise UserError(f"{path}: damaged: it is not as it was written (its digest differs)")
        state: dict[str, Any] = torch.load(io.BytesIO(rest), map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a file that it doesn't admit
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read ({reason})") from None
    return state


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Within, no other process may train into the run's folder; the system ends that with the process, however it
    ends. Raises UserError where one does."""
    try:
        with FileLock(run / ".lock", timeout=0):
            yield
    except Timeout:
        raise UserError(f"{run}: another process is training this run; wait for it, or start a new run") from None

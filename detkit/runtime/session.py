"""An exported detector in ONNX Runtime: photos in, Detections in the photos' own pixels out. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _state

from detkit import geometry, imaging
from detkit.errors import UserError
from detkit.manifest import KEY, Manifest
from detkit.runtime import merge
from detkit.types import Detections

INPUT = "images"
OUTPUTS = ("boxes", "scores", "labels")

# ONNX Runtime's exceptions have no common base class of their own.
_ORT_ERRORS = (
    _state.Fail,
    _state.InvalidArgument,
    _state.InvalidGraph,
    _state.InvalidProtobuf,
    _state.NoModel,
    _state.NotImplemented,
    _state.RuntimeException,
)


class Raw(NamedTuple):
    """What the network says: boxes float32 [B, K, 4] in pixels of the input canvas, scores float32 [B, K] with 0 as
    padding, labels int64 [B, K]."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


Run = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]]


def detections(
    plan: geometry.ResizePlan,
    boxes: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> Detections:
    """One photo's Detections, in its own pixels and best first, from what the network says of it.

    boxes: [K, 4], pixels of the input canvas. scores: [K], 0 is padding. labels: [K]. A box of which nothing is left
    inside the photo (it lay in the padding of a letterbox) is dropped.
    """
    inside = plan.to_source(boxes).astype(np.float32)
    kept = np.flatnonzero((scores > 0) & (inside[:, :2] < inside[:, 2:]).all(axis=1))
    order = kept[np.argsort(-scores[kept], kind="stable")]
    return Detections(inside[order], scores[order].astype(np.float32), labels[order].astype(np.int64), plan.source)


def detect_with(
    run: Run, manifest: Manifest, images: Sequence[NDArray[np.uint8]], nms: merge.Kind = "hard"
) -> list[Detections]:
    """Detections of each image, in its own pixels, as one batch through `run`.

    run: from uint8 [B, 3, H, W] on the canvas to boxes, scores and labels (see `Raw`). images: uint8 [h, w, 3] RGB,
    each of any size. Raises ValueError on anything else. nms: what becomes of candidates that overlap, where the
    network leaves that open.
    """
    if not images:
        return []
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"an image must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")
    plans = [geometry.plan((image.shape[0], image.shape[1]), manifest.size, manifest.resize) for image in images]
    batch_B3HW = np.empty((len(images), 3, *manifest.size), np.uint8)
    for slot, image, plan in zip(batch_B3HW, images, plans, strict=True):
        slot[:] = imaging.to_canvas(image, plan, manifest.fill).transpose(2, 0, 1)
    outputs = run(batch_B3HW)
    found = [detections(plan, *rows) for plan, *rows in zip(plans, *outputs, strict=True)]
    return [merge.merge(one, nms, manifest.nms) for one in found]


class Session:
    """A detector exported by ``detkit export``. Several threads may use one Session at a time.

    path: the ONNX file. device: 'cpu', 'cuda', or 'auto': CUDA if it really loads, else the CPU. threads: those of
    one call on the CPU; 0: one a core. nms: what becomes of boxes that overlap (see runtime.merge); another than 'hard'
    needs a file exported with ``--nms none``. Raises UserError, one line, where the file is missing, damaged or not
    detkit's, and where 'cuda' or that `nms` can't be had.
    """

    def __init__(self, path: str | Path, device: str = "auto", threads: int = 0, nms: merge.Kind = "hard") -> None:
        self.path, self.nms = Path(path), nms
        if device not in ("auto", "cpu", "cuda"):
            raise UserError(f"device '{device}': ONNX files run on auto, cpu or cuda")
        self._session = _open(self.path, device, threads)
        self.manifest = _manifest(self._session, self.path)
        merge.check(nms, self.manifest.nms, self.path)
        if device == "cuda" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise UserError("device 'cuda': CUDA can't be loaded; run  pip install 'detkit[gpu]'  or use --device cpu")

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is an index into them."""
        return self.manifest.classes

    @property
    def device(self) -> str:
        """What the network really runs on: 'cuda' or 'cpu'."""
        return "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"

    def run(self, images_B3HW: NDArray[np.uint8]) -> Raw:
        """The network alone: uint8 [B, 3, H, W] RGB, already on the canvas -> Raw."""
        boxes, scores, labels = self._session.run(OUTPUTS, {INPUT: images_B3HW})
        return Raw(boxes, scores, labels)

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of each image in its own pixels, best first; all images go through the network as one batch.

        images: uint8 [h, w, 3] RGB, each of any size. Raises ValueError on anything else.
        """
        return detect_with(self.run, self.manifest, images, self.nms)


def _open(path: Path, device: str, threads: int) -> Any:
    if not path.is_file():
        raise UserError(f"{path}: no such ONNX file")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; its warnings are about its own optimiser
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=_providers(device))
    except _ORT_ERRORS:
        raise UserError(f"{path}: not an ONNX file that can be run (damaged, cut off, or another format)") from None


def _providers(device: str) -> list[str]:
    cpu = ["CPUExecutionProvider"]
    if device == "cpu" or "CUDAExecutionProvider" not in ort.get_available_providers() or not _has_nvidia():
        return cpu
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each library that it can't find
        ort.preload_dlls()
    return ["CUDAExecutionProvider", *cpu]


def _has_nvidia() -> bool:
    """Whether an NVIDIA driver with a GPU is here. Asking ONNX Runtime itself where there is none fills stderr."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuInit(0) == 0)


def _manifest(session: Any, path: Path) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    if text is None:
        raise UserError(f"{path}: an ONNX file, but not one that 'detkit export' wrote (it has no manifest)")
    manifest = Manifest.from_json(text, str(path))
    inputs, outputs = ([node.name for node in nodes] for nodes in (session.get_inputs(), session.get_outputs()))
    if inputs != [INPUT] or not set(OUTPUTS) <= set(outputs):
        raise UserError(f"{path}: expected input {INPUT} and outputs {', '.join(OUTPUTS)}, not {inputs} and {outputs}")
    return manifest

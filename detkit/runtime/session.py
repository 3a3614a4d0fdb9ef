"""An exported detector in ONNX Runtime: photos in, Detections in the photos' own pixels out. No torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as _state
from PIL.Image import Image

from detkit import geometry, imaging
from detkit import manifest as manifests
from detkit.errors import UserError
from detkit.manifest import Manifest
from detkit.runtime import merge
from detkit.types import Detections

INPUT = "images"  # uint8 [B, 3, H, W], on the canvas
IMAGE = "image"  # uint8 [h, w, 3], a photo of any size: the graph resizes, and maps the boxes back
OUTPUTS = ("boxes", "scores", "labels")

_CPU = "CPUExecutionProvider"
_OPENVINO = "OpenVINOExecutionProvider", "put onnxruntime-openvino in the place of onnxruntime-gpu (pip)"
# What each device is to ONNX Runtime, and what brings it.
_PROVIDERS = {
    "cuda": ("CUDAExecutionProvider", "run  pip install 'detkit[gpu]'"),
    "tensorrt": ("TensorrtExecutionProvider", "run  pip install 'detkit[gpu]' 'tensorrt-cu13>=10,<11'"),
    "openvino": _OPENVINO,
    "openvino-bf16": _OPENVINO,
    "coreml": ("CoreMLExecutionProvider", "it comes with onnxruntime for macOS"),
    "directml": ("DmlExecutionProvider", "on Windows, put onnxruntime-directml in the place of onnxruntime-gpu (pip)"),
}
DEVICES = ("auto", "cpu", *_PROVIDERS)
_NAMES = {_CPU: "cpu"} | {provider: device for device, (provider, _) in _PROVIDERS.items()}
_QUIET, _DEFAULT = 4, 2  # ONNX Runtime's levels of log: only what ends the process; warnings

# ONNX Runtime's exceptions have no common base class of their own.
_ORT_ERRORS = (
    RuntimeError,
    ValueError,
    _state.EPFail,
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


def require_photo(image: NDArray[np.uint8]) -> None:
    """Raise ValueError unless it is uint8 [h, w, 3] with something in it."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"an image must be uint8 [height, width, 3], not {image.dtype} {list(image.shape)}")


class Canvas(NamedTuple):
    """A photo on a model's canvas. plan: how it lies there. image: the canvas as the network takes it, uint8 [3, H, W],
    not contiguous."""

    plan: geometry.ResizePlan
    image: NDArray[np.uint8]


def onto_canvas(image: NDArray[np.uint8] | Image, said: Manifest) -> Canvas:
    """A photo, uint8 [h, w, 3] or what imaging.picture gives, on a model's canvas."""
    hw = image.size[::-1] if isinstance(image, Image) else image.shape[:2]
    plan = geometry.plan((hw[0], hw[1]), said.size, said.resize)
    return Canvas(plan, imaging.to_canvas(image, plan, said.fill).transpose(2, 0, 1))


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
    run: Run, manifest: Manifest, images: Sequence[NDArray[np.uint8] | Canvas], nms: merge.Kind = "hard"
) -> list[Detections]:
    """Detections of each image, in its own pixels, as one batch through `run`.

    run: from uint8 [B, 3, H, W] on the canvas to boxes, scores and labels (see `Raw`). images: uint8 [h, w, 3] RGB,
    each of any size, or on this model's canvas already. Raises ValueError on anything else. nms: what becomes of
    candidates that overlap, where the network leaves that open.
    """
    if not images:
        return []
    for image in images:
        if not isinstance(image, Canvas):
            require_photo(image)
    batch_B3HW = np.empty((len(images), 3, *manifest.size), np.uint8)
    plans = []
    for slot, image in zip(batch_B3HW, images, strict=True):
        plan, slot[:] = image if isinstance(image, Canvas) else onto_canvas(image, manifest)
        plans.append(plan)
    outputs = run(batch_B3HW)
    found = [detections(plan, *rows) for plan, *rows in zip(plans, *outputs, strict=True)]
    return [merge.merge(one, nms, manifest.nms) for one in found]


class Session:
    """A detector exported by ``detkit export``, of either input. Several threads may use one Session at a time.

    path: the ONNX file. device: 'cpu', 'cuda', 'tensorrt', 'openvino', 'openvino-bf16' (it multiplies in bfloat16),
    'coreml', 'directml'; or 'auto': CUDA if it really loads, else the CPU. threads: those of one call on the CPU; 0:
    one a core. nms: what becomes of boxes that overlap (see runtime.merge); another than 'hard' needs a file exported
    with ``--nms none``. Raises UserError, one line, where the file is missing, damaged, a newer detkit's or not
    detkit's, and where the device or that `nms` can't be had: what was asked for is what runs.
    """

    def __init__(self, path: str | Path, device: str = "auto", threads: int = 0, nms: merge.Kind = "hard") -> None:
        self.path, self.nms, self._asked = Path(path), nms, device
        if device not in DEVICES:
            raise UserError(f"device '{device}': ONNX files run on {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
        try:
            self.manifest = manifests.read(self.path.read_bytes(), str(self.path))
        except FileNotFoundError:
            raise UserError(f"{self.path}: no such ONNX file") from None
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None
        self._session = _open(self.path, device, threads)
        _fit(self._session, self.manifest, self.path)
        merge.check(nms, self.manifest.nms, self.path)
        self._input: str = self._session.get_inputs()[0].name
        self._bound = self.device in ("cuda", "tensorrt")
        self._held = threading.local()  # each thread's own input in the GPU's memory
        # DirectML runs one call of a session at a time; the others need no lock.
        self._turn = threading.Lock() if self.device == "directml" else contextlib.nullcontext()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is an index into them."""
        return self.manifest.classes

    @property
    def device(self) -> str:
        """What the network really runs on: 'cpu', 'cuda', ..."""
        first: str = self._session.get_providers()[0]
        return self._asked if first == _PROVIDERS.get(self._asked, ("",))[0] else _NAMES.get(first, first)

    @property
    def kind(self) -> Literal["canvas", "image"]:
        """What the file takes: batches on its canvas, or one photo of any size."""
        return "image" if self._input == IMAGE else "canvas"

    def run(self, images: NDArray[np.uint8]) -> Raw:
        """The network alone, without resizing. Of a canvas file: uint8 [B, 3, H, W] RGB on the canvas -> Raw. Of an
        image file: uint8 [h, w, 3] RGB -> the same, in pixels of that photo, B being 1."""
        with self._turn:
            outputs = self._on_gpu(images) if self._bound else self._session.run(OUTPUTS, {self._input: images})
        boxes, scores, labels = outputs
        return Raw(boxes, scores, labels) if boxes.ndim == 3 else Raw(boxes[None], scores[None], labels[None])

    def _on_gpu(self, images: NDArray[np.uint8], memory: str = "cuda") -> list[Any]:
        """`images` go to the GPU as the bytes that they are, into memory that the thread keeps while their shape stays
        the same, and only the boxes come back."""
        held = getattr(self._held, "input", None)
        if held is not None and tuple(held.shape()) == images.shape:
            held.update_inplace(images)
        else:
            held = self._held.input = ort.OrtValue.ortvalue_from_numpy(images, memory, 0)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, held)
        for name in OUTPUTS:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        return [value.numpy() for value in binding.get_outputs()]

    def read(self, source: str | Path | bytes, *, max_pixels: int = imaging.MAX_PIXELS) -> Canvas | NDArray[np.uint8]:
        """A photo as `detect` takes it: for a canvas file on its canvas already, which is less work, and holds less
        memory, than its pixels; for an image file the pixels. Source, `max_pixels`, errors: imaging.decode's."""
        if self.kind == "image":
            return imaging.decode(source, max_pixels=max_pixels)
        return onto_canvas(imaging.picture(source, max_pixels=max_pixels), self.manifest)

    def detect(self, images: Sequence[NDArray[np.uint8] | Canvas]) -> list[Detections]:
        """Detections of each image in its own pixels, best first. All images go through a canvas file as one batch, and
        through an image file one after the other.

        images: uint8 [h, w, 3] RGB, each of any size, or what `read` gives. Raises ValueError on anything else.
        """
        if self.kind == "canvas":
            return detect_with(self.run, self.manifest, images, self.nms)
        found = []
        for image in images:
            if isinstance(image, Canvas):
                raise ValueError("an image file takes pixels, not a canvas")
            require_photo(image)
            hw = image.shape[:2]
            (rows,) = zip(*self.run(np.ascontiguousarray(image)), strict=True)
            found.append(merge.merge(detections(geometry.ResizePlan(hw, hw, hw), *rows), self.nms, self.manifest.nms))
        return found


def _open(path: Path, device: str, threads: int) -> Any:
    """An ONNX Runtime session whose first provider is the device's. Raises UserError."""
    if device == "cpu":
        try:
            return _session(path, [_CPU], threads)
        except _ORT_ERRORS as error:
            raise UserError(f"{path}: not an ONNX file that can be run ({_reason(error)})") from None
    wanted = "cuda" if device == "auto" else device
    why = _missing(wanted)
    if not why:
        try:
            with _silent():
                session = _session(path, _chain(wanted, path, threads), threads)
            if session.get_providers()[0] == _PROVIDERS[wanted][0]:
                return session
            why = _unloadable(wanted) or "ONNX Runtime did not load it"
        except _ORT_ERRORS as error:
            why = _unloadable(wanted) or _reason(error)
        why = f"{why}; {_PROVIDERS[wanted][1]}"
    session = _open(path, "cpu", threads)  # else it is the file's fault, not the device's
    if device == "auto":
        return session
    raise UserError(f"device '{device}': {why}, or use --device cpu")


def _session(path: Path, providers: list[Any], threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors; its warnings are about its own optimiser
    # A plan of memory for each shape that was ever seen would be kept, and photos come in many; DirectML knows none.
    options.enable_mem_pattern = False
    return ort.InferenceSession(os.fspath(path), options, providers=providers, enable_fallback=0)


def _chain(device: str, path: Path, threads: int) -> list[Any]:
    """The providers to ask for: the device's, with its options, and what runs the operators that it lacks."""
    provider, _ = _PROVIDERS[device]
    if device == "tensorrt":
        options: dict[str, Any] = {}
        if os.access(path.parent, os.W_OK):  # building its engines takes minutes
            options = {"trt_engine_cache_enable": True, "trt_engine_cache_path": f"{path}.tensorrt"}
        return [(provider, options), _PROVIDERS["cuda"][0], _CPU]
    if _PROVIDERS[device] == _OPENVINO:
        options = {"num_of_threads": str(threads)} if threads else {}
        if device == "openvino-bf16":
            options["load_config"] = json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}})
        return [(provider, options), _CPU]
    return [provider, _CPU]


def _missing(device: str) -> str:
    """Why the device can't be had, and what to do, as far as can be told before trying; else ''. Loads the CUDA
    libraries that pip has brought."""
    provider, advice = _PROVIDERS[device]
    if provider not in ort.get_available_providers():
        return f"this ONNX Runtime ({ort.__version__} for {sys.platform}) is built without it; {advice}"
    if device not in ("cuda", "tensorrt"):
        return ""
    if not _has_nvidia():
        return "no GPU with an NVIDIA driver is here; install the driver"
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line for each library that it can't find
        ort.preload_dlls()
    if device == "tensorrt":
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("tensorrt_libs")  # loads what it holds
    return ""


def _unloadable(device: str) -> str:
    """Why ONNX Runtime, which keeps it to itself, could not load an NVIDIA library; '' where it could. Only to be asked
    after it tried: the library counts on what it finds set up then."""
    if device not in ("cuda", "tensorrt"):
        return ""
    prefix, suffix = ("", ".dll") if sys.platform == "win32" else ("lib", ".so")
    try:
        ctypes.CDLL(str(Path(_state.__file__).parent / f"{prefix}onnxruntime_providers_{device}{suffix}"))
    except OSError as error:
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    """What ONNX Runtime says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """ONNX Runtime's own lines on stderr, about a provider that it can't load, left out."""
    ort.set_default_logger_severity(_QUIET)
    try:
        yield
    finally:
        ort.set_default_logger_severity(_DEFAULT)


def _has_nvidia() -> bool:
    """Whether an NVIDIA driver with a GPU is here. Asking ONNX Runtime itself where there is none fills stderr."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return bool(driver.cuInit(0) == 0)


def _fit(session: Any, said: Manifest, path: Path) -> None:
    """Raise UserError where a graph is not what its manifest says."""
    inputs, outputs = session.get_inputs(), [node.name for node in session.get_outputs()]
    found = [(node.name, node.type, [side if isinstance(side, int) else 0 for side in node.shape]) for node in inputs]
    fits = ([(INPUT, "tensor(uint8)", [0, 3, *said.size])], [(IMAGE, "tensor(uint8)", [0, 0, 3])])
    if found not in fits or not {*OUTPUTS} <= {*outputs}:
        inside = ", ".join(f"{name} {kind} {shape}" for name, kind, shape in found)
        raise UserError(
            f"{path}: its graph isn't what its manifest says: expected input {INPUT} uint8 {fits[0][0][2]} or {IMAGE} "
            f"uint8 {fits[1][0][2]} and outputs {', '.join(OUTPUTS)}, not {inside} and {', '.join(outputs)}"
        )

"""A model repository for NVIDIA's Triton Inference Server, of an exported ONNX file. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort

from detkit.errors import UserError
from detkit.files import atomic_write, whole_folder
from detkit.manifest import Manifest
from detkit.runtime.session import OUTPUTS, Session

MAX_BATCH, MAX_DELAY = 8, 5000  # photos; microseconds that Triton waits for a batch to fill
_TYPES = {"tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


def write(model: Path, repository: Path, name: str | None = None, max_batch: int = MAX_BATCH) -> Path:
    """Write REPOSITORY/NAME/config.pbtxt, labels.txt and NAME/<version>/model.onnx; returns the version's folder.

    name: default: the manifest's. A model that is there gets a further version where it takes and gives the same.
    Raises UserError where the file is none that runs, and where the model there has another configuration.
    """
    said = Session(model, "cpu", threads=1).manifest  # which also tells whether it runs
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", said.name).strip("-._") or "model"
    folder = repository / name
    texts = {
        "config.pbtxt": config(model, said, name, max_batch),
        "labels.txt": "".join(f"{c}\n" for c in said.classes),
    }
    for file, text in texts.items():
        path = folder / file
        if path.exists() and _interface(path.read_text(encoding="utf-8")) != _interface(text):
            raise UserError(f"{path}: differs from what {model} needs; name another repository, or remove that model")
    versions = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    for file, text in texts.items():
        atomic_write(folder / file, text)
    target = folder / str(max(versions, default=0) + 1)
    with whole_folder(target) as new:  # Triton, which may be looking, sees it whole
        (new / "model.onnx").write_bytes(model.read_bytes())
    return target


def config(model: Path, said: Manifest, name: str, max_batch: int) -> str:
    """The model's configuration, in protobuf's text format (Triton's model_config.proto, ModelConfig).

    What the graph leaves open is -1. The parameters tell a client how to put a photo onto the canvas.
    """
    graph = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    batched = said.input == "canvas"
    outputs = {node.name: node for node in graph.get_outputs()}
    lines = [
        f"name: {_text(name)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {max_batch if batched else 0}",
        *(f"input [ {_tensor(node, batched)} ]" for node in graph.get_inputs()),
        *(f"output [ {_tensor(outputs[one], batched)} ]" for one in OUTPUTS),
    ]
    if batched:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {MAX_DELAY} }}")
    told = {
        "classes": json.dumps(said.classes), "score": str(said.score),
        "resize": said.resize, "fill": json.dumps(said.fill),
    }  # fmt: skip
    lines += [
        f"parameters {{ key: {_text(key)} value {{ string_value: {_text(value)} }} }}" for key, value in told.items()
    ]
    return "\n".join(lines) + "\n"


def _interface(text: str) -> list[str]:
    """A file's lines without the parameters, in which versions of a model may differ."""
    return [line for line in text.splitlines() if not line.startswith("parameters")]


def _tensor(node: Any, batched: bool) -> str:
    sides: Sequence[object] = node.shape[batched:]
    more = ' label_filename: "labels.txt"' if node.name == "labels" else ""
    dims = ", ".join(str(side) if isinstance(side, int) else "-1" for side in sides)
    return f"{{ name: {_text(node.name)} data_type: {_TYPES[node.type]} dims: [ {dims} ]{more} }}"


def _text(value: str) -> str:
    """A string as protobuf's text format has it: bytes that are no printable ASCII as octal."""
    escaped = (f"\\{byte:03o}" if not 32 <= byte < 127 or byte in b'"\\' else chr(byte) for byte in value.encode())
    return f'"{"".join(escaped)}"'

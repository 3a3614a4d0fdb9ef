"""The Open Inference Protocol, version 2: what its REST and its gRPC have in common, and REST's two ways of tensors.

The network is served as it is in the ONNX file: pixels on the canvas in, boxes on the canvas out. A client of Triton
Inference Server, which serves the same file so (see detkit.triton), needs no change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detkit import __version__
from detkit.runtime.session import IMAGE, INPUT, OUTPUTS
from detkit.serve.models import Entry
from detkit.serve.settings import Problem

NAME = "detkit"
EXTENSIONS = ["binary_tensor_data", "model_repository"]
PLATFORM = "onnxruntime_onnx"
LENGTH_HEADER = "inference-header-content-length"
DATATYPES = {"boxes": "FP32", "scores": "FP32", "labels": "INT64"}


class Tensor(NamedTuple):
    """A tensor's description; a side of -1 is open."""

    name: str
    datatype: str
    shape: list[int]


class Asked(NamedTuple):
    """What an inference request says. images: one entry an image, as the network takes it. outputs: each wanted
    tensor's name, and whether it goes back as bytes."""

    id: str
    images: Sequence[NDArray[np.uint8]]
    outputs: Mapping[str, bool]


def server() -> dict[str, Any]:
    """Metadata of the server."""
    return {"name": NAME, "version": __version__, "extensions": EXTENSIONS}


def inputs(entry: Entry) -> Tensor:
    """What the model takes."""
    height, width = entry.engine.manifest.size
    if entry.engine.session.kind == "image":
        return Tensor(IMAGE, "UINT8", [-1, -1, 3])
    return Tensor(INPUT, "UINT8", [-1, 3, height, width])


def outputs(entry: Entry) -> list[Tensor]:
    """What the model gives; K, the number of boxes, is the same in every answer, and score 0 is padding."""
    lead = [] if entry.engine.session.kind == "image" else [-1]
    return [Tensor(name, DATATYPES[name], [*lead, -1, *([4] if name == "boxes" else [])]) for name in OUTPUTS]


def images(entry: Entry, tensor: Tensor, data: object, most: int) -> list[NDArray[np.uint8]]:
    """The images in a request's tensor, `data` being its bytes, or its numbers in (nested) lists. Raises Problem."""
    expected = inputs(entry)
    if tensor.name != expected.name or tensor.datatype != expected.datatype:
        raise Problem(
            400,
            f"the input must be {expected.name}, {expected.datatype}, not {tensor.name[:100]}, {tensor.datatype[:20]}",
        )
    shape = tensor.shape
    fits = len(shape) == len(expected.shape) and all(
        side > 0 and want in (-1, side) for side, want in zip(shape, expected.shape, strict=True)
    )
    if not fits:
        raise Problem(400, f"the input's shape must be {expected.shape}, not {str(list(shape))[:100]}")
    if expected.name == INPUT and shape[0] > most:
        raise Problem(400, f"at most {most} images a request, not {shape[0]}")
    pixels = _pixels(data)
    if pixels.size != math.prod(shape):
        raise Problem(400, f"the input holds {pixels.size} values; its shape {list(shape)} says {math.prod(shape)}")
    array = pixels.reshape(shape)
    return list(array) if expected.name == INPUT else [array]


def _pixels(data: object) -> NDArray[np.uint8]:
    if isinstance(data, bytes | memoryview):
        return np.frombuffer(data, np.uint8)
    try:
        numbers = np.asarray(data)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise Problem(400, "the input's data must be whole numbers, flat or nested evenly") from None
    if numbers.dtype.kind not in "iu" or (numbers.size and (numbers.min() < 0 or numbers.max() > 255)):
        raise Problem(400, "the input's data must be whole numbers from 0 to 255")
    return numbers.astype(np.uint8)


async def infer(entry: Entry, asked: Asked) -> dict[str, NDArray[Any]]:
    """The tensors that were asked for. Raises Problem 429."""
    found = await entry.engine.infer(asked.images)
    tensors: dict[str, NDArray[Any]] = dict(zip(OUTPUTS, found, strict=True))
    if entry.engine.session.kind == "image":
        tensors = {name: tensor[0] for name, tensor in tensors.items()}
    return {name: tensors[name] for name in asked.outputs}


def chosen(names: Mapping[str, bool], binary: bool) -> Mapping[str, bool]:
    """The outputs that were asked for, or all. Raises Problem 400 where there is none of a name."""
    for name in names:
        if name not in OUTPUTS:
            raise Problem(400, f"no output '{name[:100]}'; there are {', '.join(OUTPUTS)}")
    return names or dict.fromkeys(OUTPUTS, binary)


def parse(entry: Entry, body: bytes, length: str | None, most: int) -> Asked:
    """A request's body: JSON, of `length` bytes where tensors as bytes follow (`LENGTH_HEADER`). Raises Problem."""
    try:
        size = len(body) if length is None else int(length)
        if not 0 < size <= len(body):
            raise Problem(400, f"{LENGTH_HEADER}: must be the length of the JSON before the tensors")
        tree = json.loads(body[:size])
        (given,) = tree["inputs"]
        tensor = Tensor(str(given["name"]), str(given["datatype"]), [int(side) for side in given["shape"]])
        binary_size = given.get("parameters", {}).get("binary_data_size")
        names = {str(one["name"]): one.get("parameters", {}).get("binary_data") for one in tree.get("outputs") or ()}
        binary = tree.get("parameters", {}).get("binary_data_output") is True
        data = given["data"] if binary_size is None else memoryview(body)[size:]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise Problem(400, "not a request of the Open Inference Protocol with one input") from None
    if binary_size is not None and (type(binary_size) is not int or binary_size != len(body) - size):
        raise Problem(400, "binary_data_size: is not what follows the JSON")
    if binary_size is None and size != len(body):
        raise Problem(400, "bytes follow the JSON, but no input says binary_data_size")
    wanted = {name: binary if own is None else own is True for name, own in names.items()}
    return Asked(str(tree.get("id", "")), images(entry, tensor, data, most), chosen(wanted, binary))


def answer(entry: Entry, asked: Asked, tensors: Mapping[str, NDArray[Any]]) -> tuple[bytes, int | None]:
    """The answer's body, and the length of its JSON where tensors follow as bytes."""
    described, tail = [], []
    for name, tensor in tensors.items():
        one: dict[str, Any] = {"name": name, "datatype": DATATYPES[name], "shape": list(tensor.shape)}
        if asked.outputs[name]:
            tail.append(raw(tensor))
            one["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            one["data"] = tensor.ravel().tolist()
        described.append(one)
    tree = {"model_name": entry.name, "model_version": entry.version, "id": asked.id, "outputs": described}
    head = json.dumps(tree).encode()
    return b"".join((head, *tail)), len(head) if tail else None


def raw(tensor: NDArray[Any]) -> bytes:
    """A tensor as the protocol has its bytes: row-major, little-endian."""
    return tensor.astype(tensor.dtype.newbyteorder("<"), copy=False).tobytes()


def index(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The repository's index. What is served is ready: a model that isn't does not get this far."""
    return [{"name": one.name, "version": one.version, "state": "READY", "reason": ""} for one in entries]


def metadata(entry: Entry, versions: list[str]) -> dict[str, Any]:
    """Metadata of a model."""
    return {
        "name": entry.name,
        "versions": versions,
        "platform": PLATFORM,
        "inputs": [inputs(entry)._asdict()],
        "outputs": [one._asdict() for one in outputs(entry)],
    }

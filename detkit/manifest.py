"""What travels inside the ONNX file: what is needed to feed it a photo, to read what it says, and to prove it whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from detkit.config import Select, Share, Triple
from detkit.errors import UserError
from detkit.geometry import Rule

KEY = "detkit"  # in the ONNX file's metadata_props
DIGEST = "detkit.sha256"  # likewise, last of all: SHA-256 of the rest of the file
FORMAT = 2

# Of protobuf messages: the numbers of ModelProto's fields `graph` and `metadata_props`, and of a property's two.
_GRAPH, _PROPERTY, _NAME, _VALUE = 7, 14, 1, 2

_Byte = Annotated[int, Field(ge=0, le=255)]
Precision = Literal["fp32", "fp16", "int8"]


class Golden(BaseModel):
    """A made-up photo and what the file found in it where it was exported: the best detections, on the CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(ge=0, description="of detkit.runtime.verify.scene, which paints the photo")
    size: tuple[PositiveInt, PositiveInt] = Field(description="its height and width in pixels")
    boxes: tuple[tuple[float, float, float, float], ...] = Field(description="in pixels of the photo")
    scores: tuple[Share, ...] = Field(description="best first")
    labels: tuple[int, ...]


class Photos(BaseModel):
    """The photos that a detector was trained on, as far as it tells how to look at others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: tuple[PositiveInt, PositiveInt] = Field(description="their median height and width, or those of the tiles")
    side: NonNegativeFloat = Field(
        description="99th percentile of objects' longer sides in pixels; or the tiles' overlap"
    )
    most: int = Field(ge=0, description="objects in the densest of them")
    tiled: bool = Field(False, description="whether they were looked at in tiles")


class Decision(BaseModel):
    """How sure a detection must be to be shown, as `detkit calibrate` found it out on photos."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration: Literal["none", "temperature", "isotonic"] = Field(
        "none", description="what is done with scores first"
    )
    temperature: PositiveFloat = Field(1.0, description="by which a score's logit is divided")
    knots: tuple[tuple[Share, Share], ...] = Field((), description="isotonic: scores, ascending, and what they become")
    thresholds: tuple[Share, ...] = Field(
        (), description="lowest score shown of each class; none: the manifest's score"
    )
    aim: str = Field("", description="what the thresholds were chosen for")


class Manifest(BaseModel):
    """The description of an exported detector, stored as JSON in the ONNX file under `KEY`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: PositiveInt = Field(FORMAT, description="version of this description")
    detkit: str = Field(description="version of detkit that exported")
    name: str = Field(description="the run's name")
    input: Literal["canvas", "image"] = Field(
        "canvas", description="what the graph takes: images already on the canvas, or one photo of any size"
    )
    precision: Precision = Field("fp32", description="what the network computes in; decoding and NMS are always fp32")
    classes: tuple[str, ...] = Field(min_length=1, description="class names; a label is an index into them")
    size: tuple[PositiveInt, PositiveInt] = Field(description="height and width of the input canvas in pixels")
    resize: Rule = Field(description="how a photo is fitted to the canvas")
    mean: Triple = Field(description="RGB mean of values in 0..1; for information: the graph normalises")
    std: Triple = Field(description="RGB standard deviation of values in 0..1; likewise")
    fill: tuple[_Byte, _Byte, _Byte] = Field(description="RGB colour of what a letterbox leaves free")
    score: Share = Field(0.3, description="lowest score that is shown, unless the user says")
    decision: Decision | None = Field(None, description="which detections are shown; none: those from `score` on")
    nms: Select = Field(description="how the graph selects its boxes")
    sha256: str = Field("", description="digest of the checkpoint that was exported")
    photos: Photos | None = Field(None, description="what it was trained on")
    metrics: dict[str, JsonValue] = Field(default_factory=dict, description="validation figures of the checkpoint")
    golden: tuple[Golden, ...] = Field((), description="what `detkit verify` repeats")

    def to_json(self) -> str:
        """The manifest as JSON text, which `from_json` reads back."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes, source: str) -> Manifest:
        """Read a manifest. Raises UserError, one line naming `source`, on junk and on a newer format."""
        try:
            tree = json.loads(text)
        except ValueError:
            raise UserError(f"{source}: its detkit manifest is damaged; export the model again") from None
        version = tree.get("format") if isinstance(tree, dict) else None
        if isinstance(version, int) and version > FORMAT:
            maker = str(tree.get("detkit"))[:20]
            raise UserError(f"{source}: exported by a newer detkit ({maker}, manifest {version}); upgrade detkit")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            reason = " ".join(first["msg"].split())[:100]
            raise UserError(f"{source}: its detkit manifest is damaged ({where}: {reason})") from None


def read(content: bytes, source: str) -> Manifest:
    """The manifest of an ONNX file, from its content alone, whatever else its graph holds.

    Raises UserError, one line naming `source`, where that is no whole ONNX file, not one of detkit's, one of a newer
    detkit's, or not as it was written. A file without a digest, as older detkits wrote, is taken as it is.
    """
    digest, properties, graphs = hashlib.sha256(), dict[str, bytes](), 0
    try:
        for field in _fields(memoryview(content)):
            graphs += field.number == _GRAPH
            pair = _property(field) if field.number == _PROPERTY else None
            if pair:
                properties[pair[0]] = pair[1]
            if pair is None or pair[0] != DIGEST:
                digest.update(field.whole)
    except (ValueError, IndexError):
        graphs = 0
    if graphs != 1:
        raise UserError(f"{source}: not an ONNX file that can be run (damaged, cut off, or another format)")
    if KEY not in properties:
        raise UserError(f"{source}: an ONNX file, but not one that 'detkit export' wrote (it has no manifest)")
    manifest = Manifest.from_json(properties[KEY], source)
    if properties.get(DIGEST, digest.hexdigest().encode()) != digest.hexdigest().encode():
        raise UserError(f"{source}: damaged: it is not as it was written (its digest differs); export it again")
    return manifest


def seal(content: bytes) -> bytes:
    """An ONNX file's content with its digest at the end, which `read` compares."""
    digest = hashlib.sha256()
    for field in _fields(memoryview(content)):
        digest.update(field.whole)
    pair = _message(_NAME, DIGEST.encode()) + _message(_VALUE, digest.hexdigest().encode())
    return content + _message(_PROPERTY, pair)


class _Field(NamedTuple):
    """A field of a protobuf message: its number, what it holds (nothing where that is a number), all its bytes."""

    number: int
    value: memoryview
    whole: memoryview


def _fields(content: memoryview) -> Iterator[_Field]:
    """The fields of a protobuf message, none looked into. Raises ValueError or IndexError where they can't be told."""
    at = 0
    while at < len(content):
        start = at
        tag, at = _number(content, at)
        value = at
        match tag & 7:
            case 0:
                _, at = _number(content, at)
            case 1:
                at += 8
            case 2:
                length, value = _number(content, at)
                at = value + length
            case 5:
                at += 4
            case _:
                raise ValueError("a kind of field that ONNX doesn't have")
        if tag < 8 or at > len(content):
            raise ValueError("a field without number or end")
        yield _Field(tag >> 3, content[value:at] if tag & 7 == 2 else content[:0], content[start:at])


def _number(content: memoryview, at: int) -> tuple[int, int]:
    """The varint at a place, and the place behind it."""
    result = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, at
    raise ValueError("a number without end")


def _property(field: _Field) -> tuple[str, bytes]:
    parts = {inner.number: bytes(inner.value) for inner in _fields(field.value)}
    return parts.get(_NAME, b"").decode(), parts.get(_VALUE, b"")


def _message(number: int, value: bytes) -> bytes:
    """A field that holds bytes."""
    length, size = bytearray(), len(value)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + value

"""What travels inside the ONNX file: all that is needed to feed it a photo and to read what it says."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveFloat, PositiveInt, ValidationError

from detkit.config import Select, Share, Triple
from detkit.errors import UserError
from detkit.geometry import Rule

KEY = "detkit"  # in the ONNX file's metadata_props
FORMAT = 1

_Byte = Annotated[int, Field(ge=0, le=255)]


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
    classes: tuple[str, ...] = Field(min_length=1, description="class names; a label is an index into them")
    size: tuple[PositiveInt, PositiveInt] = Field(description="height and width of the input canvas in pixels")
    resize: Rule = Field(description="how a photo is fitted to the canvas")
    mean: Triple = Field(description="RGB mean of values in 0..1; for information: the graph normalises")
    std: Triple = Field(description="RGB standard deviation of values in 0..1; likewise")
    fill: tuple[_Byte, _Byte, _Byte] = Field(description="RGB colour of what a letterbox leaves free")
    score: Share = Field(0.3, description="lowest score that is shown, unless the user says")
    decision: Decision | None = Field(None, description="which detections are shown; none: those from `score` on")
    nms: Select = Field(description="how the graph selects its boxes")
    sha256: str = Field("", description="digest of the weights")
    metrics: dict[str, JsonValue] = Field(default_factory=dict, description="validation figures of the checkpoint")

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

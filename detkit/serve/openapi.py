"""What /openapi.json says of the routes beside their parameters: bodies, answers and examples."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

Responses = dict[int | str, dict[str, Any]]


class Found(BaseModel):
    """One object."""

    label: str
    score: float = Field(ge=0, le=1)
    box: tuple[float, float, float, float] = Field(description="x1 y1 x2 y2 in pixels of the photo, turned upright")


class Photo(BaseModel):
    """What was found in one photo, best first."""

    image: str = Field(description="the file's name, as sent")
    height: int
    width: int
    detections: list[Found]


class Answer(BaseModel):
    """What /v1/detect says: the photos in the order in which they were sent."""

    model: str
    version: str
    photos: list[Photo]

    model_config = {
        "json_schema_extra": {
            "example": {
                "model": "shelf",
                "version": "1",
                "photos": [
                    {
                        "image": "photo.jpg",
                        "height": 480,
                        "width": 640,
                        "detections": [{"label": "milk", "score": 0.93, "box": [12.5, 40.0, 118.25, 300.0]}],
                    }
                ],
            }
        }
    }


class Error(BaseModel):
    """Why a request got nothing: one line."""

    error: str

    model_config = {"json_schema_extra": {"example": {"error": "photo.jpg: not an image that can be read"}}}


class ModelInfo(BaseModel):
    """A model that is served."""

    name: str
    version: str
    classes: list[str]
    score: float = Field(description="lowest score that is shown, unless a request or the model's thresholds say")
    thresholds: list[float] = Field(description="lowest score of each class that is shown unless a request says")
    size: tuple[int, int] = Field(description="height and width of the canvas")
    device: str

    model_config = {
        "json_schema_extra": {
            "example": {
                "name": "shelf",
                "version": "1",
                "classes": ["milk", "tea"],
                "score": 0.4,
                "thresholds": [0.4, 0.35],
                "size": [300, 300],
                "device": "cpu",
            }
        }
    }


BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "image/jpeg": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"photo": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
        "description": "One photo as it is, whatever its Content-Type says; or one and more as multipart/form-data.",
    }
}
DETECT: Responses = {
    200: {
        "model": Answer,
        "description": "Detections; with several photos, pictures and XML come as a ZIP.",
        "content": {"image/jpeg": {}, "application/xml": {}, "application/zip": {}},
    },
    **{
        status: {"model": Error, "description": text}
        for status, text in {
            401: "No token, or another.",
            404: "No such model.",
            408: "The request took too long to arrive.",
            413: "More bytes or photos than allowed.",
            422: "Not a photo, damaged, too many pixels; or a parameter that is none.",
            429: "The queue is full: try again after Retry-After seconds.",
            503: "No answer in time, or shutting down: try again after Retry-After seconds.",
        }.items()
    },
}


def example(told: object, kind: str = "application/json") -> Responses:
    """A route whose answer looks like this."""
    return {200: {"content": {kind: {"example": told}}}}


READY: Responses = {
    **example({"ready": True}),
    503: {"description": "Starting or shutting down.", "content": {"application/json": {"example": {"ready": False}}}},
}
METRICS = example('detkit_requests_total{protocol="http",route="/v1/detect",status="200"} 7.0\n', "text/plain")
SERVER = example({"name": "detkit", "version": "0.1.0", "extensions": ["binary_tensor_data", "model_repository"]})
INDEX = example([{"name": "shelf", "version": "1", "state": "READY", "reason": ""}])
MODEL_READY = example({"name": "shelf", "ready": True})
METADATA = example({
    "name": "shelf",
    "versions": ["1"],
    "platform": "onnxruntime_onnx",
    "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 3, 300, 300]}],
    "outputs": [
        {"name": "boxes", "datatype": "FP32", "shape": [-1, -1, 4]},
        {"name": "scores", "datatype": "FP32", "shape": [-1, -1]},
        {"name": "labels", "datatype": "INT64", "shape": [-1, -1]},
    ],
})  # fmt: skip
_BYTES = {"schema": {"type": "string", "format": "binary"}}
INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "example": {
                    "id": "7",
                    "inputs": [
                        {"name": "images", "datatype": "UINT8", "shape": [1, 3, 1, 2], "data": [255, 0, 17, 4, 99, 8]}
                    ],
                    "outputs": [{"name": "scores"}],
                }
            },
            "application/octet-stream": _BYTES,
        },
        "description": "The Open Inference Protocol: JSON; or JSON whose input has the parameter `binary_data_size`, "
        "followed by so many bytes, its length in the header Inference-Header-Content-Length. Of a model on a canvas "
        "the shape is [images, 3, height, width], as its metadata say.",
    }
}
INFER: Responses = {
    200: {
        "description": "The tensors; those that were asked for with `binary_data` follow the JSON.",
        "content": {
            "application/json": {
                "example": {
                    "model_name": "shelf",
                    "model_version": "1",
                    "id": "7",
                    "outputs": [{"name": "scores", "datatype": "FP32", "shape": [1, 2], "data": [0.93, 0.0]}],
                }
            },
            "application/octet-stream": _BYTES,
        },
    }
}

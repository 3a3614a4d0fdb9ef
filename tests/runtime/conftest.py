"""Tiny ONNX models that a test can foretell, made without torch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from detkit.manifest import KEY, Manifest
from tests.test_manifest import manifest

# On a canvas of 64 x 96: padding first, the best one last; the third lies below row 48.
BOXES = np.array([[0, 0, 0, 0], [0, 0, 48, 24], [0, 50, 96, 64], [48, 12, 96, 48]], np.float32)
SCORES = np.array([0, 0.5, 0.6, 0.9], np.float32)
LABELS = np.array([0, 1, 0, 2], np.int64)

Make = Callable[..., Path]


def onnx_model(found: Manifest | None, size: tuple[int, int] = (64, 96)) -> onnx.ModelProto:
    """A detector that says BOXES and LABELS of every image, and SCORES times the red of its top left pixel / 255."""
    height, width = size
    constants = {
        "box": BOXES[None], "score": SCORES[None], "label": LABELS[None], "byte": np.float32(255),
        "from": np.zeros(4, np.int64), "to": np.array([2**31, 1, 1, 1]), "flat": np.array([-1, 1]),
        "flat3": np.array([-1, 1, 1]), "one": np.int64(1), "onef": np.float32(1), "zero": np.float32(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("Slice", ["images", "from", "to"], ["corner"]),
        helper.make_node("Cast", ["corner"], ["red"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["red", "byte"], ["share"]),
        helper.make_node("Reshape", ["share", "flat"], ["share2"]),
        helper.make_node("Mul", ["share2", "score"], ["scores"]),
        helper.make_node("Mul", ["share2", "zero"], ["nought"]),
        helper.make_node("Add", ["nought", "onef"], ["ones"]),
        helper.make_node("Reshape", ["ones", "flat3"], ["ones3"]),
        helper.make_node("Mul", ["ones3", "box"], ["boxes"]),
        helper.make_node("Cast", ["ones"], ["ones_int"], to=TensorProto.INT64),
        helper.make_node("Mul", ["ones_int", "label"], ["labels"]),
    ]
    K = len(SCORES)
    graph = helper.make_graph(
        nodes,
        "fixed",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, height, width])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", K, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", K]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", K]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if found is not None:
        helper.set_model_props(model, {KEY: found.to_json()})
    return model


def image_model(found: Manifest | None) -> onnx.ModelProto:
    """A detector that takes one photo, uint8 [h, w, 3]: it says a box over its left half, with the red of its top left
    pixel / 255 as the score, and an empty box."""
    constants = {
        "byte": np.float32(255), "from": np.zeros(3, np.int64), "to": np.ones(3, np.int64), "flat": np.array([-1]),
        "one": np.array([0, 1], np.float32), "share": np.array([[0, 0, 0, 0], [0, 0, 0.5, 1]], np.float32),
        "names": np.array([1, 2]), "swap": np.array([1, 0, 1, 0]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Slice", ["image", "from", "to"], ["corner"]),
        helper.make_node("Cast", ["corner"], ["red"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["red", "byte"], ["score1"]),
        helper.make_node("Reshape", ["score1", "flat"], ["score"]),
        helper.make_node("Mul", ["score", "one"], ["scores"]),
        helper.make_node("Shape", ["image"], ["hwc"]),
        helper.make_node("Gather", ["hwc", "swap"], ["whwh"]),
        helper.make_node("Cast", ["whwh"], ["whwhf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["share", "whwhf"], ["boxes"]),
        helper.make_node("Identity", ["names"], ["labels"]),
    ]
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["height", "width", 3])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [2, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, [2]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if found is not None:
        helper.set_model_props(model, {KEY: found.to_json()})
    return model


@pytest.fixture
def make_model(tmp_path: Path) -> Make:
    """Write such a model, with a manifest that has the given changes, and return its path."""

    def make(name: str = "model.onnx", **changes: object) -> Path:
        path = tmp_path / name
        onnx.save(onnx_model(manifest(**changes)), path)
        return path

    return make

"""fp16 and int8: what becomes of the network, what stays fp32, and when they are refused."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from rich.console import Console

from detkit import checkpoint, config, export, gate, quantize
from detkit.errors import UserError
from detkit.export import Plan
from detkit.manifest import read
from detkit.nn.detector import Detector, Predictor
from detkit.quantize import Fit, Half, Int8, fit
from detkit.runtime.session import INPUT, Session
from detkit.runtime.verify import scene
from tests.test_export import data_set
from tests.test_manifest import manifest

SIZE = (64, 64)
CLASSES = ("tea", "rice", "soap")
SMALL = {
    "ssd_mobilenet": ["model.backbone.width=0.35", "model.neck.channels=16"],
    "faster_rcnn_mobilenet": ["model.backbone.width=0.35", "model.neck.channels=16", "model.head.width=32"],
    "yolo_nano": ["model.backbone.width=0.25", "model.neck.channels=16", "model.head.channels=16"],
}


def detector(name: str) -> tuple[config.Config, Detector]:
    """With random weights, and BatchNorm that fits made-up photos."""
    torch.manual_seed(0)
    settings = config.load(name, [*SMALL[name], "model.weights=none", "input.size=[64, 64]"])
    model = Detector(settings.model, settings.input, len(CLASSES)).train()
    batch = torch.from_numpy(np.stack(canvases(4)))
    with torch.no_grad():
        for _ in range(5):
            model(batch, None)
    return settings, model


def canvases(count: int) -> list[NDArray[np.uint8]]:
    return [scene(i, SIZE).transpose(2, 0, 1) for i in range(count)]


@pytest.fixture(
    scope="module",
    params=["yolo_nano", *(pytest.param(name, marks=pytest.mark.slow) for name in SMALL if name != "yolo_nano")],
)
def network(request: pytest.FixtureRequest) -> onnx.ModelProto:
    settings, model = detector(request.param)
    predictor = Predictor(model, settings.model.select)
    return export.graph(predictor, {INPUT: torch.zeros(2, 3, *SIZE, dtype=torch.uint8)})


def run(model: onnx.ModelProto, batch: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    outputs: list[NDArray[np.float32]] = gate.session(model.SerializeToString()).run(None, {INPUT: batch})
    return outputs


def weights(model: onnx.ModelProto) -> Counter[int]:
    """How many numbers the model has of each kind."""
    found: Counter[int] = Counter()
    for tensor in model.graph.initializer:
        found[tensor.data_type] += int(np.prod(tensor.dims))
    return found


def test_fp16_keeps_decoding_and_ends(network: onnx.ModelProto) -> None:
    half = Half(network).reduced()
    onnx.checker.check_model(half, full_check=True)
    kinds = {node.name: node.op_type for node in network.graph.node}
    assert [put.type for put in half.graph.input] == [put.type for put in network.graph.input]
    assert [put.type for put in half.graph.output] == [put.type for put in network.graph.output]
    assert weights(half)[TensorProto.FLOAT16] > 20 * weights(half)[TensorProto.FLOAT]
    halves = {t.name for t in half.graph.initializer if t.data_type == TensorProto.FLOAT16}
    inferred = onnx.shape_inference.infer_shapes(half).graph
    halves |= {info.name for info in inferred.value_info if info.type.tensor_type.elem_type == TensorProto.FLOAT16}
    float_only = {"NonMaxSuppression", "RoiAlign", "TopK", "Exp", "Softmax", "GatherElements", "ScatterND"}
    for node in half.graph.node:
        if node.op_type in float_only:
            assert not halves & set(node.input), node.name
    normalised = next(node for node in network.graph.node if node.input[0] == "sub").output[0]
    assert normalised not in halves
    assert f"{normalised}/half" in halves
    assert kinds.keys() <= {node.name for node in half.graph.node}
    for ours, theirs in zip(run(half, np.stack(canvases(3))), run(network, np.stack(canvases(3))), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype


def test_what_fp16_can_not_hold_is_seen_on_a_cpu_too() -> None:
    """ONNX Runtime's CPU takes nodes in fp16 in fp32, and so gives what no GPU gives."""
    large = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 18]>
        large (uint8[batch, 3, 8, 8] images) => (float[batch, 1, 8, 8] y) {
            pixels = Cast<to=1>(images)
            x = Conv(pixels, first)
            z = Relu(x)
            end = Conv(z, second)
            y = Identity(end)
        }""")
    for number, (node, gain) in enumerate(zip(large.graph.node, (0, 1e4, 0, 1e-4, 0), strict=True)):
        node.name = f"{number}"
        if gain:
            node.input[1] = f"detector.{number}.weight"
            weight = np.full((1, 3 if number == 1 else 1, 1, 1), gain, np.float32)
            large.graph.initializer.append(onnx.numpy_helper.from_array(weight, node.input[1]))
    numbers, batch = Half(large), np.full((1, 3, 8, 8), 200, np.uint8)
    (wanted,) = run(large, batch)
    assert wanted == pytest.approx(600, rel=1e-3)
    for spare, right in [((), False), (("1",), False), (("1", "3"), True)]:
        (stand_in,) = numbers.stand_ins(spare)
        (found,) = run(stand_in, batch)
        assert (found == pytest.approx(wanted, rel=1e-2)) == right, spare
    black = np.full((1, 3, 8, 8), 1, np.uint8)  # which fp16 can hold
    for model in (numbers.reduced(), *numbers.stand_ins()):
        assert run(model, black)[0] == pytest.approx(run(large, black)[0], rel=2e-3)


def test_int8_is_u8s8_a_channel_and_leaves_the_heads_outputs(network: onnx.ModelProto) -> None:
    numbers = Int8(network, canvases(3))
    whole = numbers.reduced()
    onnx.checker.check_model(whole)
    tensors = {tensor.name: tensor for tensor in whole.graph.initializer}
    kinds = Counter(tensors[node.input[2]].data_type for node in whole.graph.node if node.op_type == "QuantizeLinear")
    assert set(kinds) == {TensorProto.UINT8}
    layers = [name for names in numbers.groups.values() for name in names]
    for name in layers:
        node = next(node for node in whole.graph.node if node.name == name)
        scale = next(n for n in whole.graph.node if n.output[0] == node.input[1])
        assert scale.op_type == "DequantizeLinear"
        weight = tensors[scale.input[0]]
        assert weight.data_type == TensorProto.INT8
        assert np.prod(tensors[scale.input[1]].dims) > 1
    last = [node for node in whole.graph.node if node.op_type in ("Conv", "Gemm") and node.name not in layers]
    assert last
    assert all(".head." in f".{node.input[1]}" for node in last)
    assert weights(whole)[TensorProto.INT8] > 3 * weights(whole)[TensorProto.FLOAT]


def test_groups_can_be_left_in_fp32(network: onnx.ModelProto) -> None:
    numbers = Int8(network, canvases(2))
    some, *others = numbers.groups
    count = weights(numbers.reduced())[TensorProto.INT8]
    assert 0 < weights(numbers.reduced([some]))[TensorProto.INT8] < count
    assert weights(numbers.reduced([some, *others]))[TensorProto.INT8] == 0
    batch = np.stack(canvases(2))
    _, ours, _ = run(numbers.reduced([some, *others]), batch)
    _, theirs, _ = run(network, batch)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    halves = Half(network)
    assert weights(halves.reduced([*halves.groups]))[TensorProto.FLOAT16] < 2000


class Numbers:
    """Stands for a network whose group b costs much, c a little and a nothing."""

    def __init__(self) -> None:
        self.groups = list("abcd")

    def reduced(self, spare: tuple[str, ...] = ()) -> tuple[str, ...]:
        return tuple(sorted(set(self.groups) - set(spare)))

    def stand_ins(self, spare: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
        return []


COSTS = {"a": 0.0, "b": 0.1, "c": 0.02, "d": 0.01}


def fitted(least: float, monkeypatch: pytest.MonkeyPatch) -> Fit:
    order = tuple(sorted(COSTS.items(), key=lambda pair: -pair[1]))
    monkeypatch.setattr(quantize, "_blame", lambda *_: order)
    return fit(Numbers(), least, lambda left: 0.5 - sum(COSTS[name] for name in left), [], manifest())  # type: ignore


@pytest.mark.parametrize(
    ("least", "spare", "value"),
    [(0.37, (), 0.37), (0.46, ("b",), 0.47), (0.48, ("b", "c"), 0.49), (0.495, ("b", "c"), 0.49)],
)
def test_the_worst_groups_are_left_out_until_it_is_good_enough(
    least: float, spare: tuple[str, ...], value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fitted(least, monkeypatch)
    assert found.spare == spare
    assert found.value == pytest.approx(value)
    assert [name for name, _ in found.blame] == ([] if not spare else ["b", "c", "d", "a"])


def test_the_group_that_spoils_is_to_blame() -> None:
    """One part that is given a range far too small."""
    settings, model = detector("yolo_nano")
    predictor = Predictor(model, settings.model.select)
    network = export.graph(predictor, {INPUT: torch.zeros(2, 3, *SIZE, dtype=torch.uint8)})
    numbers = Int8(network, canvases(3))
    guilty = next(iter(numbers.groups))
    names = {name for group in [guilty] for name in numbers.groups[group]}
    for node in network.graph.node:
        if node.name in names:
            low, high = numbers._ranges[node.input[0]]
            numbers._ranges[node.input[0]] = (low * np.float32(0.02), high * np.float32(0.02))
    said = manifest(size=SIZE, nms=settings.model.select, resize="stretch", score=0.02)
    photos = [gate.photo(scene(i, SIZE), said) for i in range(4)]
    blame = quantize._blame(numbers, photos, said, None)
    assert {name for name, _ in blame} == set(numbers.groups)
    assert [change for _, change in blame] == sorted((change for _, change in blame), reverse=True)
    assert blame[0][0] == guilty
    assert blame[0][1] > 0.1


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("yolo")
    data = data_set(folder / "data", [(64, 64)] * 6)
    settings, model = detector("yolo_nano")
    settings = config.parse({**settings.model_dump(mode="json"), "data": {"root": str(data)}}, "x")
    file = folder / "runs" / "x-1" / "best.safetensors"
    checkpoint.write(file, model.state_dict(), settings, CLASSES, 1, {"mAP": 0.5, "score": 0.02})
    return file


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_accepted_within_the_budget(precision: str, run_folder: Path, tmp_path: Path) -> None:
    said = io.StringIO()
    plan = Plan(("canvas", "image"), precision, max_ap_drop=1.0)  # type: ignore[arg-type]
    files = export.run(str(run_folder), tmp_path / "m.onnx", None, Console(file=said, width=500), plan)
    assert [path.name for path in files] == ["m.onnx", "m-image.onnx"]
    assert "mAP" in said.getvalue()
    assert "shows little: check it on photos" in said.getvalue()  # with random weights
    report = json.loads((tmp_path / "m.report.json").read_text())
    tried = {check["file"] for check in report["checks"]}
    assert tried == report["mAP"].keys() - {"torch"} == {"m.onnx in fp32", "m-image.onnx in fp32"}
    assert report["files"].keys() == {"m.onnx", "m-image.onnx"}
    report = report["precision"]
    assert report["precision"] == precision
    assert report["bytes"][1] < report["bytes"][0] * (0.6 if precision == "fp16" else 0.7)
    photo = scene(0, SIZE)
    canvas, image = (Session(path, "cpu") for path in files)
    (ours,), (theirs,) = canvas.detect([photo]), image.detect([photo])
    assert ours.scores.tolist() == theirs.scores.tolist()
    assert read(files[0].read_bytes(), "").precision == precision


def test_refused_beyond_the_budget_with_the_parts_to_blame(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "measure", lambda *_: -1.0)
    with pytest.raises(
        UserError, match=r"m\.onnx: not written: int8 lowers mAP from .* to blame.* backbone\."
    ) as error:
        export.run(str(run_folder), tmp_path / "m.onnx", None, Console(file=io.StringIO()), Plan(precision="int8"))
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m.refused.json"]
    report = json.loads((tmp_path / "m.refused.json").read_text())
    assert report["refused"] in str(error.value)
    assert report["precision"]["mAP"][1] == -1
    assert report["precision"]["changes"]

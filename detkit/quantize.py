"""A smaller, faster network in the same ONNX file: fp16, and int8 calibrated on photos. Decoding and NMS stay fp32."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from detkit import metrics
from detkit.gate import Photo, Progress, Subject, session
from detkit.manifest import Manifest
from detkit.runtime.session import INPUT
from detkit.types import Detections, Record

# What multiplies by weights, and what may lie between two of those in int8.
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BETWEEN = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Mul", "Relu", "Sigmoid")
# Which inputs carry features, of operators where not all do: the others are places, sizes and limits.
_CARRIES = defaultdict(
    lambda: slice(None),
    dict.fromkeys(("Clip", "Expand", "Gather", "Pad", "Reshape", "Resize", "RoiAlign", "MaxRoiPool", "Slice"), slice(1))
    | dict.fromkeys(("Split", "Squeeze", "Tile", "Unsqueeze", "ReduceMean"), slice(1))
    | {"Shape": slice(0), "Where": slice(1, 3)},
)
# Of the values that a tensor has in the photos, so many are within its range; the rest are clipped.
_SHARE = 0.9999


def _layers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that multiply by weights."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [node for node in model.graph.node if node.op_type in _LAYERS and node.input[1] in weights]


def _features(model: onnx.ModelProto) -> set[str]:
    """The names of the nodes from which features flow into a layer: the network without decoding, selection and the
    places at which a second stage looks."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found = {node.name: node for node in _layers(model)}
    open_ends = list(found.values())
    while open_ends:
        node = open_ends.pop()
        for name in list(node.input)[_CARRIES[node.op_type]]:
            maker = makers.get(name)
            if maker is not None and maker.name not in found:
                found[maker.name] = maker
                open_ends.append(maker)
    return set(found)


class _Reduced:
    """A canvas file's model whose layers can be had in coarser numbers, by `groups`: the parts of the detector (its
    stages, necks and branches), each with the names of its layers' nodes."""

    def __init__(self, model: onnx.ModelProto, layers: Collection[str]) -> None:
        self.model = model
        self.groups: dict[str, list[str]] = defaultdict(list)
        for node in _layers(model):
            if node.name in layers:
                parts = node.input[1].removeprefix("detector.").split(".")[:-1]
                self.groups[".".join(parts[:3])].append(node.name)

    def _left(self, spare: Collection[str]) -> set[str]:
        return {name for group in spare for name in self.groups[group]}

    def reduced(self, spare: Collection[str] = ()) -> onnx.ModelProto:
        """A copy in coarser numbers, but for the layers of the groups `spare`."""
        raise NotImplementedError

    def stand_ins(self, spare: Collection[str] = ()) -> list[onnx.ModelProto]:
        """What has to be as good, where this processor doesn't compute `reduced(spare)` as those do that it is for."""
        del spare
        return []


class Half(_Reduced):
    """A model that can be had in fp16: its network, not its input, normalising, decoding, selection and outputs.

    RoiAlign stays fp32, for it takes the boxes in the numbers of the features.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model, {node.name for node in _layers(model)})

    def reduced(self, spare: Collection[str] = ()) -> onnx.ModelProto:
        """See _Reduced."""
        return _half(self.model, self._chosen(spare))

    def stand_ins(self, spare: Collection[str] = ()) -> list[onnx.ModelProto]:
        """The network in fp32 with each tensor rounded to fp16. A CPU takes nodes in fp16 in fp32 and rounds nothing
        between two of them: what overflows on a GPU would look right."""
        return [_half(self.model, self._chosen(spare), rounding=True)]

    def _chosen(self, spare: Collection[str]) -> set[str]:
        """Layers, and what lies between them where all that it takes is fp16: so normalising is not, and what follows
        a layer that is left in fp32 can't overflow either."""
        features, layers = _features(self.model), {node.name for node in _layers(self.model)} - self._left(spare)
        weights = {tensor.name for tensor in self.model.graph.initializer}
        chosen, made = set[str](), set[str]()
        for node in self.model.graph.node:  # in the order in which they compute
            takes = {*list(node.input)[_CARRIES[node.op_type]]} - weights
            between = node.name in features and node.op_type not in (*_LAYERS, "Cast", "RoiAlign", "MaxRoiPool")
            if node.name in layers or (between and takes and takes <= made):
                chosen.add(node.name)
                made.update(node.output)
        return chosen


def _half(model: onnx.ModelProto, chosen: Collection[str], *, rounding: bool = False) -> onnx.ModelProto:
    """A copy of the model whose nodes of those names compute in fp16; rounding: in fp32, on what fp16 can hold."""
    model = copy.deepcopy(model)
    graph = model.graph
    floats = _floats(model)
    inside = {name for node in graph.node if node.name in chosen for name in node.output if name in floats}
    casts = _Casts(graph)
    for node in graph.node:
        # Resize has sizes and scales of their own kind behind the features.
        places = range(1 if node.op_type == "Resize" else len(node.input))
        for at in (at for at in places if node.input[at] in floats):
            here, there = node.name in chosen, node.input[at] in inside
            if rounding and (here or there):
                node.input[at] = casts.of(casts.of(node.input[at], TensorProto.FLOAT16), TensorProto.FLOAT)
            elif here != there:
                node.input[at] = casts.of(node.input[at], TensorProto.FLOAT16 if here else TensorProto.FLOAT)
        casts.nodes.append(node)
    used = {name for node in casts.nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, content in ((graph.node, casts.nodes), (graph.initializer, kept), (graph.value_info, [])):
        del field[:]
        field.extend(content)
    return model


class _Casts:
    """`nodes`, in the order in which they compute, and among them those that make other numbers of tensors, each once.
    Weights are turned here."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self._graph = graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._made: dict[tuple[str, int], str] = {}

    def of(self, name: str, kind: int) -> str:
        """The name of the tensor as that kind of number, fp16 or fp32."""
        if (name, kind) not in self._made:
            self._made[name, kind] = new = f"{name}/{'half' if kind == TensorProto.FLOAT16 else 'float'}"
            if name in self._weights:
                self._graph.initializer.append(numpy_helper.from_array(_to_half(self._weights[name]), new))
            else:
                self.nodes.append(helper.make_node("Cast", [name], [new], f"{new}/cast", to=kind))
        return self._made[name, kind]


def _to_half(tensor: onnx.TensorProto) -> NDArray[np.float16]:
    values = numpy_helper.to_array(tensor)
    largest = float(np.finfo(np.float16).max)
    return values.clip(-largest, largest).astype(np.float16)


def _floats(model: onnx.ModelProto) -> set[str]:
    """The names of all tensors that are fp32."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    said = {info.name for info in (*graph.value_info, *graph.input, *graph.output) if _kind(info) == TensorProto.FLOAT}
    return said | {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}


def _kind(info: onnx.ValueInfoProto) -> int:
    return int(info.type.tensor_type.elem_type)


class Int8(_Reduced):
    """A model that can be had in int8: QDQ, activations uint8, weights int8 a channel (U8S8), the layers that give the
    head's own outputs left in fp32.

    model: a canvas file's. canvases: uint8 [3, H, W] each, photos like those that it is to see, which set the ranges.
    """

    def __init__(self, model: onnx.ModelProto, canvases: Iterable[NDArray[np.uint8]]) -> None:
        features = _features(model)
        readers = defaultdict(list)
        for node in model.graph.node:
            for name in node.input if node.op_type != "Shape" else ():  # which looks at no features
                readers[name].append(node.name)
        self._nodes = [
            node for node in model.graph.node if node.name in features and node.op_type in _LAYERS + _BETWEEN
        ]
        layers = {node.name for node in _layers(model)}
        last = {
            node.name
            for node in self._nodes
            if node.name in layers and any(reader not in features for name in node.output for reader in readers[name])
        }
        self._nodes = [node for node in self._nodes if node.name not in last]
        super().__init__(model, layers - last)
        self._ranges = self._calibrated(canvases)

    def _calibrated(self, canvases: Iterable[NDArray[np.uint8]]) -> dict[str, tuple[Any, Any]]:
        """The range of each tensor that becomes int8: the mean over the photos of what holds `_SHARE` of its values."""
        floats = _floats(self.model) - {tensor.name for tensor in self.model.graph.initializer}
        names = sorted({n for node in self._nodes for n in (*node.input, *node.output) if n in floats})
        probe = copy.deepcopy(self.model)
        del probe.graph.output[:]
        probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
        run = session(probe.SerializeToString(), ort.GraphOptimizationLevel.ORT_DISABLE_ALL)
        ends: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for canvas in canvases:
            for name, values in zip(names, run.run(names, {INPUT: canvas[None]}), strict=True):
                flat = values.ravel()
                if not flat.size:  # of a pyramid's level no region may be taken
                    continue
                beyond = int(flat.size * (1 - _SHARE))
                flat = np.partition(flat, (beyond, flat.size - 1 - beyond))
                ends[name].append((float(flat[beyond]), float(flat[flat.size - 1 - beyond])))
        ranges = {}
        for name, pairs in ends.items():
            low, high = np.mean(pairs or [(0.0, 0.0)], axis=0)
            ranges[name] = (np.float32(min(low, 0)), np.float32(max(high, 0)))
        return ranges

    def reduced(self, spare: Collection[str] = ()) -> onnx.ModelProto:
        """See _Reduced."""
        left, made, chosen = self._left(spare), set[str](), list[onnx.NodeProto]()
        for node in self._nodes:  # in the order in which they compute
            # What lies between two layers is int8 where all that it takes is.
            takes = set(node.input) & self._ranges.keys()
            if (node.op_type in _LAYERS and node.name not in left) or (node.op_type in _BETWEEN and takes <= made):
                chosen.append(node)
                made.update(node.output)
        with _silent():
            quantizer = QDQQuantizer(
                copy.deepcopy(self.model),
                per_channel=True,
                reduce_range=False,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QUInt8,
                tensors_range=TensorsData(CalibrationMethod.MinMax, self._ranges),
                nodes_to_quantize=[node.name for node in chosen],
                nodes_to_exclude=[],
                op_types_to_quantize=sorted({node.op_type for node in chosen}),
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        model: onnx.ModelProto = quantizer.model.model
        model.producer_name, model.producer_version = self.model.producer_name, self.model.producer_version
        return model


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


class Fit(NamedTuple):
    """What became of a model in coarser numbers: the model and its mean AP; the groups left in fp32; and how much each
    group alone changes, worst first (none where nothing had to be left): 0 nothing, 1 all that was found."""

    model: onnx.ModelProto
    value: float
    spare: tuple[str, ...] = ()
    blame: tuple[tuple[str, float], ...] = ()


def fit(
    numbers: Half | Int8,
    least: float,
    measure: Callable[[onnx.ModelProto], float],
    photos: Sequence[Photo],
    manifest: Manifest,
    progress: Progress | None = None,
) -> Fit:
    """The model in coarser numbers with a mean AP of `least` or more, as `measure` has it: wholly, or with the groups
    that change most left in fp32, up to half of them; where that isn't enough, the nearest to it.

    photos: on which the groups are compared, each by itself. progress: of that.
    """

    def tried(spare: tuple[str, ...], blame: tuple[tuple[str, float], ...] = ()) -> Fit:
        model = numbers.reduced(spare)
        return Fit(model, min(map(measure, [model, *numbers.stand_ins(spare)])), spare, blame)

    best = tried(())
    if best.value >= least:
        return best
    blame = _blame(numbers, photos, manifest, progress)
    count = 1
    while count <= len(blame) // 2:
        one = tried(tuple(name for name, _ in blame[:count]), blame)
        if one.value >= least:
            return one
        best = max(best, one, key=lambda fit: fit.value)
        count *= 2
    return best._replace(blame=blame)


def _blame(
    numbers: Half | Int8, photos: Sequence[Photo], manifest: Manifest, progress: Progress | None
) -> tuple[tuple[str, float], ...]:
    """How much each group alone changes what is found, worst first: 1 less the mean AP of its detections, those of the
    fp32 model being the truth."""
    names = tuple(f"{i}" for i in range(len(manifest.classes)))
    exact = _found(numbers.model, photos, manifest)
    sure = max((float(found.scores.max(initial=0)) for found in exact), default=0.0)
    floor = min(manifest.score, sure / 2)
    truth = [_as_truth(found.above(floor)) for found in exact]
    changes = []
    for done, group in enumerate(numbers.groups, 1):
        others = [name for name in numbers.groups if name != group]
        *_, model = numbers.reduced(others), *numbers.stand_ins(others)
        found = _found(model, photos, manifest)
        changes.append((group, 1 - float(metrics.coco_ap(truth, found, names)["mAP"])))
        if progress:
            progress(done, len(numbers.groups))
    return tuple(sorted(changes, key=lambda pair: -pair[1]))


def _found(model: onnx.ModelProto, photos: Sequence[Photo], manifest: Manifest) -> list[Detections]:
    subject = Subject(model.SerializeToString(), manifest)
    return [subject.detections(outputs, photo.plan) for photo in photos for outputs in subject.run([photo])]


def _as_truth(found: Detections) -> Record:
    return Record("", found.hw, found.boxes.astype(np.float64), found.labels, np.zeros(len(found), np.uint8))

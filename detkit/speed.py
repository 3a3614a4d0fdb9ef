"""How large and how fast a detector is, measured on the spot."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from detkit import checkpoint
from detkit.runtime.predict import Detector
from detkit.runtime.session import Session

if TYPE_CHECKING:
    import onnx

    from detkit.nn.detector import Predictor

BATCH = 8  # photos, of the throughput
_SECONDS, _LEAST = 1.0, 5  # of each measurement, and how often at least


@dataclass(frozen=True, slots=True)
class Speed:
    """provider: what computes. parameters: in all. flops: of the network for one photo, a multiplication and an
    addition being two; None where it can't be counted. latency, latency95: seconds from one decoded photo to its boxes,
    median and 95 %. throughput: photos a second in batches of `BATCH`."""

    provider: str
    parameters: int
    flops: int | None
    latency: float
    latency95: float
    throughput: float

    def tree(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def measure(detector: Detector, photos: Sequence[NDArray[np.uint8]]) -> Speed:
    """Run a detector on photos, uint8 [h, w, 3] each, at least one, as `detkit predict` does, decoding left out."""
    several = [photos[i % len(photos)] for i in range(BATCH)]
    alone = _times(detector, several[:1])
    parameters, flops = _size(detector)
    return Speed(
        provider=_provider(detector),
        parameters=parameters,
        flops=flops,
        latency=statistics.median(alone),
        latency95=float(np.percentile(alone, 95)),
        throughput=BATCH / statistics.median(_times(detector, several)),
    )


def _times(detector: Detector, batch: list[NDArray[np.uint8]]) -> list[float]:
    """Seconds that each of several runs took, after one that is not counted."""
    detector.detect(batch)
    taken: list[float] = []
    while len(taken) < _LEAST or sum(taken) < _SECONDS:
        start = time.perf_counter()
        detector.detect(batch)
        taken.append(time.perf_counter() - start)
    return taken


def _provider(detector: Detector) -> str:
    if isinstance(detector, Session):
        return f"ONNX Runtime, {detector.device}"
    assert isinstance(detector, checkpoint.TorchSession)
    return f"torch, {detector.device.type}"


def _size(detector: Detector) -> tuple[int, int | None]:
    """Parameters and FLOPs."""
    if isinstance(detector, Session):
        import onnx

        model = onnx.load(detector.path, load_external_data=False)
        return _onnx_parameters(model), onnx_flops(model)
    assert isinstance(detector, checkpoint.TorchSession)
    flops = torch_flops(detector.predictor, detector.manifest.size)
    return sum(each.numel() for each in detector.predictor.parameters()), flops


def torch_flops(predictor: Predictor, size: tuple[int, int]) -> int:
    """FLOPs of a predictor for one photo on a canvas of height and width `size`: torch's count."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    image = torch.zeros(1, 3, *size, dtype=torch.uint8, device=next(predictor.parameters()).device)
    with torch.inference_mode(), counter:
        predictor(image)
    return int(counter.get_total_flops())


def _onnx_parameters(model: onnx.ModelProto) -> int:
    import onnx

    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return sum(math.prod(each.dims) for each in model.graph.initializer if each.data_type in floats)


def onnx_flops(model: onnx.ModelProto) -> int | None:
    """FLOPs of an exported network for one photo, counted as torch counts them: convolutions and matrix products, two
    for a multiplication with addition. None where the shapes are not known. `model` is changed: its batch is 1."""
    import onnx

    graph = model.graph
    for each in (*graph.input, *graph.value_info):
        for dim in each.type.tensor_type.shape.dim:
            # 'batch' is 1, and '500*batch' 500.
            factors = dim.dim_param.split("*")
            if "batch" in factors and all(factor == "batch" or factor.isdecimal() for factor in factors):
                dim.dim_value = math.prod(int(factor) for factor in factors if factor != "batch")
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {each.name: tuple(each.dims) for each in graph.initializer}
    shapes |= {
        each.name: tuple(dim.dim_value for dim in each.type.tensor_type.shape.dim)  # 0 where unknown
        for each in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    flops = []
    for node in products:
        output, first, weight = (shapes.get(name, (0,)) for name in (node.output[0], *node.input[:2]))
        # What each number of the output is a sum of: a kernel over the channels of a group, or a row.
        terms = math.prod(weight[1:]) if node.op_type == "Conv" else first[-1]
        flops.append(2 * math.prod(output) * terms)
    return sum(flops) if all(flops) else None

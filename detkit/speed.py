"""How large and how fast a detector is, measured on the spot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit import checkpoint
from detkit.runtime.predict import Detector
from detkit.runtime.session import Session

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
        return _onnx_parameters(detector.path), None
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    assert isinstance(detector, checkpoint.TorchSession)
    counter = FlopCounterMode(display=False)
    image = torch.zeros(1, 3, *detector.manifest.size, dtype=torch.uint8, device=detector.device)
    with torch.inference_mode(), counter:
        detector.predictor(image)
    return sum(each.numel() for each in detector.predictor.parameters()), counter.get_total_flops()


def _onnx_parameters(path: Path) -> int:
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return sum(int(np.prod(each.dims)) for each in graph.initializer if each.data_type in floats)

"""select against torchvision's batched_nms, by hand and by hypothesis; and its ONNX form against itself."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import batched_nms, nms

from detkit import export
from detkit.config import Select
from detkit.nn.contract import Decoded
from detkit.nn.select import select

HW = (200, 320)


def candidates(B: int, A: int, C: int, D: int = 1, seed: int = 0, levels: int = 64) -> Decoded:
    """Boxes on a grid of half pixels, some outside the canvas, and scores of few values: exact sums, many ties."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.randint(-40, 640, (B, A, D, 2), generator=rng) / 2
    size = torch.randint(1, 160, (B, A, D, 2), generator=rng) / 2
    scores = torch.randint(0, levels + 1, (B, A, C), generator=rng) / levels
    return Decoded(torch.cat([corner, corner + size], -1), scores)


def expected(decoded: Decoded, rule: Select, image: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torchvision alone: every pair, sorted stably, then batched_nms."""
    A, C = decoded.scores.shape[1:]
    boxes = decoded.boxes[image].expand(A, C, 4).reshape(-1, 4)
    limit = torch.tensor([HW[1], HW[0], HW[1], HW[0]], dtype=torch.float32)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    scores = decoded.scores[image].flatten()
    labels = torch.arange(C).repeat(A)
    order = scores.sort(descending=True, stable=True).indices[: rule.candidates].sort().values
    area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    order = order[(scores[order] > rule.score) & area[order]]
    if rule.nms == "hard":
        given = boxes[order], scores[order]
        kept = nms(*given, rule.iou) if rule.agnostic else batched_nms(*given, labels[order], rule.iou)
        order = order[kept.sort().values]  # of many boxes, batched_nms gives equal scores in no certain order
    order = order[scores[order].sort(descending=True, stable=True).indices]
    if rule.nms == "hard":
        order = order[: rule.keep]
    return boxes[order], scores[order], labels[order]


def agree(decoded: Decoded, rule: Select) -> None:
    boxes, scores, labels = select(decoded, rule, HW)
    assert (boxes.dtype, scores.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int64)
    A, C = decoded.scores.shape[1:]
    K = min(rule.candidates if rule.nms == "none" else rule.keep, rule.candidates, A * C)
    assert boxes.shape[1:] == (K, 4)
    assert scores.shape == labels.shape == boxes.shape[:2]
    for image in range(len(scores)):
        wanted = expected(decoded, rule, image)
        count = len(wanted[1])
        for ours, theirs in zip((boxes[image], scores[image], labels[image]), wanted, strict=True):
            assert torch.equal(ours[:count], theirs)
            assert not ours[count:].any()


@pytest.mark.parametrize("D", [1, 7])
@pytest.mark.parametrize("B", [1, 3])
def test_same_set_as_batched_nms(B: int, D: int) -> None:
    # Distinct scores, so that the top-k is one set whoever takes it.
    decoded = candidates(B, 300, 7, D)
    scores = torch.randperm(decoded.scores.numel()).view_as(decoded.scores) / decoded.scores.numel()
    decoded = decoded._replace(scores=scores)
    agree(decoded, Select(score=0.3, candidates=5000, keep=50))
    agree(decoded, Select(score=0.3, candidates=100, keep=200))
    agree(decoded, Select(score=0.0, candidates=5000, keep=5000, iou=0.2))


@settings(max_examples=60, deadline=None)
@given(
    B=st.integers(0, 3),
    A=st.integers(1, 40),
    C=st.integers(1, 6),
    specific=st.booleans(),
    seed=st.integers(0, 2**32),
    levels=st.integers(1, 64),
    score=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    iou=st.floats(0.0, 1.0, width=16),
    keep=st.integers(1, 60),
    agnostic=st.booleans(),
    kind=st.sampled_from(["hard", "hard", "none"]),
)
def test_same_set_as_batched_nms_with_ties(
    B: int, A: int, C: int, specific: bool, seed: int, levels: int, score: float, iou: float, keep: int,
    agnostic: bool, kind: str,
) -> None:  # fmt: skip
    rule = Select(nms=kind, score=score, iou=iou, keep=keep, agnostic=agnostic)
    agree(candidates(B, A, C, C if specific else 1, seed, levels), rule)


@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_same_set_as_batched_nms_where_shelves_are_full(seed: int, agnostic: bool) -> None:
    """Hundreds of boxes on few places, few scores: long chains in which one tie decides the next."""
    rng = torch.Generator().manual_seed(seed)
    place, shift, size = (
        torch.randint(low, high, (2, 400, 1, 2), generator=rng) for low, high in ((0, 12), (0, 6), (20, 40))
    )
    scores = torch.randint(0, 9, (2, 400, 3), generator=rng) / 8
    boxes = torch.cat([16 * place + shift, 16 * place + shift + size], -1).float()
    agree(Decoded(boxes, scores), Select(score=0.1, iou=seed % 8 / 8, agnostic=agnostic, candidates=2000, keep=2000))


def test_many_classes_stay_apart() -> None:
    C = 5000
    decoded = Decoded(torch.tensor([[[[10.0, 10.0, 300.0, 190.0]]]]), torch.linspace(0.5, 0.9, C)[None, None])
    boxes, scores, labels = select(decoded, Select(candidates=C, keep=C), HW)
    assert labels[0].sort().values.equal(torch.arange(C))
    assert (scores > 0).all()
    assert boxes.eq(decoded.boxes[0]).all()


def test_nothing_found_is_all_zero() -> None:
    for result in select(candidates(2, 30, 3), Select(score=1.0), HW):
        assert not result.any()


def test_broken_candidates_are_no_detections() -> None:
    boxes = torch.tensor([[float("nan")] * 4, [-50, 0, -10, 20], [5, 5, 5, 30], [1, 2, 3, float("inf")]])
    found, scores, _ = select(Decoded(boxes.view(1, 4, 1, 4), torch.full((1, 4, 1), 0.5)), Select(), HW)
    assert scores.tolist() == [[0.5, 0, 0, 0]]
    assert found[0].tolist() == [[1, 2, 3, 200], *[[0] * 4] * 3]


def test_float32_under_autocast_and_from_half() -> None:
    decoded = candidates(2, 200, 3)
    wanted = select(decoded, Select(), HW)
    with torch.autocast("cpu", torch.bfloat16):
        got = select(decoded, Select(), HW)
    assert all(map(torch.equal, got, wanted))
    half = Decoded(decoded.boxes.half(), decoded.scores.half())
    assert all(map(torch.equal, select(half, Select(), HW), wanted))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_finds_the_same() -> None:
    decoded = candidates(3, 300, 7)
    scores = torch.randperm(decoded.scores.numel()).view_as(decoded.scores) / decoded.scores.numel()
    decoded = decoded._replace(scores=scores)
    got = select(Decoded(decoded.boxes.cuda(), decoded.scores.cuda()), Select(), HW)
    assert all(torch.equal(ours.cpu(), wanted) for ours, wanted in zip(got, select(decoded, Select(), HW), strict=True))


class Selecting(nn.Module):
    def __init__(self, rule: Select) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return select(Decoded(boxes, scores), self.rule, HW)


@pytest.mark.parametrize(("A", "D", "rule"), [
    (300, 1, Select(candidates=700)), (40, 5, Select(score=0.0, keep=1000)), (300, 1, Select(agnostic=True)),
    (40, 5, Select(nms="none", candidates=150)),
])  # fmt: skip
def test_onnx_gives_the_same_at_any_batch_size(A: int, D: int, rule: Select) -> None:
    module, example = Selecting(rule).eval(), candidates(2, A, 5, D)
    model = export.graph(module, {"at": example.boxes, "sure": example.scores})
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for B in (1, 3, 8):
        # Distinct scores, or few above zero: which of equal ones a top-k takes at its end isn't laid down.
        some = candidates(B, A, 5, D, seed=B)
        distinct = torch.stack([torch.randperm(A * 5) for _ in range(B)]).view_as(some.scores) / (A * 5)
        for scores in (distinct, some.scores * (some.scores > 0.9), torch.zeros_like(distinct)):
            wanted = module(some.boxes, scores)
            got = session.run(None, {"at": some.boxes.numpy(), "sure": scores.numpy()})
            for ours, theirs in zip(got, wanted, strict=True):
                assert ours.dtype == theirs.numpy().dtype
                np.testing.assert_array_equal(ours, theirs.numpy())


def test_the_op_is_well_formed() -> None:
    boxes, scores = candidates(2, 20, 1)
    torch.library.opcheck(torch.ops.detkit.suppress.default, (boxes[:, :, 0], scores[..., 0], 0.5, 0.1, 5))

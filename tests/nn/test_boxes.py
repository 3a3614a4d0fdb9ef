"""Box arithmetic against torchvision's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_area, box_iou, generalized_box_iou

from detkit.nn import boxes

VARIANCES = (0.1, 0.2)
CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


def random(count: int, seed: int = 0, low: float = 0.5) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=rng) * 200 - 20
    return torch.cat([corner, corner + low + torch.rand(count, 2, generator=rng) * 120], 1)


# Apart, touching, inside one another, the same, one pixel.
SPECIAL = torch.tensor(
    [[0, 0, 10, 10], [10, 0, 20, 10], [500, 500, 600, 600], [2, 2, 4, 9], [0, 0, 10, 10], [3, 3, 4, 4]]
).float()


@pytest.mark.parametrize(("a", "b"), [(random(40), random(60, 1)), (SPECIAL, SPECIAL)])
def test_iou_and_giou_are_torchvisions(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(boxes.area(a), box_area(a))
    torch.testing.assert_close(boxes.iou(a[:, None], b[None]), box_iou(a, b))
    torch.testing.assert_close(boxes.giou(a[:, None], b[None]), generalized_box_iou(a, b))


def test_pairs_are_the_diagonal() -> None:
    a, b = random(30), random(30, 1)
    torch.testing.assert_close(boxes.iou(a, b), box_iou(a, b).diagonal())
    torch.testing.assert_close(boxes.giou(a, b), generalized_box_iou(a, b).diagonal())


def test_empty_boxes_give_numbers() -> None:
    empty, full = torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 5.0, 5.0]])
    assert boxes.iou(empty, empty).item() == 0
    assert boxes.iou(empty, full).item() == 0
    a = empty.clone().requires_grad_()
    value = boxes.giou(a, full) + boxes.giou(a, empty)
    value.sum().backward()
    assert value.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()


def test_giou_draws_a_box_that_is_far_away() -> None:
    far = torch.tensor([[100.0, 100.0, 110.0, 110.0]], requires_grad=True)
    boxes.giou(far, torch.tensor([[0.0, 0.0, 10.0, 10.0]])).sum().backward()
    assert far.grad is not None
    assert (far.grad[0, :2] < 0).all()


def test_encode_and_decode_are_torchvisions() -> None:
    some, priors = random(200), random(200, 1)
    wanted = CODER.encode_single(some, priors)
    torch.testing.assert_close(boxes.encode(some, priors, VARIANCES), wanted, rtol=1e-5, atol=1e-5)
    offsets = torch.randn(200, 4) * torch.tensor([3.0, 3.0, 12.0, 12.0])  # some beyond the limit of exp()
    assert (offsets[:, 2:] * VARIANCES[1] > boxes.MAX_LOG_SIDE).any()
    wanted = CODER.decode_single(offsets, priors)
    torch.testing.assert_close(boxes.decode(offsets, priors, VARIANCES), wanted, rtol=1e-5, atol=1e-3)


def test_decode_never_overflows() -> None:
    got = boxes.decode(torch.full((1, 4), 1e6), torch.tensor([[0.0, 0.0, 300.0, 300.0]]), VARIANCES)
    assert got.isfinite().all()
    assert (got[:, 2] - got[:, 0]).item() == pytest.approx(300 * 1000 / 16, rel=1e-3)


side = st.floats(1, 1000, width=32)
place = st.floats(-100, 2000, width=32)
box = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), place, place, side, side)


@given(box, box, st.floats(0.05, 1), st.floats(0.05, 1))
def test_decode_inverts_encode(some: tuple[float, ...], prior: tuple[float, ...], v0: float, v1: float) -> None:
    one, other = torch.tensor([some]), torch.tensor([prior])
    ratio = (one[:, 2:] - one[:, :2]) / (other[:, 2:] - other[:, :2])
    back = boxes.decode(boxes.encode(one, other, (v0, v1)), other, (v0, v1))
    if ratio.max().log() < boxes.MAX_LOG_SIDE - 1e-3:
        torch.testing.assert_close(back, one, rtol=1e-4, atol=0.02)
    else:
        assert (back[:, 2:] - back[:, :2] <= math.exp(boxes.MAX_LOG_SIDE) * (other[:, 2:] - other[:, :2]) * 1.01).all()

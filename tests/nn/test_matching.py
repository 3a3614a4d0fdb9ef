"""Which candidate answers for which object: against torchvision's SSDMatcher, and what TOOD's assignment promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import SSDMatcher
from torchvision.ops import box_iou

from detkit.nn.anchors import default_boxes
from detkit.nn.matching import Match, match_aligned, match_priors
from detkit.types import Targets

CANVAS = 128
GRIDS, STEPS = ((16, 16), (8, 8), (4, 4)), (8.0, 16.0, 32.0)
PRIORS = default_boxes(
    (CANVAS, CANVAS), GRIDS, STEPS, (0.1, 0.3, 0.6, 0.9), ((2.0,), (2.0,), (2.0,)), True, torch.device("cpu")
)
CENTRES = (PRIORS[:, :2] + PRIORS[:, 2:]) / 2


def some_boxes(count: int, seed: int, largest: float = 60) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    size = 1 + torch.rand(count, 2, generator=rng) * (largest - 1)
    corner = torch.rand(count, 2, generator=rng) * (CANVAS - size)
    return torch.cat([corner, corner + size], 1)


def targets(*images: Tensor, ignore: tuple[tuple[int, ...], ...] = (), pad: int = 0) -> Targets:
    """Of boxes an image: labels 0, 1, 2, 0, ..., padded to the longest and `pad` more, with junk as padding boxes."""
    longest = max(1, *(len(boxes) for boxes in images)) + pad
    at = torch.full((len(images), longest, 4), 0.0)
    at[..., 2:] = CANVAS
    labels = torch.full((len(images), longest), -1)
    ignored = torch.zeros(len(images), longest, dtype=torch.bool)
    for i, boxes in enumerate(images):
        at[i, : len(boxes)] = boxes
        labels[i, : len(boxes)] = torch.arange(len(boxes)) % 3
    for i, which in enumerate(ignore):
        ignored[i, list(which)] = True
    return Targets(at, labels, ignored)


def inside(boxes: Tensor) -> Tensor:
    """Which centres lie in boxes [..., 1, 4] -> bool [..., A]."""
    return ((CENTRES - boxes[..., :2] > 0) & (boxes[..., 2:] - CENTRES > 0)).all(-1)


def row(match: Match, image: int) -> Match:
    return Match(*(part[image : image + 1] for part in match))


def same(a: Match, b: Match) -> None:
    for ours, other in zip(a, b, strict=True):
        assert torch.equal(ours, other)


def aligned(where: Targets, top: int = 13, seed: int = 0, boxes: Tensor | None = None) -> Match:
    """Assignment of random scores and of boxes near the priors."""
    B, A = len(where.labels), len(PRIORS)
    rng = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, A, 3, generator=rng).expand(B, A, 3)
    at = PRIORS + torch.randn(A, 4, generator=rng) if boxes is None else boxes
    return match_aligned(at.expand(B, A, 4), scores, CENTRES, where, top)


# SSD's matching


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("threshold", [0.35, 0.5])
def test_priors_match_as_in_torchvision(seed: int, threshold: float) -> None:
    images = [some_boxes(count, seed * 10 + count) for count in (1, 3, 20, 100)]
    match = match_priors(PRIORS, targets(*images, pad=2), threshold)
    for i, boxes in enumerate(images):
        theirs = SSDMatcher(threshold)(box_iou(boxes, PRIORS))
        assert torch.equal(match.positive[i], theirs >= 0)
        assert torch.equal(match.object[i], theirs.clamp(min=0))
    assert torch.equal(match.quality, match.positive.float())
    assert not match.ignore.any()


def test_two_objects_that_want_the_same_prior() -> None:
    """The later one has it, as in torchvision; the earlier one has only what else it overlaps enough."""
    twin = torch.tensor([[10.0, 10.0, 12.0, 12.0]]).repeat(2, 1)
    match = match_priors(PRIORS, targets(twin), 0.5)
    assert match.positive.sum() == 1
    assert match.object[match.positive].tolist() == [1]
    assert torch.equal(match.positive[0], SSDMatcher(0.5)(box_iou(twin, PRIORS)) >= 0)


def test_every_object_has_a_prior_however_small() -> None:
    centres = torch.cartesian_prod(torch.arange(12.0, 128, 24), torch.arange(12.0, 128, 24))
    pixels = torch.cat([centres, centres + 1], 1)
    match = match_priors(PRIORS, targets(pixels), 0.5)
    assert match.object[match.positive].sort().values.tolist() == list(range(len(pixels)))


# Both


def both(where: Targets) -> list[Match]:
    return [match_priors(PRIORS, where, 0.5), aligned(where, boxes=PRIORS)]


def test_an_image_without_objects_matches_nothing() -> None:
    for match in both(targets(some_boxes(0, 0), some_boxes(3, 0))):
        empty, full = row(match, 0), row(match, 1)
        assert not empty.positive.any()
        assert not empty.ignore.any()
        assert not empty.quality.any()
        assert full.positive.any()


def test_padding_never_matches() -> None:
    images = (some_boxes(5, 1), some_boxes(2, 2))
    for plain, padded in zip(both(targets(*images)), both(targets(*images, pad=11)), strict=True):
        same(plain, padded)
        assert (padded.object[1] < 2).all()


def test_ignored_objects_are_neither_positive_nor_negative() -> None:
    """A photo with an ignored object is as one without, but for the candidates on it: they are left out."""
    far = torch.tensor([[90.0, 90.0, 120.0, 120.0]])
    boxes = torch.cat([far, PRIORS[len(PRIORS) // 3][None]])
    for match, without in zip(both(targets(boxes, ignore=((1,),))), both(targets(far)), strict=True):
        assert torch.equal(match.positive, without.positive)
        assert torch.equal(match.object, without.object)
        assert torch.equal(match.quality, without.quality)
        assert torch.equal(match.ignore[0], (box_iou(boxes[1:], PRIORS)[0] > 0.5) & ~match.positive[0])
        assert match.ignore.any()


def test_a_counted_object_below_an_ignored_one_is_still_positive() -> None:
    boxes = some_boxes(1, 3).repeat(2, 1)
    for match, alone in zip(both(targets(boxes, ignore=((0,),))), both(targets(boxes[:1])), strict=True):
        assert torch.equal(match.positive, alone.positive)
        assert (match.object[match.positive] == 1).all()
        assert not (match.ignore & match.positive).any()


def test_only_ignored_objects() -> None:
    for match in both(targets(some_boxes(2, 4), ignore=((0, 1),))):
        assert not match.positive.any()
        assert not match.quality.any()


@pytest.mark.parametrize("size", [1, 4])
def test_an_image_is_matched_as_if_alone(size: int) -> None:
    images = [some_boxes(count, count) for count in (0, 7, 1, 30)][:size]
    together = targets(*images, pad=1)
    alone = [both(Targets(*(part[i : i + 1] for part in together))) for i in range(size)]
    for which, match in enumerate(both(together)):
        for i in range(size):
            same(row(match, i), alone[i][which])


# Task-aligned assignment


@given(st.integers(1, 25), st.integers(1, 20), st.integers(0, 10**6))
def test_aligned_keeps_its_limits(count: int, top: int, seed: int) -> None:
    boxes = some_boxes(count, seed)
    match = aligned(targets(boxes), top, seed)
    assert ((match.quality >= 0) & (match.quality <= 1)).all()
    assert not match.quality[~match.positive].any()
    # `object` is one index a candidate: none has two. An object has `top` at most.
    owned = torch.bincount(match.object[match.positive], minlength=count)
    assert (owned <= top).all()
    assert match.positive.any()
    # A positive's centre lies in its object, unless no centre does.
    orphan = ~inside(boxes[:, None]).any(1)
    assert (inside(boxes[match.object[0]]) | orphan[match.object[0]])[match.positive[0]].all()


def test_objects_apart_all_have_candidates() -> None:
    """A grid of objects that share no cell: each has at least one, from one pixel to 20."""
    for size in (1, 5, 20):
        corner = torch.cartesian_prod(torch.arange(2.0, 120, 24), torch.arange(2.0, 120, 24))
        boxes = torch.cat([corner, corner + size], 1)
        match = aligned(targets(boxes))
        assert (torch.bincount(match.object[match.positive], minlength=len(boxes)) >= 1).all()


def test_the_best_aligned_are_chosen() -> None:
    """Against the definition, plainly: score^0.5 * IoU^6 among candidates inside."""
    boxes, top = some_boxes(1, 5, largest=90) + torch.tensor([0.0, 0, 20, 20]), 5
    rng = torch.Generator().manual_seed(0)
    predicted = PRIORS + torch.randn(len(PRIORS), 4, generator=rng)
    scores = torch.rand(1, len(PRIORS), 3, generator=rng)
    match = match_aligned(predicted[None], scores, CENTRES, targets(boxes), top)
    overlap = box_iou(boxes, predicted)[0]
    value = torch.where(inside(boxes), scores[0, :, 0].sqrt() * overlap**6, -1.0)
    best = value.topk(top).indices
    assert set(match.positive[0].nonzero()[:, 0].tolist()) == set(best.tolist())
    wanted = value[best] / value[best].max() * overlap[best].max()
    torch.testing.assert_close(match.quality[0, best], wanted)


def test_a_candidate_that_two_want_goes_to_the_one_it_overlaps_most() -> None:
    large, small = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[30.0, 30, 60, 60]])
    predicted = small.expand(len(PRIORS), 4)
    match = aligned(targets(torch.cat([large, small])), top=len(PRIORS), boxes=predicted)
    within = inside(small)
    assert (match.object[0, within] == 1).all()
    assert match.positive[0, within].all()
    assert match.quality[0, within].max() == 1


@pytest.mark.parametrize("size", [1.0, 3.0, 30.0])
def test_an_objects_best_quality_is_its_best_iou(size: int) -> None:
    """However small the object still is beside what is predicted, or it would never be learnt."""
    boxes = torch.tensor([[50.0, 50, 50 + size, 50 + size]])
    predicted = torch.cat([CENTRES - 30, CENTRES + 30], 1)
    match = aligned(targets(boxes), boxes=predicted)
    overlap = box_iou(boxes, predicted)[0]
    assert match.quality.max().item() == pytest.approx(overlap[match.positive[0]].max().item(), rel=1e-4)
    assert match.quality.max() > 0


def test_500_objects() -> None:
    boxes = some_boxes(500, 6, largest=20)
    match = aligned(targets(boxes, some_boxes(1, 7)))
    assert match.positive[0].any()
    assert ((match.quality >= 0) & (match.quality <= 1)).all()
    assert match.object.max() < 500
    assert len(match.object[0, match.positive[0]].unique()) > 150
    same(row(match, 0), aligned(targets(boxes)))


def test_no_gradient_flows_through_the_assignment() -> None:
    scores = torch.rand(1, len(PRIORS), 3, requires_grad=True)
    boxes = PRIORS[None].clone().requires_grad_()
    assert not match_aligned(boxes, scores, CENTRES, targets(some_boxes(3, 8)), 13).quality.requires_grad

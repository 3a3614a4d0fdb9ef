"""The two losses: finite and complete gradients whatever the ground truth, and sums that add up."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from detkit.nn.anchors import default_boxes
from detkit.nn.boxes import encode
from detkit.nn.contract import Losses
from detkit.nn.losses import aligned_loss, multibox_loss
from detkit.nn.matching import match_aligned, match_priors
from detkit.types import Targets

CLASSES = 4
PRIORS = default_boxes(
    (64, 64), ((8, 8), (4, 4)), (8.0, 16.0), (0.2, 0.5, 0.9), ((2.0,), ()), True, torch.device("cpu")
)
CENTRES = (PRIORS[:, :2] + PRIORS[:, 2:]) / 2
A = len(PRIORS)

NOTHING = ((), ())
ONE = (((10.0, 12.0, 30.0, 40.0),), (2,))
PIXEL = (((7.0, 7.0, 8.0, 8.0), (63.0, 63.0, 64.0, 64.0)), (0, 1))
MANY = (((0.0, 0.0, 64.0, 64.0), (5.0, 5.0, 20.0, 20.0), (40.0, 3.0, 60.0, 30.0)), (3, 0, 1))
IMAGES = (MANY, NOTHING, PIXEL, ONE)


def targets(*images: tuple, ignore: bool = False) -> Targets:
    boxes = torch.zeros(len(images), 4, 4)
    labels = torch.full((len(images), 4), -1)
    for i, (at, what) in enumerate(images):
        if at:
            boxes[i, : len(at)] = torch.tensor(at)
            labels[i, : len(at)] = torch.tensor(what)
    return Targets(boxes, labels, (labels >= 0) & ignore)


def multibox(logits: Tensor, offsets: Tensor, where: Targets, **options: float) -> Losses:
    rule = {"threshold": 0.5, "negatives": 3.0, "variances": (0.1, 0.2)} | options
    return multibox_loss(logits, offsets, PRIORS, where, **rule)


def aligned(logits: Tensor, offsets: Tensor, where: Targets, **options: float) -> Losses:
    return aligned_loss(logits[..., 1:], PRIORS + offsets, CENTRES, where, **({"top": 7} | options))


LOSSES = pytest.mark.parametrize("loss", [multibox, aligned])


def outputs(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, A, 1 + CLASSES, generator=rng)
    return logits.requires_grad_(), torch.randn(count, A, 4, generator=rng).requires_grad_()


def total(losses: Losses) -> Tensor:
    return torch.stack([losses.sums[name] / losses.denoms[name].clamp(min=1) for name in losses.sums]).sum()


@LOSSES
@pytest.mark.parametrize("images", [(NOTHING,), (NOTHING, NOTHING), (PIXEL,), (ONE,), IMAGES, (MANY,)])
@pytest.mark.parametrize("ignore", [False, True])
def test_gradients_are_finite_and_reach_everything(loss: Callable[..., Losses], images: tuple, ignore: bool) -> None:
    logits, offsets = outputs(len(images))
    losses = loss(logits, offsets, targets(*images, ignore=ignore))
    assert set(losses.sums) == set(losses.denoms) == {"class", "box"}
    for value in (*losses.sums.values(), *losses.denoms.values()):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert value >= 0
    total(losses).backward()
    for tensor in (logits, offsets):
        assert tensor.grad is not None  # DDP waits for each parameter
        assert tensor.grad.isfinite().all()
    objects = not ignore and any(at for at, _ in images)
    assert bool(offsets.grad.any()) == objects


@LOSSES
def test_only_positives_pull_at_the_boxes(loss: Callable[..., Losses]) -> None:
    logits, offsets = outputs(1)
    where = targets(ONE)
    total(loss(logits, offsets, where)).backward()
    if loss is multibox:
        positive = match_priors(PRIORS, where, 0.5).positive
    else:
        positive = match_aligned(PRIORS + offsets, logits[..., 1:].sigmoid(), CENTRES, where, 7).positive
    assert positive.any()
    assert not offsets.grad[~positive].any()


@LOSSES
def test_half_batches_add_up_to_the_batch(loss: Callable[..., Losses]) -> None:
    logits, offsets = outputs(4)
    whole = loss(logits, offsets, targets(*IMAGES))
    halves = [loss(logits[half], offsets[half], targets(*IMAGES[half])) for half in (slice(0, 2), slice(2, 4))]
    for part in ("sums", "denoms"):
        for name, value in getattr(whole, part).items():
            torch.testing.assert_close(value, sum(getattr(half, part)[name] for half in halves))


@LOSSES
def test_padding_changes_nothing(loss: Callable[..., Losses]) -> None:
    logits, offsets = outputs(4)
    some = targets(*IMAGES)
    more = Targets(F.pad(some.boxes, (0, 0, 0, 4)), F.pad(some.labels, (0, 4), value=-1), F.pad(some.ignore, (0, 4)))
    assert torch.equal(total(loss(logits, offsets, some)), total(loss(logits, offsets, more)))


@LOSSES
def test_half_precision_outputs_are_summed_in_float32(loss: Callable[..., Losses]) -> None:
    logits, offsets = outputs(4)
    half = loss(logits.bfloat16(), offsets.bfloat16().float(), targets(*IMAGES))
    full = loss(logits.bfloat16().float(), offsets.bfloat16().float(), targets(*IMAGES))
    assert total(half).dtype == torch.float32
    torch.testing.assert_close(total(half), total(full))


def test_a_perfect_prediction_costs_nothing() -> None:
    where = targets(ONE)
    box = where.boxes[:, :1].expand(1, A, 4)
    match = match_priors(PRIORS, where, 0.5)
    offsets = encode(box, PRIORS[None], (0.1, 0.2))
    logits = torch.full((1, A, 1 + CLASSES), -30.0).scatter(2, (match.positive * 3)[..., None], 30.0)
    perfect = multibox(logits, offsets, where)
    assert perfect.sums["box"].item() == pytest.approx(0, abs=1e-5)
    assert perfect.sums["class"].item() == pytest.approx(0, abs=1e-5)

    perfect = aligned_loss(logits[..., 1:], box, CENTRES, where, top=7)
    assert perfect.denoms["box"] > 0
    assert perfect.sums["box"].item() == pytest.approx(0, abs=1e-5)


def test_a_box_that_is_off_costs_its_giou() -> None:
    where = targets(ONE)
    box = (where.boxes[:, :1] + torch.tensor([3.0, -2.0, 5.0, 1.0])).expand(1, A, 4)
    # One candidate, so that the quality is its IoU, as numerator and denominator.
    losses = aligned_loss(torch.zeros(1, A, CLASSES), box, CENTRES, where, top=1, box_weight=2.5)
    wanted = 2.5 * generalized_box_iou_loss(box[0, 0], where.boxes[0, 0])
    torch.testing.assert_close(losses.sums["box"] / losses.denoms["box"], wanted)


def test_multibox_counts_its_negatives() -> None:
    """Each wrongly scored background costs the same, so the sum tells how many are counted."""
    where = targets(ONE)
    positives = int(match_priors(PRIORS, where, 0.5).positive.sum())
    logits = torch.zeros(1, A, 1 + CLASSES)
    each = float(torch.tensor(1.0 + CLASSES).log())
    for negatives in (1.0, 3.0, 2.5):
        cost = multibox(logits, torch.zeros(1, A, 4), where, negatives=negatives).sums["class"].item()
        counted = -(-positives * negatives // 1)  # rounded up
        assert cost == pytest.approx(each * (positives + counted), rel=1e-4)
    most = multibox(logits, torch.zeros(1, A, 4), where, negatives=1e6).sums["class"].item()
    assert most == pytest.approx(each * A, rel=1e-4)


def test_ignored_candidates_cost_nothing() -> None:
    """However sure the detector is of an object that doesn't count."""
    where = targets(ONE, ignore=True)
    on_it = match_priors(PRIORS, where, 0.5).ignore
    assert on_it.any()
    calm = torch.full((1, A, 1 + CLASSES), -20.0)
    sure = torch.where(on_it[..., None], 20.0, calm)
    unsure = torch.where(on_it[..., None], calm, 20.0)
    losses = [aligned(logits, torch.zeros(1, A, 4), where).sums["class"].item() for logits in (calm, sure, unsure)]
    assert losses[0] == pytest.approx(0, abs=1e-4)
    assert losses[1] == pytest.approx(0, abs=1e-4)
    assert losses[2] > 1

    both = targets((ONE[0] + MANY[0][1:2], (2, 0)))
    both.ignore[0, 0] = True
    logits = torch.zeros(1, A, 1 + CLASSES)
    logits[..., 0] = 20.0
    spoilt = torch.where(match_priors(PRIORS, both, 0.5).ignore[..., None], logits.flip(-1), logits)
    cost = [multibox(x, torch.zeros(1, A, 4), both).sums["class"] for x in (logits, spoilt)]
    assert torch.equal(*cost)


@LOSSES
def test_descent_finds_the_objects(loss: Callable[..., Losses]) -> None:
    """Gradient descent on the raw outputs brings the loss down: signs and pairings are right."""
    logits, offsets = outputs(4)
    where = targets(*IMAGES)
    optimizer = torch.optim.Adam([logits, offsets], 0.2)
    first = total(loss(logits, offsets, where)).item()
    for _ in range(60):
        optimizer.zero_grad()
        total(loss(logits, offsets, where)).backward()
        optimizer.step()
    assert total(loss(logits, offsets, where)).item() < first / 3


def test_smoothing_lowers_what_is_wanted() -> None:
    logits, offsets = outputs(1)
    where = targets(ONE)
    plain, smooth = (aligned(logits, offsets, where, smoothing=s) for s in (0.0, 0.25))
    torch.testing.assert_close(smooth.denoms["class"], plain.denoms["class"] * 0.75)
    sure = torch.full((1, A, 1 + CLASSES), -30.0).scatter(
        2, (match_priors(PRIORS, where, 0.5).positive * 3)[..., None], 30.0
    )
    zero, more = (multibox(sure, offsets, where, smoothing=s).sums["class"] for s in (0.0, 0.1))
    assert zero < 1e-3
    assert more > 1

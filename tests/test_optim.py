"""Optimisers and schedules against torch's own; Muon against torch's for matrices, against AdamW for the rest."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    StepLR,
)

from detkit import config
from detkit.errors import UserError
from detkit.nn.detector import Detector
from detkit.optim import Muon, Schedule, is_matrix, make_optimizer, orthogonal, rate


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]


def steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], count: int, seed: int = 1) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=rng)
        optimizer.step()


def test_matrices_move_as_with_torchs_muon() -> None:
    shapes = ((20, 30), (30, 20), (20, 30), (64, 8), (16, 16))
    ours, theirs = parameters(*shapes), parameters(*shapes)
    steps(Muon([{"params": ours}], 0.02, 0.9, weight_decay=0.1), ours, 5)
    reference = torch.optim.Muon(theirs, 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    steps(reference, theirs, 5)
    for one, other, before in zip(ours, theirs, parameters(*shapes), strict=True):
        assert (one - before).norm() > 0.01 * before.norm()
        # torch's own computes in bfloat16.
        torch.testing.assert_close(one - before, other - before, rtol=0, atol=2e-3)


def test_a_convolution_is_a_matrix_of_its_output_channels() -> None:
    (flat,), (kernel,) = parameters((12, 45)), parameters((12, 5, 3, 3))
    kernel.data = flat.detach().clone().view(12, 5, 3, 3).to(memory_format=torch.channels_last)
    rng = torch.Generator().manual_seed(1)
    flat.grad = torch.randn(12, 45, generator=rng)
    kernel.grad = flat.grad.view(12, 5, 3, 3).to(memory_format=torch.channels_last)
    for weight in (flat, kernel):
        Muon([{"params": [weight]}], 0.02).step()
    torch.testing.assert_close(kernel.flatten(1), flat)


def test_the_rest_moves_as_with_adamw() -> None:
    """Norms, biases, depthwise convolutions, and the stem."""
    shapes = ((7,), (6, 1, 5, 5), (8, 3, 7, 7), ())
    ours, theirs = parameters(*shapes), parameters(*shapes)
    steps(Muon([{"params": ours}], 0.02, 0.9, weight_decay=0.1), ours, 6)
    steps(torch.optim.AdamW(theirs, 0.02, (0.9, 0.999), weight_decay=0.1), theirs, 6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_orthogonal_is_near_the_polar_factor() -> None:
    for shape in ((3, 20, 50), (2, 50, 20), (1, 30, 30)):
        matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        found = orthogonal(matrices)
        values = torch.linalg.svdvals(found)
        assert values.max() < 1.3
        assert values.median() > 0.65
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        likeness = (found * (u @ vh)).sum() / found.norm() / (u @ vh).norm()
        assert likeness > 0.96


def plain(matrix: Tensor) -> Tensor:
    """The iteration as it is defined."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("smallest", [0, -7])
def test_orthogonal_is_newton_and_schulzs_iteration_however_ill_conditioned(smallest: int) -> None:
    u, _, vh = torch.linalg.svd(torch.randn(40, 90, dtype=torch.float64), full_matrices=False)
    matrix = u * torch.logspace(0, smallest, 40, dtype=torch.float64) @ vh
    found, wanted = orthogonal(matrix.float()[None])[0].double(), plain(matrix)
    assert (found - wanted).norm() < 1e-3 * wanted.norm()


def test_no_gradient_moves_nothing_and_a_zero_one_only_decays() -> None:
    weights = parameters((6, 5), (4,), (5, 5), (3,))
    before = copy.deepcopy(weights)
    for weight in weights[2:]:
        weight.grad = torch.zeros_like(weight)
    Muon([{"params": weights}], 0.1, weight_decay=0.5).step()
    for i, (one, other) in enumerate(zip(weights, before, strict=True)):
        torch.testing.assert_close(one, other if i < 2 else other * 0.95)


def test_a_saved_state_goes_on_the_same() -> None:
    whole, parts = parameters((6, 5), (4,)), parameters((6, 5), (4,))
    steps(first := Muon([{"params": whole}], 0.1), whole, 3)
    steps(first, whole, 3, seed=2)
    steps(second := Muon([{"params": parts}], 0.1), parts, 3)
    resumed = Muon([{"params": parts}], 0.1)
    resumed.load_state_dict(copy.deepcopy(second.state_dict()))
    steps(resumed, parts, 3, seed=2)
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_a_parameter_that_is_frozen_at_first_moves_as_if_it_had_begun_then() -> None:
    """Muon counts the steps of what moves as with AdamW."""
    early, late = parameters((6, 5), (4,)), parameters((6, 5), (4,))
    optimizer = Muon([{"params": [*early, *late]}], 0.1)
    steps(optimizer, early, 3)
    steps(optimizer, late, 2, seed=2)
    alone = parameters((6, 5), (4,))
    steps(Muon([{"params": alone}], 0.1), alone, 2, seed=2)
    assert all(torch.equal(one, other) for one, other in zip(late, alone, strict=False) if one.ndim == 1)


# Of a detector


def detector(*more: str, name: str = "yolo_nano") -> tuple[Detector, config.Train]:
    small = ["model.neck.channels=16", "model.backbone.width=0.25"] if name == "yolo_nano" else []
    settings = config.load(name, [*small, *more])
    return Detector(settings.model, settings.input, 3), settings.train


BOTH = {"lr": 0.01, "weight_decay": 0.1}
CASES: list[tuple[dict[str, Any], Callable[..., optim.Optimizer], dict[str, Any]]] = [
    ({"name": "sgd"}, optim.SGD, {"momentum": 0.9, "nesterov": True}),
    ({"name": "sgd", "momentum": 0.8, "nesterov": False}, optim.SGD, {"momentum": 0.8}),
    ({"name": "sgd", "momentum": 0}, optim.SGD, {}),
    ({"name": "adagrad"}, optim.Adagrad, {}),
    *(
        ({"name": "adagrad"} | options, optim.Adagrad, options)
        for options in ({"lr_decay": 0.1}, {"initial_accumulator_value": 0.5, "eps": 1e-3})
    ),
    ({"name": "rmsprop"}, optim.RMSprop, {}),
    *(
        ({"name": "rmsprop"} | options, optim.RMSprop, options)
        for options in ({"alpha": 0.9, "momentum": 0.7}, {"centered": True, "eps": 1e-3})
    ),
    *(
        case
        for name, kind in (("adam", optim.Adam), ("adamw", optim.AdamW))
        for case in (
            ({"name": name}, kind, {}),
            ({"name": name, "momentum": 0.5, "amsgrad": True}, kind, {"betas": (0.5, 0.999), "amsgrad": True}),
            ({"name": name, "betas": [0.8, 0.9], "eps": 1e-3}, kind, {"betas": (0.8, 0.9), "eps": 1e-3}),
        )
    ),
]


@pytest.mark.parametrize(
    ("own", "kind", "options"), CASES, ids=lambda case: str(case) if isinstance(case, dict) else ""
)
def test_each_is_torchs_of_that_name(
    own: dict[str, Any], kind: Callable[..., optim.Optimizer], options: dict[str, Any]
) -> None:
    ours, cfg = detector(f"train.optimizer={own | BOTH}", "model.head.channels=8")
    theirs = copy.deepcopy(ours)
    optimizer = make_optimizer(ours, cfg.optimizer)
    groups = [{"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in theirs.parameters()]
    reference = kind(groups, lr=0.01, foreach=False, **options)
    assert type(optimizer) is type(reference)
    before = [p.detach().clone() for p in ours.parameters()]
    for each, net in ((optimizer, ours), (reference, theirs)):
        steps(each, [*net.parameters()][10:], 2)  # the others are frozen yet
        steps(each, [*net.parameters()], 3, seed=2)
    for one, other, start in zip(ours.parameters(), theirs.parameters(), before, strict=True):
        assert not torch.equal(one, start)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "adamw", "muon"])
def test_a_saved_optimiser_goes_on_the_same(name: str) -> None:
    net, cfg = detector(f"train.optimizer={{name: {name}, lr: 0.01}}", "model.head.channels=8")
    steps(first := make_optimizer(net, cfg.optimizer), [*net.parameters()], 2)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(net)
    second = make_optimizer(again, cfg.optimizer)
    second.load_state_dict(torch.load(file, weights_only=True))
    for optimizer, each in ((first, net), (second, again)):
        steps(optimizer, [*each.parameters()], 2, seed=5)
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), again.parameters(), strict=True))


def rates(net: Detector, settings: config.Optimizer) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in make_optimizer(net, settings).param_groups
        for parameter in group["params"]
    }


def test_norms_and_biases_do_not_decay_and_the_backbone_has_its_own_rate() -> None:
    net, cfg = detector("train.optimizer.backbone_lr=0.1", "model.weights=imagenet", name="ssd_mobilenet")
    found = rates(net, cfg.optimizer)
    assert found.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        lr = cfg.optimizer.lr * (0.1 if name.startswith("backbone.") else 1)
        assert found[name] == pytest.approx((lr, cfg.optimizer.weight_decay if parameter.ndim > 1 else 0))


def test_what_is_frozen_does_not_move_whatever_decays() -> None:
    net, cfg = detector("model.weights=imagenet", "model.backbone.freeze=2", name="ssd_mobilenet")
    before = {name: value.clone() for name, value in net.state_dict().items()}
    optimizer = make_optimizer(net, cfg.optimizer)
    sum(parameter.square().sum() for parameter in net.parameters() if parameter.requires_grad).backward()  # type: ignore[union-attr]
    optimizer.step()
    moved = {name for name, parameter in net.named_parameters() if not torch.equal(parameter, before[name])}
    assert not any(name.startswith("backbone.features.0.") for name in moved)
    assert {"backbone.features.17.conv.2.weight", "head.scores.0.bias"} <= moved
    assert moved <= {name for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_each_stage_learns_more_slowly_than_the_next() -> None:
    more = ["train.optimizer.layer_decay=0.5", "train.optimizer.backbone_lr=0.4", "train.optimizer.lr=0.01"]
    net, cfg = detector(*more, "model.backbone.name=resnet18", name="ssd_resnet")
    found = {name: lr for name, (lr, _) in rates(net, cfg.optimizer).items()}
    assert found.keys() == dict(net.named_parameters()).keys()
    stages = {"conv1": 0, "bn1": 0, "layer1": 1, "layer2": 2, "layer3": 3, "layer4": 4}
    for name, lr in found.items():
        part = name.split(".")
        wanted = 0.01 * 0.4 * 0.5 ** (4 - stages[part[1]]) if part[0] == "backbone" else 0.01
        assert lr == pytest.approx(wanted), name


def test_the_groups_of_muon() -> None:
    net, cfg = detector("train.optimizer.backbone_lr=0.5")
    optimizer = make_optimizer(net, cfg.optimizer)
    assert isinstance(optimizer, Muon)
    lr = cfg.optimizer.lr
    assert {group["lr"] for group in optimizer.param_groups} == {lr, lr / 2}
    matrices = [name for name, parameter in net.named_parameters() if is_matrix(parameter)]
    assert len(matrices) == sum(isinstance(layer, nn.Conv2d) for layer in net.modules()) - 1  # but for the stem


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["train.optimizer.name=adagrad"], "'train.optimizer.momentum' is no setting of adagrad"),
        (["train.optimizer={name: sgd, lr: 1, betas: [0, 0]}"], "'train.optimizer.betas' is no setting of sgd"),
        (["train.optimizer.name=adamx"], "did you mean 'adam'?"),
        (["train.optimizer.momentum=1"], "train.optimizer.momentum: "),
        (["train.optimizer.layer_decay=0"], "train.optimizer.layer_decay: "),
        (
            ["train.schedule.name=cosine", "train.schedule.milestones=[0.5]"],
            "milestones is of multistep, not of cosine",
        ),
        (["train.schedule.power=2"], "power is of polynomial, not of multistep"),
        (["train.schedule.name=exponential"], "train.schedule.name: "),
    ],
)
def test_what_an_optimiser_or_a_schedule_has_not_is_refused(sets: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        config.load("ssd_vgg", sets)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


# Schedules


def driven(scheduler: Callable[[optim.Optimizer], LRScheduler], steps: int) -> list[float]:
    """The rates of `steps` steps."""
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = scheduler(optimizer), []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if len(found) < steps:
            schedule.step()
    return found


def same(settings: config.Schedule, theirs: Callable[[optim.Optimizer], LRScheduler], steps: int) -> None:
    ours = driven(lambda optimizer: Schedule(optimizer, settings, steps), steps)
    assert ours == pytest.approx([rate(settings, step, steps) for step in range(steps)], abs=1e-12)
    assert ours == pytest.approx(driven(theirs, steps), rel=1e-6, abs=1e-9)


LENGTHS, FACTORS = st.integers(1, 80), st.floats(0.05, 0.95)


@given(LENGTHS, st.integers(1, 80), FACTORS)
def test_step_is_torchs(steps: int, every: int, gamma: float) -> None:
    assume(every <= steps)
    settings = config.Schedule(name="step", warmup_steps=0, step_size=every / steps, gamma=gamma)
    same(settings, lambda optimizer: StepLR(optimizer, every, gamma), steps)


@given(LENGTHS, st.lists(st.integers(0, 80), max_size=4, unique=True), FACTORS)
def test_multistep_is_torchs(steps: int, falls: list[int], gamma: float) -> None:
    falls = sorted(fall for fall in falls if 0 < fall <= steps)
    shares = tuple(fall / steps for fall in falls)
    settings = config.Schedule(name="multistep", warmup_steps=0, milestones=shares, gamma=gamma)
    same(settings, lambda optimizer: MultiStepLR(optimizer, falls, gamma), steps)


@given(LENGTHS, st.floats(0, 1))
def test_cosine_is_torchs(steps: int, final: float) -> None:
    settings = config.Schedule(name="cosine", warmup_steps=0, final=final)
    same(settings, lambda optimizer: CosineAnnealingLR(optimizer, steps, eta_min=final), steps)


@given(LENGTHS, st.floats(0.3, 4))
def test_polynomial_is_torchs(steps: int, power: float) -> None:
    settings = config.Schedule(name="polynomial", warmup_steps=0, power=power, final=0)
    same(settings, lambda optimizer: PolynomialLR(optimizer, steps, power), steps)


@given(st.integers(4, 80), FACTORS, st.floats(1, 50), st.floats(1, 1e5))
def test_one_cycle_is_torchs(steps: int, rise: float, div: float, final: float) -> None:
    assume(1.01 < rise * steps < steps)
    settings = config.Schedule(name="one_cycle", warmup_steps=0, pct_start=rise, div_factor=div, final_div_factor=final)
    same(
        settings,
        lambda optimizer: OneCycleLR(
            optimizer, 1.0, steps, pct_start=rise, div_factor=div, final_div_factor=final, cycle_momentum=False
        ),
        steps,
    )


@given(LENGTHS, st.integers(0, 40))
def test_warming_up_is_torchs(steps: int, warmup: int) -> None:
    settings = config.Schedule(name="plateau", warmup_steps=warmup)
    same(settings, lambda optimizer: LinearLR(optimizer, 1 / (warmup + 1), 1.0, max(1, warmup)), steps)


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=30),
    st.integers(0, 4),
    FACTORS,
    st.sampled_from([0.0, 0.01, 0.3]),
)
def test_plateau_is_torchs(figures: list[float], patience: int, gamma: float, final: float) -> None:
    settings = config.Schedule(name="plateau", warmup_steps=0, patience=patience, gamma=gamma, final=final)
    ours, theirs = (optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
    schedule = Schedule(ours, settings, 1000)
    reference = ReduceLROnPlateau(theirs, "max", gamma, patience, threshold=0, min_lr=final, eps=0)
    for figure in figures:
        for _ in range(2):
            ours.step()
            schedule.step()
        schedule.measured(figure)
        reference.step(figure)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])


def test_only_plateau_heeds_what_is_measured() -> None:
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule(optimizer, config.Schedule(name="step", warmup_steps=0), 100)
    for _ in range(10):
        schedule.measured(0.1)
    assert optimizer.param_groups[0]["lr"] == 1


@pytest.mark.parametrize("name", config.SCHEDULES)
def test_every_schedule_warms_up_to_its_highest_rate_and_ends_lower(name: str) -> None:
    found = [rate(config.Schedule.model_validate({"name": name, "warmup_steps": 10}), step, 100) for step in range(101)]
    assert all(0 < a <= 1 for a in found)
    assert all(a < b for a, b in pairwise(found[:10]))
    assert max(found) == pytest.approx(1, abs=0.02)
    assert name == "plateau" or found[100] <= 0.100001


@pytest.mark.parametrize("name", config.SCHEDULES)
def test_a_saved_schedule_goes_on_the_same(name: str) -> None:
    settings = config.Schedule.model_validate({"name": name, "warmup_steps": 3})
    if name == "plateau":
        settings = settings.model_copy(update={"patience": 1})

    def drive(optimizer: optim.Optimizer, schedule: Schedule, first: int, last: int) -> list[list[float]]:
        found = []
        for step in range(first, last):
            found.append([float(group["lr"]) for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
            if step % 3 == 2:
                schedule.measured(0.5)
        return found

    def begin() -> tuple[optim.Optimizer, Schedule]:
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.5, 0.1)]
        optimizer = optim.SGD(groups, lr=1.0)
        return optimizer, Schedule(optimizer, settings, 40)

    whole = drive(*begin(), 0, 40)
    assert len({lr for lr, _ in whole}) > 3
    for cut in (2, 9, 21):
        optimizer, schedule = begin()
        drive(optimizer, schedule, 0, cut)
        file = io.BytesIO()
        torch.save((optimizer.state_dict(), schedule.state_dict()), file)
        file.seek(0)
        resumed = begin()
        for each, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
            each.load_state_dict(state)
        assert drive(*resumed, cut, 40) == whole[cut:]
    assert math.isclose(whole[0][0], 5 * whole[0][1])

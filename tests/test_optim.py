"""Muon: against torch's own for matrices, against AdamW for the rest."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from detkit import config, train
from detkit.nn.detector import Detector
from detkit.optim import Muon, is_matrix, orthogonal


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


def test_a_detectors_groups() -> None:
    settings = config.load("yolo_nano.yaml", ["train.optimizer.name=muon", "train.optimizer.backbone_lr=0.5"])
    detector = Detector(settings.model, settings.input, 3)
    optimizer = train.make_optimizer(detector, settings.train.optimizer)
    assert isinstance(optimizer, Muon)
    lr = settings.train.optimizer.lr
    assert {group["lr"] for group in optimizer.param_groups} == {lr, lr / 2}
    matrices = [name for name, parameter in detector.named_parameters() if is_matrix(parameter)]
    assert len(matrices) == sum(isinstance(layer, nn.Conv2d) for layer in detector.modules()) - 1  # but for the stem

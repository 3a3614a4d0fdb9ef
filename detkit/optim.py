"""Muon, an optimiser for networks of convolutions and fully connected layers that are trained from scratch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Of the quintic iteration: they bring singular values from (0, 1] to about 0.7 to 1.2 in five steps (Jordan 2024).
_QUINTIC, _STEPS = (3.4445, -4.7750, 2.0315), 5
# Root mean square of an update, as AdamW's usually are: so one learning rate and one weight decay fit both (Liu 2025).
_RMS = 0.2


def orthogonal(matrices_Nrc: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrix of each [N, r, c], by Newton-Schulz: U V^T of its decomposition.

    A step is x <- (a + b g + c g g) x, where g = x x^T. All steps' factors are multiplied first, on the short side:
    half the arithmetic of a convolution's wide weight, and equal to 4e-4 in float32 however ill-conditioned.
    """
    a, b, c = _QUINTIC
    tall = matrices_Nrc.shape[1] > matrices_Nrc.shape[2]
    x = matrices_Nrc.mT if tall else matrices_Nrc
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    gram = x @ x.mT
    product = torch.eye(gram.shape[1], device=x.device, dtype=x.dtype)
    for _ in range(_STEPS):
        factor = b * gram + c * gram @ gram
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product, gram = factor @ product, factor @ gram @ factor
    nearest: Tensor = product @ x
    return nearest.mT if tall else nearest


def is_matrix(parameter: Tensor) -> bool:
    """Whether it is a layer's weight that mixes many channels: no norm or bias, no depthwise convolution, no stem."""
    return parameter.ndim > 1 and parameter.shape[1] > 3


class Muon(Optimizer):
    """Muon (Jordan 2024): Nesterov momentum made orthogonal, so that all directions of a layer's weight learn at one
    pace. For matrices, which a convolution's weight [out, in, h, w] is as [out, in * h * w]; the other parameters are
    moved as by AdamW. Weight decay is decoupled.

    momentum: of matrices, and beta1 of the others.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "beta2": 0.999, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the parameters along their gradients."""
        assert closure is None
        for group in self.param_groups:
            live = [parameter for parameter in group["params"] if parameter.grad is not None]
            torch._foreach_mul_(live, 1 - group["lr"] * group["weight_decay"])
            by_shape = defaultdict(list)
            for parameter in live:
                by_shape[tuple(parameter.shape) if is_matrix(parameter) else ()].append(parameter)
            self._adam(by_shape.pop((), []), group)
            for alike in by_shape.values():
                self._orthogonal(alike, group)

    def _orthogonal(self, alike: list[Tensor], group: dict[str, Any]) -> None:
        """Move matrices of one shape."""
        gradients = [parameter.grad for parameter in alike if parameter.grad is not None]
        means = self._states("mean", alike)
        torch._foreach_lerp_(means, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, means, group["momentum"])
        updates = orthogonal(torch.stack([update.flatten(1) for update in ahead]))
        scale = _RMS * max(updates.shape[1:]) ** 0.5
        for parameter, update in zip(alike, updates, strict=True):
            parameter.add_(update.view(parameter.shape), alpha=-group["lr"] * scale)

    def _adam(self, others: list[Tensor], group: dict[str, Any]) -> None:
        if not others:
            return
        beta1, beta2 = group["momentum"], group["beta2"]
        group["steps"] = steps = group.get("steps", 0) + 1
        gradients = [parameter.grad for parameter in others if parameter.grad is not None]
        means, squares = self._states("mean", others), self._states("square", others)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**steps) ** 0.5)
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_addcdiv_(others, means, roots, -group["lr"] / (1 - beta1**steps))

    def _states(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

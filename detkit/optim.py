"""Optimisers, learning rates by parameter and by step; and Muon, which torch has for plain matrices only."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from detkit import config
from detkit.nn.detector import Detector

# Of the quintic iteration: they bring singular values from (0, 1] to about 0.7 to 1.2 in five steps (Jordan 2024).
_QUINTIC, _STEPS = (3.4445, -4.7750, 2.0315), 5
# A first step may be left out: gradients overflow in 16 bits, losses are not finite.
warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
# Root mean square of an update, as AdamW's usually are: so one learning rate and one weight decay fit both (Liu 2025).
_RMS = 0.2


def make_optimizer(detector: Detector, settings: config.Optimizer) -> Optimizer:
    """The optimiser of all parameters: weight decay off for norms and biases, the backbone's rates scaled.

    Frozen parameters are among them, for a later epoch may set them free; without a gradient none is moved.
    """
    factors = backbone_rates(detector, settings)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in detector.parameters():
        groups.setdefault((factors.get(parameter, 1.0), parameter.ndim > 1), []).append(parameter)
    parameters = [
        {"params": members, "lr": settings.lr * factor, "weight_decay": settings.weight_decay if decays else 0.0}
        for (factor, decays), members in groups.items()
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in detector.parameters())
    match settings:
        case config.SGD():
            nesterov = settings.nesterov and settings.momentum > 0
            sgd = SGD(parameters, momentum=settings.momentum, nesterov=nesterov, fused=fused)
            # The fused kernel takes a step that is the first of all parameters or of none, not one that is the first
            # of those set free. From zero the first step is the same.
            for parameter in detector.parameters() if settings.momentum else ():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        case config.Adagrad():
            start = settings.initial_accumulator_value
            return Adagrad(
                parameters,
                lr_decay=settings.lr_decay,
                initial_accumulator_value=start,
                eps=settings.eps,
                fused=fused,
            )
        case config.RMSprop():
            return RMSprop(
                parameters,
                alpha=settings.alpha,
                eps=settings.eps,
                momentum=settings.momentum,
                centered=settings.centered,
            )
        case config.Adam() | config.AdamW():
            kind = Adam if isinstance(settings, config.Adam) else AdamW
            betas = settings.betas or (settings.momentum, 0.999)
            return kind(parameters, betas=betas, eps=settings.eps, amsgrad=settings.amsgrad, fused=fused)
        case config.Muon():
            return Muon(parameters, settings.lr, settings.momentum)


def backbone_rates(detector: Detector, settings: config.Optimizer) -> dict[nn.Parameter, float]:
    """The factor on the learning rate of each parameter of the backbone: `backbone_lr` in its last stage, and
    `layer_decay` once more for each stage nearer to the image. What lies in no stage counts as the first."""
    backbone = detector.backbone
    if settings.layer_decay == 1:
        return dict.fromkeys(backbone.parameters(), settings.backbone_lr)
    stages = backbone.stages
    factors = [settings.backbone_lr * settings.layer_decay**later for later in reversed(range(len(stages)))]
    rates = dict.fromkeys(backbone.parameters(), factors[0])
    for factor, stage in zip(factors, stages, strict=True):
        rates |= {parameter: factor for layer in stage for parameter in layer.parameters()}
    return rates


def rate(settings: config.Schedule, step: int, steps: int) -> float:
    """The learning rate at a step as a share of the optimiser's setting; with plateau, of what that has become."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    done = min(1.0, max(0, step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    late = (step + 1e-6) / steps  # shares such as 0.1 are a little more or less than their multiples
    match settings.name:
        case "step":
            return warmup * math.pow(settings.gamma, late // settings.step_size)
        case "multistep":
            return warmup * settings.gamma ** sum(late >= share for share in settings.milestones)
        case "cosine":
            return warmup * _cosine(1, settings.final, done)
        case "one_cycle":
            return warmup * _one_cycle(settings, step, steps)
        case "polynomial":
            return warmup * (settings.final + (1 - settings.final) * math.pow(1 - done, settings.power))
        case "plateau":
            return warmup


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def _one_cycle(settings: config.Schedule, step: int, steps: int) -> float:
    """Up, then down to the end (Smith & Topin 2018), each half a cosine; the last step has the last rate."""
    first, last = 1 / settings.div_factor, 1 / settings.div_factor / settings.final_div_factor
    top, end = max(0.0, settings.pct_start * steps - 1), steps - 1
    if step < top:
        return _cosine(first, 1, step / top)
    return _cosine(1, last, min(1.0, (step - top) / (end - top)) if end > top else 1)


class Schedule(LambdaLR):
    """The learning rate of each step (`rate`); with plateau, times what the evaluations have left of it.

    steps: of the whole run.
    """

    def __init__(self, optimizer: Optimizer, settings: config.Schedule, steps: int) -> None:
        self._settings = settings
        self.level, self.best, self.stale = 1.0, -math.inf, 0
        super().__init__(optimizer, lambda step: self.level * rate(settings, step, steps))

    def measured(self, figure: float) -> None:
        """Take note of an evaluation: with plateau, the rate falls where none has been better for too long."""
        if self._settings.name != "plateau":
            return
        if figure > self.best:
            self.best, self.stale = figure, 0
            return
        self.stale += 1
        if self.stale > self._settings.patience:
            self.level, self.stale = max(self._settings.final, self.level * self._settings.gamma), 0
            for group, base, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
                group["lr"] = base * factor(self.last_epoch)  # the coming step's, which `step` has already set

    def state_dict(self) -> dict[str, Any]:
        """Of plain values."""
        return {name: value for name, value in super().state_dict().items() if name != "_settings"}


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
            by_shape, by_steps = defaultdict(list), defaultdict(list)
            for parameter in live:
                if is_matrix(parameter):
                    by_shape[parameter.shape].append(parameter)
                else:  # some may have been frozen at first
                    by_steps[self.state[parameter].get("steps", 0) + 1].append(parameter)
            for steps, others in by_steps.items():
                self._adam(others, steps, group)
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

    def _adam(self, others: list[Tensor], steps: int, group: dict[str, Any]) -> None:
        """Move other parameters, in their step of that number (from 1)."""
        beta1, beta2 = group["momentum"], group["beta2"]
        gradients = [parameter.grad for parameter in others if parameter.grad is not None]
        means, squares = self._states("mean", others), self._states("square", others)
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - beta2**steps) ** 0.5)
        torch._foreach_add_(roots, 1e-8)
        torch._foreach_addcdiv_(others, means, roots, -group["lr"] / (1 - beta1**steps))
        for parameter in others:
            self.state[parameter]["steps"] = steps

    def _states(self, name: str, parameters: list[Tensor]) -> list[Tensor]:
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

"""The learning-rate range test (Smith 2017): mini-batches at rising rates, and what their loss says of the rate."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from detkit import config, distributed
from detkit.console import counting
from detkit.errors import UserError, need
from detkit.files import atomic_write, next_folder
from detkit.nn import weights
from detkit.train import NotFiniteError, Run, changed, settled
from detkit.types import Batch

PICTURE, TABLE = "lr-find.png", "lr-find.csv"
_MEDIAN = 2  # mini-batches to each side of one, of whose losses the median is taken: single bad ones don't count
_SMOOTH = 0.05  # standard deviation of the smoothing after that, as a share of the steps
_FALL = 0.05  # of the first loss: less is taken for noise
_MOST = 0.7  # of the loss's fall
_AHEAD = 0.9  # decay of the mean that is watched meanwhile
_LOST = 1.5  # times the first loss: nothing that comes after it says anything


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """The loss of each mini-batch at its rate: float64 [N] both; the last may be infinite."""

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]

    @property
    def first(self) -> float:
        """The loss before anything is learnt."""
        return float(self.losses[: max(3, len(self.losses) // 20)].mean())

    def smoothed(self) -> NDArray[np.float64]:
        """The losses without outliers, each a mean weighted by the distance in steps: float64 [N]."""
        bounded = np.minimum(np.nan_to_num(self.losses, nan=math.inf), 2 * _LOST * self.first)
        steps = np.arange(len(bounded))
        medians = np.array([np.median(bounded[max(0, step - _MEDIAN) : step + _MEDIAN + 1]) for step in steps])
        share = np.exp(-0.5 * ((steps[:, None] - steps) / max(1, _SMOOTH * len(steps))) ** 2)
        return np.asarray(share @ medians / share.sum(1))


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A learning rate, or None where the curve shows none, and why."""

    rate: float | None
    reason: str


def suggest(curve: Curve) -> Suggestion:
    """The middle, by order of magnitude, of the rates at which the last 30% of the smoothed loss's fall are done.

    Lower rates still learn faster with every increase. At the lowest point itself, what a rate gains and what it breaks
    are equal. The steepest point of the fall, which others suggest, and that of any one share of it were tried as well:
    where the fall has a step, noise moves them by a factor of four and more.
    """
    smooth, first = curve.smoothed(), curve.first
    lowest = int(smooth.argmin())
    fall = first - smooth[lowest]
    ends = f"from {curve.rates[0]:.2g} to {curve.rates[-1]:.2g}"
    if fall < _FALL * first:
        return Suggestion(None, f"the loss ({first:.3g}) falls at no rate {ends}: test others, or take more steps")
    shares = np.linspace(_MOST, 1, 100, endpoint=False)
    done = (first - np.minimum.accumulate(smooth)) / fall
    rate = float(f"{np.exp(np.log(curve.rates)[np.searchsorted(done, shares)].mean()):.2g}")
    reason = (
        f"rates {ends}: the loss begins at {first:.3g} and is lowest, {smooth[lowest]:.3g}, at "
        f"{curve.rates[lowest]:.2g}; the last {1 - _MOST:.0%} of that fall are done around {rate:g}"
    )
    if lowest == len(smooth) - 1 and done[-len(done) // 10] < 1 - _FALL:
        reason += "; it was still falling at the highest rate: try a higher --max"
    elif (lost := np.flatnonzero(smooth[lowest:] > first)).size:
        reason += f"; from {curve.rates[lowest + lost[0]]:.2g} on it is higher than at first"
    return Suggestion(rate, reason)


def _batches(run: Run) -> Iterator[list[Batch]]:
    """Mini-batches without end, in the pieces that a step takes."""
    for epoch in itertools.count():
        pieces = run.loader.epoch(epoch)
        while batch := list(itertools.islice(pieces, run.settings.train.accumulate)):
            yield batch


def sweep(run: Run, rates: NDArray[np.float64], progress: Callable[[int, int], None] | None = None) -> Curve:
    """Train a run on a mini-batch at each rate, float64 [N] rising, of the optimiser's parts in the proportions that
    they have. Ends early where the loss is no longer finite, has climbed back to where it began, or far beyond."""
    losses: list[float] = []
    mean = lowest = 0.0
    for step, (rate, pieces) in enumerate(zip(rates.tolist(), _batches(run), strict=False), 1):
        factor = rate / run.settings.train.optimizer.lr
        for group, base in zip(run.optimizer.param_groups, run.schedule.base_lrs, strict=True):
            group["lr"] = base * factor
        try:
            loss = sum(run.guarded_step(pieces).values())
        except NotFiniteError:
            loss = math.inf
        losses.append(loss)
        if progress:
            progress(step, len(rates))
        mean = _AHEAD * mean + (1 - _AHEAD) * loss
        ahead = mean / (1 - _AHEAD**step)
        lowest = ahead if step == 1 else min(lowest, ahead)
        first = float(np.mean(losses[: max(3, len(rates) // 20)]))
        if not ahead < _LOST * first or (ahead > first and lowest < (1 - 2 * _FALL) * first):
            break
    return Curve(rates[: len(losses)], np.array(losses))


def plot(curve: Curve, suggestion: Suggestion, name: str) -> bytes:
    """A PNG of the curve."""
    need("matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained")
    axes: Any = figure.subplots()
    smooth = curve.smoothed()
    axes.plot(curve.rates, np.minimum(curve.losses, smooth.max()), color="0.75", linewidth=1, label="mini-batches")
    axes.plot(curve.rates, smooth, color="#0072B2", label="smoothed")
    if suggestion.rate:
        height = float(np.interp(np.log(suggestion.rate), np.log(curve.rates), smooth))
        axes.plot([suggestion.rate], [height], "o", color="#D55E00", label=f"suggestion: {suggestion.rate:g}")
    axes.set(xscale="log", title=f"Range test of {name}", xlabel="learning rate", ylabel="loss")
    axes.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def run(settings: config.Config, least: float, most: float, steps: int, console: Console) -> Path:
    """``detkit lr-find``: the test over rates from `least` to `most`, what it suggests, and a new folder with a picture
    and a table. Raises UserError for the user's mistakes."""
    if distributed.ranks() > 1:
        raise UserError("detkit lr-find is for one process: start it without torchrun")
    if not 0 < least < most:
        raise UserError(f"--min {least:g} --max {most:g}: the first is to be above 0 and below the second")
    need("matplotlib")
    test = Run(changed(settled(settings, console), skip=0), console)
    report = weights.load(test.detector, settings.model, test.classes)
    if settings.train.recalibrate_bn and report:
        test.recalibrate()
    test.hold()
    test.wrap()
    with counting(console, "testing rates") as progress, closing(test.loader):
        curve = sweep(test, np.geomspace(least, most, steps), progress)
    suggestion = suggest(curve)
    folder = next_folder(settings.runs / f"{settings.name}-lr-find-")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("lr", "loss", "smoothed"))
    rows.writerows(
        [f"{value:.6g}" for value in row] for row in zip(curve.rates, curve.losses, curve.smoothed(), strict=True)
    )
    atomic_write(folder / TABLE, text.getvalue())
    atomic_write(folder / PICTURE, plot(curve, suggestion, settings.name))
    console.print(suggestion.reason, highlight=False)
    console.print(f"plot: {folder / PICTURE}", highlight=False, soft_wrap=True)
    if suggestion.rate:
        console.print(f"--set train.optimizer.lr={suggestion.rate:g}", style="bold", highlight=False)
    return folder

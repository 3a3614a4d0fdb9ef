"""`detkit doctor`: what the curves that a run has recorded say of it, in the words of a practitioner.

A rule looks at simple statistics of the curves, most of them medians over a part of the run, and gives a finding or
none. Faults of the training itself are asked for in the order in which they explain each other, and only the first is
told: where the rate is far too high, that channels have died needs no telling. What the thresholds rest on:
docs/training.md.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from detkit import config, page
from detkit.errors import UserError, need
from detkit.files import atomic_write
from detkit.loggers import CLASSES, TABLES

Values = NDArray[np.float64]
GROUPS = ("backbone", "neck", "head")
COLOURS = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito's

# A run whose mAP50 has been as high as this learns: how it looked on the way is no fault.
LEARNT = 0.3
# Diverging: the loss at the end, over that of the first steps, and over that of the best tenth of the run.
BLOWN, FALLEN_BACK = 1.5, 2.0
# Shares of the weights that a step moves: too much, and too little; what is usual lies between.
FAST, SLOW, USUAL = 0.05, 2e-4, 0.005
# Gradients: how many times what they are clipped to (or `CLIP`, where they are not) is huge; and how small the first
# layer's is over the head's where it vanishes.
HUGE, CLIP, FAINT = 1000.0, 10.0, 1e-3
# Shares of the channels that are dead, of a group, or like another, of all.
DEAD, ALIKE = 0.6, 0.5
# A fall of the loss that counts as none, and the share of the run without more.
FLAT, LONG = 0.03, 0.3
LEAST = 50  # steps before which a loss that does not fall says nothing
# Overfitting: how far the validation loss has risen since its lowest and the training loss fallen since then; or how
# far apart they are, where the one has fallen and the other has not followed.
RISEN, FALLEN, APART, FOLLOWED = 1.1, 0.9, 2.0, 0.25
STARVED = 1 / 3  # share of the time spent waiting for data
FOUND, UNFOUND = 0.5, 0.02  # share of the classes that are found, where others stand out; and an AP that is none
FEWEST = 4  # evaluations that make a course


class Curve(NamedTuple):
    """A named curve over steps: x, y float64 [N], NaN where there is no value."""

    name: str
    x: Values
    y: Values


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves to look at, over the threshold of a rule where there is one. log: whether the scale is logarithmic."""

    curves: tuple[Curve, ...]
    limit: float | None = None
    log: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong, with the numbers that say so; changes: what to do, as assignments for --set; advice: what no
    setting does."""

    name: str
    sentence: str
    changes: tuple[str, ...]
    plot: Plot
    advice: str = ""

    def tree(self) -> dict[str, Any]:
        """As plain data."""
        return {"name": self.name, "sentence": self.sentence, "set": list(self.changes), "advice": self.advice}


class Run:
    """What a run has recorded.

    steps, metrics, classes: the columns of these tables, float64 [rows]; none where there is no such file. evaluations:
    the rows of metrics that have figures. loss, val_loss: sums of the parts, of steps' and evaluations' rows. objects:
    of each class, how many there are by split.
    Raises UserError where the folder is no run, or has recorded nothing.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: not a run of detkit: it has no config.yaml")
        self.folder, self.settings = folder, config.load(folder / "config.yaml")
        tables = {name: _columns(folder / f"{name}.csv") for name in TABLES}
        self.steps, self.metrics, self.classes = tables["steps"], tables["metrics"], tables["classes"]
        if not self.steps:
            raise UserError(
                f"{folder}: it has no steps.csv with what it recorded: it stopped at once, or is of an older detkit"
            )
        counts = folder / CLASSES
        self.objects: dict[str, dict[str, int]] = json.loads(counts.read_text("utf-8")) if counts.is_file() else {}
        self.loss = _total(self.steps, "loss_")
        evaluated = np.isfinite(self.metrics.get("mAP", np.zeros(0)))
        self.evaluations = {name: values[evaluated] for name, values in self.metrics.items()}
        self.val_loss = _total(self.evaluations, "val_loss_")

    def part(self, values: Values, start: float, end: float) -> float:
        """The median of a column of steps.csv over the rows between two shares of the steps done, at least one row; NaN
        where they have no values."""
        done = self.steps["step"] / self.steps["step"][-1]
        rows = values[(done > start) & (done <= end)]
        rows = rows[np.isfinite(rows)]
        return float(np.median(rows)) if len(rows) else math.nan

    def curve(self, column: str, name: str) -> Curve:
        """A column of steps.csv."""
        return Curve(name, self.steps["step"], self.steps[column])

    def course(self, name: str, values: Values) -> Curve:
        """Values at the evaluations."""
        return Curve(name, self.evaluations["step"], values)

    @property
    def done(self) -> int:
        """Optimiser steps done."""
        return int(self.steps["step"][-1])

    @property
    def training(self) -> Curve:
        """The training loss."""
        return Curve("training loss", self.steps["step"], self.loss)

    @property
    def update(self) -> Values:
        """The share of the weights that a step moves, float64 [rows]: the median of the groups that are trained."""
        groups = np.array([self.steps[f"update_{group}"] for group in GROUPS])
        known = [column[np.isfinite(column)] for column in groups.T]
        return np.array([np.median(column) if len(column) else math.nan for column in known])

    @property
    def learnt(self) -> bool:
        """Whether it has become a detector."""
        return bool(self.evaluations and self.evaluations["mAP50"].max(initial=0) >= LEARNT)

    @property
    def clip(self) -> float:
        """What gradients are clipped to, or might be."""
        return self.settings.train.clip_norm or CLIP

    def times(self, factor: float = 0.1) -> str:
        """The assignment that multiplies the rate."""
        return f"train.optimizer.lr={self.settings.train.optimizer.lr * factor:.2g}"


def _columns(path: Path) -> dict[str, Values]:
    """The columns of a CSV file; none where it isn't there or has no rows."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = [*csv.reader(file)] or [[]]
    try:
        values = np.array([[float(cell) for cell in row] for row in rows])
        return dict(zip(head, values.T, strict=True)) if len(rows) else {}
    except ValueError:
        raise UserError(f"{path}: not a table as a run records it") from None


def _total(table: Mapping[str, Values], prefix: str) -> Values:
    """The sum of the parts of a loss."""
    parts = [values for name, values in table.items() if name.startswith(prefix) and name != "loss_max"]
    return np.sum(parts, axis=0) if parts else np.zeros(0)


def _running(values: Values, width: int = 3) -> Values:
    """Running medians of the values that are finite."""
    values = values[np.isfinite(values)]
    if len(values) < width:
        return values
    return np.asarray(np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=-1))


# --- rules: faults of the training itself, causes first ---------------------------------------------------------------


def _exploding(run: Run) -> Finding | None:
    """Gradients that are huge before the rate has had any effect, or all the time; but not those that BatchNorm makes
    of channels that were dead from the start."""
    grad, limit = run.steps["grad"], HUGE * run.clip
    first, usual = float(grad[0]), run.part(grad, 0, 1)
    clip = () if run.settings.train.clip_norm else (f"train.clip_norm={CLIP:g}",)
    curves = (run.curve("grad", "gradient's norm"), run.training)
    if first > limit and not _dead_from_the_start(run):
        said = (
            f"in its first step the gradient's norm is {first:.2g} and the loss {run.loss[0]:.2g}, before the rate has "
            "had any effect; tens are usual. The weights that it starts from are too large"
        )
        changes = (*_init(run), *clip)
    elif usual > limit and not _running(run.update).max(initial=0) > FAST:
        said = (
            f"the gradient's norm is {usual:.2g} in the median step, {usual / run.clip:.0f} times what it is clipped "
            "to: of each step only the direction is left"
        )
        changes = (run.times(), *_norms(run), *clip)
    else:
        return None
    return Finding("exploding gradients", said, changes, Plot(curves, limit, log=True))


def _diverging(run: Run) -> Finding | None:
    """A loss that ends well above where it was, or as no number."""
    loss, steps = run.loss, run.steps["step"]
    lost = np.flatnonzero(~np.isfinite(loss))
    changes = (run.times(), *(() if run.settings.train.clip_norm else (f"train.clip_norm={CLIP:g}",)))
    if len(lost):
        at = int(lost[0])
        before = f"; {loss[0]:.3g} in the first, {loss[at - 1]:.3g} in the last that could be measured" if at else ""
        said = f"the loss is no number any more in step {steps[at]:.0f}{before}"
    else:
        tenths = [run.part(loss, i / 10, (i + 1) / 10) for i in range(10)]
        start, end, best = float(np.median(loss[:3])), tenths[-1], float(np.nanmin(tenths))
        if not (end > BLOWN * start or end > FALLEN_BACK * best > 0):
            return None
        said = f"the loss ends at {end:.3g}; it began at {start:.3g}, and was {best:.3g} in the best tenth of the run"
    return Finding("diverging", said, changes, Plot((run.training, run.curve("grad", "gradient's norm")), log=True))


def _rate_high(run: Run) -> Finding | None:
    """Steps so large that each undoes what others have learnt."""
    update = run.update
    peak = float(_running(update).max(initial=0))
    if peak <= FAST:
        return None
    start, most = float(np.median(run.loss[:3])), float(run.steps["loss_max"].max())
    rose = f" and sent the loss from {start:.3g} up to {most:.3g}" if most > 1.2 * start else ""
    said = (
        f"steps move up to {peak:.0%} of the weights, where 0.1 to 2 % is usual{rose}: each undoes what others have "
        f"learnt{_reached(run)}"
    )
    curves = (Curve("update / weights", run.steps["step"], update), run.training)
    return Finding("rate too high", said, (run.times(min(0.1, USUAL / peak)),), Plot(curves, FAST, log=True))


def _alike(run: Run) -> Finding | None:
    """Channels that all compute the same, for their weights began alike."""
    alike = run.evaluations.get("alike", np.zeros(0))
    share = float(np.nanmax(alike[: 1 + len(alike) // 2], initial=0))
    if share < ALIKE:
        return None
    said = (
        f"{share:.0%} of the channels give what another of their layer gives: their weights began alike and are moved "
        f"alike, so that each layer is worth one channel{_reached(run)}"
    )
    curves = (run.course("share of channels like another", alike), run.training)
    return Finding("flat start", said, _init(run), Plot(curves, ALIKE))


def _dead_shares(run: Run) -> dict[str, Values]:
    """Of the groups that have activations, the share of dead channels at each evaluation."""
    shares = {group: run.evaluations.get(f"dead_{group}", np.zeros(0)) for group in GROUPS}
    return {group: values for group, values in shares.items() if len(values) and np.isfinite(values[[0, -1]]).all()}


def _dead_from_the_start(run: Run) -> bool:
    """Whether so many are dead in the end that were, half of them, at the first evaluation."""
    return any(values[-1] >= DEAD and values[0] >= DEAD / 2 for values in _dead_shares(run).values())


def _dead(run: Run) -> Finding | None:
    """Channels that give the same whatever they see."""
    shares = _dead_shares(run)
    group = max(shares, key=lambda name: float(shares[name][-1]), default="")
    if not group or shares[group][-1] < DEAD:
        return None
    first, last = float(shares[group][0]), float(shares[group][-1])
    since = run.evaluations["step"][0]
    if first >= DEAD / 2:
        cause = (
            f"{first:.0%} did so after step {since:.0f} already: the weights that it starts from leave them no signal"
        )
        changes = (*_init(run), *_leaky(run))
    else:
        cause = f"after step {since:.0f} {first:.0%} did so: large steps have pushed the others below zero"
        changes = (run.times(), *_leaky(run))
    said = f"{last:.0%} of the channels in the {group} give the same for whatever they see; {cause}"
    curves = tuple(run.course(f"dead in {name}", values) for name, values in shares.items())
    return Finding("dead activations", said, changes, Plot(curves, DEAD))


def _vanishing(run: Run) -> Finding | None:
    """Gradients that don't reach the first layer."""
    with np.errstate(all="ignore"):
        ratio = run.steps["grad_first"] / run.steps["grad_head"]
    usual = run.part(ratio, 0, 0.5)
    if not usual < FAINT:
        return None
    first, head = run.part(run.steps["grad_first"], 0, 0.5), run.part(run.steps["grad_head"], 0, 0.5)
    said = (
        f"the gradient's norm is {head:.2g} in the head and {first:.2g} in the first layer, {usual:.1g} of it; from a "
        f"hundredth to a hundred times is usual. The first layers learn nothing{_reached(run)}"
    )
    curves = (run.curve("grad_head", "gradient, head"), run.curve("grad_first", "gradient, first layer"))
    return Finding("vanishing gradients", said, (*_init(run), *_norms(run)), Plot(curves, log=True))


def _rate_low(run: Run) -> Finding | None:
    """Steps so small that the run can't get anywhere."""
    update = run.update
    known = update[np.isfinite(update)]
    usual = float(np.percentile(known, 75)) if len(known) else math.nan
    start, end = float(np.median(run.loss[:3])), run.part(run.loss, 0.9, 1)
    if run.done < LEAST or not usual < SLOW or end < 0.7 * start:
        return None
    said = (
        f"a step moves {usual:.1g} of the weights, where 0.001 to 0.02 is usual: in {run.done} steps "
        f"the loss has gone from {start:.3g} to {end:.3g}"
    )
    curves = (run.training, Curve("update / weights", run.steps["step"], update))
    return Finding(
        "rate too low", said, (run.times(min(1000.0, USUAL / max(usual, 1e-9))),), Plot(curves, SLOW, log=True)
    )


def _flat(run: Run) -> Finding | None:
    """A loss that doesn't leave its first value for long."""
    start, level = float(np.median(run.loss[:3])), _running(run.loss, 5)
    left = np.flatnonzero(level < (1 - FLAT) * start)
    steps = run.steps["step"]
    stayed = steps[min(left[0] + 4, len(steps) - 1)] if len(left) else run.done
    if run.done < LEAST or stayed < LONG * run.done:
        return None
    then = f"; then it fell to {run.part(run.loss, 0.9, 1):.3g}" if len(left) else ", to the end"
    said = (
        f"for {stayed:.0f} of {run.done} steps the loss stays within {FLAT:.0%} of the {start:.3g} that it began "
        f"with{then}, though a step moves {run.part(run.update, 0, LONG):.1g} of the weights: where it starts, "
        "nothing tells it where to go"
    )
    return Finding("flat start", said, (*_init(run), *_norms(run)), Plot((run.training,), start))


def _init(run: Run) -> tuple[str, ...]:
    """Other weights to start from."""
    model = run.settings.model
    if model.weights != "none":
        return ("model.weights=none",)
    return ("model.init=kaiming_normal",) if model.init != "kaiming_normal" else ("model.init=orthogonal",)


def _norms(run: Run) -> tuple[str, ...]:
    """Norms, where the neck can have them and has none."""
    neck = run.settings.model.neck
    return ("model.neck.norm=batch",) if isinstance(neck, config.FPN) and neck.norm == "none" else ()


def _leaky(run: Run) -> tuple[str, ...]:
    """An activation that lets something through everywhere."""
    return ("model.activation=leaky_relu",) if run.settings.model.activation in (None, "relu", "relu6") else ()


def _reached(run: Run) -> str:
    """What it has come to, as the end of a sentence."""
    best = float(run.evaluations["mAP50"].max(initial=0)) if run.evaluations else math.nan
    return "" if math.isnan(best) else f". The best mAP50 is {best:.3f}"


# --- rules: what can be wrong with a run that trains ------------------------------------------------------------------


def _overfitting(run: Run) -> Finding | None:
    """A validation loss that rises, or stays, while the training loss falls."""
    val = run.val_loss
    if len(val) < FEWEST or not np.isfinite(val).all():
        return None
    train, steps = _total(run.evaluations, "loss_"), run.evaluations["step"]
    low, half = int(val.argmin()), len(val) // 2
    end, learnt = float(np.median(val[-2:])), float(np.median(train[-2:]))
    if end > RISEN * val[low] and learnt < FALLEN * train[low]:
        said = (
            f"since step {steps[low]:.0f} the validation loss has risen from {val[low]:.3g} to {end:.3g}, while the "
            f"training loss fell from {train[low]:.3g} to {learnt:.3g}"
        )
    elif (
        learnt < FALLEN * train[half]
        and end > APART * learnt
        and 1 - end / val[half] < FOLLOWED * (1 - learnt / train[half])
    ):
        said = (
            f"since step {steps[half]:.0f} the training loss has fallen from {train[half]:.3g} to {learnt:.3g}, and "
            f"the validation loss has not followed: {val[half]:.3g} to {end:.3g}"
        )
    else:
        return None
    said += (
        f". mAP was best after step {steps[int(run.evaluations['mAP'].argmax())]:.0f}: the photos are learnt by heart"
    )
    curves = (run.course("validation loss", val), run.course("training loss", train))
    return Finding("overfitting", said, _regularise(run), Plot(curves), "more photos help most")


def _regularise(run: Run) -> tuple[str, ...]:
    """What makes a run learn less by heart, of what it doesn't do yet."""
    augment, model = run.settings.augment, run.settings.model
    wanted = {"crop": 0.5, "colour": 0.5, "mosaic": 0.3}
    changes = [f"augment.{name}={share:g}" for name, share in wanted.items() if getattr(augment, name) < share]
    if not changes and model.dropout == 0:
        changes.append("model.dropout=0.1")
    return (*changes, "train.patience=10") if not run.settings.train.patience else tuple(changes)


def _starved(run: Run) -> Finding | None:
    """Time spent waiting for photos."""
    wait = run.steps["data_wait"]
    share = run.part(wait, 0.1, 1)
    if not share > STARVED:
        return None
    cfg = run.settings.train
    changes = []
    if cfg.decode == "full":
        changes.append("train.decode=reduced")
    if cfg.cache == "none":
        changes.append("train.cache=disk")
    changes.append(f"train.workers={max(2, 2 * cfg.workers)}")
    speed = run.part(run.steps["img_s"], 0.1, 1)
    said = (
        f"{share:.0%} of the time goes by waiting for photos: {speed:.3g} img/s, where the network could do "
        f"{speed / max(1 - share, 1e-6):.3g}"
    )
    curves = (run.curve("data_wait", "share of time waiting for data"),)
    return Finding("data-starved", said, tuple(changes), Plot(curves, STARVED))


def _unpredicted(run: Run) -> Finding | None:
    """Classes that are never found, where others are."""
    names = [name.removeprefix("AP/") for name in run.classes if name.startswith("AP/")]
    ap = {name: run.classes[f"AP/{name}"] for name in names}
    known = [name for name in names if np.isfinite(ap[name][-1])]  # those in the validation split
    never = [name for name in known if not run.classes[f"found/{name}"][-2:].any() and ap[name][-1] < UNFOUND]
    others = [name for name in known if name not in never]
    usual = float(np.median([ap[name][-1] for name in others])) if others else 0.0
    if not never or len(others) < FOUND * len(known) or usual < UNFOUND:
        return None
    counts = {name: splits.get("train", 0) for name, splits in run.objects.items()}
    listed = ", ".join(f"{name} ({counts[name]} objects to learn from)" if counts else name for name in never[:8])
    said = f"{listed}: never found at the last evaluations, where the others' median AP is {usual:.3f}"
    often = float(np.median([counts[name] for name in others])) if counts else 0.0
    if counts:
        said += f", with {often:.0f} objects"
    rare = bool(counts) and min(counts[name] for name in never) < often / 4
    changes = ("train.sampler=repeat-factor", "train.repeat_threshold=0.3") if rare else ()
    advice = "label more of them" if rare else "look at their labels:  detkit data show --class NAME"
    best = max(others, key=lambda name: float(ap[name][-1]))
    curves = tuple(Curve(f"AP {name}", run.classes["step"], ap[name]) for name in (*never[:2], best))
    return Finding("classes never predicted", said, changes, Plot(curves), advice)


BROKEN: tuple[Callable[[Run], Finding | None], ...] = (
    _exploding, _diverging, _rate_high, _alike, _dead, _vanishing, _rate_low, _flat,
)  # fmt: skip
OTHERS: tuple[Callable[[Run], Finding | None], ...] = (_overfitting, _unpredicted)


def diagnose(run: Run) -> list[Finding]:
    """What is wrong with a run, the worst first; nothing where it learns as it should."""
    broken: Finding | None = None
    for rule in BROKEN if not run.learnt else (_diverging,):
        if broken := rule(run):
            break
    found = [broken] if broken else [finding for rule in OTHERS if (finding := rule(run))]
    starved = _starved(run)
    return [*found, starved] if starved else found


# --- what is shown ----------------------------------------------------------------------------------------------------

_BLOCKS, _PLAIN = "▁▂▃▄▅▆▇█", "_.-=+*%#"  # for consoles without Unicode
_WIDTH = 40


def sparkline(values: Values, *, log: bool = False, blocks: str = _BLOCKS) -> str:
    """A curve as one line of text: medians of equal parts, scaled between the lowest and the highest. A cross is where
    values are not finite."""
    values = np.where(values > 0, np.log10(np.maximum(values, 1e-300)), np.nan) if log else values
    parts = np.array_split(values, min(_WIDTH, len(values)))
    finite = [part[np.isfinite(part)] for part in parts]
    medians = [float(np.median(part)) if len(part) else math.nan for part in finite]
    known = [value for value in medians if not math.isnan(value)]
    if not known:
        return "x" * len(medians)
    low, span = min(known), (max(known) - min(known)) or 1.0
    places = [value if math.isnan(value) else (value - low) / span * (len(blocks) - 1) for value in medians]
    return "".join("x" if math.isnan(place) else blocks[round(place)] for place in places)


def png(plot: Plot) -> bytes:
    """The curves as a small picture. Raises UserError where matplotlib is not installed."""
    need("matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=(6.4, 2.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    for curve, colour in zip(plot.curves, COLOURS, strict=False):
        known = np.isfinite(curve.y)
        few = known.sum() <= 30
        axes.plot(
            curve.x[known], curve.y[known], color=colour, label=curve.name, linewidth=1.4, marker="." if few else None
        )
    if plot.limit is not None:
        axes.axhline(plot.limit, color="0.5", linewidth=1, linestyle="--")
    axes.set(xlabel="optimiser step", yscale="log" if plot.log else "linear")
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _uri(plot: Plot) -> str:
    return "data:image/png;base64," + base64.b64encode(png(plot)).decode()


def overview(run: Run) -> dict[str, Plot]:
    """The curves that a practitioner looks at, by title."""
    wide = len(run.val_loss) > 0 and np.nanmax(run.val_loss) > 50 * np.nanmin(run.loss)
    plots = {"Loss": Plot((run.training,))}
    if len(run.val_loss):
        plots["Loss"] = Plot((run.training, run.course("validation loss", run.val_loss)), log=bool(wide))
        plots["mAP"] = Plot(tuple(run.course(name, run.evaluations[name]) for name in ("mAP", "mAP50")))
    plots["Learning rate"] = Plot((run.curve("lr", "neck and head"), run.curve("lr_backbone", "first layers")))
    for title, prefix in (("Gradient's norm", "grad"), ("Update / weights", "update")):
        plots[title] = Plot(tuple(run.curve(f"{prefix}_{group}", group) for group in GROUPS), log=True)
    plots["Share of time waiting for data"] = Plot((run.curve("data_wait", "share"),))
    return plots


def summary(run: Run) -> str:
    """How far the run is, in one line."""
    best = [f"best {name} {run.evaluations[name].max():.3f}" for name in ("mAP", "mAP50") if len(run.val_loss)]
    epochs = f"epoch {run.metrics['epoch'][-1]:.0f}, " if run.metrics else ""
    return f"{run.folder.name}: {epochs}step {run.done}; {', '.join(best) or 'not yet evaluated'}"


def report(run: Run, findings: Sequence[Finding], console: Console) -> None:
    """Print the findings."""
    blocks = _PLAIN if console.options.ascii_only else _BLOCKS
    console.print(summary(run), highlight=False, markup=False)
    for number, finding in enumerate(findings, 1):
        console.print(f"\n{number}. {finding.name}", style="bold red", highlight=False, markup=False)
        console.print(f"{finding.sentence[:1].upper()}{finding.sentence[1:]}.", highlight=False, markup=False)
        table = Table(box=None, show_header=False, pad_edge=False)
        for curve in finding.plot.curves:
            known = curve.y[np.isfinite(curve.y)]
            ends = f"{known[0]:.3g} to {known[-1]:.3g}" if len(known) else ""
            table.add_row(curve.name, Text(sparkline(curve.y, log=finding.plot.log, blocks=blocks)), ends)
        console.print(table)
        if finding.changes:
            console.print(f"  --set {' '.join(finding.changes)}", style="bold", highlight=False, markup=False)
        if finding.advice:
            console.print(f"  {finding.advice}", highlight=False, markup=False)
    if not findings:
        console.print("nothing wrong found", style="green")


def newest(runs: Path = Path("runs")) -> Path:
    """The folder of the run that has recorded something last. Raises UserError where there is none."""
    tables = list(runs.glob("*/steps.csv"))
    if not tables:
        raise UserError(f"{runs}: no run has recorded anything yet; name a run's folder")
    return max(tables, key=lambda path: path.stat().st_mtime_ns).parent


def run(folder: Path, console: Console, *, html: Path | None = None, json_file: Path | None = None) -> list[Finding]:
    """``detkit doctor``: print what is wrong with a run, and write it as a page and as JSON where asked."""
    recorded = Run(folder)
    findings = diagnose(recorded)
    report(recorded, findings, console)
    if json_file:
        tree = {"run": folder.name, "steps": recorded.done, "findings": [f.tree() for f in findings]}
        atomic_write(json_file, json.dumps(tree, ensure_ascii=False, indent=1) + "\n")
    if html:
        page.write(
            html,
            "doctor.html",
            name=folder.name,
            lead=summary(recorded),
            findings=[(finding, _uri(finding.plot)) for finding in findings],
            curves=[(title, _uri(plot)) for title, plot in overview(recorded).items()],
        )
    for path in (json_file, html):
        if path:
            console.print(f"written: {path}", highlight=False, markup=False)
    return findings

"""What came of a study's trials: a table, trials.csv, plots, and the best configuration as a config."""

from __future__ import annotations

import csv
import io
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detkit import config, space
from detkit.files import atomic_write

if TYPE_CHECKING:
    from detkit.tune import Plan

BEST, CSV = "best.yaml", "trials.csv"
_ROWS = 10  # of the table
_MINUTE = timedelta(minutes=1)
_FEWEST = 6  # finished trials that importances are estimated from
_GOOD, _BAD = "#0072B2", "#D55E00"


def shuffled(grid: Mapping[str, Sequence[Any]], seed: int) -> Iterator[dict[str, Any]]:
    """The combinations of a grid, in an order drawn from the seed: its first part looks everywhere."""
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    random.Random(seed).shuffle(every)
    return iter(every)


def words(params: Mapping[str, Any]) -> str:
    """A trial's values as they would be set."""
    return "  ".join(f"{name}={_value(value)}" for name, value in params.items())


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def finished(frozen: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that were trained to their end, best first."""
    done = [trial for trial in frozen if trial.state == TrialState.COMPLETE]
    return sorted(done, key=lambda trial: (-_figure(trial), trial.number))


def _figure(trial: FrozenTrial) -> float:
    return math.nan if trial.value is None else trial.value


def _first(frozen: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """The starting configuration's, once it is finished."""
    return next((t for t in frozen if "start" in t.user_attrs and t.state == TrialState.COMPLETE), None)


def write(folder: Path, plan: Plan, searched: space.Space, frozen: Sequence[FrozenTrial]) -> None:
    """Write trials.csv and, once a trial is finished, best.yaml: the starting config with the best trial's values, at
    its own length. Each is replaced whole."""
    begun = [trial for trial in frozen if trial.state != TrialState.WAITING]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["trial", "state", plan.objective, "epoch", "minutes", *searched, "reason"])
    for trial in begun:
        ended, reason = trial.datetime_complete or trial.datetime_start, trial.user_attrs.get("reason")
        minutes = 0.0 if ended is None or trial.datetime_start is None else (ended - trial.datetime_start) / _MINUTE
        params = [trial.params.get(name) for name in searched]
        state = trial.state.name.lower()
        rows.writerow([trial.number, state, trial.value, trial.last_step, round(minutes, 2), *params, reason])
    atomic_write(folder / CSV, text.getvalue())
    done = finished(begun)
    if not done:
        return
    best, first = done[0], _first(begun)
    settings = plan.start
    if best is not first:
        settings = space.applied(settings.model_dump(mode="json"), searched, best.params, f"trial {best.number}")
    settings = settings.model_copy(update={"name": f"{settings.name}-tuned"})
    said = f"# {_verdict(plan, best, first)}\n# {words(best.params)}\n"
    if plan.epochs:
        said += f"# The trials had {plan.epochs} epochs; this is the whole length.\n"
    atomic_write(folder / BEST, said + config.dump(settings))


def _verdict(plan: Plan, best: FrozenTrial, first: FrozenTrial | None) -> str:
    name, figure = f"trial {best.number}: {plan.objective}", _figure(best)
    if first is None:
        return f"{name} {figure:.4f}; the starting configuration has no figure yet"
    start = _figure(first)
    if best is first or figure <= start:
        return f"no trial was better than the starting configuration: {plan.objective} {start:.4f}"
    return f"{name} {figure:.4f}, the starting configuration's {start:.4f} (+{figure - start:.4f})"


def report(folder: Path, plan: Plan, study: optuna.Study, console: Console) -> None:
    """Print the best trials and draw the plots."""
    frozen = [trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    done = finished(frozen)
    counts = {state: sum(trial.state == state for trial in frozen) for state in TrialState}
    console.print(
        f"{folder}: {counts[TrialState.COMPLETE]} trials finished, {counts[TrialState.PRUNED]} pruned, "
        f"{counts[TrialState.FAIL]} failed, {counts[TrialState.RUNNING]} open",
        highlight=False,
    )
    if not done:
        return
    first = _first(frozen)
    names = [*plan.space]
    table = Table("trial", plan.objective, *(escape(name) for name in names), title="best trials", title_justify="left")
    shown = done[:_ROWS] + ([first] if first and first not in done[:_ROWS] else [])
    for trial in shown:
        mark = " (start)" if trial is first else ""
        values = [escape(_value(trial.params.get(name, "-"))) for name in names]
        table.add_row(f"{trial.number}{mark}", f"{_figure(trial):.4f}", *values)
    console.print(table)
    for name, picture in plots(plan, study).items():
        atomic_write(folder / f"{name}.png", picture)
    console.print(_verdict(plan, done[0], first), style="bold", highlight=False)
    console.print(f"plots and {CSV}: {folder}\nnext:  detkit train --config {folder / BEST}", highlight=False)


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each setting decides whether a trial is among the good ones, greatest first, summing to 1 (PED-ANOVA,
    Watanabe 2023); empty where there are too few finished trials to tell."""
    count = len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    if count < _FEWEST:
        return {}
    good = min(0.5, max(0.1, 5 / count))
    # Against the whole space, not against the other finished trials: the bad ones have been pruned.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=good, evaluate_on_local=False)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


def plots(plan: Plan, study: optuna.Study) -> dict[str, bytes]:
    """PNGs by name: history, slices (the figure against each setting) and, from enough trials, importance."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    frozen = [trial for trial in study.get_trials(deepcopy=False) if trial.value is not None]
    shares = importances(study)
    columns = min(3, math.ceil(len(plan.space) ** 0.5))
    rows = -(-len(plan.space) // columns)
    pictures = {}
    sizes = {"history": (6.4, 4.0), "slices": (3.2 * columns, 2.6 * rows + 0.4), "importance": (6.4, 3.2)}
    for name, size in sizes.items():
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        if name == "history":
            _plot_history(figure.subplots(), plan, frozen)
        elif name == "slices":
            _plot_slices(figure, figure.subplots(rows, columns, squeeze=False), plan, frozen)
        elif shares:
            _plot_importance(figure.subplots(), shares)
        else:
            continue
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        pictures[name] = buffer.getvalue()
    return pictures


def _plot_history(axes: Any, plan: Plan, frozen: Sequence[FrozenTrial]) -> None:
    done = [trial for trial in frozen if trial.state == TrialState.COMPLETE]
    cut = [trial for trial in frozen if trial.state == TrialState.PRUNED]
    axes.scatter([t.number for t in done], [t.value for t in done], color=_GOOD, s=24, label="finished", zorder=3)
    if cut:
        axes.scatter([t.number for t in cut], [t.value for t in cut], color="0.6", marker="x", s=24, label="pruned")
    best = list(itertools.accumulate((_figure(trial) for trial in done), max))
    axes.step([t.number for t in done], best, where="post", color=_BAD, label="best so far")
    first = _first(frozen)
    if first:
        axes.axhline(_figure(first), color="0.4", linewidth=1, linestyle="--", label="starting configuration")
    axes.set(title="Trials of the study", xlabel="trial", ylabel=plan.objective)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8)


def _plot_importance(axes: Any, shares: Mapping[str, float]) -> None:
    axes.barh([*shares], [*shares.values()], color=_GOOD)
    axes.invert_yaxis()
    axes.set(title="How much each setting decides", xlabel="importance (PED-ANOVA)")
    axes.tick_params(axis="y", labelsize=8)


def _ends(distribution: Any) -> tuple[float, float]:
    return distribution.low, distribution.high


def _plot_slices(figure: Any, grid: Any, plan: Plan, frozen: Sequence[FrozenTrial]) -> None:
    panels = list(grid.flat)
    dots = None
    for axes, name in zip(panels, plan.space, strict=False):
        own = [trial for trial in frozen if name in trial.params]
        values = [trial.params[name] for trial in own]
        distribution = next((trial.distributions[name] for trial in own), None)
        if isinstance(distribution, optuna.distributions.CategoricalDistribution):
            choices = [*distribution.choices]
            values = [choices.index(value) for value in values]
            axes.set_xticks(range(len(choices)), [f"{choice!s:.16}" for choice in choices], rotation=30, fontsize=7)
        elif distribution is not None and getattr(distribution, "log", False):
            low, high = ((min, max)[end]([limit, *values]) for end, limit in enumerate(_ends(distribution)))
            ticks = [low, (low * high) ** 0.5, high]
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
            axes.minorticks_off()
        for marker, state in (("o", TrialState.COMPLETE), ("x", TrialState.PRUNED)):
            chosen = [(x, t.value, t.number) for x, t in zip(values, own, strict=True) if t.state == state]
            shades: Any = {"cmap": "viridis", "vmin": 0, "vmax": max((t.number for t in frozen), default=1)}
            x, y, numbers = zip(*chosen, strict=True) if chosen else ((), (), ())
            dots = axes.scatter(x, y, c=numbers, marker=marker, s=18, **shades)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
    for axes in panels[len(plan.space) :]:
        axes.set_axis_off()
    for row in grid:
        row[0].set_ylabel(plan.objective, fontsize=8)
    if dots is not None:
        figure.colorbar(dots, ax=grid, label="trial (crosses: pruned)", shrink=0.8)

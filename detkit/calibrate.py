"""``detkit calibrate``: thresholds for an aim, and calibrated scores, kept in the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from detkit import checkpoint, matches, metrics, snippets, sources, thresholds
from detkit.errors import UserError
from detkit.files import atomic_write
from detkit.manifest import DIGEST, KEY, Decision, Manifest, seal
from detkit.sources import Source, Where


def run(
    model: str | None,
    where: Where,
    console: Console,
    *,
    aim: str = "f1",
    method: thresholds.Method = "temperature",
    out: Path | None = None,
) -> Decision:
    """Choose thresholds and fit a calibration on a split, say what they are worth, and write them into the model, or
    into a copy of it, `out`. Raises UserError."""
    wanted = thresholds.aim(aim)
    source = sources.measured(model, where, console)
    if source.manifest is None:
        raise UserError(
            f"{source.path}: detections; thresholds are kept in a model: name a run, a checkpoint or an .onnx"
        )
    decision, worth = decide(source, method, wanted)
    table = Table("on photos that it was not chosen by", "before", "after", box=None, pad_edge=False)
    for name, before in worth["before"].items():
        table.add_row(name, f"{before:.3f}", f"{worth['after'][name]:.3f}")
    console.print(table)
    low, high = min(decision.thresholds), max(decision.thresholds)
    path = out or source.path
    programs = snippets.present(path) if path.suffix == ".onnx" and path.is_file() else {}
    write(source.path, path, decision)
    console.print(
        f"{path}: thresholds for {wanted}, {low:.3f} to {high:.3f}; calibration: {decision.calibration}",
        highlight=False,
        markup=False,
    )
    if programs:
        snippets.write(path, [each for each, own in programs.items() if own])
    for each, own in programs.items():
        said = "with these thresholds" if own else "not detkit's own text, so left with its thresholds"
        console.print(f"{each}: {said}", highlight=False, markup=False)
    return decision


def decide(
    source: Source, method: thresholds.Method, wanted: thresholds.Aim
) -> tuple[Decision, dict[str, dict[str, float]]]:
    """Calibration and thresholds by a model's detections, and what they are worth: `count_figures` and the calibration
    error of each half of the photos with what the other half gave; before: with one threshold for all classes, of the
    other half's best F1, and scores as they are."""
    pool = source.pool()
    state = matches.match(pool, (0.5,)).state[0, 0]
    scores, before, after = pool.score.copy(), np.zeros(len(pool.score), bool), np.zeros(len(pool.score), bool)
    odd = np.arange(pool.photos) % 2 == 1
    for learnt, tested in ((odd, ~odd), (~odd, odd)):
        half, own = pool.of_photos(learnt), tested[pool.photo]
        before |= own & (pool.score >= metrics.best_score(half, matches.match(half, (0.5,)).state[0, 0]))
        decision = thresholds.decided(half, method, wanted)
        scores[own] = thresholds.rescored(pool, decision).score[own]
        after |= own & (scores >= np.array(decision.thresholds)[pool.label])
    worth = {
        "before": _worth(metrics.counted(pool, state, before), pool.score, state),
        "after": _worth(metrics.counted(pool, state, after), scores, state),
    }
    return thresholds.decided(pool, method, wanted), worth


def _worth(counted: metrics.Counts, score: matches.Floats, state: Any) -> dict[str, float]:
    return metrics.count_figures(counted) | {"calibration error": thresholds.reliability(score, state).error}


def write(source: Path, out: Path, decision: Decision) -> None:
    """Write a checkpoint or an ONNX file with that decision. Raises UserError."""
    if source.suffix != out.suffix:
        raise UserError(f"--out {out}: name a file that ends in {source.suffix}")
    if source.suffix != ".onnx":
        trained = checkpoint.read(source)
        checkpoint.write(
            out,
            trained.weights,
            trained.config,
            trained.classes,
            trained.epoch,
            trained.metrics,
            decision,
            trained.photos,
        )
        return
    import onnx

    content = onnx.load(source)
    properties = {each.key: each.value for each in content.metadata_props if each.key != DIGEST}
    manifest = Manifest.from_json(properties[KEY], str(source)).model_copy(update={"decision": decision})
    onnx.helper.set_model_props(content, properties | {KEY: manifest.to_json()})
    atomic_write(out, seal(content.SerializeToString()))

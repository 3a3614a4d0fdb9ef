"""``detkit eval``: all that is known of a detector on a split; and ``detkit compare``, several side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from detkit import imaging, matches, metrics, mistakes, report, sources, speed, thresholds
from detkit.errors import UserError
from detkit.evaluate import table
from detkit.files import atomic_write, require_free
from detkit.matches import HIT, Floats, Pool
from detkit.mistakes import Confusion, Suspect, Tide
from detkit.sources import Source, Where

SHARES = ("mAP", "mAP50", "mAP75", "precision", "recall", "f1", "count_MAE", "count_exact", "cAcc")  # with intervals


@dataclass(frozen=True, slots=True)
class Files:
    """What is written: figures as JSON and Markdown, a page; a new folder of VOC XML of photos with doubtful labels."""

    json: Path | None = None
    markdown: Path | None = None
    html: Path | None = None
    suspects: Path | None = None

    def written(self) -> list[Path]:
        """Those that were asked for."""
        return [path for path in (self.json, self.markdown, self.html, self.suspects) if path]


@dataclass(frozen=True, slots=True, eq=False)
class Assessment:
    """What is known of a model's detections, with calibrated scores where the model has a calibration. figures: plain
    data. model: what is resampled. score: of each class, the threshold from which things are counted, float64 [C]."""

    source: Source
    pool: Pool
    model: metrics.Scored
    score: Floats
    tide: Tide
    confusion: Confusion
    suspects: list[Suspect]
    figures: dict[str, Any]


def assess(
    source: Source,
    *,
    resamples: int = metrics.RESAMPLES,
    speeds: speed.Speed | None = None,
    ious: Sequence[float] = (),
) -> Assessment:
    """Measure everything. resamples: of the photos, for intervals; 0: none. ious: at which AP and AR are measured,
    besides COCO's."""
    pool, decision = source.pool(), source.decision
    if decision:
        pool = thresholds.rescored(pool, decision)
    figures = metrics.brief(pool)
    levels = {round(iou, 4): iou for iou in (*ious, *metrics.IOUS)}  # 0.9 is COCO's, which is less by a last digit
    figures["by_iou"] = metrics.by_iou(pool, [levels[iou] for iou in sorted(levels)])
    near = matches.pairs(pool, 0.5)
    figures["VOC_AP50_2007"] = metrics.pooled_mean(metrics.voc(pool, eleven=True, near=near))
    alike = np.full(len(pool.classes), figures["score"])
    score = np.array(decision.thresholds) if decision and decision.thresholds else alike
    model = metrics.scored(pool, score)
    split = mistakes.tide(pool)
    confused = mistakes.confusion(pool, score)
    suspects = mistakes.suspects(pool, split, score)
    figures |= metrics.count_figures(model.counted)
    drawn = metrics.resamples([model], resamples)[0] if resamples else {}
    figures["intervals"] = metrics.intervals(drawn, figures)
    figures["tide"] = {name: {"AP": split.costs[name], "number": split.numbers[name]} for name in mistakes.KINDS}
    figures["look_alikes"] = [each._asdict() for each in mistakes.look_alikes(confused.table, pool.classes)]
    figures["confusion"] = {"classes": [*pool.classes, "background"], "table": confused.table.tolist()}
    photos = mistakes.worst(pool, confused)
    figures["worst"] = [{"photo": source.names[each.place], **each._asdict()} for each in photos]
    figures["suspects"] = [each._asdict() | {"photo": source.names[each.photo]} for each in suspects]
    figures["calibration_error"] = thresholds.reliability(pool.score, model.state[0]).error
    figures["classes"] = _classes(pool, model, score, figures["per_class"], near)
    figures["thresholds"] = f"for {decision.aim}" if decision and decision.thresholds else "of the best F1 here"
    figures["speed"] = speeds.tree() if speeds else None
    head = {
        "model": str(source.path),
        "data": str(source.root),
        "split": source.split,
        "photos": pool.photos,
        "objects": int((~pool.ignored).sum()),
        "detections": len(pool.score),
    }
    return Assessment(source, pool, model, score, split, confused, suspects, head | figures)


def _classes(
    pool: Pool, model: metrics.Scored, score: Floats, ap: dict[str, list[float] | None], near: matches.Pairs
) -> list[dict[str, Any]]:
    """What is known of each class that has objects or detections that are shown."""
    voc, objects = metrics.voc(pool, near=near), pool.objects()
    state = model.state[0]
    kept = (pool.score >= score[pool.label]) & (state != matches.IGNORED)
    found, hit = pool.found(kept), pool.found(kept & (state == HIT))
    rows = []
    for label, name in enumerate(pool.classes):
        true, all_found, there = (int(table[:, label].sum()) for table in (hit, found, objects))
        if not there and not all_found:
            continue
        own = pool.of_class(label)
        swept = metrics.sweep(pool.score[own], state[own], there)
        best = int(swept.f1.argmax()) if len(swept.score) else -1
        pair = ap[name] or [math.nan, math.nan]
        rows.append(
            {
                "class": name,
                "objects": there,
                "AP": _number(pair[0]),
                "AP50": _number(pair[1]),
                "VOC_AP50": voc[name],
                "precision": true / all_found if all_found else None,
                "recall": true / there if there else None,
                "f1": 2 * true / max(1, all_found + there),
                "count_MAE": float(np.abs(found[:, label] - objects[:, label]).mean()),
                "score": float(score[label]),
                "best_f1": float(swept.f1[best]) if best >= 0 else None,
                "best_score": metrics.floored(float(swept.score[best])) if best >= 0 else None,
            }
        )
    return rows


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def run(
    model: str | None,
    where: Where,
    console: Console,
    files: Files | None = None,
    *,
    resamples: int = metrics.RESAMPLES,
    timed: bool = True,
    ious: Sequence[float] = (),
) -> dict[str, Any]:
    """``detkit eval``: print the figures of a run, a checkpoint, an .onnx file or detections in a file, on a split, and
    write them where asked. timed: its speed too. ious: at which AP and AR are printed as well. Raises UserError."""
    files = files or Files()
    if files.suspects:
        require_free(files.suspects)
    source = sources.measured(model, where, console)
    found = assess(source, resamples=resamples, speeds=_speed(source, where) if timed else None, ious=ious)
    figures = found.figures
    console.print(table(figures, f"{source.path} on {source.root}, {source.split}"))
    console.print(*report.lines(figures, ious), sep="\n", highlight=False, markup=False)
    if files.suspects:
        mistakes.write_suspects(files.suspects, found.suspects, source.records, source.names, source.classes)
    _write(files, figures, report.markdown, lambda path: report.write(path, found), console)
    return figures


def _write(
    files: Files,
    tree: dict[str, Any],
    markdown: Callable[[dict[str, Any]], str],
    page: Callable[[Path], None],
    console: Console,
) -> None:
    """Write what was asked for, and say what there is now."""
    if files.json:
        atomic_write(files.json, json.dumps(tree, ensure_ascii=False, indent=1) + "\n")
    if files.markdown:
        atomic_write(files.markdown, markdown(tree))
    if files.html:
        page(files.html)
    for path in files.written():
        console.print(f"written: {path}", highlight=False, markup=False)


def _speed(source: Source, where: Where) -> speed.Speed | None:
    detector = sources.detector(source, where)
    if detector is None:
        return None
    return speed.measure(detector, [imaging.decode(record.path) for record in source.records[: speed.BATCH]])


# --- several ----------------------------------------------------------------------------------------------------------


def compare(
    models: Sequence[str],
    where: Where,
    console: Console,
    files: Files | None = None,
    *,
    resamples: int = metrics.RESAMPLES,
    figure: str = "mAP",
    timed: bool = True,
) -> dict[str, Any]:
    """``detkit compare``: models side by side on the same photos, and whether each is better than the first by
    `figure`, one of `SHARES`. timed: their speed too. Raises UserError where their classes or photos differ."""
    files = files or Files()
    if figure not in SHARES:
        raise UserError(f"--figure {figure}: one of {', '.join(SHARES)}")
    found: list[Assessment] = []
    for model in models:
        source = sources.measured(model, where, console)
        if found and (source.names, source.classes) != (found[0].source.names, found[0].source.classes):
            first = found[0].source.path
            raise UserError(f"{source.path}: its photos or classes are not those of {first}; name a data set by --data")
        found.append(assess(source, resamples=0, speeds=_speed(source, where) if timed else None))
    drawn = metrics.resamples([each.model for each in found], resamples)
    for each, own in zip(found, drawn, strict=True):
        each.figures["intervals"] = metrics.intervals(own, each.figures)
    names = _names([each.source for each in found])
    verdicts = []
    for place in range(1, len(found)):
        apart = found[place].figures[figure] - found[0].figures[figure]
        result = metrics.compare(figure, drawn[place], drawn[0], apart)
        verdicts.append({"first": names[place], "second": names[0], "figure": figure, **result._asdict()})
    tree = {
        "models": [{"name": n, **each.figures} for n, each in zip(names, found, strict=True)],
        "comparisons": verdicts,
    }
    console.print(_side_by_side(tree))
    console.print(*(report.verdict(each) for each in verdicts), sep="\n", highlight=False, markup=False)
    _write(files, tree, report.compared_markdown, lambda path: report.write_compared(path, tree, found), console)
    return tree


def _names(found: Sequence[Source]) -> list[str]:
    """A name for each, no two alike."""
    short = [source.name for source in found]
    return short if len(set(short)) == len(short) else [f"{i}: {name}" for i, name in enumerate(short, 1)]


def _side_by_side(tree: dict[str, Any]) -> Table:
    result = Table(box=None, pad_edge=False)
    result.add_column("")
    for model in tree["models"]:
        result.add_column(Text(model["name"]), justify="right")
    for name, cells in report.side_by_side(tree):
        result.add_row(name, *cells)
    return result

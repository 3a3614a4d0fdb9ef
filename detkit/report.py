"""An assessment to read: lines for the terminal, Markdown, and a page with plots and photos."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from detkit import imaging, matches, metrics, page, thresholds
from detkit.errors import need
from detkit.runtime import render
from detkit.types import Detections

if TYPE_CHECKING:
    from detkit.assess import Assessment

SIDE = 360  # pixels: the longer side of a photo on the page
PHOTOS, DOUBTS = 60, 24
DOUBT = {
    "no label": "Detected, without label",
    "another class": "Detected as another class",
    "box": "Detected with another box",
    "nothing there": "Labelled, and never detected",
}
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
_MOST_NAMED = 40  # classes whose names are written along a plot

# What figures are called, and how many digits they have.
_NAMES = {
    "mAP": "mAP (IoU 0.50 to 0.95)",
    "mAP50": "mAP50",
    "mAP75": "mAP75",
    "mAP_small": "mAP, small objects",
    "mAP_medium": "mAP, medium objects",
    "mAP_large": "mAP, large objects",
    "AR": "AR, all detections",
    "AR1": "AR, 1 detection",
    "AR10": "AR, 10 detections",
    "AR100": "AR, 100 detections",
    "AR_small": "AR, small objects",
    "AR_medium": "AR, medium objects",
    "AR_large": "AR, large objects",
    "VOC_AP50": "VOC AP50 (2010, area)",
    "VOC_AP50_2007": "VOC AP50 (2007, 11 points)",
    "precision": "precision",
    "recall": "recall",
    "f1": "F1",
    "count_MAE": "counting error (MAE)",
    "count_exact": "photos with the right count",
    "cAcc": "cAcc, every class's count right",
    "calibration_error": "calibration error (ECE)",
}


_AT_IOU = (
    ("AP", "AP"),
    ("small", "AP_small"),
    ("medium", "AP_medium"),
    ("large", "AP_large"),
    ("AR", "AR"),
    ("VOC AP", "VOC_AP"),
)


def number(value: float | None) -> str:
    """A figure as text."""
    return "-" if value is None else f"{value:.3f}"


def ranged(figures: dict[str, Any], name: str) -> str:
    """A figure with its 95 % interval, where there is one."""
    ends = figures["intervals"].get(name)
    return number(figures[name]) + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")


def speed_cells(speed: dict[str, Any] | None) -> dict[str, str]:
    """What is said of a detector's size and speed."""
    if speed is None:
        return {}
    parameters, flops = speed["parameters"], speed["flops"]
    return {
        "provider": speed["provider"],
        "parameters": f"{parameters / 1e6:.2f} M",
        **({"FLOPs a photo": f"{flops / 1e9:.2f} G"} if flops is not None else {}),
        "latency": f"{1e3 * speed['latency']:.1f} ms (95 %: {1e3 * speed['latency95']:.1f})",
        "throughput": f"{speed['throughput']:.1f} photos/s",
    }


def lines(figures: dict[str, Any], ious: Sequence[float] = ()) -> list[str]:
    """What the terminal shows beside the table of classes; at `ious` AP and AR too."""
    names = ("mAP", "mAP50", "mAP75")
    costs = ", ".join(f"{name} {each['AP']:.3f}" for name, each in figures["tide"].items())
    sizes = ", ".join(f"{size} {number(figures[f'mAP_{size}'])}" for size in ("small", "medium", "large"))
    shares = ", ".join(f"{name} {ranged(figures, name)}" for name in ("precision", "recall", "f1"))
    voc, voc_2007 = number(figures["VOC_AP50"]), number(figures["VOC_AP50_2007"])
    off, exact, checkout = (figures[name] for name in ("count_MAE", "count_exact", "cAcc"))
    said = [
        ", ".join(f"{name} {ranged(figures, name)}" for name in names),
        f"VOC AP50 {voc} (2007: {voc_2007})   AR {number(figures['AR'])}   mAP {sizes}",
        *(
            f"at IoU {each['iou']:g}: " + ", ".join(f"{name} {number(each[key])}" for name, key in _AT_IOU)
            for each in figures["by_iou"]
            if each["iou"] in {round(iou, 4) for iou in ious}
        ),
        f"at the thresholds {figures['thresholds']}: {shares}",
        f"counts: off by {off:.2f} a photo; right in {exact:.1%} of photos, of every class in {checkout:.1%} (cAcc)",
        f"errors cost AP50: {costs}",
    ]
    if figures["speed"]:
        said.append(", ".join(f"{name} {text}" for name, text in speed_cells(figures["speed"]).items()))
    if figures["intervals"]:
        said.append("in brackets: 95 % intervals, by a bootstrap over photos")
    return said


def markdown(figures: dict[str, Any]) -> str:
    """An assessment as Markdown, for CI and pull requests."""
    rows = [(_NAMES[name], ranged(figures, name)) for name in _NAMES]
    rows += list(speed_cells(figures["speed"]).items())
    tide = [(name, number(each["AP"]), each["number"]) for name, each in figures["tide"].items()]
    keys = ("objects", "AP", "AP50", "precision", "recall", "f1", "count_MAE", "score")
    classes = [(each["class"], *(_cell(each[key]) for key in keys)) for each in by_ap(figures)]
    pairs = [(e["first"], e["second"], e["times"], e["reverse"], f"{e['share']:.1%}") for e in figures["look_alikes"]]
    worst = [(each["photo"], each["right"], each["false"], each["missed"]) for each in figures["worst"][:10]]
    parts = [
        f"# {title(figures)}",
        f"{summary(figures)} Thresholds: {figures['thresholds']}. In brackets: 95 % intervals.",
        _table(("figure", "value"), rows),
        "## Errors",
        _table(("kind", "AP50 it costs", "number"), tide),
        "## By IoU",
        _table(("IoU", *(name for name, _ in _AT_IOU)), by_iou(figures)),
        "## Classes",
        _table(("class", *keys), classes),
        "## Taken for each other",
        _table(("class", "taken for", "times", "reverse", "share"), pairs) if pairs else "None.",
        "## Worst photos",
        _table(("photo", "right", "false", "missed"), worst) if worst else "None.",
    ]
    return "\n\n".join(parts) + "\n"


def title(figures: dict[str, Any]) -> str:
    """The heading."""
    model = Path(figures["model"])
    name = model.parent.name if model.suffix == ".safetensors" else model.name
    return f"{name} on {Path(figures['data']).name}, {figures['split']}"


def summary(figures: dict[str, Any]) -> str:
    """What was measured, in a sentence."""
    return (
        f"{figures['photos']} photos, {figures['objects']} objects, {figures['detections']} detections; at most "
        f"{figures['most']} of a photo and class, all of which count."
    )


def by_iou(figures: dict[str, Any]) -> list[list[str]]:
    """A row an IoU, and what is measured at it."""
    return [[f"{each['iou']:.2f}", *(number(each[key]) for _, key in _AT_IOU)] for each in figures["by_iou"]]


def by_ap(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The classes, best first."""
    return sorted(figures["classes"], key=lambda each: -1 if each["AP"] is None else each["AP"], reverse=True)


def _cell(value: object) -> str:
    return number(value) if value is None or isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    body = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([body[0], "|" + " --- |" * len(head), *body[1:]])


# --- several ----------------------------------------------------------------------------------------------------------


def side_by_side(tree: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """A row a figure: its name, and a cell a model."""
    models = tree["models"]
    rows = [(_NAMES[name], [ranged(model, name) for model in models]) for name in _NAMES]
    rows += [(f"AP50 lost: {kind}", [number(m["tide"][kind]["AP"]) for m in models]) for kind in models[0]["tide"]]
    rows.append(("thresholds", [model["thresholds"] for model in models]))
    cells = [speed_cells(model["speed"]) for model in models]
    names = dict.fromkeys(name for each in cells for name in each)
    return rows + [(name, [each.get(name, "-") for each in cells]) for name in names]


def verdict(comparison: dict[str, Any]) -> str:
    """Whether one model is better than another, in a sentence."""
    first, second, figure, p = (comparison[name] for name in ("first", "second", "figure", "p"))
    apart, low, high = (comparison[name] for name in ("difference", "low", "high"))
    up = apart > 0 if figure != "count_MAE" else apart < 0
    if p >= 0.05:
        said = f"No difference between {first} and {second} is shown"
    else:
        said = f"{first} is {'better' if up else 'worse'} than {second}"
    return f"{said}: {figure} {apart:+.3f} ({low:+.3f} to {high:+.3f}), p = {p:.3f} (paired bootstrap over photos)"


def compared_markdown(tree: dict[str, Any]) -> str:
    """Models side by side as Markdown."""
    rows = [(name, *cells) for name, cells in side_by_side(tree)]
    table = _table(("", *(model["name"] for model in tree["models"])), rows)
    first = tree["models"][0]
    head = f"# {len(tree['models'])} models on {Path(first['data']).name}, {first['split']}"
    return "\n\n".join([head, *(verdict(each) + "." for each in tree["comparisons"]), table]) + "\n"


def write_compared(path: Path, tree: dict[str, Any], found: Sequence[Assessment]) -> None:
    """Models side by side as a page."""
    names = [model["name"] for model in tree["models"]]

    def draw(axes: Any) -> None:
        for name, each, colour in zip(names, found, _COLOURS * len(names), strict=False):
            curves = metrics.curves(each.pool, each.model.state[0])
            axes.plot(_recalls(), _mean_curve(curves), color=colour, label=name)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
        axes.set_title("Precision and recall at IoU 0.5, mean over classes")
        axes.legend(fontsize=8, frameon=False)

    page.write(
        path,
        "compare.html",
        tree=tree,
        names=names,
        place=f"{Path(tree['models'][0]['data']).name}, {tree['models'][0]['split']}",
        rows=side_by_side(tree),
        verdicts=[verdict(each) for each in tree["comparisons"]],
        picture=_uri(draw),
        classes=_classes_side_by_side(tree),
    )


def _classes_side_by_side(tree: dict[str, Any]) -> list[tuple[str, list[str]]]:
    tables = [{each["class"]: each["AP"] for each in model["classes"]} for model in tree["models"]]
    names = dict.fromkeys(name for table in tables for name in table)
    return [(name, [number(table.get(name)) for table in tables]) for name in names]


# --- the page ---------------------------------------------------------------------------------------------------------


def write(path: Path, found: Assessment) -> None:
    """An assessment as a page of one file. Raises UserError where it can't be written, or a photo can't be read."""
    figures = found.figures
    kinds: dict[str, list[dict[str, Any]]] = {}
    for each in found.suspects:
        kinds.setdefault(each.doubt, [])
        if len(kinds[each.doubt]) < DOUBTS // 4:
            kinds[each.doubt].append(_doubt(found, each))
    page.write(
        path,
        "eval.html",
        figures=figures,
        heading=title(figures),
        lead=summary(figures),
        rows=[(label, ranged(figures, name)) for name, label in _NAMES.items()],
        speed=speed_cells(figures["speed"]),
        classes=by_ap(figures),
        at_iou=[name for name, _ in _AT_IOU],
        by_iou=by_iou(figures),
        pictures={name: _uri(draw, size) for name, draw, size in _plots(found)},
        worst=[_worst(found, each) for each in figures["worst"][:PHOTOS]],
        doubts={DOUBT[kind]: doubts for kind, doubts in kinds.items()},
        number=number,
        link=_link,
    )


def _link(path: str) -> str:
    return Path(path).absolute().as_uri()


def _worst(found: Assessment, photo: dict[str, Any]) -> dict[str, Any]:
    """A photo with its ground truth and its detections side by side."""
    place = photo["place"]
    record, pool = found.source.records[place], found.pool
    rows = np.flatnonzero(found.confusion.shown & (pool.photo == place))
    rows = rows[np.argsort(-pool.score[rows], kind="stable")]
    detections = Detections(
        pool.box[rows].astype(np.float32), pool.score[rows].astype(np.float32), pool.label[rows], record.hw
    )
    truth = Detections(
        record.boxes.astype(np.float32), np.ones(len(record.labels), np.float32), record.labels, record.hw
    )
    image, classes = imaging.decode(record.path), found.source.classes
    names = sorted({classes[label] for label in (*record.labels, *pool.label[rows])})
    return {
        **photo,
        "path": record.path,
        "classes": names,
        "truth": _photo(image, truth, classes, scores=False),
        "found": _photo(image, detections, classes, scores=True),
    }


def _photo(image: Any, shown: Detections, classes: Sequence[str], *, scores: bool) -> str:
    """The photo with boxes, its longer side `SIDE` pixels, as a data URI."""
    height, width = shown.hw
    scale = SIDE / max(height, width)
    hw = max(1, round(height * scale)), max(1, round(width * scale))
    small = np.array(Image.fromarray(image).resize(hw[::-1], Image.Resampling.LANCZOS))
    moved = shown.boxes * np.tile([hw[1] / width, hw[0] / height], 2).astype(np.float32)
    drawn = render.draw(small, Detections(moved, shown.scores, shown.labels, hw), classes, scores=scores)
    return page.data_uri(drawn)


def _doubt(found: Assessment, suspect: Any) -> dict[str, Any]:
    record = found.source.records[suspect.photo]
    return {
        **suspect._asdict(),
        "name": found.source.names[suspect.photo],
        "path": record.path,
        "classes": [name for name in (suspect.said, suspect.seen) if name],
        "image": page.thumbnail(imaging.decode(record.path), [suspect.box], 200),
    }


def _uri(draw: Callable[[Any], None], size: tuple[float, float] = (6.4, 4.2)) -> str:
    return "data:image/png;base64," + base64.b64encode(png(draw, size)).decode()


def png(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """A plot as a PNG. draw: gets the axes. size: inches."""
    need("matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def plots(found: Assessment) -> dict[str, bytes]:
    """A PNG of each plot, by title."""
    return {name: png(draw, size) for name, draw, size in _plots(found)}


def _plots(found: Assessment) -> Iterator[tuple[str, Callable[[Any], None], tuple[float, float]]]:
    usual, classes = (6.4, 4.2), len(found.figures["classes"])
    tall = max(4.2, 0.9 + 0.17 * min(classes, _MOST_NAMED))
    square = min(11.0, max(5.0, 1.5 + 0.24 * (len(found.pool.classes) + 1)))
    yield "Precision and recall", lambda axes: _plot_curves(axes, found), usual
    yield "AP and AR", lambda axes: _plot_averages(axes, found), usual
    yield "Precision, recall and F1 over the threshold", lambda axes: _plot_sweep(axes, found), usual
    yield "What errors cost", lambda axes: _plot_tide(axes, found), usual
    yield "Counts", lambda axes: _plot_counts(axes, found), usual
    yield "Reliability", lambda axes: _plot_reliability(axes, found), usual
    yield "AP by class", lambda axes: _plot_classes(axes, found), (6.4, tall)
    yield "Confusion", lambda axes: _plot_confusion(axes, found), (square, square)


def _recalls() -> Any:
    return np.linspace(0, 1, metrics.RECALLS)


def _mean_curve(curves: dict[str, matches.Floats]) -> matches.Floats:
    return np.mean(list(curves.values()), axis=0) if curves else np.zeros(metrics.RECALLS)


def draw_curves(axes: Any, curves: dict[str, matches.Floats], most: int = _MOST_NAMED) -> None:
    """Precision over recall at IoU 0.5: the first `most` classes, thin, and the mean of all."""
    for label, (name, curve) in enumerate(list(curves.items())[:most]):
        named = name if len(curves) <= 20 else None
        axes.plot(_recalls(), curve, color=np.array(render.colour(label)) / 255, linewidth=1, alpha=0.7, label=named)
    if curves:
        axes.plot(_recalls(), _mean_curve(curves), color="black", linewidth=2.5, label="mean")
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title="Precision and recall at IoU 0.5")


def _plot_curves(axes: Any, found: Assessment) -> None:
    draw_curves(axes, metrics.curves(found.pool, found.model.state[0]))


def _plot_sweep(axes: Any, found: Assessment) -> None:
    swept = metrics.sweep(found.pool.score, found.model.state[0], found.figures["objects"])
    rows = {"precision": swept.precision, "recall": swept.recall, "F1": swept.f1}
    for (name, values), colour in zip(rows.items(), _COLOURS, strict=False):
        axes.plot(swept.score, values, color=colour, label=name)
    if len(swept.score):
        best = int(swept.f1.argmax())
        axes.axvline(swept.score[best], color="0.5", linewidth=1, linestyle="--")
        axes.set_title(f"All classes together; best F1 {swept.f1[best]:.3f} at {swept.score[best]:.3f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="threshold", ylabel="share")
    axes.legend(fontsize=8, frameon=False)


def _plot_tide(axes: Any, found: Assessment) -> None:
    tide = found.figures["tide"]
    names = list(tide)
    bars = axes.barh(names, [tide[name]["AP"] for name in names], color=_COLOURS[0])
    axes.bar_label(bars, [f"{tide[name]['AP']:.3f}" for name in names], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set(xlabel="mAP50 that is lost", title="Kinds of error (TIDE)")


def _plot_averages(axes: Any, found: Assessment) -> None:
    """AP and AR at all their settings, with intervals where there are some."""
    names = [name for name in _NAMES if name.startswith(("mAP", "AR", "VOC"))]
    known = [name for name in names if found.figures[name] is not None]
    colours = [_COLOURS[("mAP", "AR", "VOC").index(name[: 2 if name[0] == "A" else 3])] for name in known]
    values = np.array([found.figures[name] for name in known])
    axes.barh([_NAMES[name] for name in known], values, color=colours)
    for place, (name, value) in enumerate(zip(known, values, strict=True)):
        low, high = found.figures["intervals"].get(name, (value, value))
        axes.plot((low, high), (place, place), color="black", linewidth=1)
        axes.annotate(number(value), (high, place), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlim=(0, 1), title="AP and AR")


def _plot_counts(axes: Any, found: Assessment) -> None:
    """Photos by how many products too many were found; what is right for every class is told apart."""
    counts = found.model.counted
    off = (counts.found - counts.objects).astype(int)
    sides = np.arange(off.min(initial=0), off.max(initial=0) + 1)
    every = [int((off == side).sum()) for side in sides]
    axes.bar(sides, every, color=_COLOURS[5], label="photos")
    axes.bar([0], [int(counts.checkout.sum())], color=_COLOURS[2], label="of these, every class's count right (cAcc)")
    for side, photos in zip(sides, every, strict=True):
        axes.annotate(str(photos), (side, photos), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    axes.legend(fontsize=8, frameon=False)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="products shown, less those that are there", ylabel="photos", title="Counts at the thresholds")


def _plot_reliability(axes: Any, found: Assessment) -> None:
    rows = thresholds.reliability(found.pool.score, found.model.state[0])
    known = rows.number > 0
    axes.plot((0, 1), (0, 1), color="0.5", linewidth=1, linestyle="--")
    axes.plot(rows.score[known], rows.right[known], color=_COLOURS[0], marker="o")
    for x, y, count in zip(rows.score[known], rows.right[known], rows.number[known], strict=True):
        offset = {"xytext": (0, 6), "textcoords": "offset points"}
        axes.annotate(f"{count:,.0f}", (x, y), **offset, ha="center", fontsize=7, color="0.4")
    axes.set(xlim=(0, 1), ylim=(0, 1.08), xlabel="score", ylabel="share that is right")
    axes.set_title(f"Detections by score, with their numbers; calibration error {rows.error:.3f}")


def _plot_classes(axes: Any, found: Assessment) -> None:
    rows = [each for each in by_ap(found.figures) if each["AP"] is not None]
    shown = rows if len(rows) <= _MOST_NAMED else rows[: _MOST_NAMED // 2] + rows[-_MOST_NAMED // 2 :]
    axes.barh([each["class"] for each in shown], [each["AP50"] for each in shown], color=_COLOURS[5], label="AP50")
    axes.barh([each["class"] for each in shown], [each["AP"] for each in shown], color=_COLOURS[0], label="AP")
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    more = f", {len(shown)} of {len(rows)}" if len(shown) < len(rows) else ""
    axes.set(xlim=(0, 1), xlabel="AP", title=f"Classes, the best first{more}")


def _plot_confusion(axes: Any, found: Assessment) -> None:
    table = found.confusion.table
    names = found.figures["confusion"]["classes"]
    picture = axes.imshow(table / np.maximum(table.sum(1, keepdims=True), 1), vmin=0, vmax=1, cmap="viridis")
    if len(names) <= _MOST_NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
    for row, column in np.argwhere(table > 0) if len(names) <= _MOST_NAMED else ():
        dark = table[row, column] < 0.6 * table[row].sum()
        axes.text(column, row, table[row, column], ha="center", va="center", fontsize=6, color="w" if dark else "k")
    axes.figure.colorbar(picture, ax=axes, label="share of the row", shrink=0.7)
    axes.set(xlabel="detected as", ylabel="object", title="Objects by class, and what they are taken for")

"""`detkit data stats`: a split in figures, on the terminal and as JSON, plots and a page; and default boxes for it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from detkit import config, page
from detkit.console import counting
from detkit.data import cache, stats, voc
from detkit.data.stats import Stats
from detkit.errors import UserError
from detkit.files import atomic_write

if TYPE_CHECKING:
    from detkit.suggest import Suggestion

_MOST_CLASSES = 60  # rows on the terminal


def run(
    data: config.Data,
    split: str,
    *,
    size: tuple[int, int] | None = None,
    settings: config.Config | None = None,
    clusters: int = 9,
    json_file: Path | None = None,
    html: Path | None = None,
    plots: Path | None = None,
    console: Console,
) -> None:
    """Print the figures of a split, and write them where asked.

    size: height and width of the canvas; default: that of `settings`, else the commonest photo's. settings: a config,
    whose default boxes are measured (on 'val' too, where the split is 'train') and bettered; needs the extra 'train'.
    clusters: of box shapes. Raises UserError where something can't be read or written.
    """
    if settings is not None and size is not None and size != settings.input.size:
        raise UserError("--size: the config has its own canvas; leave it out, or set input.size in the config")
    dataset = cache.load_split(data, split, console)
    canvas = settings.input.size if settings else size or stats.usual_size(dataset)
    resize = settings.input.resize if settings else "stretch"
    found = stats.collect(dataset, split, canvas, resize)
    learnt = stats.measured(dataset)
    shapes = stats.clusters(found.sides[learnt], clusters)
    console.print(*facts(found), sep="\n", highlight=False, markup=False)
    console.print(_class_table(found), _size_table(found))
    tree: dict[str, Any] = found.tree() | {"clusters": cluster_tree(found.sides[learnt], shapes)}
    console.print(*_cluster_lines(tree["clusters"]), sep="\n", highlight=False, markup=False)
    suggestions = _suggested(settings, data, found, found.boxes[learnt], console) if settings else []
    if suggestions:
        tree["default_boxes"] = [box_tree(each) for each in suggestions]
    if json_file:
        atomic_write(json_file, json.dumps(tree, ensure_ascii=False, indent=1) + "\n")
    if html or plots:
        pictures = stats.plots(found)
        if plots:
            stats.write_plots(pictures, plots)
        if html:
            uris = {name: "data:image/png;base64," + base64.b64encode(p).decode() for name, p in pictures.items()}
            page.write(
                html,
                "stats.html",
                tree=tree,
                facts=facts(found),
                pictures=uris,
                root=str(data.root),
                suggestions=suggestions,
            )
    for path in (json_file, html, plots):
        if path:
            console.print(f"written: {path}", highlight=False, markup=False)


def _suggested(
    settings: config.Config, data: config.Data, found: Stats, objects: NDArray[np.float64], console: Console
) -> list[Suggestion]:
    """Print the config's default boxes, measured on `objects`, float64 [M, 4] on its canvas, and better ones; none,
    where its head has no default boxes."""
    if settings.model.head.default_boxes() is None:
        console.print(f"the config's head {settings.model.head.name} has no default boxes to fit", highlight=False)
        return []
    from detkit import suggest

    splits = {found.name: objects}
    if found.name == "train" and "val" in voc.splits(data):
        other = cache.load(data, "val")
        splits["val"] = stats.on_canvas(other, found.canvas, found.resize, stats.measured(other))
    with counting(console, "seeking default boxes") as progress:
        suggestions = suggest.suggest(settings, splits, progress)
    console.print(_box_table(suggestions))
    console.print(*(f"{s.name}:\n{s.yaml()}" for s in suggestions[1:]), sep="\n", highlight=False, markup=False)
    return suggestions


def facts(found: Stats) -> list[str]:
    """A split in a few sentences."""
    photos, objects = len(found.a_photo), len(found.boxes)
    empty = int((found.a_photo == 0).sum())
    shares = ", ".join(f"{share:.1%} {name}" for name, share in found.shares().items())
    height, width = found.canvas
    dense = f"{objects / max(photos, 1):.1f} a photo, at most {int(found.a_photo.max(initial=0))}"
    return [
        f"{photos} photos in '{found.name}', {empty} of them without objects",
        f"{objects} objects of {len(found.classes)} classes, {found.ignored} of them difficult; {dense}",
        f"on a canvas of {width}x{height} ({found.resize}): {shares} (borders: {stats.SMALL}², {stats.LARGE}² px)",
    ]


def cluster_tree(sides: NDArray[np.float64], shapes: NDArray[np.float64]) -> dict[str, Any]:
    """Clusters of box shapes as plain data: widths and heights in pixels, and the mean IoU of objects with the best."""
    iou = float(stats.overlap(sides, shapes).max(1).mean()) if len(sides) else 0.0
    return {"mean_iou": round(iou, 4), "shapes": shapes.round(1).tolist()}


def box_tree(suggestion: Suggestion) -> dict[str, Any]:
    """A suggestion as plain data."""
    head = suggestion.head.model_dump(mode="json", include={"scales", "ratios", "extra_square"})
    fits = {
        name: {"recall": fit.recall, "possible_recall": fit.possible, "mean_iou": fit.iou}
        for name, fit in suggestion.fits.items()
    }
    return {"name": suggestion.name, "boxes_a_cell": suggestion.boxes, **head, "fits": fits}


def _class_table(found: Stats) -> Table:
    columns = [Column(name, justify="right") for name in ("objects", "share", "photos", "median w x h")]
    table = Table("class", *columns, box=None, pad_edge=False)
    order = np.argsort(-found.objects, kind="stable")
    sides = found.sides
    for label in order[:_MOST_CLASSES].tolist():
        own = sides[found.labels == label]
        width, height = np.median(own, axis=0).tolist() if len(own) else (0, 0)
        table.add_row(
            escape(found.classes[label]),
            str(found.objects[label]),
            f"{found.objects[label] / max(1, len(sides)):.1%}",
            str(found.photos_with[label]),
            f"{width:.0f} x {height:.0f}" if len(own) else "-",
        )
    if len(order) > _MOST_CLASSES:
        rest = order[_MOST_CLASSES:]
        table.add_row(f"{len(rest)} more", str(found.objects[rest].sum()), "", "", "")
    return table


def _size_table(found: Stats) -> Table:
    table = Table("", *(Column(f"{p} %", justify="right") for p in stats.PERCENTILES), box=None, pad_edge=False)
    for name, values in (
        ("objects a photo", found.a_photo),
        ("size, √area, pixels", found.sizes),
        ("width over height", found.aspects),
    ):
        if len(values):
            table.add_row(name, *(f"{value:.3g}" for value in np.percentile(values, stats.PERCENTILES)))
    return table


def _cluster_lines(tree: dict[str, Any]) -> list[str]:
    shapes = ", ".join(f"{width:.0f}x{height:.0f}" for width, height in tree["shapes"])
    return [f"{len(tree['shapes'])} clusters of shapes (k-means, 1 - IoU), mean IoU {tree['mean_iou']:.3f}: {shapes}"]


def _box_table(suggestions: list[Suggestion]) -> Table:
    splits = list(suggestions[0].fits)
    names = [f"{what} ({split})" for split in splits for what in ("recall", "possible", "mean IoU")]
    table = Table("default boxes", "a cell", *(Column(name, justify="right") for name in names), box=None)
    for each in suggestions:
        cells = [f"{value:.3f}" for split in splits for value in each.fits[split]]
        table.add_row(each.name, " ".join(map(str, each.boxes)), *cells)
    return table

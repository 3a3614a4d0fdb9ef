"""What is in a split: classes, box sizes on the network's canvas, places; and clusters of box shapes."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit import geometry
from detkit.config import Tiles
from detkit.data.labels import DataSet
from detkit.errors import UserError, need
from detkit.files import atomic_write
from detkit.manifest import Photos
from detkit.types import CROWD, DIFFICULT

HEAT = 32  # cells of the heat map along each side
SMALL, LARGE = 32, 96  # pixels: COCO's borders between small, medium and large objects
_PHOTOS = 4096  # at a time, in sums over photos
_MOST_CLUSTERED = 10_000  # objects that k-means looks at
_STARTS, _ROUNDS = 8, 100  # of k-means
_MOST_BARS = 60  # classes in a plot
_MOST_DOTS = 20_000
_COLOUR = "#0072B2"
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


@dataclass(frozen=True, slots=True, eq=False)
class Stats:
    """A split in figures. Sizes are on the canvas, height and width, to which photos are fitted by the rule `resize`.

    objects, photos_with: int64 [C], by class; `ignored` of the objects are difficult or crowd. a_photo: int64 [N],
    objects of each photo. boxes: float64 [M, 4] on the canvas; labels: int32 [M]. heat: float64 [HEAT, HEAT], share of
    the photos that have an object on this part of the photo. together: int64 [C, C], photos that show both classes.
    """

    name: str
    classes: tuple[str, ...]
    canvas: tuple[int, int]
    resize: geometry.Rule
    objects: NDArray[np.int64]
    photos_with: NDArray[np.int64]
    ignored: int
    a_photo: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int32]
    heat: NDArray[np.float64]
    together: NDArray[np.int64]

    @property
    def sides(self) -> NDArray[np.float64]:
        """Width and height of each box, float64 [M, 2], pixels of the canvas."""
        return np.asarray(self.boxes[:, 2:] - self.boxes[:, :2])

    @property
    def sizes(self) -> NDArray[np.float64]:
        """Square root of each box's area, float64 [M]."""
        return np.asarray(np.sqrt(self.sides.prod(axis=1)))

    @property
    def aspects(self) -> NDArray[np.float64]:
        """Width over height of each box, float64 [M]."""
        return self.sides[:, 0] / self.sides[:, 1]

    def shares(self) -> dict[str, float]:
        """Shares of small, medium and large objects, with COCO's borders, on the canvas."""
        sizes, count = self.sizes, max(1, len(self.boxes))
        small, large = int((sizes < SMALL).sum()), int((sizes >= LARGE).sum())
        return {"small": small / count, "medium": (len(sizes) - small - large) / count, "large": large / count}

    def tree(self) -> dict[str, Any]:
        """The figures as plain data, for JSON."""
        return {
            "split": self.name,
            "canvas": {"height": self.canvas[0], "width": self.canvas[1], "resize": self.resize},
            "photos": len(self.a_photo),
            "photos_without_objects": int((self.a_photo == 0).sum()),
            "objects": len(self.boxes),
            "ignored": self.ignored,
            "classes": [
                {"name": name, "objects": int(objects), "photos": int(photos)}
                for name, objects, photos in zip(self.classes, self.objects, self.photos_with, strict=True)
            ],
            "objects_a_photo": _percentiles(self.a_photo),
            "size": _percentiles(self.sizes),
            "width": _percentiles(self.sides[:, 0]),
            "height": _percentiles(self.sides[:, 1]),
            "aspect_ratio": _percentiles(self.aspects),
            "shares": self.shares(),
            "heat": self.heat.round(4).tolist(),
            "together": self.together.tolist(),
        }


def _percentiles(values: NDArray[Any]) -> dict[str, float]:
    """Mean and percentiles, empty where there are no values."""
    if not len(values):
        return {}
    found = np.percentile(values, PERCENTILES).round(3).tolist()
    return {"mean": round(float(values.mean()), 3)} | {f"p{p}": v for p, v in zip(PERCENTILES, found, strict=True)}


def on_canvas(
    dataset: DataSet, canvas: tuple[int, int], resize: geometry.Rule, keep: NDArray[np.bool_] | None = None
) -> NDArray[np.float64]:
    """The objects' boxes, of those that `keep`, bool [M], says, in pixels of the canvas: float64 [M, 4]."""
    photo = photo_index(dataset)
    boxes, photo = (dataset.boxes, photo) if keep is None else (dataset.boxes[keep], photo[keep])
    kinds, kind = np.unique(dataset.hw, axis=0, return_inverse=True)
    plans = [geometry.plan((int(height), int(width)), canvas, resize) for height, width in kinds]
    unit = np.array([[0.0, 0.0, 1.0, 1.0]])
    scales = np.array([plan.to_canvas(unit)[0, 2:] for plan in plans]).reshape(-1, 2)
    return np.asarray(boxes * np.tile(scales[kind.reshape(-1)[photo]], 2))


def usual_size(dataset: DataSet) -> tuple[int, int]:
    """The commonest height and width of the photos."""
    kinds, counts = np.unique(dataset.hw, axis=0, return_counts=True)
    height, width = kinds[counts.argmax()].tolist()
    return height, width


def measured(dataset: DataSet) -> NDArray[np.bool_]:
    """bool [M]: the objects that training learns from: neither difficult nor crowd."""
    return np.asarray((dataset.flags & (DIFFICULT | CROWD)) == 0)


def photos(dataset: DataSet, tiles: Tiles | None = None) -> Photos:
    """What an exported file says of the photos, or of their tiles, that it was trained on: median size, 99th percentile
    of objects' longer sides, objects of the densest."""
    learnt = measured(dataset)
    sides = (dataset.boxes[learnt, 2:] - dataset.boxes[learnt, :2]).max(1, initial=0)
    height, width = tiles.size if tiles else np.median(dataset.hw, axis=0).round().astype(int).tolist()
    side = float(np.percentile(sides, 99)) if len(sides) else 1.0
    most = int(np.diff(dataset.box_ends, prepend=0).max(initial=0))
    overlap = tiles.overlap if tiles else round(side, 2)
    return Photos(size=(height, width), side=overlap, most=most, tiled=bool(tiles))


def collect(dataset: DataSet, name: str, canvas: tuple[int, int], resize: geometry.Rule) -> Stats:
    """The figures of a split called `name`, for a canvas of that height and width."""
    classes, photo = len(dataset.classes), photo_index(dataset)
    pairs = np.unique(photo * max(1, classes) + dataset.labels)
    return Stats(
        name=name,
        classes=dataset.classes,
        canvas=canvas,
        resize=resize,
        objects=np.bincount(dataset.labels, minlength=classes),
        photos_with=np.bincount(pairs % max(1, classes), minlength=classes),
        ignored=int((~measured(dataset)).sum()),
        a_photo=np.diff(dataset.box_ends, prepend=0),
        boxes=on_canvas(dataset, canvas, resize),
        labels=dataset.labels,
        heat=_heat(dataset, photo),
        together=_together(pairs // max(1, classes), pairs % max(1, classes), len(dataset), classes),
    )


def photo_index(dataset: DataSet) -> NDArray[np.int64]:
    """The photo of each object, int64 [M]."""
    return np.repeat(np.arange(len(dataset)), np.diff(dataset.box_ends, prepend=0))


def _heat(dataset: DataSet, photo: NDArray[np.int64]) -> NDArray[np.float64]:
    """The share of photos with an object on each cell, float64 [HEAT, HEAT]."""
    cells = dataset.boxes / np.tile(dataset.hw[photo][:, ::-1], 2) * HEAT
    low = np.clip(np.floor(cells[:, :2]), 0, HEAT - 1).astype(int)
    high = np.clip(np.ceil(cells[:, 2:]), low + 1, HEAT).astype(int)
    total = np.zeros((HEAT, HEAT))
    for first in range(0, len(dataset), _PHOTOS):
        start, stop = np.searchsorted(photo, (first, first + _PHOTOS))
        own = slice(start, stop)
        # Each box adds 1 at its first corner and takes it away behind its edges: summed up, it is 1 inside.
        marks = np.zeros((_PHOTOS, HEAT + 1, HEAT + 1), np.int32)
        for x, y, sign in ((low, low, 1), (high, low, -1), (low, high, -1), (high, high, 1)):
            np.add.at(marks, (photo[own] - first, y[own, 1], x[own, 0]), sign)
        total += (marks.cumsum(1).cumsum(2)[:, :HEAT, :HEAT] > 0).sum(0)
    return np.asarray(total / max(1, len(dataset)))


def _together(photos: NDArray[np.int64], labels: NDArray[np.int64], count: int, classes: int) -> NDArray[np.int64]:
    """In how many photos each two classes are both seen, int64 [C, C], from the distinct pairs of photo and class."""
    total = np.zeros((classes, classes))
    for first in range(0, count, _PHOTOS):
        start, stop = np.searchsorted(photos, (first, first + _PHOTOS))
        seen = np.zeros((_PHOTOS, classes), np.float32)
        seen[photos[start:stop] - first, labels[start:stop]] = 1
        total += seen.T @ seen
    return total.astype(np.int64)


def overlap(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU of boxes of widths and heights a [N, 2] and b [K, 2] that have the same centre: float64 [N, K]."""
    common = np.minimum(a[:, None], b[None]).prod(axis=2)
    return np.asarray(common / (a.prod(1)[:, None] + b.prod(1)[None] - common))


def clusters(sides: NDArray[np.float64], count: int, seed: int = 0) -> NDArray[np.float64]:
    """Widths and heights typical of boxes of `sides`, float64 [M, 2] -> [K, 2], smallest first: k-means with the
    distance 1 - IoU (YOLO9000, Redmon 2017, section 2). K is `count`, or less where there are fewer different sides.
    """
    rng = np.random.default_rng(seed)
    if len(sides) > _MOST_CLUSTERED:
        sides = sides[rng.choice(len(sides), _MOST_CLUSTERED, replace=False)]
    distinct = np.unique(sides, axis=0)
    if len(distinct) <= count:
        return distinct[np.argsort(distinct.prod(1))]
    tried = [_means(sides, _seeds(distinct, count, rng)) for _ in range(_STARTS)]
    best = max(tried, key=lambda centres: overlap(sides, centres).max(1).mean())
    return best[np.argsort(best.prod(1))]


def _seeds(distinct: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Where k-means starts: sides far from each other (k-means++, Arthur and Vassilvitskii 2007)."""
    centres = distinct[rng.choice(len(distinct), 1)]
    while len(centres) < count:
        far = (1 - overlap(distinct, centres).max(1)) ** 2
        centres = np.concatenate([centres, distinct[rng.choice(len(distinct), 1, p=far / far.sum())]])
    return centres


def _means(sides: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """The centres after k-means from those given."""
    nearest = np.full(len(sides), -1)
    for _ in range(_ROUNDS):
        before, nearest = nearest, overlap(sides, centres).argmax(1)
        if (before == nearest).all():
            break
        for k in np.unique(nearest):
            centres[k] = sides[nearest == k].mean(0)
    return centres


# --- plots ------------------------------------------------------------------------------------------------------------


def _plot_classes(axes: Any, stats: Stats) -> None:
    order = np.argsort(-stats.objects, kind="stable")
    shown = order[:_MOST_BARS]
    axes.barh([stats.classes[k] for k in shown], stats.objects[shown], color=_COLOUR)
    axes.invert_yaxis()
    more = f" ({_MOST_BARS} commonest of {len(order)})" if len(order) > _MOST_BARS else ""
    axes.set(title=f"Objects of each class{more}", xlabel="objects")
    axes.tick_params(axis="y", labelsize=8)


def _plot_objects(axes: Any, stats: Stats) -> None:
    axes.hist(stats.a_photo, bins=np.arange(-0.5, min(stats.a_photo.max(initial=0), 100) + 1), color=_COLOUR)
    axes.set(title="Objects in a photo", xlabel="objects", ylabel="photos")


def _plot_sizes(axes: Any, stats: Stats) -> None:
    shown = stats.sides[:: 1 + len(stats.boxes) // _MOST_DOTS]
    axes.scatter(*shown.T, s=6, alpha=min(1, 0.05 + 200 / (1 + len(shown))), color=_COLOUR, linewidths=0)
    height, width = stats.canvas
    limits = (0.8 * stats.sides.min(initial=SMALL), 1.1 * max(height, width))
    sides = np.geomspace(*limits, 50)
    for border in (SMALL, LARGE):
        axes.plot(sides, border**2 / sides, color="0.5", linewidth=1, linestyle="--")
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits, xlabel="width in pixels", ylabel="height in pixels")
    axes.set(title=f"Sizes on a canvas of {width}x{height}; dashed: {SMALL}² and {LARGE}²")
    axes.set_aspect("equal")


def _plot_aspects(axes: Any, stats: Stats) -> None:
    axes.hist(stats.aspects, bins=np.geomspace(0.1, 10, 61), color=_COLOUR)
    axes.set(xscale="log", title="Aspect ratios on the canvas", xlabel="width over height", ylabel="objects")
    ticks = (0.1, 0.2, 0.33, 0.5, 1, 2, 3, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _plot_places(axes: Any, stats: Stats) -> None:
    picture = axes.imshow(stats.heat, extent=(0, 1, 1, 0), vmin=0, cmap="viridis", interpolation="nearest")
    axes.figure.colorbar(picture, ax=axes, label="share of photos", shrink=0.8)
    axes.set(title="Where objects are", xlabel="share of width", ylabel="share of height")


def _plot_together(axes: Any, stats: Stats) -> None:
    order = np.argsort(-stats.objects, kind="stable")[:_MOST_BARS]
    alone = np.maximum(stats.photos_with[order], 1)[:, None]
    picture = axes.imshow(stats.together[np.ix_(order, order)] / alone, vmin=0, vmax=1, cmap="viridis")
    names = [stats.classes[k] for k in order]
    axes.set_xticks(range(len(order)), names, rotation=90, fontsize=7)
    axes.set_yticks(range(len(order)), names, fontsize=7)
    axes.figure.colorbar(picture, ax=axes, label="share of the row's photos", shrink=0.8)
    axes.set(title="Photos of a class (row) that show another as well")


_PLOTS: dict[str, Callable[[Any, Stats], None]] = {
    "classes": _plot_classes,
    "objects": _plot_objects,
    "sizes": _plot_sizes,
    "aspects": _plot_aspects,
    "places": _plot_places,
    "together": _plot_together,
}


def plots(stats: Stats) -> dict[str, bytes]:
    """A PNG of each plot, by name. Raises UserError where matplotlib is not installed."""
    need("matplotlib")
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    pictures = {}
    for name, draw in _PLOTS.items():
        rows = min(len(stats.classes), _MOST_BARS) if name in ("classes", "together") else 0
        figure = Figure(figsize=(6.4, max(4.0, 1.2 + 0.17 * rows)), dpi=110, layout="constrained")
        draw(figure.subplots(), stats)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        pictures[name] = buffer.getvalue()
    return pictures


def write_plots(pictures: Mapping[str, bytes], folder: Path) -> None:
    """Write NAME.png for each. Raises UserError where one is there already, or can't be written."""
    for name in pictures:
        if (folder / f"{name}.png").exists():
            raise UserError(f"{folder / name}.png exists: name another folder with --plots")
    for name, content in pictures.items():
        atomic_write(folder / f"{name}.png", content)

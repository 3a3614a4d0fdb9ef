"""Default boxes for a data set: how well those of an SSD config meet its objects, and better ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from detkit.config import SSD, Config
from detkit.data.stats import clusters, overlap
from detkit.errors import UserError
from detkit.nn.anchors import Grids, shapes
from detkit.nn.detector import Detector

MET = 0.5  # IoU from which a default box meets an object: what SSD's matching asks for
_SAMPLE = 4000  # objects that the search looks at
_STEPS = (1.3, 1.12, 1.05, 1.02)  # factors by which it changes one number at a time
_RATIOS = (1.05, 6.0)  # least and largest aspect ratio, which is used both ways up


class Levels(NamedTuple):
    """Where the default boxes' centres are. canvas: height and width in pixels. grids: rows and columns of each level.
    steps: pixels between centres on each level."""

    canvas: tuple[int, int]
    grids: Grids
    steps: tuple[float, ...]


class Fit(NamedTuple):
    """How well default boxes meet objects. recall: share of the objects whose best default box has an IoU of at least
    MET. possible: the same were there a centre everywhere, so that only shapes count. iou: mean of the best IoU."""

    recall: float
    possible: float
    iou: float


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The head with other scales and ratios, how many boxes a cell of each level has, and how well they fit."""

    name: str
    head: SSD
    boxes: tuple[int, ...]
    fits: dict[str, Fit]

    def yaml(self) -> str:
        """The settings to put into a config, in the place of the same keys of model.head."""
        tree = self.head.model_dump(mode="json", include={"scales", "ratios", "extra_square"})
        return "model:\n  head:\n" + "".join(f"    {key}: {json.dumps(value)}\n" for key, value in tree.items())


def _head(config: Config) -> SSD:
    head = config.model.head.default_boxes()
    if head is None:
        raise UserError(f"{config.name}: its head {config.model.head.name} has no default boxes")
    return head


def levels(config: Config) -> Levels:
    """The levels of a config's detector, found by running it without weights or arithmetic. Raises UserError."""
    height, width = config.input.size
    with torch.device("meta"):
        detector = Detector(config.model, config.input, 1)
        feats = detector.neck(detector.backbone(torch.zeros(1, 3, height, width)))
    grids = tuple((int(feat.shape[-2]), int(feat.shape[-1])) for feat in feats)
    return Levels(config.input.size, grids, _head(config).spacing(detector.neck.strides))


def _level(
    boxes: NDArray[np.float64], sides: NDArray[np.float64], grid: tuple[int, int], step: float
) -> NDArray[np.float64]:
    """The best IoU of each object, boxes [M, 4], with default boxes of `sides` [S, 2] on a grid, and were there a
    centre on each object: float64 [M, 2].

    The best of a shape is the one whose centre is nearest, in x and in y: they overlap most.
    """
    centres, own = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    nearest = (np.clip(np.rint(centres / step - 0.5), 0, np.array(grid[::-1]) - 1) + 0.5) * step
    reach = (own[:, None] + sides) / 2 - np.abs(centres - nearest)[:, None]
    common = np.minimum(np.minimum(own[:, None], sides), reach.clip(0)).prod(2)
    found = common / (own.prod(1)[:, None] + sides.prod(1) - common)
    return np.stack([found.max(1), overlap(own, sides).max(1)], axis=1)


def _best(boxes: NDArray[np.float64], head: SSD, where: Levels, chosen: Iterable[int]) -> list[NDArray[np.float64]]:
    """`_level` of each of the chosen levels."""
    height, width = where.canvas
    sides = shapes(head.scales, head.ratios, head.extra_square)
    scaled = [np.minimum(np.array(level) * (height * width) ** 0.5, (width, height)) for level in sides]
    return [_level(boxes, scaled[i], where.grids[i], where.steps[i]) for i in chosen]


def fit(boxes: NDArray[np.float64], head: SSD, where: Levels) -> Fit:
    """How well a head's default boxes meet objects, float64 [M, 4] in pixels of the canvas; NaN where M is 0."""
    if not len(boxes):
        return Fit(np.nan, np.nan, np.nan)
    best, possible = np.max(_best(boxes, head, where, range(len(head.ratios))), axis=0).T
    return Fit(float((best >= MET).mean()), float((possible >= MET).mean()), float(best.mean()))


def _changed(head: SSD, level: int, place: int, factor: float) -> SSD | None:
    """The head with one number times `factor`: the level's scale (place -1), or one of its ratios. None where that
    leaves scales out of order, or no ratio worth having."""
    scales, ratios = list(head.scales), [list(row) for row in head.ratios]
    if place < 0:
        scales[level] *= factor
        if (np.diff(scales) <= 0).any() or not 0 < scales[level] <= max(head.scales[-1], 1.05):
            return None
    else:
        ratios[level][place] *= factor
        if not _RATIOS[0] <= ratios[level][place] <= _RATIOS[1]:
            return None
    return head.model_copy(update={"scales": tuple(scales), "ratios": tuple(map(tuple, ratios))})


def _climb(boxes: NDArray[np.float64], head: SSD, where: Levels) -> tuple[float, SSD]:
    """Change one number at a time while recall plus mean IoU rises; what it came to, and the head."""
    count = len(head.ratios)
    columns = np.stack(_best(boxes, head, where, range(count)))[..., 0]

    def score(columns: NDArray[np.float64]) -> float:
        best = columns.max(0)
        return float((best >= MET).mean() + best.mean())

    reached = score(columns)
    places = [(level, place) for level in range(count + 1) for place in range(-1, len((*head.ratios, ())[level]))]
    for step in _STEPS:
        better = True
        while better:
            better = False
            for level, place in places:
                # A scale is in the boxes of its own level, and in the extra square of the level before.
                touched = [i for i in ((level - 1, level) if place < 0 else (level,)) if 0 <= i < count]
                for factor in (step, 1 / step):
                    other = _changed(head, level, place, factor)
                    if other is None:
                        continue
                    tried = columns.copy()
                    for i, column in zip(touched, _best(boxes, other, where, touched), strict=True):
                        tried[i] = column[:, 0]
                    if (value := score(tried)) > reached + 1e-5:
                        head, columns, reached, better = other, tried, value, True
    return reached, head


def _start(boxes: NDArray[np.float64], head: SSD, where: Levels) -> SSD:
    """The head with scales and ratios from clusters of the objects' shapes."""
    side = float(where.canvas[0] * where.canvas[1]) ** 0.5
    sides = boxes[:, 2:] - boxes[:, :2]
    found = np.sqrt(clusters(sides, len(head.ratios)).prod(1)) / side
    scales = np.maximum.accumulate(np.resize(found, len(head.ratios)) * 1.01 ** np.arange(len(head.ratios)))
    aspects = np.exp(np.abs(np.log(sides[:, 0] / sides[:, 1]))).clip(*_RATIOS)
    ratios = tuple(
        tuple(np.quantile(aspects, (np.arange(len(row)) + 1) / (len(row) + 1)).tolist()) for row in head.ratios
    )
    last = max(head.scales[-1], float(scales[-1]) * 1.1)
    return head.model_copy(update={"scales": (*scales.tolist(), last), "ratios": ratios})


def _rounded(head: SSD) -> SSD:
    ratios = tuple(tuple(sorted(round(ratio, 2) for ratio in row)) for row in head.ratios)
    return head.model_copy(update={"scales": tuple(round(scale, 3) for scale in head.scales), "ratios": ratios})


def search(boxes: NDArray[np.float64], head: SSD, where: Levels) -> SSD:
    """The head with scales and ratios that meet the objects best, as many as it has: a hill climb from its own, and one
    from clusters of the objects' shapes. boxes: float64 [M, 4], one or more, in pixels of the canvas."""
    if len(boxes) > _SAMPLE:
        boxes = boxes[np.random.default_rng(0).choice(len(boxes), _SAMPLE, replace=False)]
    tried = [_climb(boxes, start, where) for start in (head, _start(boxes, head, where))]
    return _rounded(max(tried, key=lambda found: found[0])[1])


def suggest(
    config: Config, splits: Mapping[str, NDArray[np.float64]], progress: Callable[[int, int], None] | None = None
) -> list[Suggestion]:
    """The config's own default boxes, others of the same number, and others with one aspect ratio more a level.

    splits: the objects of each split, float64 [M, 4] in pixels of the config's canvas; default boxes are sought on the
    first and measured on all. progress: called with (searches done, searches in all). Raises UserError where the first
    is empty, or the config's head has no default boxes.
    """
    head, where = _head(config), levels(config)
    objects = next(iter(splits.values()))
    if not len(objects):
        raise UserError(f"{config.data.root}: no object to fit default boxes to")
    more = head.model_copy(update={"ratios": tuple((*row, max((1.3, *row)) * 1.25) for row in head.ratios)})
    found = [("config", head)]
    for done, (name, start) in enumerate((("as many", head), ("one ratio more", more)), 1):
        found.append((name, search(objects, start, where)))
        if progress:
            progress(done, 2)
    return [
        Suggestion(
            name,
            each,
            tuple(len(level) for level in shapes(each.scales, each.ratios, each.extra_square)),
            {split: fit(boxes, each, where) for split, boxes in splits.items()},
        )
        for name, each in found
    ]

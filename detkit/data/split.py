"""A data set divided into train, val and test: each class in its share, and near-duplicate photos never apart."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Column, Table

from detkit.data import similar, voc
from detkit.data.labels import DataSet
from detkit.data.voc import Progress
from detkit.errors import UserError
from detkit.files import whole_folder


class _Units(NamedTuple):
    """What is never divided, one row each: `photos` int64 [U], how many; and its objects by class in flat columns:
    classes int64 [E], counts int64 [E], ends int64 [U]."""

    photos: NDArray[np.int64]
    classes: NDArray[np.int64]
    counts: NDArray[np.int64]
    ends: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """A data set's photos in splits.

    splits: their names. lists: the photos of each, as split files name them, sorted. objects: int64 [S, C], objects by
    split and class. groups: groups of near-duplicates, of two photos or more; grouped: the photos in them.
    """

    splits: tuple[str, ...]
    classes: tuple[str, ...]
    lists: tuple[tuple[str, ...], ...]
    objects: NDArray[np.int64]
    groups: int
    grouped: int

    def table(self) -> Table:
        """Photos, and objects of each class, by split: counts and shares."""
        table = Table("", *(Column(name, justify="right") for name in (*self.splits, "all")), box=None, pad_edge=False)
        photos = np.array([len(photos) for photos in self.lists])
        for name, counts in (("photos", photos), *zip(self.classes, self.objects.T, strict=True)):
            total = int(counts.sum())
            cells = (f"{count} ({count / max(total, 1):.1%})" for count in counts.tolist())
            table.add_row(escape(name), *cells, str(total), end_section=name == "photos")
        return table


def stratify(units: _Units, shares: Sequence[float], rng: np.random.Generator) -> NDArray[np.int64]:
    """The split of each unit, int64 [U], so that every split gets its share of each class's objects: iterative
    stratification (Sechidis 2011, algorithm 1), with objects for examples.

    The class with the fewest objects left goes first; each of its units goes where most of the class is wanted yet,
    then where most photos are. rng: the order of units (the largest first would leave few photos for the others).
    """
    classes, counts, photos = units.classes.tolist(), units.counts.tolist(), units.photos.tolist()
    starts = [0, *units.ends.tolist()]
    unit_of = np.repeat(np.arange(len(photos)), np.diff(starts))
    left = np.bincount(units.classes, units.counts)
    wanted = [(left * share).tolist() for share in shares]
    room = [float(units.photos.sum()) * share for share in shares]
    rank = rng.permutation(len(photos))
    order = np.lexsort((rank[unit_of], units.classes))
    ends = np.cumsum(np.bincount(units.classes[order], minlength=len(left)))
    of_class = [part.tolist() for part in np.split(unit_of[order], ends[:-1])] if len(ends) else []
    split = [-1] * len(photos)

    def put(unit: int, wishes: Sequence[float]) -> None:
        best = max(range(len(shares)), key=lambda s: (wishes[s], room[s], -s))
        split[unit] = best
        room[best] -= photos[unit]
        for at in range(starts[unit], starts[unit + 1]):
            wanted[best][classes[at]] -= counts[at]
            left[classes[at]] -= counts[at]

    while (left > 0).any():
        label = int(np.where(left > 0, left, np.inf).argmin())
        for unit in of_class[label]:
            if split[unit] < 0:
                put(unit, [wish[label] for wish in wanted])
    for unit in np.lexsort((rank, -units.photos)).tolist():  # those without objects
        if split[unit] < 0:
            put(unit, room)
    return np.array(split, np.int64)


def _units(dataset: DataSet, unit: NDArray[np.int64]) -> _Units:
    """The photos by their units, int64 [N] in 0 .. U - 1."""
    photo = np.repeat(np.arange(len(dataset)), np.diff(dataset.box_ends, prepend=0))
    width = max(1, len(dataset.classes))
    found, counts = np.unique(unit[photo] * width + dataset.labels, return_counts=True)
    photos = np.bincount(unit)
    ends = np.cumsum(np.bincount(found // width, minlength=len(photos)))
    return _Units(photos, found % width, counts, ends)


def divide(
    dataset: DataSet,
    shares: Mapping[str, float],
    seed: int = 0,
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> Division:
    """A data set divided into splits of those shares (which add up to 1).

    It depends on the photos' names and pixels, the annotations and the seed; not on the order of files or the number of
    processes. progress: called with (photos compared, photos in all). Raises UserError, naming the file, where
    something can't be read, and where a split would be empty.
    """
    names = [dataset.name(index) for index in range(len(dataset))]
    by_name = sorted(range(len(names)), key=names.__getitem__)
    hashes = similar.fingerprints([os.path.join(dataset.root, name) for name in names], workers, progress)  # noqa: PTH118
    # Units are numbered in the order of names, whatever the order of files.
    unit = np.empty(len(names), np.int64)
    unit[by_name] = np.unique(similar.groups(hashes[by_name]), return_inverse=True)[1]
    split = stratify(_units(dataset, unit), list(shares.values()), np.random.default_rng(seed))[unit]
    lists = tuple(tuple(sorted(voc.key(names[i]) for i in np.flatnonzero(split == s))) for s in range(len(shares)))
    sizes = np.bincount(unit)
    for name, photos in zip(shares, lists, strict=True):
        if not photos:
            raise UserError(
                f"{dataset.root}: {len(names)} photos in {len(sizes)} groups leave none for '{name}'; change its share"
            )
    objects = np.zeros((len(shares), len(dataset.classes)), np.int64)
    photo = np.repeat(np.arange(len(dataset)), np.diff(dataset.box_ends, prepend=0))
    np.add.at(objects, (split[photo], dataset.labels), 1)
    many = sizes > 1
    return Division(tuple(shares), dataset.classes, lists, objects, int(many.sum()), int(sizes[many].sum()))


def write(division: Division, folder: Path) -> None:
    """Write <split>.txt, one photo a line, to `folder`, which must not hold anything yet; all of them or none.

    Raises UserError where it does, or can't be written.
    """
    with whole_folder(folder) as temporary:
        for name, photos in zip(division.splits, division.lists, strict=True):
            lines = "".join(f"{photo}\n" for photo in photos)
            (temporary / f"{name}.txt").write_text(lines, encoding="utf-8", errors="surrogateescape", newline="\n")

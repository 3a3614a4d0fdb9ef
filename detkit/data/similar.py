"""Near-duplicate photos by perceptual hash: signs of the photo's low frequencies, compared by Hamming distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, pairwise
from math import comb, log2
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from detkit import imaging
from detkit.data.synth import pooled
from detkit.errors import UserError

# How many of the 64 coarse bits may differ in near-duplicates, and of the 64 of the colours; twice as many of the 64
# fine ones. Chosen by looking at pairs of shop photos and of packages on white: see docs/data.md.
MOST = 8

_FEW = 512  # photos for which processes take longer to start than they save
_SIDE = 32
_BLANK = 2.0  # levels: standard deviation of the shrunk photo below which there is nothing to compare
_QUIET = 1.0  # levels times _SIDE / 2: a frequency that is not there at all must not give a bit of noise
_ANGLES = np.pi * (2 * np.arange(_SIDE)[None] + 1) * np.arange(_SIDE // 2 + 1)[:, None] / (2 * _SIDE)
_COSINES = (np.cos(_ANGLES) * (2 / _SIDE) ** 0.5).astype(np.float32)
# The 128 lowest frequencies (row, column) by their sum, without the mean.
_LOWEST = sorted(np.ndindex(_COSINES.shape[0], _COSINES.shape[0]), key=lambda at: (sum(at), at))[1:129]
_ROWS, _COLUMNS = np.array(_LOWEST).T
_TINTS = ([0, *_ROWS[:31]], [0, *_COLUMNS[:31]])  # of each of two colour channels: the mean, and the 31 lowest
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def fingerprint(image: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The photo's perceptual hash, uint64 [3]: signs of its 64 lowest frequencies, of the 64 after them, and of the 32
    lowest of its blue and red less the brightness (pHash: Zauner 2010, section 3.2.1, with signs for the median).

    image: uint8 [H, W, 3] RGB of any size. The hash changes little when the photo is encoded anew, resized, made
    lighter or darker, or cut by 1 or 2 % at the edges. A blank photo gives zeros: near to nothing in `pairs` and
    `groups`. Colours tell apart packages of one shape on a plain background; so a grey copy is not near its original.
    """
    small = np.asarray(Image.fromarray(image).resize((_SIDE, _SIDE), Image.Resampling.BOX), np.float32)
    grey = small @ _LUMA
    if grey.std() < _BLANK:
        return np.zeros(3, np.uint64)
    light, blue, red = (_COSINES @ part @ _COSINES.T for part in (grey, small[..., 2] - grey, small[..., 0] - grey))
    signs = np.concatenate([light[_ROWS, _COLUMNS], blue[_TINTS], red[_TINTS]]) > _QUIET
    return np.packbits(signs).view(np.uint64)


def fingerprints(
    paths: Sequence[str | Path], workers: int = 0, progress: Callable[[int, int], None] | None = None
) -> NDArray[np.uint64]:
    """The `fingerprint` of each photo file, uint64 [N, 3].

    workers: processes, 0 for one per CPU (the result doesn't depend on it). progress: called with (done, total).
    Raises UserError, naming the file, where one can't be decoded.
    """
    found = list(pooled(_of_file, paths, workers if len(paths) >= _FEW else 1, progress))
    return np.array(found, np.uint64).reshape(-1, 3)


def _of_file(path: str | Path) -> NDArray[np.uint64]:
    try:
        image = imaging.inspect(Path(path).read_bytes(), 4 * _SIDE).image
    except (OSError, UserError):
        image = imaging.decode(path)  # it names the file
    return fingerprint(image)


def pairs(hashes: NDArray[np.uint64], most: int = MOST) -> NDArray[np.int64]:
    """All near-duplicates among N fingerprints, uint64 [N, 3] -> int64 [P, 2], each i < j, in order.

    most: of their coarse bits so many may differ, of the colours' too, and of the fine ones twice as many. Blank photos
    are in no pair; but n copies of another photo are n * (n - 1) / 2: where there may be thousands, ask for `groups`.
    """
    used = np.flatnonzero(hashes.any(axis=1))
    found = [used[pair] for pair in _near(hashes[used], most)]
    result = np.sort(np.concatenate([np.empty((0, 2), np.int64), *found]), axis=1)
    return result[np.lexsort((result[:, 1], result[:, 0]))]


def groups(hashes: NDArray[np.uint64], most: int = MOST) -> NDArray[np.int64]:
    """The group of each of N photos, int64 [N]: the smallest index among those that chains of `pairs` join to it."""
    used = np.flatnonzero(hashes.any(axis=1))
    distinct, first, which = np.unique(hashes[used], axis=0, return_index=True, return_inverse=True)
    group = np.arange(len(hashes))
    group[used] = used[first[which.reshape(-1)]]
    edges = np.concatenate([np.empty((0, 2), np.int64), *(used[first[pair]] for pair in _near(distinct, most))])
    while len(edges):
        ends = group[edges]
        np.minimum.at(group, ends.max(1), ends.min(1))
        while (group[group] != group).any():
            group = group[group]
        edges = edges[group[edges[:, 0]] != group[edges[:, 1]]]
    return group


def _near(hashes: NDArray[np.uint64], most: int) -> Iterator[NDArray[np.int64]]:
    """The pairs of near hashes, each once, as int64 [p, 2] at a time.

    Where at most `most` bits differ, at least `alike` of most + alike bands agree (pigeonhole principle): the hashes
    are sorted by each choice of `alike` bands, and those equal there are compared.
    """
    count = len(hashes)
    coarse = np.ascontiguousarray(hashes[:, 0])
    limits = np.array([most, 2 * most, most])
    cost = {n: comb(most + n, n) * (7 + count / 2 ** (1 + 64 * n / (most + n))) for n in range(1, 5)}
    alike = min(cost, key=lambda n: cost[n]) if log2(max(count, 1)) > 8 else 1
    edges = np.linspace(0, 64, most + alike + 1).round().astype(int).tolist()
    bands = [np.uint64((1 << high) - (1 << low)) for low, high in pairwise(edges)]
    for chosen in combinations(range(len(bands)), alike):
        # A pair that agrees in more bands is taken with the first of them.
        before = [bands[i] for i in range(chosen[-1]) if i not in chosen]
        part = coarse & np.bitwise_or.reduce([bands[i] for i in chosen])
        order = np.argsort(part)
        part, bits = part[order], coarse[order]
        at, step = np.arange(count), 0
        while len(at):
            step += 1
            at = at[: np.searchsorted(at, count - step)]
            at = at[part[at] == part[at + step]]
            differ = bits[at] ^ bits[at + step]
            close = np.flatnonzero(np.bitwise_count(differ) <= most)
            for band in before:
                close = close[(differ[close] & band) != 0]
            found = np.stack([order[at[close]], order[at[close] + step]], axis=1)
            apart = np.bitwise_count(hashes[found[:, 0]] ^ hashes[found[:, 1]])
            found = found[(apart <= limits).all(axis=1)]
            if len(found):
                yield found

"""`detkit data audit`: every annotation and every photo of a data set read, and all that is wrong or unusual listed.

The fast part is `scan.survey`: what training itself finds. Here each photo is decoded, once, and boxes, classes and
splits are looked at as a whole. Nothing is written but the reports; `fix` makes the cleaned copy.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from detkit import geometry, imaging, page
from detkit.config import Data
from detkit.data import scan, similar
from detkit.data.findings import KINDS, Finding, level, located
from detkit.data.scan import Survey
from detkit.data.synth import pooled
from detkit.data.voc import Progress, digest
from detkit.errors import UserError
from detkit.files import atomic_write

SIZE = (300, 300)
TINY = 8  # pixels of the training canvas: a shorter side below it is hardly ever learnt
SAME = 0.95  # IoU from which two boxes are one
COVERS = 0.98  # share of the photo's area
RARE = 20  # objects in the training split
# Not for training to refuse or to change, but what is measured with them is wrong: --strict counts them.
LEAKS = ("near-duplicate across splits", "in two splits")

SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
}
_PIXELS = {
    "greyscale": ("its pixels are greyscale", "the grey is used for red, green and blue"),
    "palette": ("its pixels are places in a palette", "converted to RGB"),
    "transparent": ("its pixels can be transparent", "laid on white"),
    "CMYK": ("its colours are CMYK, for print", "converted to RGB"),
    "16-bit": ("its pixels have 16 bits", "reduced to 8 bits"),
}
_LOOK_AT = 128  # pixels a side: what a fingerprint is made of, at least
_CHUNK = 64
_ALONE = 1000  # photos that one process has read before others have started
_THUMBNAILS = 12  # a kind, on the page
_ROWS = 200  # a kind, on the page
_LEVELS = ("error", "change", "note")


class Audit(NamedTuple):
    """What `run` found. findings: the gravest first, then by kind as in KINDS. size: the canvas' height and width.

    formats: of each photo ('' where unreadable), by its place in survey.items. twins: photos to show beside a finding's
    own, by that one's file.
    """

    data: Data
    survey: Survey
    size: tuple[int, int]
    findings: tuple[Finding, ...]
    formats: tuple[str, ...]
    twins: dict[str, str]

    def bad(self) -> bool:
        """Whether there is anything that --strict fails on: errors, changes, and photos that splits share."""
        return any(level(finding) != "note" or finding.kind in LEAKS for finding in self.findings)


def run(
    data: Data,
    size: tuple[int, int] = SIZE,
    rule: geometry.Rule = "stretch",
    workers: int = 0,
    progress: Progress | None = None,
) -> Audit:
    """Audit the data set, all its splits.

    size, rule: height and width of the training canvas and how photos are fitted to it, for `tiny box`. workers:
    processes that decode, 0: one a CPU. progress: called with (files done, in all), in each
    of the passes: annotations, headers, pixels. Raises UserError where there is
    no data set at all: no folder, no photo, or (formats other than VOC) annotations that can't be read.
    """
    survey = scan.survey(data, progress)
    photos = _inspect(data, survey, workers, progress)
    twins: dict[str, str] = {}
    found = [
        *survey.findings,
        *_photo_findings(survey, photos),
        *_box_findings(data, survey, size, rule),
        *_class_findings(data, survey),
        *_split_findings(data, survey, photos, twins),
    ]
    order = {kind: place for place, kind in enumerate(KINDS)}
    found.sort(key=lambda finding: (_LEVELS.index(level(finding)), order[finding.kind]))
    return Audit(data, survey, size, tuple(found), tuple(photo.format for photo in photos), twins)


# --- photos ---------------------------------------------------------------------------------------------------------


class _Photo(NamedTuple):
    """What decoding a file told. error: why it can't be, '' where it can. hash: `similar.fingerprint`'s bytes, b""
    where there is nothing to compare."""

    error: str = ""
    format: str = ""
    pixels: str = ""
    digest: bytes = b""
    hash: bytes = b""


def _look(root: str, names: Sequence[str]) -> list[_Photo]:
    """Read those files whole (a job for another process)."""
    return [_look_at(os.path.join(root, name)) for name in names]  # noqa: PTH118 (as in DataSet)


def _look_at(path: str) -> _Photo:
    try:
        content = Path(path).read_bytes()
        seen = imaging.inspect(content, _LOOK_AT)
    except OSError as error:
        return _Photo(f"can't be read ({error.strerror or error})")
    except UserError as error:
        return _Photo(str(error).removeprefix("image: "))
    found = similar.fingerprint(seen.image)
    return _Photo("", seen.format, seen.pixels, digest(content), found.tobytes() if found.any() else b"")


def _inspect(data: Data, survey: Survey, workers: int, progress: Progress | None) -> list[_Photo]:
    """A _Photo for each item; those without image, or whose header can't be read, are not opened again."""
    places = [
        place
        for place, item in enumerate(survey.items)
        if item.image and place not in survey.headers.errors
    ]  # fmt: skip
    photos = [_Photo()] * len(survey.items)
    chunks = [places[first : first + _CHUNK] for first in range(0, len(places), _CHUNK)]
    tasks = [[survey.items[place].image for place in chunk] for chunk in chunks]
    told = partial(_tell, progress, len(places)) if progress else None
    results = pooled(partial(_look, str(data.root)), tasks, workers if len(places) > _ALONE else 1, told)
    for chunk, result in zip(chunks, results, strict=True):
        for place, photo in zip(chunk, result, strict=True):
            photos[place] = photo
    return photos


def _tell(progress: Progress, total: int, done: int, _: int) -> None:
    progress(min(done * _CHUNK, total), total)


def _photo_findings(survey: Survey, photos: Sequence[_Photo]) -> Iterator[Finding]:
    copies: dict[bytes, str] = {}
    for place, (item, photo) in enumerate(zip(survey.items, photos, strict=True)):
        told = [("image unreadable", photo.error, "training stops when it comes to it")] if photo.error else []
        if photo.format:
            told += _remarks(item.image, photo, int(survey.headers.orientation[place]))
            first = copies.setdefault(photo.digest, item.image)
            if first != item.image:
                told.append(("identical photos", f"the same bytes as {first}", "both are used"))
        for kind, what, action in told:
            yield Finding(kind, item.image, what, action, 0, item.image)


def _remarks(name: str, photo: _Photo, orientation: int) -> Iterator[tuple[str, str, str]]:
    if not name.lower().endswith(SUFFIXES[photo.format]):
        yield "wrong extension", f"it is a {photo.format} file", f"read as {photo.format}"
    if orientation != 1:
        yield "EXIF-turned photo", f"its EXIF orientation is {orientation}", "turned before anything else"
    if photo.pixels:
        yield f"{photo.pixels} photo", *_PIXELS[photo.pixels]


# --- boxes ----------------------------------------------------------------------------------------------------------


def _box_findings(data: Data, survey: Survey, size: tuple[int, int], rule: geometry.Rule) -> Iterator[Finding]:
    """Remarks on boxes as training would use them; none of those that it drops."""
    used = np.flatnonzero(survey.kept)
    photo, boxes = survey.labels.photos[used], survey.boxes[used]
    names, lines = survey.labels.names[used], survey.labels.lines[used]
    vocabulary = survey.labels.vocabulary
    hw = survey.headers.hw[photo]
    sides = boxes[:, 2:] - boxes[:, :2]
    scale = np.array(size) / hw
    if rule == "letterbox":
        scale = np.repeat(scale.min(1, keepdims=True), 2, axis=1)
    scaled = sides * scale[:, ::-1]

    def finding(kind: str, index: int, what: str, action: str) -> Finding:
        item, box = survey.items[photo[index]], boxes[index].tolist()
        text = f"{vocabulary[names[index]]} {scan.shown(box)} {what}"
        return Finding(kind, item.file, text, action, int(lines[index]), item.image, _box(boxes[index]))

    for index in np.flatnonzero(scaled.min(1, initial=np.inf) < TINY).tolist():
        width, height = scaled[index].tolist()
        what = f"is {width:.3g}x{height:.3g} px on a canvas of {size[1]}x{size[0]}"
        yield finding("tiny box", index, what, "used")
    for index in np.flatnonzero(sides.prod(1) >= COVERS * hw.prod(1)).tolist():
        yield finding("box covers the image", index, f"in an image of {hw[index, 1]}x{hw[index, 0]}", "used")
    for first, second in same_boxes(photo, boxes):
        other = f"lies on {vocabulary[names[first]]} {scan.shown(boxes[first].tolist())}"
        alike = names[first] == names[second]
        where = f" (line {lines[first]})" if lines[first] else ""
        yield finding("duplicate box" if alike else "two classes on one box", second, other + where, "both are used")
    if data.format == "voc":  # others state shares of the photo, or have decimals as a matter of course
        broken = np.any(survey.labels.boxes % 1 != 0, axis=1)
        counts = np.bincount(survey.labels.photos[broken], minlength=len(survey.items))
        every = np.diff(survey.labels.ends, prepend=0)
        first_broken = dict(zip(survey.labels.photos[broken][::-1].tolist(), np.flatnonzero(broken)[::-1], strict=True))
        for place in np.flatnonzero(counts).tolist():
            item, row = survey.items[place], first_broken[place]
            what = f"{counts[place]} of its {every[place]} boxes have decimals"
            line, box = int(survey.labels.lines[row]), _box(survey.labels.boxes[row])
            yield Finding("decimals", item.file, what, "kept", line, item.image, box)


def _box(row: NDArray[np.float64]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = row.tolist()
    return x1, y1, x2, y2


def same_boxes(photo: NDArray[np.int64], boxes: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The pairs of boxes [M, 4] of the same photo, int64 [M], that have an IoU of SAME: (earlier, later), in order."""
    order = np.argsort(photo, kind="stable")
    photo, boxes = photo[order], boxes[order]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    found = []
    at, step = np.arange(len(photo)), 0
    while len(at):  # each box with the next one, those that have one with the one after it, and so on
        step += 1
        at = at[at + step < len(photo)]
        at = at[photo[at] == photo[at + step]]
        one, two = boxes[at], boxes[at + step]
        overlap = np.maximum(np.minimum(one[:, 2:], two[:, 2:]) - np.maximum(one[:, :2], two[:, :2]), 0).prod(1)
        same = at[overlap >= SAME * np.maximum(areas[at] + areas[at + step] - overlap, 1e-9)]
        found.append(np.stack([order[same], order[same + step]], 1))
    pairs = np.concatenate([np.empty((0, 2), np.int64), *found])
    return [(int(first), int(second)) for first, second in pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]]


# --- classes --------------------------------------------------------------------------------------------------------


def plain(name: str) -> str:
    """The name without what is easily confused: the case of its letters, spaces, hyphens, underscores."""
    return "".join(letter for letter in name.casefold() if not letter.isspace() and letter not in "-_")


def spellings(survey: Survey) -> dict[str, str]:
    """The chosen spelling of each class name that has another one that differs by case or space only: among those that
    are in the list of classes (of all, where none is) the most frequent."""
    counts = _counts(survey)
    groups: dict[str, list[str]] = defaultdict(list)
    for name in dict.fromkeys([*survey.classes, *survey.labels.vocabulary]):
        groups[plain(name)].append(name)
    chosen: dict[str, str] = {}
    for group in groups.values():
        if len(group) > 1:
            known = [name for name in group if name in survey.classes] or group
            best = max(known, key=lambda name: counts[name])
            chosen |= dict.fromkeys(group, best)
    return chosen


def _counts(survey: Survey, places: NDArray[np.int64] | None = None) -> Counter[str]:
    """How many objects each class has, in those items (None: in all)."""
    names = survey.labels.names
    if places is not None:
        names = names[np.isin(survey.labels.photos, places)]
    counts = np.bincount(names, minlength=len(survey.labels.vocabulary)).tolist()
    return Counter(dict(zip(survey.labels.vocabulary, counts, strict=True)))


def _class_findings(data: Data, survey: Survey) -> Iterator[Finding]:
    counts = _counts(survey)
    chosen = spellings(survey)

    def tell(kind: str, name: str, other: str, how: str) -> Finding:
        what = f"'{name}' ({_many(counts[name], 'object')}) and '{other}' ({counts[other]}) {how}"
        if not counts[name]:
            return Finding(kind, "", what, "two classes")
        row = int(np.argmax(survey.labels.names == survey.labels.vocabulary.index(name)))
        item = survey.items[survey.labels.photos[row]]
        return Finding(
            kind, item.file, what, "two classes", int(survey.labels.lines[row]), item.image, _box(survey.boxes[row])
        )

    for name, best in chosen.items():
        if name != best:
            yield tell("class names alike", name, best, "differ by case or space only")
    for name, other in similar_names([name for name in counts if chosen.get(name, name) == name], counts):
        yield tell("class names similar", name, other, "are one letter apart")
    train = survey.splits.get(data.train)
    in_train = _counts(survey, train)
    where = "" if train is None else f" in '{data.train}'"
    in_val = _counts(survey, survey.splits[data.val]) if data.val in survey.splits else None
    for name in survey.classes:
        if in_train[name] < RARE:
            yield Finding("rare class", "", f"'{name}' has {_many(in_train[name], 'object')}{where}", "used")
        elif in_val is not None and not in_val[name]:
            yield Finding("rare class", "", f"'{name}' has no object in '{data.val}'", "not measured")


def similar_names(names: Iterable[str], counts: Counter[str]) -> list[tuple[str, str]]:
    """Pairs (rare, frequent) of names of five letters or more that become equal when each loses one letter or none; the
    rare one has a tenth of the other's objects at most. Names that differ in a digit are different products."""
    shortened: dict[str, dict[str, None]] = defaultdict(dict)
    for name in names:
        if len(name) >= 5:
            for place in range(len(name) + 1):
                shortened[name[:place] + name[place + 1 :]][name] = None
    found: dict[tuple[str, str], None] = {}
    for group in shortened.values():
        best = max(group, key=lambda name: counts[name])
        for name in group:
            digits = ["".join(letter for letter in text if letter.isdigit()) for text in (name, best)]
            if 10 * counts[name] <= counts[best] and digits[0] == digits[1]:
                found[name, best] = None
    return sorted(found)


# --- splits ---------------------------------------------------------------------------------------------------------


def _split_findings(data: Data, survey: Survey, photos: Sequence[_Photo], twins: dict[str, str]) -> Iterator[Finding]:
    """Photos that training and evaluation share. Each is named once, by the training photo."""
    held: dict[int, str] = {}  # the photos to evaluate on, with their split
    for split in dict.fromkeys((data.val, "val", "test")):
        if split in survey.splits and split != data.train:
            for place in survey.splits[split].tolist():
                held.setdefault(place, split)
    alike = _alike(photos, held)
    copies = {photos[place].digest: place for place in held if photos[place].digest}
    train = survey.splits.get(data.train, np.empty(0, np.int64))
    for place in train.tolist():
        item = survey.items[place]
        if place in held:
            what = f"it is in '{data.train}' and in '{held[place]}'"
            yield Finding("in two splits", item.file or item.image, what, "used in both", 0, item.image)
            continue
        twin = copies.get(photos[place].digest, alike.get(photos[place].hash))
        if twin is not None:
            other = twins[item.image] = survey.items[twin].image
            how = "the same bytes as" if photos[place].digest == photos[twin].digest else "looks like"
            what = f"{how} {other} in '{held[twin]}'"
            yield Finding("near-duplicate across splits", item.image, what, "both are used", 0, item.image)


def _alike(photos: Sequence[_Photo], held: Iterable[int]) -> dict[bytes, int]:
    """One of the photos `held` for each fingerprint that is near to some of theirs."""
    hashes = list(dict.fromkeys(photo.hash for photo in photos if photo.hash))
    sample = {photos[place].hash: place for place in held if photos[place].hash}
    found = dict(sample)
    if not sample:
        return found
    for pair in similar.pairs(np.frombuffer(b"".join(hashes), np.uint64).reshape(len(hashes), -1)).tolist():
        one, two = (hashes[index] for index in pair)
        for own, other in ((one, two), (two, one)):
            if other in sample:
                found.setdefault(own, sample[other])
    return found


# --- reports --------------------------------------------------------------------------------------------------------


def _grouped(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        groups[finding.kind].append(finding)
    return groups


def _facts(audit: Audit) -> dict[str, Any]:
    survey = audit.survey
    counts = _counts(survey)
    return {
        "root": str(audit.data.root),
        "photos": sum(1 for item in survey.items if item.image),
        "annotations": sum(1 for item in survey.items if item.file),
        "objects": len(survey.labels.names),
        "classes": {name: counts[name] for name in survey.classes},
        "splits": {name: len(places) for name, places in survey.splits.items()},
        "size": list(audit.size),
    }


def verdict(audit: Audit) -> str:
    """What the findings mean, in a sentence."""
    counts = Counter(level(finding) for finding in audit.findings)
    leaks = sum(1 for finding in audit.findings if finding.kind in LEAKS)
    told = []
    if counts["error"]:
        told.append(f"Training refuses this data set: {_many(counts['error'], 'error')} to mend")
    else:
        told.append("Training takes this data set")
    if counts["change"]:
        told.append(f"{_many(counts['change'], 'thing')} would be dropped, moved or read otherwise than written")
    if leaks:
        told.append(f"{_many(leaks, 'training photo')} also in evaluation")
    return "; ".join(told) + "."


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def print_summary(audit: Audit, console: Console) -> None:
    """A line a kind of finding, the gravest first, and the verdict."""
    facts = _facts(audit)
    splits = ", ".join(f"{name} {count}" for name, count in facts["splits"].items())
    console.print(
        f"{facts['root']}: {facts['photos']} photos, {facts['annotations']} annotations, {facts['objects']} objects, "
        f"{len(facts['classes'])} classes; {splits or 'no splits'}",
        markup=False,
        highlight=False,
    )
    folded = (Column(name, overflow="fold") for name in ("first of them", "what detkit does"))
    table = Table("", "kind", "count", *folded, box=None, pad_edge=False)
    styles = {"error": "red", "change": "yellow", "note": "cyan"}
    for kind, group in _grouped(audit.findings).items():
        first, grave = group[0], KINDS[kind].level
        where = f"{first.file}: " if first.file else ""
        cells = (f"{where}{located(first.line, first.what)}", first.action)
        table.add_row(f"[{styles[grave]}]{grave}", kind, str(len(group)), *map(_escaped, cells))
    console.print(table)
    console.print(verdict(audit), highlight=False)


def _escaped(text: str) -> str:
    # Names may hold bytes that are no text, and a terminal's control characters.
    clean = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return escape(clean)


def write_json(path: Path, audit: Audit) -> None:
    """All findings, the counts and advice of each kind, and the data set's figures."""
    kinds = {
        kind: {"level": KINDS[kind].level, "count": len(group), "advice": KINDS[kind].advice}
        for kind, group in _grouped(audit.findings).items()
    }
    content = _facts(audit) | {
        "verdict": verdict(audit),
        "kinds": kinds,
        "findings": [{"level": level(finding)} | finding._asdict() for finding in audit.findings],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    atomic_write(path, text.encode("utf-8", "surrogateescape"))


def write_html(path: Path, audit: Audit, progress: Progress | None = None) -> None:
    """The findings as a page in one file: a section a kind, with up to 12 thumbnails and 200 rows."""
    groups = _grouped(audit.findings)
    kinds = []
    for done, (kind, group) in enumerate(groups.items(), 1):
        kinds.append(
            {
                "name": kind,
                "anchor": kind.replace(" ", "-"),
                "level": KINDS[kind].level,
                "advice": KINDS[kind].advice,
                "count": len(group),
                "action": "; ".join(dict.fromkeys(plain_action(finding) for finding in group[:_ROWS])),
                "thumbnails": list(_thumbnails(audit, group)),
                "rows": [(finding, located(finding.line, finding.what)) for finding in group[:_ROWS]],
            }
        )
        if progress:
            progress(done, len(groups))
    page.write(path, "audit.html", facts=_facts(audit), kinds=kinds, verdict=verdict(audit), leaks=LEAKS)


def plain_action(finding: Finding) -> str:
    """The action without the numbers of this case."""
    for start in ("clipped", "read as"):
        if finding.action.startswith(start) and finding.box is not None:
            return "clipped to the image" if start == "clipped" else "read with its corners exchanged"
    if finding.kind == "size missing":
        return "the image's size is used"
    return finding.action


def _thumbnails(audit: Audit, group: Sequence[Finding]) -> Iterator[dict[str, Any]]:
    shown = 0
    for finding in group:
        if shown == _THUMBNAILS:
            return
        images = [
            _thumbnail(audit, name, finding.box if name == finding.image else None)
            for name in (finding.image, audit.twins.get(finding.image) if finding.kind in LEAKS else None)
            if name
        ]
        images = [image for image in images if image]
        if images:
            shown += 1
            yield {"images": images, "file": finding.file, "what": located(finding.line, finding.what)}


def _thumbnail(audit: Audit, name: str, box: Sequence[float] | None) -> str:
    """A data URI; '' where the photo can't be read."""
    try:
        image = imaging.inspect((audit.data.root / name).read_bytes(), 320).image
    except (OSError, UserError):
        return ""
    if box is None:
        return page.thumbnail(image)
    # The box is in pixels of the whole photo, and a JPEG may have been read at a part of it.
    height, width = imaging.size(audit.data.root / name)
    scale = (image.shape[1] / width, image.shape[0] / height)
    return page.thumbnail(image, [[value * scale[place % 2] for place, value in enumerate(box)]])

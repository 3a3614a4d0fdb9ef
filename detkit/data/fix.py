"""`detkit data audit --fix`: a copy of a data set, in VOC's layout, with what the audit found mended, and a log of it.

Photos are copied byte for byte, and so is each XML file in which nothing is to be mended; in the others only what is
mended changes. Boxes become what training makes of them, by the same code.
"""

from __future__ import annotations

import posixpath
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit.data import audit as auditing
from detkit.data import voc
from detkit.data.audit import LEAKS, SUFFIXES, Audit
from detkit.data.findings import KINDS, Finding, level, write
from detkit.data.labels import Columns
from detkit.data.scan import Headers, Split, shown
from detkit.data.voc import BadFileError, Item, Progress
from detkit.errors import UserError, need
from detkit.files import whole_folder
from detkit.formats import number, voc_xml

LOG = "changes.jsonl"
# A photo with such a finding is not copied, nor is its annotation.
_LEFT_OUT = (
    "annotation unreadable", "image unreadable", "image without annotation", "image skipped", LEAKS[0],
)  # fmt: skip
# What the lists and folders of the copy hold instead.
_ACTIONS = {
    "listed twice": "listed once",
    "listed but missing": "line left out",
    "split unusable": "split left out",
    "same name twice": "left out",
    "image taken as negative": "an annotation without objects is written",
}
# Mended, and said, while each annotation is written.
_MENDED = (
    "object unreadable", "unknown class", "size missing", "size disagrees", "boxes turned", "boxes scaled",
    "box without area", "box inverted", "box outside the image", "box partly outside", "misspelt tag", "odd value",
)  # fmt: skip
_MANY = ("object", "part", "point")  # tags that may stand in their parent more than once


def fix(audit: Audit, out: Path, progress: Progress | None = None) -> list[Finding]:
    """Write the mended copy to `out`, which must not hold anything, and give back the changes, which are its LOG too.

    The copy has VOC's layout: JPEGImages, Annotations, ImageSets/Main, classes.txt; it appears whole or not at all, and
    the source is not touched. A line of the log is a Finding; each object that is not in the copy has one. progress:
    called with (photos done, in all). Raises UserError where `out` can't be written or lies inside the source.
    """
    root = audit.data.root.resolve()
    if out.resolve().is_relative_to(root):
        raise UserError(f"{out} lies inside the data set, which is not to be touched: name a folder elsewhere")
    with whole_folder(out) as temp:
        copy = _Copy(audit, temp)
        copy.write(progress)
    return copy.changes


class _Copy:
    """The copy being written to the folder `out`, and the changes so far."""

    def __init__(self, audit: Audit, out: Path) -> None:
        self.audit, self.survey, self.data, self.out = audit, audit.survey, audit.data, out
        self.spellings = auditing.spellings(audit.survey)
        self.changes: list[Finding] = []

    def write(self, progress: Progress | None) -> None:
        """Write all of it."""
        gone = self._gone()
        self._log_the_rest()
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (self.out / folder).mkdir(parents=True)
        for place in range(len(self.survey.items)):
            if place in gone:
                self._leave_out(place, gone[place])
            else:
                self._photo(place)
            if progress:
                progress(place + 1, len(self.survey.items))
        self._lists(gone)
        write(self.out / LOG, self.changes)

    def _gone(self) -> dict[int, Finding]:
        """The items that are left out, and why."""
        items = self.survey.items
        places = {item.image: place for place, item in enumerate(items) if item.image}
        gone = {
            place: Finding("annotation without image", item.file, "there is no image of this name", "left out")
            for place, item in enumerate(items)
            if not item.image
        }
        for finding in self.audit.findings:
            if finding.kind not in _LEFT_OUT or finding.image not in places:
                continue
            twin = self.audit.twins.get(finding.image, "")
            if finding.kind in LEAKS and places[twin] in gone:
                continue  # the photo to evaluate on is not copied itself
            gone.setdefault(places[finding.image], finding._replace(action="left out"))
        return gone

    def _log_the_rest(self) -> None:
        """What is mended elsewhere than in an annotation."""
        for finding in self.audit.findings:
            if finding.kind == "in two splits":
                self.changes.append(finding._replace(action=f"left out of '{self.data.train}'"))
            elif level(finding) != "note" and finding.kind not in (*_MENDED, *_LEFT_OUT, "annotation without image"):
                action = _ACTIONS.get(finding.kind, finding.action)
                self.changes.append(finding._replace(action=action))
                if finding.kind == "same name twice" and finding.file.lower().endswith(".xml"):
                    labels = voc.parse(self.data.root, [finding.file])[0]
                    self.changes += self._objects(finding, labels.boxes, labels.vocabulary, labels.names, labels.lines)

    def _objects(
        self, why: Finding, boxes: NDArray[np.float64], vocabulary: Sequence[str],
        names: NDArray[np.int32], lines: NDArray[np.int32],
    ) -> Iterator[Finding]:  # fmt: skip
        """A line for each object of a file that is left out."""
        for box, name, line in zip(boxes.tolist(), names.tolist(), lines.tolist(), strict=True):
            x1, y1, x2, y2 = box
            what = f"{vocabulary[name]} {shown(box)}: {why.what}"
            yield Finding(why.kind, why.file, what, "left out", line, why.image, (x1, y1, x2, y2))

    def _leave_out(self, place: int, why: Finding) -> None:
        item, labels = self.survey.items[place], self.survey.labels
        why = why._replace(file=item.file or item.image, image=item.image)
        self.changes.append(why)
        own = slice(int(labels.ends[place - 1]) if place else 0, int(labels.ends[place]))
        self.changes += self._objects(why, labels.boxes[own], labels.vocabulary, labels.names[own], labels.lines[own])
        for remark in labels.remarks:
            if remark.photo == place and remark.kind == "object unreadable":
                self.changes.append(Finding(remark.kind, item.file, remark.what, "left out", remark.line, item.image))

    def _photo(self, place: int) -> None:
        """Copy the photo, and write its annotation."""
        item, key = self.survey.items[place], voc.key(self.survey.items[place].image)
        suffix = posixpath.splitext(item.image)[1]
        right = SUFFIXES[self.audit.formats[place]]
        if suffix.lower() not in right:
            what = f"it is a {self.audit.formats[place]} file"
            suffix = right[0]
            action = f"renamed to {posixpath.basename(key)}{suffix}"
            self.changes.append(Finding("wrong extension", item.image, what, action, 0, item.image))
        photo = self.out / "JPEGImages" / (key + suffix)
        photo.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.data.root / item.image, photo)
        path = self.out / "Annotations" / f"{key}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        as_it_is = self.data.format == "voc" and bool(item.file)
        content = (self.data.root / item.file).read_bytes() if as_it_is else self._xml(place, photo.name).encode()
        try:
            tree = voc.tree(content, blank=True)
        except BadFileError as error:  # it was XML when it was audited
            raise UserError(f"{self.data.root / item.file}: changed meanwhile ({error.args[1]})") from None
        mending = _Mending(self, place, tree, self.survey.convention if as_it_is else "edges")
        mending.run(photo.name, renamed=photo.name != posixpath.basename(item.image))
        if mending.changes:
            content = need("lxml.etree").tostring(tree, encoding="utf-8", xml_declaration=False) + b"\n"
        path.write_bytes(content)
        self.changes += mending.changes

    def _xml(self, place: int, filename: str) -> str:
        """An annotation that is no VOC XML yet."""
        labels, hw = self.survey.labels, self.survey.headers.hw[place]
        own = slice(int(labels.ends[place - 1]) if place else 0, int(labels.ends[place]))
        stated = labels.hw[place] if labels.hw[place].all() else hw
        names = [labels.vocabulary[index] for index in labels.names[own]]
        size = (int(stated[0]), int(stated[1]))
        return voc_xml(filename, size, labels.boxes[own], names, labels.flags[own].tolist())

    def _lists(self, gone: dict[int, Finding]) -> None:
        """classes.txt and ImageSets/Main: a name a line."""
        names = [self.spellings.get(name, name) for name in self.survey.classes]
        counts = Counter(
            self.spellings.get(self.survey.labels.vocabulary[index], self.survey.labels.vocabulary[index])
            for index in self.survey.labels.names.tolist()
        )
        for name in sorted(set(counts) - set(names)):
            names.append(name)
            what = f"'{name}' ({counts[name]} objects) is not in the list"
            self.changes.append(Finding("unknown class", "", what, "added to classes.txt"))
        self._text("classes.txt", dict.fromkeys(names))
        twice = {finding.image for finding in self.audit.findings if finding.kind == "in two splits"}
        for split, places in self.survey.splits.items():
            kept = [self.survey.items[place].image for place in places.tolist() if place not in gone]
            lines = [voc.key(image) for image in kept if split != self.data.train or image not in twice]
            if lines:
                self._text(f"ImageSets/Main/{split}.txt", lines)
            else:
                what = f"no photo of '{split}' is left"
                self.changes.append(Finding("split unusable", "", what, "split left out"))

    def _text(self, name: str, lines: Sequence[str] | dict[str, None]) -> None:
        content = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        (self.out / name).write_bytes(content)


class _Mending:
    """One annotation being mended: its tree is changed in place, and each change is noted."""

    def __init__(self, copy: _Copy, place: int, tree: Any, convention: str) -> None:
        self.copy, self.place, self.tree, self.convention = copy, place, tree, convention
        self.item = copy.survey.items[place]
        self.changes: list[Finding] = []

    def _note(self, kind: str, what: str, action: str, line: int, box: tuple[float, ...] | None = None) -> None:
        corners = (box[0], box[1], box[2], box[3]) if box else None
        self.changes.append(
            Finding(kind, self.item.file or self.item.image, what, action, line, self.item.image, corners)
        )

    def run(self, filename: str, *, renamed: bool) -> None:
        """Mend all that is to be mended; filename: what the photo is called in the copy."""
        self._tags()
        columns, elements = self._objects()
        self._boxes(columns, elements)
        self._filename(filename, renamed)

    def _tags(self) -> None:
        self._correct(self.tree)  # first: its children may be misspelt objects
        for element in self.tree.findall("object"):
            self._correct(element)
            for box in element.findall("bndbox"):
                self._correct(box)

    def _correct(self, parent: Any) -> None:
        """Give the misspelt tags among the children their right names."""
        for child in list(parent):
            right = voc.nearest_tag(parent.tag, child.tag)
            if not right:
                continue
            what = f"<{child.tag}> in <{parent.tag}> looks like <{right}>"
            if right in _MANY or parent.find(right) is None:
                child.tag = right
                self._note("misspelt tag", what, f"renamed to <{right}>", child.sourceline)
            else:
                parent.remove(child)
                self._note("misspelt tag", what, f"removed: there is a <{right}> as well", child.sourceline)

    def _objects(self) -> tuple[Columns, list[Any]]:
        """The objects as training reads them, and their elements; those that can't be read are removed."""
        columns, elements = Columns(), []
        for element in self.tree.findall("object"):
            before, known = len(columns.names), len(columns.remarks)
            voc.take(element, columns)
            for remark in columns.remarks[known:]:
                if remark.kind == "object unreadable":
                    self._note(remark.kind, remark.what, "left out", remark.line)
                else:
                    self._note(remark.kind, remark.what, "0 is written", remark.line)
            if len(columns.names) == before:
                self.tree.remove(element)
                continue
            elements.append(element)
            for tag in voc.FLAGS:
                flag = element.find(tag)
                if flag is not None and (flag.text or "").strip() not in voc.YES | voc.NO:
                    flag.text = "0"
        return columns, elements

    def _boxes(self, columns: Columns, elements: Sequence[Any]) -> None:
        survey, headers = self.copy.survey, self.copy.survey.headers
        size = self.tree.find("size")
        columns.end(voc.size(size) if size is not None else None)
        labels = columns.labels()
        own = slice(self.place, self.place + 1)
        header = Headers(headers.hw[own], headers.orientation[own], {})
        before = voc.edges(labels.boxes, self.convention)
        split = Split(
            self.copy.data,
            [Item(self.item.image, self.item.file or self.item.image)],
            replace(labels, boxes=before),
            header,
        )
        split.fit()
        kept = split.clip()
        self.changes += split.findings
        names = [self.copy.spellings.get(name, name) for name in (labels.vocabulary[i] for i in labels.names.tolist())]
        kept &= self._no_duplicates(split.boxes, kept, names, labels.lines)
        for index, element in enumerate(elements):
            if not kept[index]:
                element.getparent().remove(element)
                continue
            if np.any(split.boxes[index] != before[index]):
                _set_box(element.find("bndbox"), split.boxes[index] + _shift(self.convention))
            name = element.find("name")
            if names[index] != (name.text or "").strip():
                what = f"'{name.text.strip()}'"
                self._note("class names alike", what, f"renamed to '{names[index]}'", int(labels.lines[index]))
                name.text = names[index]
        height, width = survey.headers.hw[self.place].tolist()
        if tuple(labels.hw[0].tolist()) != (height, width):
            _set_size(self.tree, height, width)

    def _no_duplicates(
        self, boxes: NDArray[np.float64], kept: NDArray[np.bool_], names: Sequence[str], lines: NDArray[np.int32]
    ) -> NDArray[np.bool_]:
        """bool [M]: False for boxes that lie on an earlier one of their class."""
        result = np.ones(len(boxes), np.bool_)
        used = np.flatnonzero(kept)
        for pair in auditing.same_boxes(np.zeros(len(used), np.int64), boxes[used]):
            first, second = (int(used[index]) for index in pair)
            if names[first] == names[second] and result[second]:
                result[second] = False
                box = tuple(boxes[second].tolist())
                what = f"{names[second]} {shown(box)} lies on {names[first]} {shown(boxes[first].tolist())}"
                self._note("duplicate box", what, "left out", int(lines[second]), box)
        return result

    def _filename(self, filename: str, renamed: bool) -> None:
        element = self.tree.find("filename")
        stated = (element.text or "").strip() if element is not None else ""
        if not stated or element is None:
            return
        stem = posixpath.splitext(filename)[0]
        if renamed or not voc.same_stem(stated, stem):
            element.text = filename
            self._note(
                "filename differs", f"<filename> is '{stated[:80]}'", f"{filename} is written", element.sourceline
            )


def _shift(convention: str) -> NDArray[np.float64]:
    """What `voc.edges` took away."""
    shift: NDArray[np.float64] = -voc.edges(np.zeros((1, 4)), convention)[0]
    return shift


def _set_box(bndbox: Any, corners: NDArray[np.float64]) -> None:
    for tag, place in voc.CORNERS.items():
        bndbox.find(tag).text = number(float(corners[place]))


def _set_size(tree: Any, height: int, width: int) -> None:
    etree = need("lxml.etree")
    size = tree.find("size")
    if size is None:
        size = etree.Element("size")
        first = tree.find("object")
        tree.insert(len(tree) if first is None else tree.index(first), size)
        size.tail = "\n\t"
    for tag, value in (("width", width), ("height", height)):
        side = size.find(tag)
        if side is None:
            side = etree.SubElement(size, tag)
        side.text = str(value)
    etree.indent(size, space="\t", level=1)


def summary(changes: Sequence[Finding]) -> list[str]:
    """A line a kind of change, the gravest first: how often it was made, and what it is."""
    lines = []
    for kind in KINDS:
        group = [change for change in changes if change.kind == kind]
        whole = [change for change in group if change.box is None]
        objects = f" and {len(group) - len(whole)} objects in them" if whole and len(whole) < len(group) else ""
        actions = list(dict.fromkeys(auditing.plain_action(change) for change in group))
        if group:
            more = ", ..." if len(actions) > 1 else ""
            lines.append(f"{kind}: {len(whole) or len(group)}{objects} ({actions[0]}{more})")
    return lines

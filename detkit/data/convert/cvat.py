"""CVAT for images 1.1: one annotations.xml; an <image> has its size, its subset, and boxes xtl ytl xbr ybr."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from functools import cache
from math import cos, radians, sin
from typing import Any
from xml.sax.saxutils import escape, quoteattr

import numpy as np

from detkit.data.convert.common import (
    FARTHEST,
    FLAGS,
    Objects,
    Plan,
    Tally,
    Tree,
    outline,
    refuse,
)
from detkit.data.findings import Finding
from detkit.data.labels import Photo, Source, stated_size
from detkit.errors import UserError, nearest, need
from detkit.formats import number
from detkit.types import CROWD, OCCLUDED

_CORNERS = ("xtl", "ytl", "xbr", "ybr")
_POINTED = {
    "polygon": "polygon",
    "polyline": "line of points",
    "cuboid": "cuboid",
    "ellipse": "ellipse",
    "mask": "mask",
}
_BOXLESS = ("points", "tag", "skeleton")
_ATTRIBUTES = FLAGS | {"is_crowd": CROWD, "iscrowd": CROWD}
_YES = ("1", "true", "True", "yes")


def files(tree: Tree) -> list[str]:
    """The XML files whose root is <annotations>."""
    found = tree.ending(".xml", folder="") or tree.ending(".xml", folder="annotations")
    return [name for name in found if _root(tree, name) == "annotations"]


def _root(tree: Tree, name: str) -> str:
    """The name of the file's root element, as its beginning has it; '' where it has none."""
    try:
        with (tree.root / name).open("rb") as file:
            head = file.read(4096)
    except OSError:
        return ""
    text = head.decode("utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin-1", "replace")
    found = re.search(r"<([A-Za-z_][\w.-]*)", text)
    return found[1] if found else ""


def _elements(path: Any) -> Iterator[Any]:
    """The <label> and <image> elements, each forgotten when the next is asked for. Raises UserError."""
    etree = need("lxml.etree")
    try:
        events = etree.iterparse(
            str(path), events=("start", "end"), resolve_entities=False, no_network=True, load_dtd=False,
            huge_tree=False, remove_comments=True, remove_pis=True,
        )  # fmt: skip
        root = None
        for event, element in events:
            if root is None:
                root = element
                if root.getroottree().docinfo.internalDTD is not None:
                    refuse(path, "a DOCTYPE is not allowed in an annotation: it could declare entities; remove it")
                if root.tag != "annotations":
                    refuse(path, f"not CVAT's: its root is <{root.tag}>, not <annotations>")
            elif event == "end" and element.tag in ("image", "label"):
                yield element
                element.clear()
                while element.getprevious() is not None and element.getparent() is root:
                    del root[0]
            elif element.tag == "track" and element.getparent() is root:
                refuse(path, "CVAT for video: export the task as 'CVAT for images 1.1'", element.sourceline or 0)
    except etree.XMLSyntaxError as error:
        reason = " ".join(re.sub(r", line \d+, column \d+.*$", "", str(error.msg or "empty file")).split())
        refuse(path, f"not XML ({reason})", error.lineno or 1)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror or error})") from None


class _File:
    """What the annotation files say."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.classes: dict[str, None] = {}
        self.photos: list[tuple[str, Photo]] = []  # the subset, the photo
        self.findings: list[Finding] = []
        self.tally = Tally()
        found = files(tree)
        if not found:
            raise UserError(f"{tree.root}: no CVAT annotations here (annotations.xml)")
        for file in found:
            self.file, self.path = file, tree.root / file
            for element in _elements(self.path):
                if element.tag == "label":
                    self._label(element)
                else:
                    self._image(element)
        found_names = {name for _, photo in self.photos if photo.annotation for name in photo.annotation.names}
        unused = [name for name in self.classes if name not in found_names]
        if unused:
            what = f"{len(unused)} of {len(self.classes)} labels have no object: {', '.join(unused[:5])}"
            self.findings.append(Finding("unused category", "", what, "kept in the list of classes"))
        self.classes |= dict.fromkeys(sorted(found_names - set(self.classes)))
        self.findings += self.tally.findings()

    def _label(self, element: Any) -> None:
        name = (element.findtext("name") or "").strip()
        if name and element.getparent() is not None and element.getparent().tag == "labels":
            self.classes[name] = None

    def _image(self, element: Any) -> None:
        name = element.get("name") or ""
        if not name:
            refuse(self.path, "an <image> has no name", element.sourceline or 0)
        subset = (element.get("subset") or "").strip()
        near = [f"images/{subset}", "images", subset, posixpath.dirname(self.file)]
        image = self.tree.images.find(name, near)
        objects = Objects()
        for child in element:
            if child.tag != "attribute":
                self._object(child, image, objects)
        found = objects.annotation(name, stated_size(element.get("height"), element.get("width")))
        self.photos.append((subset, Photo(image, self.file, found)))

    def _object(self, element: Any, image: str, objects: Objects) -> None:
        line, kind = element.sourceline or 0, element.tag
        name = (element.get("label") or "").strip()
        if not name:
            refuse(self.path, f"<{kind}> has no label", line)
        what = f"{name} is a <{kind}>"
        if kind in _BOXLESS:
            self.findings.append(Finding("no box", self.file, what, "left out: it has no area", line, image))
            return
        if kind != "box" and kind not in _POINTED:
            refuse(self.path, f"<{kind}> is not known", line)
        try:
            box = _box(element)
        except (TypeError, ValueError, KeyError):
            refuse(self.path, f"<{kind}> lacks a number for its place", line)
        place = (box[0], box[1], box[2], box[3])
        if kind != "box":
            self.findings.append(Finding("polygon", self.file, what, "the box round it is taken", line, image, place))
        elif _turn(element):
            what = f"{name} is turned by {element.get('rotation')} degrees"
            self.findings.append(
                Finding("rotated box", self.file, what, "the box round it is taken", line, image, place)
            )
        objects.add(name, box, self._flags(element), line)

    def _flags(self, element: Any) -> int:
        flags = OCCLUDED if element.get("occluded") == "1" else 0
        for attribute in element:
            bit = _ATTRIBUTES.get(attribute.get("name") or "")
            if bit is None:
                self.tally.add("not read", "attributes other than difficult, truncated, occluded, crowd", "left out")
            elif (attribute.text or "").strip() in _YES:
                flags |= bit
        return flags


def _number(text: str) -> float:
    value = float(text)
    if not abs(value) <= FARTHEST:
        raise ValueError
    return value


def _turn(element: Any) -> float:
    return _number(element.get("rotation") or "0") % 360


def _turned(box: list[float], degrees: float) -> list[float]:
    """The box round a box that is turned clockwise about its centre."""
    if degrees % 180 == 0:
        return box
    x1, y1, x2, y2 = box
    c, s = abs(cos(radians(degrees))), abs(sin(radians(degrees)))
    half_w, half_h = (c * (x2 - x1) + s * (y2 - y1)) / 2, (s * (x2 - x1) + c * (y2 - y1)) / 2
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return [x - half_w, y - half_h, x + half_w, y + half_h]


def _box(element: Any) -> list[float]:
    """x1 y1 x2 y2. Raises TypeError, ValueError or KeyError."""
    kind, get = element.tag, element.get
    if kind == "box":
        return _turned([_number(get(key)) for key in _CORNERS], _turn(element))
    if kind == "mask":
        left, top, width, height = (_number(get(key)) for key in ("left", "top", "width", "height"))
        return [left, top, left + width, top + height]
    if kind == "ellipse":
        x, y, rx, ry = (_number(get(key)) for key in ("cx", "cy", "rx", "ry"))
        turn = radians(_turn(element))
        half_w, half_h = ((rx * c) ** 2 + (ry * s) ** 2 for c, s in ((cos(turn), sin(turn)), (sin(turn), cos(turn))))
        return [x - half_w**0.5, y - half_h**0.5, x + half_w**0.5, y + half_h**0.5]
    if kind == "cuboid":
        corners = [(_number(get(f"x{e}{n}")), _number(get(f"y{e}{n}"))) for n in "12" for e in ("tl", "tr", "bl", "br")]
        return outline(np.array(corners, np.float64))
    pairs = [[_number(value) for value in pair.split(",")] for pair in get("points").split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError
    return outline(np.array(pairs, np.float64))


def splits(tree: Tree) -> tuple[str, ...]:
    """The subsets, in the order of their first photo; none where not every photo has one."""
    subsets = dict.fromkeys(subset for subset, _ in tree.once(_File).photos)
    return () if "" in subsets else tuple(subsets)


def read(tree: Tree, split: str | None) -> Source:
    """The photos of the subset, in the file's order; None: all, and unnamed ones beside them. Raises UserError."""
    found = tree.once(_File)
    photos = [photo for subset, photo in found.photos if split is None or subset == split]
    if split is None:
        photos += tree.images.unnamed(photos)
    elif not photos:
        known = sorted({subset for subset, _ in found.photos})
        raise UserError(f"{tree.root}: no subset '{split}'{nearest(split, known)}; there are: {', '.join(known)}")
    return Source(tuple(found.classes), photos, found.findings)


def photo(split: str, name: str) -> str:  # noqa: ARG001
    """Where the photo goes."""
    return f"images/{name}"


@cache
def _meta_attributes() -> str:
    return "".join(
        f"<attribute><name>{name}</name><mutable>False</mutable><input_type>checkbox</input_type>"
        "<default_value>false</default_value><values>false</values></attribute>"
        for name in ("difficult", "truncated", "is_crowd")
    )


def write(plan: Plan) -> None:
    """annotations.xml: a line an object."""
    images: list[str] = []
    for split, items in plan.splits.items():
        for item in items:
            annotation = item.photo.annotation
            if annotation is None:
                plan.lose_unlabelled("CVAT")
                continue
            size = plan.size(item)
            sides = f' width="{size[1]}" height="{size[0]}"' if size else ""
            subset = f" subset={quoteattr(split)}" if split else ""
            images.append(f'  <image id="{len(images)}" name={quoteattr(item.name)}{subset}{sides}>')
            rows = zip(annotation.names, annotation.boxes.tolist(), annotation.flags.tolist(), strict=True)
            images[-1] = "\n".join([images[-1], *(_object(*row) for row in rows), "  </image>"])
    labels = "\n".join(
        f"        <label><name>{escape(name)}</name><attributes>{_meta_attributes()}</attributes></label>"
        for name in plan.classes
    )
    head = (
        '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta>\n    <task>\n'
        f"      <name>detkit</name>\n      <size>{len(images)}</size>\n      <mode>annotation</mode>\n"
        f"      <labels>\n{labels}\n      </labels>\n    </task>\n  </meta>\n"
    )
    plan.save("annotations.xml", head + "".join(f"{image}\n" for image in images) + "</annotations>\n")


def _object(name: str, box: list[float], flags: int) -> str:
    corners = " ".join(f'{key}="{number(value)}"' for key, value in zip(_CORNERS, box, strict=True))
    occluded = int(bool(flags & OCCLUDED))
    marks = "".join(
        f'<attribute name="{key}">true</attribute>'
        for key in ("difficult", "truncated", "is_crowd")
        if flags & _ATTRIBUTES[key]
    )
    return f'    <box label={quoteattr(name)} source="manual" occluded="{occluded}" {corners} z_order="0">{marks}</box>'

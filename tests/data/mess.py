"""A messy data set in VOC's layout: everything that the audit looks for, and what it must say of each."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from detkit.formats import voc_xml

HW = (120, 160)
Object = tuple[str, tuple[float, float, float, float]]
Scene = Callable[[int], tuple[NDArray[np.uint8], list[Object]]]


class Expected(NamedTuple):
    """A finding that there must be. at: how the line that it names begins, '' where it names none. what, action: parts
    of the texts. unlabelled: the setting under which it is found."""

    kind: str
    file: str
    what: str
    action: str
    at: str = ""
    unlabelled: str = "error"


def scene(index: int) -> tuple[NDArray[np.uint8], list[Object]]:
    """Smooth noise, with a can and a lemonade drawn on it."""
    rng = np.random.default_rng(index)
    noise = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(HW[::-1], Image.Resampling.BICUBIC)
    objects: list[Object] = [("can", (10, 20, 60, 90)), ("lemonade", (90, 15, 150, 100))]
    pen = ImageDraw.Draw(image)
    for name, (x1, y1, x2, y2) in objects:
        pen.rectangle((x1, y1, x2 - 1, y2 - 1), fill="#b01030" if name == "can" else "#f0c020", outline="#202020")
    return np.asarray(image), objects


class _Maker:
    def __init__(self, root: Path, scene: Scene) -> None:
        self.root, self.scene, self.count = root, scene, 0
        self.lists: dict[str, list[str]] = {"train": [], "val": []}
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (root / folder).mkdir(parents=True)

    def photo(self, name: str) -> Path:
        return self.root / "JPEGImages" / name

    def xml(self, stem: str) -> Path:
        return self.root / "Annotations" / f"{stem}.xml"

    def add(
        self,
        stem: str,
        more: Sequence[Object] = (),
        *,
        split: str = "train",
        edits: Sequence[tuple[str, str]] = (),
        save: Callable[[Image.Image, Path], None] | None = None,
        suffix: str = ".jpg",
    ) -> Path:
        """A photo with its annotation: the scene's objects, then `more`; edits: replacements in the XML."""
        pixels, objects = self.scene(self.count)
        self.count += 1
        image, path = Image.fromarray(pixels), self.photo(stem + suffix)
        if save:
            save(image, path)
        else:
            image.save(path, quality=90)
        objects = [*objects, *more]
        text = voc_xml(path.name, HW, np.array([box for _, box in objects]), [name for name, _ in objects])
        for old, new in edits:
            assert old in text, (stem, old)
            text = text.replace(old, new, 1)
        self.xml(stem).write_text(text, encoding="utf-8", newline="\n")
        self.lists[split].append(stem)
        return path


def make(root: Path, scene: Scene = scene) -> list[Expected]:
    """Make the data set and give back what an audit of it must find. scene: photo and objects by number, of size HW."""
    maker = _Maker(root, scene)
    for index in range(24):
        maker.add(f"sound{index:02d}")
    for index in range(4):
        maker.add(f"held{index}", split="val")
    found = [Expected("coordinates", "", "as LabelImg writes", "0-based edges")]
    for add in (_files, _sizes, _boxes, _names, _pixels, _twins, _lists):
        found += add(maker)
    for split, lines in maker.lists.items():
        text = "".join(f"{line}\n" for line in lines)
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text, encoding="utf-8", newline="\n")
    (root / "ImageSets" / "Main" / "test.txt").write_text("")
    (root / "classes.txt").write_text("can\nlemonade\nbiscuit\nCan\nlemonede\n", encoding="utf-8", newline="\n")
    return found


def _files(maker: _Maker) -> list[Expected]:
    """Files that can't be read, or have no partner."""
    maker.add("windows")
    text = maker.xml("windows").read_text(encoding="utf-8").replace("\n", "\r\n")
    maker.xml("windows").write_bytes(text.encode("utf-8-sig"))  # nothing is wrong with it
    maker.add("broken", edits=[("</bndbox>", "")])
    maker.add("entity")
    text = maker.xml("entity").read_text(encoding="utf-8")
    maker.xml("entity").write_text(f'<!DOCTYPE annotation [<!ENTITY x "y">]>\n{text}', encoding="utf-8")
    maker.add("latin", edits=[("Unknown", "Kühlregal")])
    maker.xml("latin").write_bytes(maker.xml("latin").read_text(encoding="utf-8").encode("latin-1"))
    maker.add("boxless", edits=[("<bndbox>", "<box>"), ("</bndbox>", "</box>")])
    maker.add("unnumbered", edits=[("<xmin>10<", "<xmin>ten<")])
    path = maker.add("cut")
    path.write_bytes(path.read_bytes()[:-400])
    maker.photo("text.jpg").write_text("this is no photo")
    maker.add("text", save=lambda _, path: path.write_text("no photo") and None)
    path = maker.add("rotten", save=lambda image, path: image.save(path, "PNG"), suffix=".png")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 60] = bytes(60)
    path.write_bytes(content)  # its end is as it should be: only decoding tells
    maker.add("bare")
    maker.xml("bare").unlink()
    maker.add("lonely")
    maker.photo("lonely.jpg").unlink()
    maker.add("double")
    maker.photo("double.png").write_bytes(maker.photo("sound00.jpg").read_bytes())
    maker.add("renamed", edits=[(">renamed.jpg<", ">IMG_0001.jpg<")])
    refused = "refused"
    return [
        Expected("annotation unreadable", "Annotations/broken.xml", "not XML", refused, "</object>"),
        Expected("annotation unreadable", "Annotations/entity.xml", "DOCTYPE", refused),
        Expected("annotation unreadable", "Annotations/latin.xml", "not XML", refused, "<database>"),
        Expected("object unreadable", "Annotations/boxless.xml", "no <bndbox>", refused, "<object>"),
        Expected("object unreadable", "Annotations/unnumbered.xml", "lacks a number", refused, "<bndbox>"),
        Expected("image unreadable", "JPEGImages/cut.jpg", "cut-off", refused),
        Expected("image unreadable", "JPEGImages/text.jpg", "not an image", refused),
        Expected("image unreadable", "JPEGImages/rotten.png", "damaged", "training stops"),
        Expected("image without annotation", "JPEGImages/bare.jpg", "no annotation", refused),
        Expected("image skipped", "JPEGImages/bare.jpg", "no annotation", "left out", unlabelled="skip"),
        Expected("image taken as negative", "JPEGImages/bare.jpg", "no annotation", "used", unlabelled="negative"),
        Expected("annotation without image", "Annotations/lonely.xml", "no image", refused),
        Expected("same name twice", "JPEGImages/double.png", "JPEGImages/double.jpg", refused),
        Expected("filename differs", "Annotations/renamed.xml", "IMG_0001.jpg", "the photo of the annotation's own"),
    ]


def _sizes(maker: _Maker) -> list[Expected]:
    """Sizes that are missing or wrong."""
    height, width = HW
    size = f"<width>{width}</width>\n\t\t<height>{height}</height>"
    maker.add("sizeless", edits=[(size, "")])
    maker.add("zero", edits=[(size, "<width>0</width><height>0</height>")])
    maker.add("resized", edits=[(size, f"<width>{width}</width><height>{height + 40}</height>")])
    turned = [(size, f"<width>{width}</width><height>{height}</height>")]

    def save_turned(image: Image.Image, path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path, exif=exif)

    maker.add("sideways", edits=turned, save=save_turned)
    half = (width // 2, height // 2)
    maker.add("shrunk", save=lambda image, path: image.resize(half).save(path))
    return [
        Expected("size missing", "Annotations/sizeless.xml", "no size", f"{width}x{height}"),
        Expected("size missing", "Annotations/zero.xml", "no size", f"{width}x{height}"),
        Expected("size disagrees", "Annotations/resized.xml", f"{width}x{height + 40}", "as written"),
        Expected("boxes turned", "Annotations/sideways.xml", "EXIF", "turned"),
        Expected("EXIF-turned photo", "JPEGImages/sideways.jpg", "orientation is 6", "turned"),
        Expected("boxes scaled", "Annotations/shrunk.xml", f"{half[0]}x{half[1]}", "scaled"),
    ]


def _boxes(maker: _Maker) -> list[Expected]:
    """Boxes that are odd, each the third object of its photo, and tags."""
    height, width = HW
    cases: list[tuple[str, str, tuple[float, float, float, float], str, str]] = [
        ("box without area", "can", (70, 40, 70, 60), "70 40 70 60", "dropped"),
        ("box inverted", "can", (85, 100, 65, 30), "85 100 65 30", "read as 65 30 85 100"),
        ("box outside the image", "can", (width + 10, 10, width + 30, 50), f"{width}x{height}", "dropped"),
        ("box partly outside", "can", (-12, 60, 40, height + 20), "-12 60", f"clipped to 0 60 40 {height}"),
        ("duplicate box", "can", (10, 20, 60, 91), "lies on can 10 20 60 90", "used"),
        ("two classes on one box", "lemonade", (10, 20, 60, 91), "lies on can 10 20 60 90", "used"),
        ("box covers the image", "can", (0, 0, width, height), f"{width}x{height}", "used"),
        ("tiny box", "can", (70, 50, 73, 53), "on a canvas of 300x300", "used"),
        ("decimals", "can", (70.5, 50.25, 85, 100), "1 of its 3 boxes", "kept"),
        ("unknown class", "gadget", (70, 30, 85, 100), "'gadget' is not in the list", "refused"),
    ]
    found = []
    for kind, name, box, what, action in cases:
        stem = kind.replace(" ", "_")
        maker.add(stem, [(name, box)])
        found.append(Expected(kind, f"Annotations/{stem}.xml", what, action, "<object>"))
    maker.add("slip", edits=[("<difficult>0</difficult>", "<diffcult>1</diffcult>")])
    maker.add("maybe", edits=[("<difficult>0<", "<difficult>maybe<")])
    return [
        *found,
        Expected("misspelt tag", "Annotations/slip.xml", "<diffcult> in <object> looks like <difficult>", "not read",
                 "<diffcult>"),
        Expected("odd value", "Annotations/maybe.xml", "'maybe'", "taken as 0", "<difficult>"),
    ]  # fmt: skip


def _names(maker: _Maker) -> list[Expected]:
    """Class names."""
    maker.add("shout", [("Can", (65, 30, 85, 100))])
    maker.add("typo", [("lemonede", (65, 30, 85, 100))])
    maker.add("crumbs", [("biscuit", (65, 30, 85, 100))])
    return [
        Expected("class names alike", "Annotations/shout.xml", "'Can' (1 object) and 'can'", "two classes",
                 "<object>"),
        Expected("class names similar", "Annotations/typo.xml", "'lemonede' (1 object) and 'lemonade'",
                 "two classes", "<object>"),
        Expected("rare class", "", "'biscuit' has 1 object in 'train'", "used"),
    ]  # fmt: skip


def _pixels(maker: _Maker) -> list[Expected]:
    """Formats and pixels."""

    def deep(image: Image.Image, path: Path) -> None:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path)

    def clear(image: Image.Image, path: Path) -> None:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)

    maker.add("lying", save=lambda image, path: image.save(path, "PNG"))
    maker.add("grey", save=lambda image, path: image.convert("L").save(path))
    maker.add("palette", save=lambda image, path: image.convert("P").save(path), suffix=".png")
    maker.add("clear", save=clear, suffix=".png")
    maker.add("print", save=lambda image, path: image.convert("CMYK").save(path))
    maker.add("deep", save=deep, suffix=".png")
    return [
        Expected("wrong extension", "JPEGImages/lying.jpg", "PNG", "read as PNG"),
        Expected("greyscale photo", "JPEGImages/grey.jpg", "greyscale", "grey is used"),
        Expected("palette photo", "JPEGImages/palette.png", "a palette", "RGB"),
        Expected("transparent photo", "JPEGImages/clear.png", "can be transparent", "white"),
        Expected("CMYK photo", "JPEGImages/print.jpg", "CMYK", "RGB"),
        Expected("16-bit photo", "JPEGImages/deep.png", "16 bits", "8 bits"),
    ]


def _twins(maker: _Maker) -> list[Expected]:
    """The same photo more than once."""
    with Image.open(maker.photo("held0.jpg")) as image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=60)
    maker.add("again")
    maker.photo("again.jpg").write_bytes(buffer.getvalue())
    maker.add("copy")
    maker.photo("copy.jpg").write_bytes(maker.photo("sound01.jpg").read_bytes())
    maker.lists["val"].append("sound02")
    return [
        Expected("near-duplicate across splits", "JPEGImages/again.jpg", "looks like JPEGImages/held0.jpg in 'val'",
                 "both are used"),
        Expected("identical photos", "JPEGImages/sound01.jpg", "the same bytes as JPEGImages/copy.jpg", "both"),
        Expected("in two splits", "Annotations/sound02.xml", "in 'train' and in 'val'", "used in both"),
    ]  # fmt: skip


def _lists(maker: _Maker) -> list[Expected]:
    """Split files."""
    maker.lists["train"] += ["sound03", "ghost"]
    name = "ImageSets/Main/train.txt"
    return [
        Expected("listed twice", name, "sound03", "used once", "sound03"),
        Expected("listed but missing", name, "'ghost'", "refused", "ghost"),
        Expected("split unusable", "", "test.txt: lists no photo", "refused"),
    ]

"""What is found wrong or unusual in a data set: the kinds there are, what each means, and the findings themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from detkit.config import Data
from detkit.errors import UserError
from detkit.files import atomic_write

REFUSED = "refused: training does not start"

# error: training refuses the data set. change: training drops, clips, moves or renames something. note: taken as it is.
Level = Literal["error", "change", "note"]


class Kind(NamedTuple):
    """A kind of finding: how grave it is, and what a person should do about it, in a sentence or two."""

    level: Level
    advice: str


class Finding(NamedTuple):
    """One thing found: its kind, the file (relative to the root; '' for the data set), what is wrong, what detkit does.

    line: of the file, 0 where it has none. image: the photo's file, relative to the root, '' where there is none.
    box: the object's x1 y1 x2 y2 as read, pixels of the original canvas, None where no single object is meant.
    """

    kind: str
    file: str
    what: str
    action: str
    line: int = 0
    image: str = ""
    box: tuple[float, float, float, float] | None = None


KINDS: dict[str, Kind] = {
    "annotation unreadable": Kind("error", "Open the file in a text editor at the line named, or write it anew."),
    "object unreadable": Kind("error", "Open the file in a text editor at the line named, or delete the object."),
    "image unreadable": Kind("error", "Copy the photo from its source again, or remove it and its annotation."),
    "image without annotation": Kind(
        "error", "Label it; or say what it means with data.unlabelled: skip (leave out) or negative (shows no object)."
    ),
    "annotation without image": Kind("error", "Put the photo back under the same name, or remove the annotation."),
    "unknown class": Kind("error", "Correct the name in the annotation, or add it to the list of classes."),
    "same name twice": Kind("error", "Rename one of the two: one annotation can't belong to both photos."),
    "listed twice": Kind("change", "Remove the second line from the split file."),
    "split unusable": Kind("error", "Mend the split's file, or name another split."),
    "listed but missing": Kind("error", "Put the photo back, or remove the line from the split file."),
    "image skipped": Kind("change", "Label it, if it should be trained on."),
    "image taken as negative": Kind("change", "Check that it shows none of the classes."),
    "size missing": Kind("note", "Nothing needs doing; --fix writes the photo's size into the annotation."),
    "size disagrees": Kind("change", "Check that the boxes fit the photo: it may have been resized after labelling."),
    "boxes turned": Kind("change", "Check one photo: its boxes were drawn before the camera's EXIF turn was applied."),
    "boxes scaled": Kind("change", "Check one photo: its boxes were drawn on the photo at another size."),
    "box without area": Kind("change", "Draw the box again, or delete it."),
    "box inverted": Kind("change", "Nothing needs doing where the box looks right with its corners exchanged."),
    "box outside the image": Kind("change", "Delete the box, or check whether the photo was cropped after labelling."),
    "box partly outside": Kind("change", "Nothing needs doing where it is a pixel or two; else draw the box again."),
    "misspelt tag": Kind("change", "Correct the tag: what stands in it is not read."),
    "odd value": Kind("change", "Write 0 or 1."),
    "filename differs": Kind("note", "Nothing needs doing where the annotation does belong to the photo beside it."),
    # What only `data audit` looks for.
    "near-duplicate across splits": Kind(
        "note", "Leave one of the two out: evaluated on a photo that it was trained on, a detector looks too good."
    ),
    "in two splits": Kind("note", "Remove the photo from one of the splits: evaluation must not see training photos."),
    "identical photos": Kind("note", "Keep the one with the better annotation, unless it is meant to count twice."),
    "class names alike": Kind("note", "Choose one spelling: names that differ by case or space only are two classes."),
    "class names similar": Kind("note", "Correct the rarer name, where it is a slip of the pen."),
    "rare class": Kind("note", "Label more of it, or leave the class out: so few objects teach or measure little."),
    "duplicate box": Kind("note", "Delete one of the two boxes: the product counts twice."),
    "two classes on one box": Kind("note", "Delete the wrong one of the two, unless both are meant."),
    "box covers the image": Kind("note", "Check that it is a product, not the whole photo as one label."),
    "tiny box": Kind("note", "Train on a larger canvas (input.size), or in tiles; delete what a person can't name."),
    "decimals": Kind(
        "note", "Nothing needs doing: decimals are kept. Old versions of LabelImg do not open such a file."
    ),
    "wrong extension": Kind("note", "Rename the file: other programs go by the extension."),
    "EXIF-turned photo": Kind("note", "Nothing needs doing where the boxes lie on the photo as people see it."),
    "greyscale photo": Kind("note", "Nothing needs doing, if the photos to be predicted are greyscale as well."),
    "palette photo": Kind("note", "Nothing needs doing; a palette of 256 colours loses some, so prefer the original."),
    "transparent photo": Kind("note", "Check that a white background is what is meant."),
    "CMYK photo": Kind("note", "Compare its colours with the original: print colours convert roughly."),
    "16-bit photo": Kind("note", "Check that the photo isn't dark: only the upper 8 of its 16 bits are used."),
    # What other formats hold, and what they can't.
    "polygon": Kind("change", "Nothing needs doing: training uses boxes. Keep the original where masks matter."),
    "rotated box": Kind("change", "Look at one: the upright box round a turned one is larger than the product."),
    "no box": Kind("change", "Draw a box, if it should be trained on: a point, line or tag has no area."),
    "photo annotated twice": Kind("change", "Remove one of the two annotations of the photo."),
    "class listed twice": Kind("change", "Give the two classes different names, if they mean different things."),
    "photo absent": Kind("change", "Get the photos, if their objects should be trained on."),
    "flag not held": Kind("change", "Choose another format, or keep the original, where the mark matters."),
    "unlabelled not listed": Kind("change", "Label the photos, or choose a format with a file a photo."),
    "photo renamed": Kind("change", "Nothing needs doing; the numbers stand in the new names."),
    "in no split": Kind("change", "Add the photos to a split, if they should be used."),
    "photo not listed": Kind("note", "Label the photo, if it should be used: no annotation file names it."),
    "unused category": Kind("note", "Set data.classes to leave classes out."),
    "mask not read": Kind("note", "Nothing needs doing: training uses boxes. Keep the original where masks matter."),
    "not read": Kind("note", "Keep the original where this matters."),
    "coordinates": Kind("note", "Set data.convention to edges or devkit where this is wrong."),
}


def located(line: int, what: str) -> str:
    """What is wrong, after the line where it is (0: the file as a whole)."""
    return f"line {line}: {what}" if line else what


def refusal(data: Data, errors: Sequence[Finding]) -> UserError:
    """The first error as one line that says what to do, and how many more there are."""
    first = errors[0]
    count = len(errors) - 1
    command = f"detkit data audit {data.root}" + (f" --format {data.format}" if data.format != "voc" else "")
    more = f" ({count} more error{'s' * (count > 1)}: run  {command} )" if count else ""
    advice = KINDS[first.kind].advice
    return UserError(f"{data.root / first.file}: {located(first.line, first.what)}{more}. {advice}")


def level(finding: Finding) -> Level:
    """How grave a finding is."""
    return KINDS[finding.kind].level


def summary(findings: Sequence[Finding]) -> list[str]:
    """One line a kind of finding: the first of them, how many more, what is done."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind, []).append(finding)
    lines = []
    for kind, group in groups.items():
        first = group[0]
        more = "" if len(group) == 1 else f" and {len(group) - 1} more"
        where = f"{first.file}{more} " if first.file else ""
        lines.append(f"{kind}: {where}({first.what}; {first.action})")
    return lines


def write(path: Path, findings: Sequence[Finding]) -> None:
    """Write every finding as a JSON line of its fields."""
    text = "".join(json.dumps(finding._asdict(), ensure_ascii=False) + "\n" for finding in findings)
    atomic_write(path, text.encode("utf-8", "surrogateescape"))

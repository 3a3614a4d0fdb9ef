"""What is found wrong or unusual in a data set: the kinds there are, what each means, and the findings themselves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

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
    "coordinates": Kind("note", "Set data.convention to edges or devkit where this is wrong."),
}


def located(line: int, what: str) -> str:
    """What is wrong, after the line where it is (0: the file as a whole)."""
    return f"line {line}: {what}" if line else what


def refusal(root: Path, errors: Sequence[Finding]) -> UserError:
    """The first error as one line that says what to do, and how many more there are."""
    first = errors[0]
    more = f" ({len(errors) - 1} more error{'s' * (len(errors) > 2)}: run  detkit data audit {root} )" if len(errors) > 1 else ""
    advice = KINDS[first.kind].advice
    return UserError(f"{root / first.file}: {located(first.line, first.what)}{more}. {advice}")


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

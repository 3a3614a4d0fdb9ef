"""Programs that run one model file without detkit, in Python, C++, C# and JavaScript: for integrators. No torch."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from detkit import manifest as manifests
from detkit.files import atomic_write
from detkit.manifest import Manifest

LANGUAGES = {"py": "Python", "cpp": "C++", "cs": "C#", "mjs": "JavaScript"}  # by the suffix of their files


def write(path: Path) -> list[Path]:
    """Write a program in each language beside an exported file: NAME-detect.py and so on, over those of the export
    before. Each prints, for the photos that it is given, lines of photo, class, score and box, with tabs between.

    The file's name, classes, canvas and threshold are in it. Raises UserError where it is no file of detkit's.
    """
    said = manifests.read(path.read_bytes(), str(path))
    written = []
    for suffix in LANGUAGES:
        target = path.with_name(f"{path.stem}-detect.{suffix}")
        atomic_write(target, program(said, path.name, suffix))
        written.append(target)
    return written


def program(said: Manifest, model: str, suffix: str) -> str:
    """The program's text. model: the file's name. suffix: one of LANGUAGES."""
    template = resources.files("detkit").joinpath("templates", "snippets", f"{said.input}.{suffix}.in")
    names = [_text(name, suffix) for name in said.classes]
    classes = ",\n    ".join(", ".join(names[start : start + 8]) for start in range(0, len(names), 8))
    letterbox = said.resize == "letterbox"
    height, width = said.size
    values = {
        "MODEL": _text(model, suffix),
        "FILE": re.sub(r"\s", " ", f"{Path(model).stem}-detect.{suffix}"),
        "CLASSES": f"[{classes}]" if suffix in ("py", "mjs") else classes,
        "WIDTH": str(width),
        "HEIGHT": str(height),
        "LETTERBOX": str(letterbox) if suffix == "py" else str(letterbox).lower(),
        "FILL": ", ".join(map(str, said.fill)),
        "SCORE": repr(float(said.score)),
    }
    return re.sub("@([A-Z]+)@", lambda found: values[found[1]], template.read_text(encoding="utf-8"))


def _text(value: str, suffix: str) -> str:
    """The value as a string literal: JSON's is one in all four languages, but for C++ and control characters."""
    literal = json.dumps(value, ensure_ascii=False)
    return (
        re.sub(r"\\u00([01][0-9a-f])", lambda code: f"\\{int(code[1], 16):03o}", literal)
        if suffix == "cpp"
        else literal
    )

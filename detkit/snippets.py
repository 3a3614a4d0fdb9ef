"""Programs that run one model file without detkit, in Python, C++, C# and JavaScript: for integrators. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from importlib import resources
from pathlib import Path

import numpy as np

from detkit import manifest as manifests
from detkit.files import atomic_write
from detkit.manifest import Manifest
from detkit.runtime import decide

LANGUAGES = {"py": "Python", "cpp": "C++", "cs": "C#", "mjs": "JavaScript"}  # by the suffix of their files


def write(path: Path, only: Collection[Path] | None = None) -> list[Path]:
    """Write a program in each language beside an exported file: NAME-detect.py and so on, over those of the export
    before. Each prints, for the photos that it is given, lines of photo, class, score and box, with tabs between.

    The file's name, classes, canvas and thresholds are in it. only: of these, no others. Raises UserError where it is
    no file of detkit's.
    """
    said = manifests.read(path.read_bytes(), str(path))
    written = []
    for suffix in LANGUAGES:
        target = _beside(path, suffix)
        if only is None or target in only:
            atomic_write(target, program(said, path.name, suffix))
            written.append(target)
    return written


def present(path: Path) -> dict[Path, bool]:
    """The programs that lie beside an exported file, and whether each is as `write` writes it now."""
    said = manifests.read(path.read_bytes(), str(path))
    there = {suffix: _beside(path, suffix) for suffix in LANGUAGES if _beside(path, suffix).is_file()}
    return {each: each.read_bytes() == program(said, path.name, suffix).encode() for suffix, each in there.items()}


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.stem}-detect.{suffix}")


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
        "SCORES": ", ".join(_number(score, suffix) for score in decide.lowest(said)),
    }
    return re.sub("@([A-Z]+)@", lambda found: values[found[1]], template.read_text(encoding="utf-8"))


def _number(value: np.float32, suffix: str) -> str:
    """The number as a literal, as short as gives it back in 32 bits."""
    return np.format_float_positional(value, trim="0") + ("f" if suffix in ("cpp", "cs") else "")


def _text(value: str, suffix: str) -> str:
    """The value as a string literal: JSON's is one in all four languages, but for C++ and control characters."""
    literal = json.dumps(value, ensure_ascii=False)
    return (
        re.sub(r"\\u00([01][0-9a-f])", lambda code: f"\\{int(code[1], 16):03o}", literal)
        if suffix == "cpp"
        else literal
    )

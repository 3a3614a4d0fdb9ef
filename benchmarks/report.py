"""What the benchmarks share: timing side by side, and results as JSON and Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

IMPORTED = {"opencv-python-headless": "cv2", "pillow": "PIL"}
RESULTS = Path(__file__).parent / "results"
console = Console(width=120)


def _machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    if torch.cuda.is_available():
        name += f", {torch.cuda.get_device_name()}"
    packages = ("torch", "torchvision", "opencv-python-headless", "albumentations", "pillow", "numpy")
    installed = {
        package: metadata.version(package) for package in packages if find_spec(IMPORTED.get(package, package))
    }
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in installed},
    }


def save(file: str, section: str, title: str, note: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Print a section's rows, and write it into results/FILE.json and FILE.md beside the other sections."""
    path = RESULTS / f"{file}.json"
    sections = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    sections[section] = {"title": title, "note": note, "machine": _machine(), **more, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8", newline="\n")
    text = "\n".join(_markdown(sections[name]) for name in sorted(sections))
    heading = path.stem.replace("_", " ").capitalize()
    path.with_suffix(".md").write_text(f"# {heading}: benchmarks\n\n{text}", encoding="utf-8", newline="\n")
    console.print(_markdown(sections[section]), markup=False, highlight=False)


def _markdown(section: dict[str, Any]) -> str:
    machine, rows = section["machine"], section["rows"]
    versions = {**machine["versions"], **section.get("versions", {})}
    lines = [f"## {section['title']}", "", section["note"], "", "| " + " | ".join(rows[0]) + " |"]
    lines.append("|" + " --- |" * len(rows[0]))
    lines += ["| " + " | ".join(str(value) for value in row.values()) + " |" for row in rows]
    where = f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, Python {machine['python']}"
    lines += ["", f"{where}; {', '.join(f'{name} {version}' for name, version in versions.items())}.", ""]
    return "\n".join(lines)


def interleaved(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds that each run says it took, every run once a round, so that a busy machine slows all alike. A round more
    than `repeats` is run, the first not counted."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            taken[name].append(run())
    return {name: times[1:] for name, times in taken.items()}

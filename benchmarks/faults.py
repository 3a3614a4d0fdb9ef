"""Makes the runs that `detkit doctor` is checked on: each shows one fault, a few are healthy. All on shelf-mini, tiny.

    python benchmarks/faults.py OUT [--seed 1] [--only NAME ...]

Photos are quarters of shelf-mini's, their sixteen products four kinds: something that is learnt in a minute. What a run
recorded goes to OUT/NAME, without weights and without this machine's paths. `first` made the runs that the thresholds
were found on, `second` (other heads, other strengths of a fault, another seed) those that they were then tried on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from PIL import Image
from torch import Tensor

from detkit import checkpoint, config
from detkit.nn.detector import Detector

SHELF = Path(__file__).parent.parent / "datasets" / "shelf-mini"
KINDS = {
    "bottle": ("cola_classic", "cola_zero", "water_still", "water_sparkling", "soda_orange"),
    "box": ("cereal_honey", "cereal_cocoa", "tea_green", "milk", "juice_orange"),
    "jar": ("jam_strawberry", "pickles", "yoghurt_blueberry"),
    "pack": ("crisps_paprika", "coffee_beans", "chocolate"),
}
FILES = ("config.yaml", "steps.csv", "metrics.csv", "classes.csv", "classes.json")
COMMON = [
    "input.size=[96, 128]", "augment.mosaic=0", "model.weights=none", "train.epochs=10", "train.batch_size=8",
    "train.eval_every=1", "train.schedule.warmup_steps=10", "train.progressive=[]", "train.recalibrate_bn=0",
    "train.workers=0", "train.device=cpu", "train.loggers=[]", "train.save_steps=0",
]  # fmt: skip
HEADS = {
    "ssd": ("ssd_shelf", ["model.backbone.width=0.35", "model.neck.channels=24", "train.optimizer.lr=0.004"]),
    "yolo": ("yolo_nano", ["model.backbone.width=0.25", "model.neck.channels=24", "model.head.channels=24"]),
    "faster_rcnn": (
        "faster_rcnn_mobilenet",
        [
            "model.backbone.width=0.35", "model.backbone.freeze=0", "model.neck.channels=24", "model.head.width=64",
            "model.head.anchor_sizes=[[16], [32], [64], [96]]", "train.optimizer.lr=0.002",
        ],
    ),
    # Without BatchNorm, which mends much of what an initialisation spoils.
    "plain": (
        "ssd_vgg",
        [
            "model.backbone={name: vgg11, strides: [8, 16, 32]}",
            "model.neck={name: fpn, channels: 32, levels: 3, norm: none}",
            "model.head={name: ssd, loss: aligned, scales: [0.12, 0.24, 0.48, 0.96], ratios: [[], [], []]}",
            "train.optimizer={name: adamw, lr: 0.0005}", "train.schedule={name: cosine, warmup_steps: 10}",
            "input.size=[64, 96]",
        ],
    ),
}  # fmt: skip


class Case(NamedTuple):
    """A run. fault: what is to be found in it; '': nothing. data, weights: what it is trained on and starts from."""

    fault: str
    head: str
    sets: tuple[str, ...] = ()
    data: str = "quarters"
    weights: str = ""


def quarters(out: Path, *, photos: int | None = None, scale: int = 1, rare: str | None = None) -> None:
    """The four quarters of each photo as a data set. photos: of the training split; default all. scale: factor on the
    photos' sides. rare: a kind of which the training split keeps two objects."""
    for folder in ("ImageSets/Main", "JPEGImages", "Annotations"):
        (out / folder).mkdir(parents=True)
    (out / "classes.txt").write_text("".join(f"{kind}\n" for kind in KINDS))
    kinds = {name: kind for kind, names in KINDS.items() for name in names}
    left = 2
    for split in ("train", "val"):
        names = []
        for name in (SHELF / f"ImageSets/Main/{split}.txt").read_text().split():
            image = Image.open(SHELF / f"JPEGImages/{name}.jpg").convert("RGB")
            objects = ET.parse(SHELF / f"Annotations/{name}.xml").findall("object")
            w, h = image.width // 2, image.height // 2
            for number, (x, y) in enumerate(((0, 0), (w, 0), (0, h), (w, h))):
                lines = []
                for item in objects:
                    kind = kinds[item.findtext("name", "")]
                    box = [float(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
                    corner, sides = (x, y, x, y), (w, h, w, h)
                    seen = [min(max(v - o, 0), most) for v, o, most in zip(box, corner, sides, strict=True)]
                    inside = max(0, seen[2] - seen[0]) * max(0, seen[3] - seen[1])
                    share = inside / ((box[2] - box[0]) * (box[3] - box[1]))
                    if share < 0.2:
                        continue
                    if kind == rare and split == "train":
                        left -= 1
                        if left < 0:
                            continue
                    places = "".join(
                        f"<{side}>{round(v * scale)}</{side}>"
                        for side, v in zip(("xmin", "ymin", "xmax", "ymax"), seen, strict=True)
                    )
                    difficult = int(share < 0.6)
                    lines.append(
                        f"<object><name>{kind}</name><difficult>{difficult}</difficult><bndbox>{places}</bndbox></object>"
                    )
                part = image.crop((x, y, x + w, y + h)).resize((w * scale, h * scale), Image.Resampling.BICUBIC)
                part.save(out / f"JPEGImages/{name}_{number}.jpg", quality=90)
                size = f"<size><width>{w * scale}</width><height>{h * scale}</height><depth>3</depth></size>"
                text = f"<annotation><filename>{name}_{number}.jpg</filename>{size}{''.join(lines)}</annotation>\n"
                (out / f"Annotations/{name}_{number}.xml").write_text(text)
                names.append(f"{name}_{number}")
        names = names[:photos] if split == "train" else names
        (out / f"ImageSets/Main/{split}.txt").write_text("".join(f"{name}\n" for name in names))


DATA: dict[str, Callable[[Path], None]] = {
    "quarters": quarters,
    "few": lambda out: quarters(out, photos=8),
    "large": lambda out: quarters(out, scale=8),
    "rare_jar": lambda out: quarters(out, rare="jar"),
    "rare_box": lambda out: quarters(out, rare="box"),
}


def _norms(weights: dict[str, Tensor]) -> list[str]:
    """The names of the norms of backbone and neck, without `.weight`."""
    names = [name.removesuffix(".running_mean") for name in weights if name.endswith(".running_mean")]
    return [name for name in names if not name.startswith("head")]


def _huge(weights: dict[str, Tensor], factor: float) -> None:
    """Every matrix times the factor; BatchNorm's scales too, which would undo it."""
    for name, value in weights.items():
        if value.ndim > 1 or name.removesuffix(".weight") in _norms(weights):
            value.mul_(factor)


def _dead(weights: dict[str, Tensor], bias: float) -> None:
    """BatchNorm's shifts so low that no ReLU lets anything through."""
    for name in _norms(weights):
        weights[f"{name}.bias"].fill_(bias)


def _constant(weights: dict[str, Tensor], value: float) -> None:
    """All weights of a layer of backbone and neck alike: its channels learn the same, and are one."""
    for name, tensor in weights.items():
        if tensor.ndim > 1 and not name.startswith("head"):
            tensor.fill_(value / tensor[0].numel() ** 0.5)


def _small(weights: dict[str, Tensor], factor: float) -> None:
    """The backbone's matrices times the factor: without norms, little of the photo reaches the head, or of the gradient
    the first layers."""
    for name, tensor in weights.items():
        if tensor.ndim > 1 and name.startswith("backbone"):
            tensor.mul_(factor)


WEIGHTS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "huge": lambda weights: _huge(weights, 4),
    "huger": lambda weights: _huge(weights, 30),
    "dead": lambda weights: _dead(weights, -6),
    "dying": lambda weights: _dead(weights, -3),
    "constant": lambda weights: _constant(weights, 1.0),
    "zero": lambda weights: _constant(weights, 0.0),
    "small": lambda weights: _small(weights, 0.1),
    "smaller": lambda weights: _small(weights, 0.05),
}

STILL = ("augment.crop=0", "augment.colour=0", "augment.flip=0")
LONG = ("train.epochs=14",)
# Steps in proportion to the gradient: AdamW takes those of faint gradients as large as others.
SGD = ("train.optimizer={name: sgd, lr: 0.02}",)
FEW = (*STILL, "train.epochs=60", "train.eval_every=4", "train.batch_size=4", "train.ema=0.9")
FIRST = {
    "healthy_ssd": Case("", "ssd", LONG),
    "healthy_yolo": Case("", "yolo", LONG),
    "healthy_faster_rcnn": Case("", "faster_rcnn", LONG),
    "rate_high_ssd": Case("rate too high", "ssd", ("train.optimizer.lr=0.4",)),
    "rate_high_yolo": Case("rate too high", "yolo", ("train.optimizer.lr=0.4",)),
    "rate_high_faster_rcnn": Case("rate too high", "faster_rcnn", ("train.optimizer.lr=0.1",)),
    "diverging_ssd": Case("diverging", "ssd", ("train.optimizer={name: sgd, lr: 3}", "train.clip_norm=0")),
    "diverging_plain": Case("diverging", "plain", ("train.optimizer={name: sgd, lr: 0.3}", "train.clip_norm=0")),
    "rate_low_ssd": Case("rate too low", "ssd", ("train.optimizer.lr=0.000004",)),
    "rate_low_faster_rcnn": Case("rate too low", "faster_rcnn", ("train.optimizer.lr=0.000002",)),
    "constant_ssd": Case("flat start", "ssd", (), weights="constant"),
    "constant_yolo": Case("flat start", "yolo", (), weights="constant"),
    "zero_yolo": Case("dead activations", "yolo", (), weights="zero"),
    "overfitting_ssd": Case("overfitting", "ssd", FEW, data="few"),
    "overfitting_yolo": Case("overfitting", "yolo", FEW, data="few"),
    "starved_ssd": Case("data-starved", "ssd", ("train.decode=full",), data="large"),
    "dead_ssd": Case("dead activations", "ssd", (), weights="dead"),
    "dead_faster_rcnn": Case("dead activations", "faster_rcnn", (), weights="dead"),
    "huge_plain": Case("exploding gradients", "plain", (), weights="huge"),
    "huge_ssd": Case("exploding gradients", "ssd", (), weights="huger"),
    "vanishing_plain": Case("vanishing gradients", "plain", SGD, weights="smaller"),
    "vanishing_vgg16": Case("vanishing gradients", "plain", (*SGD, "model.backbone.name=vgg16", "model.init=normal")),
    "rare_jar_yolo": Case("classes never predicted", "yolo", LONG, data="rare_jar"),
}
SECOND = {
    "healthy_plain": Case("", "plain", LONG),
    "healthy_ssd": Case("", "ssd", ("train.optimizer={name: sgd, lr: 0.03}", *LONG)),
    "healthy_yolo": Case("", "yolo", ("train.optimizer={name: adamw, lr: 0.003}", *LONG)),
    "healthy_faster_rcnn": Case("", "faster_rcnn", LONG),
    "rate_high_plain": Case("rate too high", "plain", ("train.optimizer.lr=0.03",)),
    "rate_high_yolo": Case("rate too high", "yolo", ("train.optimizer={name: adamw, lr: 0.3}",)),
    "diverging_yolo": Case("diverging", "yolo", ("train.optimizer={name: sgd, lr: 5}", "train.clip_norm=0")),
    "diverging_faster_rcnn": Case(
        "diverging", "faster_rcnn", ("train.optimizer={name: sgd, lr: 10}", "train.clip_norm=0")
    ),
    "rate_low_yolo": Case("rate too low", "yolo", ("train.optimizer.lr=0.000004",)),
    "rate_low_plain": Case("rate too low", "plain", ("train.optimizer.lr=0.0000005",)),
    "constant_faster_rcnn": Case("flat start", "faster_rcnn", (), weights="constant"),
    "overfitting_faster_rcnn": Case("overfitting", "faster_rcnn", FEW, data="few"),
    "starved_yolo": Case("data-starved", "yolo", ("train.decode=full",), data="large"),
    "dead_yolo": Case("dead activations", "yolo", (), weights="dead"),
    "huge_faster_rcnn": Case("exploding gradients", "faster_rcnn", (), weights="huger"),
    "vanishing_plain": Case("vanishing gradients", "plain", SGD, weights="small"),
    "rare_box_ssd": Case("classes never predicted", "ssd", ("train.epochs=40",), data="rare_box"),
}


def weights_file(case: Case, sets: list[str], seed: int, folder: Path) -> Path:
    """The detector's initial weights, spoilt."""
    settings = config.load(f"{HEADS[case.head][0]}.yaml", sets)
    torch.manual_seed(seed)
    weights = Detector(settings.model, settings.input, len(KINDS)).state_dict()
    WEIGHTS[case.weights](weights)
    path = folder / f"{case.weights}-{case.head}.safetensors"
    checkpoint.write(path, weights, settings, tuple(KINDS), 0, {})
    return path


def make(name: str, case: Case, seed: int, out: Path, scratch: Path) -> None:
    """Train the run from the command line, and keep its record."""
    data = scratch / case.data
    if not data.exists():
        DATA[case.data](data)
    shipped, own = HEADS[case.head]
    where = [f"data.root={data}", f"runs={scratch / 'runs'}", f"name={name}", f"train.seed={seed}"]
    sets = [*COMMON, *own, *case.sets, *where]
    if case.weights:
        sets.append(f"model.weights={weights_file(case, sets, seed, scratch)}")
    command = [sys.executable, "-m", "detkit", "train", "--config", f"{shipped}.yaml", "--set", *sets]
    done = subprocess.run(command, capture_output=True, text=True)
    run = scratch / "runs" / f"{name}-1"
    if not (run / "steps.csv").exists():
        raise SystemExit(done.stdout + done.stderr)
    print(f"{name}: exit {done.returncode} {done.stderr.strip()[:200]}")
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).mkdir(parents=True)
    for file in FILES:
        if (run / file).exists():
            shutil.copy(run / file, out / name)
    tree = yaml.safe_load((out / name / "config.yaml").read_text())
    tree["runs"], tree["data"]["root"], tree["data"]["cache"] = "runs", f"datasets/{case.data}", None
    tree["model"]["weights"] = case.weights or "none"
    (out / name / "config.yaml").write_text(config.dump(config.parse(tree, name)))


def main() -> None:
    """Make the runs that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", choices=("first", "second"), default="first")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--scratch", type=Path, help="where data and runs go; default: a folder that is removed")
    arguments = parser.parse_args()
    cases, seed = (FIRST, 0) if arguments.set == "first" else (SECOND, 1)
    scratch = arguments.scratch or Path(tempfile.mkdtemp())
    scratch.mkdir(exist_ok=True)
    for name in arguments.only or cases:
        make(name, cases[name], seed if arguments.seed is None else arguments.seed, arguments.out, scratch.absolute())
    if not arguments.scratch:
        shutil.rmtree(scratch)


if __name__ == "__main__":
    main()

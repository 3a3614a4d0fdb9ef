"""Data benchmarks: side by side in one run, as ratios. One command each:

    python benchmarks/data.py annotations ROOT   VOC XML to a split, against torchvision and xml.etree
    python benchmarks/data.py start ROOT         the start of training on half a million photos
    python benchmarks/data.py audit ROOT         an audit of a whole data set
    python benchmarks/data.py scenes             scenes from cut-outs
    python benchmarks/data.py loader             photos to uint8 batches, against torchvision and others
    python benchmarks/data.py reduced MODEL      a checkpoint's mAP, decoded in full and as training does

Each writes its section of results/data.json and results/data.md and leaves the others as they are.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else importing it asks the network for a newer version

import albumentations
import cv2
import numpy as np
import torch
import typer
from PIL import Image
from report import console, interleaved, save
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import io, tv_tensors
from torchvision.datasets import VOCDetection
from torchvision.transforms import v2

from detkit import checkpoint, geometry
from detkit.config import Augment, Data, Input
from detkit.data import audit, augment, batch, cache, pixels, scan, synth, voc
from detkit.data.batch import Loader
from detkit.data.dataset import EvalSet, Key, Sample, TrainSet
from detkit.data.labels import DataSet
from detkit.data.synth import synthesise
from detkit.evaluate import evaluate

BATCH = 8
JITTER: dict[str, Any] = {
    "brightness": (0.7, 1.3), "contrast": (0.7, 1.3), "saturation": (0.6, 1.4), "hue": (-0.03, 0.03),
}  # fmt: skip
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


# --- loader -----------------------------------------------------------------------------------------------------------


class Photos(NamedTuple):
    """A set of photos for the benchmark, and what it says of them in the table."""

    data: DataSet
    words: str


def _shelves(folder: Path, count: int, size: tuple[int, int]) -> DataSet:
    root = folder / f"{size[0]}x{size[1]}"
    synthesise(root, train=count, val=1, size=size)
    return cache.load(Data(root=root), "train")


def _small(folder: Path, large: DataSet, size: int) -> DataSet:
    """The photos again, as JPEGs of `size` by `size`."""
    root = folder / f"{size}x{size}"
    (root / "JPEGImages").mkdir(parents=True)
    hw = np.full_like(large.hw, size)
    names = [Path(large.name(i)).name for i in range(len(large))]
    for index, name in enumerate(names):
        with Image.open(large[index].path) as image:
            image.resize((size, size), Image.Resampling.BILINEAR).save(root / "JPEGImages" / name, quality=90)
    paths = [f"JPEGImages/{name}".encode() for name in names]
    scale = size / np.repeat(large.hw[:, ::-1], np.diff(large.box_ends, prepend=0), axis=0)
    return DataSet(
        root=str(root), classes=large.classes, findings=(), hw=hw, boxes=large.boxes * np.tile(scale, 2),
        paths=np.frombuffer(b"".join(paths), np.uint8), path_ends=np.cumsum([len(path) for path in paths]),
        labels=large.labels, flags=large.flags, box_ends=large.box_ends,
    )  # fmt: skip


def _timed_loader(samples: TrainSet, epochs: Iterator[int]) -> float:
    """Seconds a photo, file to uint8 batch, in this process."""
    loader = Loader(samples, BATCH, 0, seed=0)
    started, count = time.perf_counter(), 0
    for found in loader.epoch(next(epochs)):
        count += len(found.images)
    return (time.perf_counter() - started) / count


class _Theirs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Photos by another library: `change` takes a path, boxes and labels, and returns an image and its boxes."""

    def __init__(self, data: DataSet, change: Callable[..., tuple[Tensor, Any]]) -> None:
        self.data, self.change = data, change

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        record = self.data[index]
        return self.change(record.path, record.boxes, record.labels)


def _timed_theirs(samples: _Theirs) -> float:
    def collate(items: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
        return torch.stack([image for image, _ in items]), [boxes for _, boxes in items]

    loader = DataLoader(samples, BATCH, shuffle=True, collate_fn=collate, drop_last=True)
    started, count = time.perf_counter(), 0
    for images, _ in loader:
        assert images.dtype == torch.uint8
        count += len(images)
    return (time.perf_counter() - started) / count


def _torchvision(transform: v2.Transform, path: str, boxes: Any, labels: Any) -> tuple[Tensor, Any]:
    image = io.decode_jpeg(io.read_file(path))
    size = (image.shape[1], image.shape[2])
    marked = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=size)  # type: ignore[call-overload]
    done = transform({"image": tv_tensors.Image(image), "boxes": marked, "labels": torch.from_numpy(labels)})
    return done["image"], done["boxes"]


def _albumentations(transform: Any, path: str, boxes: Any, labels: Any) -> tuple[Tensor, Any]:
    image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
    done = transform(image=image, bboxes=boxes, labels=labels)
    return torch.from_numpy(done["image"]).permute(2, 0, 1), done["bboxes"]


def _ssd_torchvision(size: int) -> v2.Transform:
    """SSD's augmentation in torchvision's transforms, in the order that is quickest: colours last, on the canvas."""
    return v2.Compose([
        v2.RandomApply([v2.RandomIoUCrop()], 0.8),
        v2.RandomZoomOut(fill=[124, 116, 104], side_range=(1, 4), p=0.5),
        v2.RandomHorizontalFlip(0.5),
        v2.Resize((size, size), antialias=True),
        v2.RandomApply([v2.ColorJitter(**JITTER)], 0.5),
        v2.SanitizeBoundingBoxes(),
    ])  # fmt: skip


def _ssd_albumentations(size: int) -> Any:
    """A crop that keeps objects, as often as SSD's; albumentations' own resize, quicker than an antialiased one."""
    return albumentations.Compose(
        [
            albumentations.BBoxSafeRandomCrop(erosion_rate=0.5, p=0.5),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.Resize(size, size),
            albumentations.ColorJitter(**JITTER, p=0.5),
        ],
        bbox_params=albumentations.BboxParams(format="pascal_voc", label_fields=["labels"], min_area=1, clip=True),
    )


# What runs in the throw-away environment: a line in, one epoch, its seconds a photo out. The set of transforms is the
# least that Ultralytics' own loader has, with its random flip.
_ULTRALYTICS = """
import sys, time
import cv2, torch
torch.set_num_threads(1)
from ultralytics import __version__
from ultralytics.data.augment import RandomFlip
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import LOGGER
LOGGER.setLevel("ERROR")
cv2.setNumThreads(0)
root, size, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
names = dict(enumerate(sys.argv[4].split(",")))
data = YOLODataset(img_path=root + "/images", data={"names": names, "channels": 3}, task="detect", imgsz=size,
                   augment=False, rect=False, cache=False)
data.transforms.transforms.insert(-1, RandomFlip(p=0.5, direction="horizontal"))
loader = torch.utils.data.DataLoader(data, batch, shuffle=True, drop_last=True, collate_fn=YOLODataset.collate_fn)
print(__version__, flush=True)
for _ in sys.stdin:
    start, count = time.perf_counter(), 0
    for found in loader:
        assert found["img"].dtype == torch.uint8 and found["img"].shape[2:] == (size, size)
        count += len(found["img"])
    print((time.perf_counter() - start) / count, flush=True)
"""


def _environment(folder: Path) -> Path:
    """A throw-away environment with Ultralytics, which sees this one's packages; returns its interpreter."""
    console.print("installing Ultralytics into a throw-away environment")
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    (Path(where) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "ultralytics"], check=True)
    return python


@contextmanager
def _ultralytics(python: Path, folder: Path, data: DataSet, size: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Ultralytics' version, and a function that times one epoch of its loader in its own process."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for index in range(len(data)):
        record = data[index]
        photo, (height, width) = Path(record.path), record.hw
        (folder / "images" / photo.name).write_bytes(photo.read_bytes())
        x1, y1, x2, y2 = (record.boxes / [width, height, width, height]).T
        rows = np.stack([record.labels, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1], 1)
        np.savetxt(folder / "labels" / f"{photo.stem}.txt", rows, ["%d"] + 4 * ["%.6f"])
    command = [python, "-c", _ULTRALYTICS, str(folder), str(size), str(BATCH), ",".join(data.classes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "YOLO_CONFIG_DIR": str(folder)}
    environment.pop("PYTHONPATH", None)
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
    ) as process:
        assert process.stdin
        assert process.stdout
        stdin, stdout = process.stdin, process.stdout

        def answer() -> str:
            for line in stdout:
                if line[:1].isdigit():
                    return line.strip()
            raise typer.Exit(1)

        def epoch() -> float:
            stdin.write("go\n")
            stdin.flush()
            return float(answer())

        version = answer()
        yield version, epoch
        stdin.close()


def _row(what: str, photos: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Images a second by the median, and the ratio to each other library: the median of the rounds' ratios."""
    ours = times["detkit"]
    rates = ", ".join(f"{name} {1 / statistics.median(taken):.0f}" for name, taken in times.items())
    ratios = {
        name: statistics.median(theirs / own for theirs, own in zip(taken, ours, strict=True))
        for name, taken in times.items() if name != "detkit"
    }  # fmt: skip
    return {
        "what": what,
        "photos": photos,
        "images/s": rates,
        "detkit is faster by": ", ".join(f"{ratio:.2f} ({name})" for name, ratio in ratios.items()),
    }


def _profile(samples: TrainSet, rounds: int) -> str:
    """Milliseconds a photo by stage."""
    spent: dict[str, float] = {}
    stages = {"read and decode": (pixels, "decode"), "crop and resize": (pixels, "resize")}
    stages |= {"colour": (augment, "colour"), "collate": (batch, "collate")}
    originals = {stage: getattr(module, name) for stage, (module, name) in stages.items()}

    def timed(stage: str, *arguments: Any) -> Any:
        started = time.perf_counter()
        result = originals[stage](*arguments)
        spent[stage] = spent.get(stage, 0.0) + time.perf_counter() - started
        return result

    for stage, (module, name) in stages.items():
        setattr(module, name, partial(timed, stage))
    started, count = time.perf_counter(), 0
    for epoch in range(rounds):
        count += sum(len(found.images) for found in Loader(samples, BATCH, 0, seed=0).epoch(epoch))
    total = time.perf_counter() - started
    for stage, (module, name) in stages.items():
        setattr(module, name, originals[stage])
    spent["draw, boxes, the rest"] = total - sum(spent.values())
    return ", ".join(f"{stage} {1000 * seconds / count:.2f}" for stage, seconds in spent.items())


@app.command()
def loader(repeats: int = 15, ultralytics: bool = True) -> None:
    """Loader in one process, from files to uint8 batches, against torchvision, albumentations and Ultralytics."""
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    rows, profile = [], {}
    epochs = itertools.count()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        console.print("rendering photos")
        middle, large = _shelves(folder, 96, (640, 480)), _shelves(folder, 8, (4000, 3000))
        small = _small(folder, middle, 224)
        ssd = Augment(crop=0.8, expand=0.5, expand_max=4, flip=0.5, colour=0.5)
        cropped, flipped = Augment(crop=0.5, flip=0.5, colour=0.5), Augment(crop=0, colour=0, flip=0.5)

        samples = TrainSet(middle, Input(size=(300, 300)), ssd, 0)
        theirs = _Theirs(middle, partial(_torchvision, _ssd_torchvision(300)))
        runs = {"detkit": partial(_timed_loader, samples, epochs), "torchvision": partial(_timed_theirs, theirs)}
        what = "SSD: crop, zoom-out, flip, resize, colour"
        rows.append(_row(what, "640x480 to 300", interleaved(runs, repeats)))
        profile[f"{what}, 640x480 to 300"] = _profile(samples, 2)

        source = pixels.in_memory(pixels.Files(middle, reduced=True), (300, 300), "stretch", 1, lambda *_: None)
        kept = TrainSet(middle, Input(size=(300, 300)), ssd, 0, source)
        runs = {
            "detkit": partial(_timed_loader, kept, epochs),
            "detkit without a cache": partial(_timed_loader, samples, epochs),
        }
        rows.append(_row("the same with train.cache: ram", "640x480 to 300", interleaved(runs, repeats)))

        samples = TrainSet(large, Input(size=(300, 300)), cropped, 0)
        theirs = _Theirs(large, partial(_albumentations, _ssd_albumentations(300)))
        runs = {
            "detkit": partial(_timed_loader, samples, epochs),
            "cv2 + albumentations": partial(_timed_theirs, theirs),
        }
        what = "crop, flip, resize, colour"
        rows.append(_row(what, "4000x3000 to 300", interleaved(runs, repeats)))
        profile[f"{what}, 4000x3000 to 300"] = _profile(samples, 2)

        python = _environment(folder / "environment") if ultralytics else None
        plain = v2.Compose([v2.Resize((224, 224), antialias=True), v2.RandomHorizontalFlip(0.5)])
        versions = {}
        for data, words in ((small, "224x224 to 224"), (middle, "640x480 to 224")):
            theirs = _Theirs(data, partial(_torchvision, plain))
            stretched = TrainSet(data, Input(size=(224, 224)), flipped, 0)
            boxed = TrainSet(data, Input(size=(224, 224), resize="letterbox"), flipped, 0)
            what = "resize (stretched), flip"
            runs = {"detkit": partial(_timed_loader, stretched, epochs), "torchvision": partial(_timed_theirs, theirs)}
            rows.append(_row(what, words, interleaved(runs, repeats)))
            profile[f"{what}, {words}"] = _profile(stretched, 2)
            if python:
                with _ultralytics(python, folder / f"yolo-{words[:3]}", data, 224) as (version, epoch):
                    versions["ultralytics"] = version
                    runs = {"detkit": partial(_timed_loader, boxed, epochs), "Ultralytics": epoch}
                    rows.append(_row("resize (letterboxed), flip", words, interleaved(runs, repeats)))
    stages = "".join(f"\n- {what}: {text}" for what, text in profile.items())
    note = (
        f"Files (in the page cache) to uint8 batches of {BATCH}, in one process and thread, of `detkit data synth`. "
        f"Rates are medians of {repeats} rounds in turns, ratios the medians of the rounds' ratios. torchvision and "
        "detkit resize antialiased, albumentations by plain bilinear, which costs least, Ultralytics as it does.\n\n"
        f"Where detkit's time goes, ms a photo:\n{stages}"
    )
    save("data", "loader", "Loader", note, rows, versions=versions)


# --- reduced decoding -------------------------------------------------------------------------------------------------


class _AsTrained(EvalSet):
    """A split for evaluation, but decoded as training decodes it."""

    def __init__(self, data: DataSet, settings: Input, source: pixels.Source) -> None:
        super().__init__(data, settings)
        self.source = source

    def __getitem__(self, key: Key | int) -> Sample:
        index = key if isinstance(key, int) else key.index
        record = self.dataset[index]
        plan = geometry.plan(record.hw, self.input.size, self.input.resize)
        view = augment.View((0, 0, record.hw[1], record.hw[0]), (0, 0, plan.inner[1], plan.inner[0]))
        ground = augment.blank(self.input.size, self.fill)
        objects = augment.Objects(record.boxes, record.labels, record.flags != 0)
        photo = augment.lay(ground, self.source(index, view.step), objects, view)
        return Sample(photo.image, photo.objects.boxes.astype(np.float32), *photo.objects[1:], plan, index)


@app.command()
def reduced(model: str, data: Path | None = None, split: str | None = None) -> None:
    """The mAP of one checkpoint on a split, decoded in full by Pillow, in full and reduced as in training."""
    trained = checkpoint.read(checkpoint.find(model))
    settings = trained.data(data)
    found = cache.load_split(settings, split or settings.val, console)
    canvas = trained.config.input
    plans = [geometry.plan((height, width), canvas.size, canvas.resize) for height, width in found.hw.tolist()]
    steps = [min(plan.source[0] / plan.inner[0], plan.source[1] / plan.inner[1]) for plan in plans]
    sets = {
        "in full, as evaluation does": EvalSet(found, canvas),
        "in full, training's resize": _AsTrained(found, canvas, pixels.Files(found, reduced=False)),
        "reduced, as in training": _AsTrained(found, canvas, pixels.Files(found, reduced=True)),
    }
    kept = pixels.in_memory(pixels.Files(found, reduced=True), canvas.size, canvas.resize, 1, lambda *_: None)
    sets["reduced, and kept as train.cache does"] = _AsTrained(found, canvas, kept)
    rows = []
    for words, samples in sets.items():
        batches = Loader(samples, trained.config.train.batch_size, trained.config.train.workers)
        device = checkpoint.pick_device(trained.config.train.device)
        figures = evaluate(trained.predictor().to(device), batches, found, device, console)
        rows.append({"decoded": words} | {name: f"{figures[name]:.4f}" for name in ("mAP", "mAP50", "mAP75")})
    note = (
        f"{trained.config.name}, {canvas.size[1]}x{canvas.size[0]} pixels, {canvas.resize}, on {len(found)} photos of "
        f"{found.hw[0][1]}x{found.hw[0][0]} pixels and the like; {sum(step >= 2.5 for step in steps)} of them are "
        "large enough to be decoded at a reduced scale."
    )
    save("data", "reduced", "Reduced decoding: one checkpoint's mAP with and without it", note, rows)


# --- annotations ------------------------------------------------------------------------------------------------------


def _seconds(work: Callable[[], Any]) -> float:
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _etree(paths: Sequence[str]) -> list[Any]:
    """The least that gives names and boxes: no check of anything."""
    found = []
    for path in paths:
        for thing in ElementTree.parse(path).getroot().iter("object"):
            box = thing.find("bndbox")
            assert box is not None
            corners = [float(box.findtext(tag) or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
            found.append((thing.findtext("name"), corners))
    return found


def _parse_voc_xml(paths: Sequence[str]) -> list[Any]:
    return [VOCDetection.parse_voc_xml(ElementTree.parse(path).getroot()) for path in paths]


@app.command()
def annotations(root: Path, repeats: int = 15) -> None:
    """A data set's VOC XML, read with every check of training, against torchvision and xml.etree without any."""
    data = Data(root=root)
    files = voc.listing(data)
    headers = scan.check(data, [item.image for item in scan.contents(data, files).items])
    paths = [f"{root}/{name}" for name in files.annotations.names]
    ours = partial(scan.scan, data, "all", files, check=lambda *_: headers)
    runs = {"detkit": ours, "xml.etree": partial(_etree, paths), "torchvision": partial(_parse_voc_xml, paths)}
    times = interleaved({name: partial(_seconds, run) for name, run in runs.items()}, repeats)

    def ratio(one: str, other: str) -> str:
        return f"{statistics.median(a / b for a, b in zip(times[one], times[other], strict=True)):.2f}"

    rows = [
        {"what": "detkit's time over a bare xml.etree loop's", "ratio": ratio("detkit", "xml.etree")},
        {"what": "torchvision's parse_voc_xml's time over detkit's", "ratio": ratio("torchvision", "detkit")},
    ]
    note = (
        f"{len(paths)} VOC annotations (in the page cache) to a split that can be trained on: every check of training "
        "but the photos' own headers, which are given. xml.etree collects names and corners, torchvision makes its "
        f"dicts; neither checks anything. Medians of the ratios of {repeats} interleaved rounds."
    )
    save("data", "annotations", "Reading annotations", note, rows)


# --- start ------------------------------------------------------------------------------------------------------------

# What a fresh process does: load, then seconds and MiB that it took, as JSON.
_LOAD = """
import json, pickle, resource, sys, time
from pathlib import Path
from detkit.config import Data
from detkit.data import cache, voc

def memory():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20

what, data = sys.argv[1], Data(root=Path(sys.argv[2]), cache=Path(sys.argv[3]))
place, digest = cache.paths(data, "train")[0], sys.argv[4]
before, started = memory(), time.perf_counter()
if what == "dicts":
    with open(sys.argv[5], "rb") as file:
        found = pickle.load(file)
elif what == "detkit":
    found = cache.read(place, digest, sys.argv[2])
else:
    found = cache.load(data, "train")
taken, more = time.perf_counter() - started, memory() - before
print(json.dumps([taken, more, len(found)]))
"""


def _replicate(root: Path, out: Path, records: int) -> None:
    """The data set over and over, in sub-folders, by hard links: as many photos as `records`."""
    found = cache.load(Data(root=root, cache=out / "first"), "all")
    names = [Path(found.name(index)) for index in range(len(found))]
    place = next(folder for folder in (root / "Annotations", root) if (folder / f"{names[0].stem}.xml").is_file())
    for kind in ("JPEGImages", "Annotations"):
        shutil.copytree(root / kind if kind == "JPEGImages" else place, out / "originals" / kind)
        for copy in range(-(-records // len(names))):
            (out / "set" / kind / str(copy)).mkdir(parents=True)
    (out / "set" / "ImageSets" / "Main").mkdir(parents=True)
    lines = []
    for record in track(range(records), "linking files", console=console):
        copy, name = divmod(record, len(names))
        photo = names[name].relative_to("JPEGImages")
        for kind, file in (("JPEGImages", photo), ("Annotations", photo.with_suffix(".xml"))):
            os.link(out / "originals" / kind / file, out / "set" / kind / str(copy) / file)
        lines.append(f"{copy}/{photo.with_suffix('')}\n")
    (out / "set" / "ImageSets" / "Main" / "train.txt").write_text("".join(lines), encoding="utf-8")


@app.command()
def start(root: Path, records: int = 494_700, repeats: int = 5) -> None:
    """The start of training on a large data set (a VOC set, replicated), against a pickled list of dicts. Linux."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        out = Path(temporary)
        _replicate(root, out, records)
        data = Data(root=out / "set", cache=out / "cache")
        cold = _seconds(lambda: cache.load(data, "train"))
        found = cache.load(data, "train")
        records_as_dicts = [
            {"path": found.name(index), "height": record.hw[0], "width": record.hw[1], "boxes": record.boxes.tolist(),
             "labels": record.labels.tolist(), "difficult": (record.flags & 1).astype(bool).tolist()}
            for index in range(len(found)) for record in [found[index]]
        ]  # fmt: skip
        (out / "dicts.pickle").write_bytes(pickle.dumps(records_as_dicts, protocol=5))
        del records_as_dicts
        listed = [_seconds(lambda: cache.key(data, "train", voc.listing(data))) for _ in range(repeats)]
        digest = cache.key(data, "train", voc.listing(data))
        arguments = [str(data.root), str(data.cache), digest, str(out / "dicts.pickle")]
        memory: dict[str, float] = {}

        def timed(what: str) -> float:
            command = [sys.executable, "-c", _LOAD, what, *arguments]
            taken, memory[what], count = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            assert count == records
            return float(taken)

        times = interleaved({what: partial(timed, what) for what in ("dicts", "detkit", "start")}, repeats)
        size, bytes_of_dicts = cache.paths(data, "train")[0].stat().st_size, (out / "dicts.pickle").stat().st_size
    faster = statistics.median(a / b for a, b in zip(times["dicts"], times["detkit"], strict=True))
    whole = statistics.median(a / b for a, b in zip(times["dicts"], times["start"], strict=True))
    checked = statistics.median(listed) / statistics.median(times["detkit"])
    rows = [
        {"what": "loading: time of a pickled list of dicts over detkit's columns", "ratio": f"{faster:.0f}"},
        {"what": "loading: memory of the same", "ratio": f"{memory['dicts'] / memory['detkit']:.1f}"},
        {"what": "file size of the same", "ratio": f"{bytes_of_dicts / size:.1f}"},
        {"what": "validation (stat of every file) over loading the columns", "ratio": f"{checked:.0f}"},
        {"what": "loading a list of dicts, unvalidated, over validation and loading", "ratio": f"{whole:.2f}"},
        {
            "what": "first start (every file read) over a later one",
            "ratio": f"{cold / statistics.median(times['start']):.0f}",
        },
    ]
    note = (
        f"{records} photos with {len(found.labels)} objects, replicated from {root.name} by hard links, so "
        f"{2 * records} files to stat. Each load in a fresh process; medians of {repeats} interleaved rounds."
    )
    save("data", "start", "Start of training on a large data set", note, rows)


# --- audit ------------------------------------------------------------------------------------------------------------


def _decoded(paths: Sequence[str]) -> None:
    for path in paths:
        with Image.open(path) as image:
            image.load()


@app.command("audit")
def audit_photos(root: Path, repeats: int = 5) -> None:
    """An audit of a whole data set, decoding and all, against decoding its photos in one process."""
    data = Data(root=root)
    paths = [f"{root}/{name}" for name in voc.listing(data).images.names]
    runs = {"audit": partial(audit.run, data), "decode": partial(_decoded, paths)}
    times = interleaved({name: partial(_seconds, run) for name, run in runs.items()}, repeats)
    ratio = statistics.median(a / b for a, b in zip(times["audit"], times["decode"], strict=True))
    rate = len(paths) / statistics.median(times["audit"])
    rows = [
        {
            "photos": len(paths),
            "photos/s": f"{rate:.0f}",
            "time over Pillow's decoding alone, one process": f"{ratio:.2f}",
        }
    ]
    note = f"{root.name}, all splits, {os.cpu_count()} processes; medians of {repeats} interleaved rounds."
    save("data", "audit", "Audit", note, rows)


# --- scenes -----------------------------------------------------------------------------------------------------------


@app.command()
def scenes(count: int = 400, repeats: int = 3) -> None:
    """Scenes of 1000x1000 pixels with 40 products each, on two cores, beside decoding as many such JPEGs on one."""
    with tempfile.TemporaryDirectory() as temporary:
        out, taken = Path(temporary), iter(range(repeats + 1))
        for number, name in enumerate(synth.CLASSES):
            (out / "cutouts" / name).mkdir(parents=True)
            for turn in (-2, 0, 2):
                synth.cut_out(number, turn).save(out / "cutouts" / name / f"{turn}.png")

        def draw() -> float:
            words = ["--from", out / "cutouts", "--out", out / f"scenes{next(taken)}", "--train", count, "--val", 0]
            words += ["--size", 1000, 1000, "--items", 40, 40, "--workers", 2]
            command = [sys.executable, "-m", "detkit", "data", "synth", *map(str, words)]
            return _seconds(lambda: subprocess.run(command, check=True, capture_output=True))

        def decode() -> float:
            made = sorted(out.glob("scenes*"))[-1]
            return _seconds(lambda: _decoded([str(path) for path in (made / "JPEGImages").iterdir()]))

        times = interleaved({"scenes": draw, "decode": decode}, repeats)
        found = cache.load(Data(root=out / "scenes0", cache=out / "cache"), "train")
    ratio = statistics.median(a / b for a, b in zip(times["scenes"], times["decode"], strict=True))
    rows = [
        {
            "scenes": count,
            "scenes/s": f"{count / statistics.median(times['scenes']):.0f}",
            "time over Pillow's decoding of them, one process": f"{ratio:.2f}",
            "objects annotated a scene": f"{len(found.labels) / len(found):.1f}",
        }
    ]
    note = (
        f"`detkit data synth --from` with {len(synth.CLASSES) * 3} cut-outs of {len(synth.CLASSES)} classes: 1000x1000 "
        "pixels, 40 products each, by two processes; the whole command is timed, starting the processes included. "
        f"Medians of {repeats} rounds. A product of which under 35 % can be seen is not annotated."
    )
    save("data", "scenes", "Scenes from cut-outs", note, rows)


if __name__ == "__main__":
    app()

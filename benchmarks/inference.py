"""From JPEG bytes to final boxes on the CPU, side by side in one run, as ratios; and where detkit's time goes.

    python benchmarks/inference.py torchvision RUN [RUN ...]       against torchvision's SSD300 and Faster R-CNN
    python benchmarks/inference.py stages RUN [RUN ...]            decode, resize, network, NMS and mapping, one by one
    python benchmarks/inference.py ultralytics RUN PYTHON          a small detector against Ultralytics' ONNX path
    python benchmarks/inference.py start RUN                       from the start of the process to the first detection
    python benchmarks/inference.py folder MODEL.onnx [...]         detkit predict on 2,000 photos, against its parts

RUN is a trained run's folder: with random weights there would be nothing, or everything, to find. Against torchvision
it is one of ssd_vgg or faster_rcnn_resnet; on its own photos both precisions have to pass `detkit export`. PYTHON is
one that has Ultralytics, in an environment of its own: detkit needs nothing of it. RUN@480x640 is the run on another
canvas, height first; MODEL.onnx@400 is on so many photos. Photos are made up, 640 x 480. Each command writes its
section of results/inference.json and results/inference.md and leaves the others as they are.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import psutil
import torch
import typer
from PIL import Image
from report import console, interleaved, save
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from torchvision.io import decode_jpeg
from train_step import RCNN, SSD, Reference

from detkit import checkpoint, config, export, geometry, imaging
from detkit.data import synth
from detkit.manifest import KEY
from detkit.nn import weights
from detkit.nn.detector import Predictor
from detkit.runtime import predict
from detkit.runtime.session import INPUT, OUTPUTS, Session, detections, onto_canvas

HW = (480, 640)
DETECT = (
    "import detkit, sys; from detkit import imaging; "
    "detkit.Session(sys.argv[1], 'cpu', 1).detect([imaging.decode(sys.argv[2])])"
)
_VERSIONS = {"versions": {"onnxruntime": ort.__version__}}
BF16 = "bf16: the fp32 file on openvino-bf16, its accuracy not measured here. "
SELECTING = {"NonMaxSuppression", "TopK", "ScatterND", "GatherND", "GatherElements"}
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Threads = typer.Option(1, help="threads of each side")


def _photos(count: int = 8) -> list[bytes]:
    """Shelf photos, as JPEG files."""
    with tempfile.TemporaryDirectory() as folder:
        synth.synthesise(Path(folder) / "set", train=count, val=0, size=HW[::-1], seed=0, workers=1)
        return [path.read_bytes() for path in sorted((Path(folder) / "set").rglob("*.jpg"))]


def _trained(run: str, *sets: str) -> checkpoint.Checkpoint:
    """A run's best checkpoint, with some settings changed."""
    run, _, size = run.partition("@")
    trained = checkpoint.read(checkpoint.find(run))
    tree = trained.config.model_dump(mode="json")
    config.override(tree, [*([f"input.size=[{size.replace('x', ', ')}]"] if size else []), *sets])
    return replace(trained, config=config.parse(tree, run))


def _exported(trained: checkpoint.Checkpoint, folder: str) -> tuple[Path, Predictor]:
    predictor = trained.predictor().eval()
    size = trained.config.input.size
    model = export.graph(predictor, {INPUT: torch.zeros(2, 3, *size, dtype=torch.uint8)})
    onnx.helper.set_model_props(model, {KEY: trained.manifest().to_json()})
    path = Path(folder) / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path, predictor


def _accepted(trained: checkpoint.Checkpoint, folder: str) -> tuple[Path, dict[str, Any]]:
    """The file in int8 as `detkit export --precision int8 --photos 0` writes it, and what its report says of that.
    Raises UserError where ONNX Runtime in fp32 and torch disagree, or int8 costs more than 0.01 of the mean AP."""
    run, out = Path(folder) / "best.safetensors", Path(folder) / "int8.onnx"
    checkpoint.write(run, trained.weights, trained.config, trained.classes, trained.epoch, trained.metrics)
    (path,) = export.run(str(run), out, None, Console(quiet=True), export.Plan(precision="int8", photos=0))
    said = json.loads(path.with_suffix(".report.json").read_text(encoding="utf-8"))
    return path, said["precision"] | {"photos": said["validation photos"]["tried"]}


def _flops(predictor: Predictor, size: tuple[int, int]) -> float:
    """GFLOPs of one photo: torch's count, two an operation of multiplying and adding."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        predictor(torch.zeros(1, 3, *size, dtype=torch.uint8))
    return counter.get_total_flops() / 1e9


def _timed(run: Callable[[bytes], Any], photos: list[bytes]) -> Callable[[], float]:
    """A photo a call, each in turn: the seconds that it took."""
    turn = 0

    def seconds() -> float:
        nonlocal turn
        photo = photos[turn % len(photos)]
        turn += 1
        start = time.perf_counter()
        run(photo)
        return time.perf_counter() - start

    return seconds


def _faster(taken: dict[str, list[float]], theirs: str) -> float:
    """How many times as fast detkit is: the median of the rounds' ratios, in each of which both had the same photo."""
    return statistics.median(their / own for their, own in zip(taken[theirs], taken["detkit"], strict=True))


# --- torchvision ------------------------------------------------------------------------------------------------------


@app.command()
def torchvision(
    runs: list[str], threads: int = Threads, rounds: int = 8, compiled: bool = False, bf16: bool = False
) -> None:
    """Against SSD300-VGG16 and Faster R-CNN R50-FPN, with the same weights; bf16: on openvino-bf16, too."""
    torch.set_num_threads(threads)
    photos = _photos()
    for run in runs:
        head = _trained(run).config.model.head.name
        reference, (height, width) = {"ssd": (SSD, (300, 300)), "faster_rcnn": (RCNN, HW)}[head]
        rules = [each for each in reference.settings if not each.startswith("model.backbone")]
        trained = _trained(run, f"input.size=[{height}, {width}]", *rules)
        with tempfile.TemporaryDirectory() as folder:
            path, _ = _exported(trained, folder)
            accepted, said = _accepted(trained, folder)
            sessions = {"detkit": Session(path, "cpu", threads), "int8": Session(accepted, "cpu", threads)}
            if bf16:
                sessions["bf16"] = Session(path, "openvino-bf16", threads)

            def own(photo: bytes, session: Session = sessions["detkit"]) -> Any:
                return session.detect([session.read(photo)])[0]

            kinds = {"eager": _theirs(reference, trained)}
            kinds["channels last"] = _theirs(reference, trained).to(memory_format=torch.channels_last)
            if compiled:
                kinds["compiled"] = torch.compile(_theirs(reference, trained))

            def their(photo: bytes, model: Any) -> Any:
                image = decode_jpeg(torch.frombuffer(bytearray(photo), dtype=torch.uint8)).float() / 255
                with torch.inference_mode():
                    return model([image])[0]

            theirs = {
                kind: _timed(lambda photo, model=model: their(photo, model), photos) for kind, model in kinds.items()
            }
            if compiled:  # proposals differ in number from photo to photo; it has seen them all before it is timed
                for photo in photos + photos:
                    their(photo, kinds["compiled"])
            ours = {
                kind: _timed(lambda photo, session=session: own(photo, session), photos)
                for kind, session in sessions.items()
            }
            taken = interleaved(ours | theirs, rounds)
            found = [(len(own(photo)), len(their(photo, kinds["eager"])["scores"])) for photo in photos[:3]]
        times = {kind: _faster(taken, kind) for kind in kinds}
        row = {
            "detector": reference.words,
            "canvas": f"{height} x {width}",
            **{f"against {kind}": f"{ratio:.2f}" for kind, ratio in times.items()},
            "against their best": f"{min(times.values()):.2f}",
            **{
                f"{kind} against their best": f"{min(times.values()) / _faster(taken, kind):.2f}"
                for kind in [*sessions][1:]
            },
            "mAP fp32, int8": f"{said['mAP'][0]:.4f}, {said['mAP'][1]:.4f} on {said['photos']} photos",
            "of int8 left in fp32": ", ".join(said["fp32 parts"]) or "nothing",
            "boxes of 3 photos: detkit, torchvision": ", ".join(f"{a} {b}" for a, b in found),
        }
        console.print(row)
        note = (
            f"How many times as fast detkit's ONNX file in Session is as torchvision's model, one photo of 640 x 480 "
            f"at a time from JPEG bytes to boxes, {threads} thread(s) a side, fp32 on both, equal weights, canvas, "
            f"proposals and thresholds. Both have passed `detkit export`: in fp32 ONNX Runtime finds what torch finds; "
            f"int8 costs 0.01 of the mean AP at most, on the run's validation photos. {BF16 * bf16}Median of the "
            f"ratios of {rounds} interleaved rounds."
        )
        title = f"{reference.words} against torchvision's, {threads} thread(s){', and bf16' * bf16}"
        key = f"torchvision {reference.config} {threads}{' bf16' * bf16}"
        save("inference", key, title, note, [row], **_VERSIONS)


def _theirs(reference: Reference, trained: checkpoint.Checkpoint) -> torch.nn.Module:
    """torchvision's detector with a run's weights, on photos of HW."""
    model = reference.build(len(trained.classes))
    state = model.state_dict()
    named = weights._renamed(state, trained.weights, trained.config.model.backbone)
    unknown = {name for name in trained.weights if name not in named}
    assert not unknown, unknown
    for name, tensor in named.items():
        if name in trained.weights:
            tensor.copy_(trained.weights[name])
    if reference is RCNN:
        model.transform.min_size, model.transform.max_size = (HW[0],), HW[1]
    return model.eval()


# --- stages -----------------------------------------------------------------------------------------------------------


@app.command()
def stages(runs: list[str], threads: int = Threads, rounds: int = 10) -> None:
    """What each step costs, as a share of what a photo takes."""
    photos = _photos()
    rows = []
    for run in runs:
        trained = _trained(run)
        size = trained.config.input.size
        with tempfile.TemporaryDirectory() as folder:
            path, predictor = _exported(trained, folder)
            session = Session(path, device="cpu", threads=threads)
            flops = _flops(predictor, size)
            selecting = _selecting(path, [_batch(session, photo)[1] for photo in photos[:4]], threads)
        spent: dict[str, list[float]] = {name: [] for name in ("decode", "resize", "network", "mapping")}
        for number in range(rounds + 1):
            for name, seconds in _steps(session, photos[number % len(photos)]).items():
                spent[name] += [seconds] if number else []
        median = {name: statistics.median(seconds) for name, seconds in spent.items()}
        median["NMS"] = median["network"] * selecting
        median["network"] -= median["NMS"]
        total = sum(median.values())
        around = {name: seconds for name, seconds in median.items() if name != "network"}
        rows.append({
            "config": trained.config.name,
            "canvas": f"{size[0]} x {size[1]}",
            "GFLOPs": f"{flops:.1f}",
            **{name: f"{seconds / total:.1%}" for name, seconds in around.items()},
            "outside the network": f"{sum(around.values()) / total:.1%}",
            "ms in all": f"{1000 * total:.0f}",
        })  # fmt: skip
        console.print(rows[-1])
    note = (
        f"Shares of the time from JPEG bytes (640 x 480) to boxes, one photo at a time, {threads} thread(s); medians "
        f"of {rounds} photos. NMS: the share of the graph's time that ONNX Runtime's profiler gives to "
        f"{', '.join(sorted(SELECTING))}; Faster R-CNN's proposals are among it."
    )
    save("inference", f"stages {threads}", f"Stage by stage, {threads} thread(s)", note, rows, **_VERSIONS)


def _batch(session: Session, photo: bytes) -> tuple[geometry.ResizePlan, np.ndarray]:
    plan, canvas = onto_canvas(imaging.decode(photo), session.manifest)
    return plan, np.ascontiguousarray(canvas)[None]


def _steps(session: Session, photo: bytes) -> dict[str, float]:
    """Seconds of each step of one photo, those that Session.detect takes."""
    marks = [time.perf_counter()]
    image = imaging.decode(photo)
    marks.append(time.perf_counter())
    plan, canvas = onto_canvas(image, session.manifest)
    batch = np.ascontiguousarray(canvas)[None]
    marks.append(time.perf_counter())
    outputs = session.run(batch)
    marks.append(time.perf_counter())
    detections(plan, *(part[0] for part in outputs))
    marks.append(time.perf_counter())
    return dict(zip(("decode", "resize", "network", "mapping"), np.diff(marks).tolist(), strict=True))


def _selecting(path: Path, batches: list[np.ndarray], threads: int) -> float:
    """The share of SELECTING in the graph's time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for batch in batches:
        session.run(OUTPUTS, {INPUT: batch})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    # Operators that hold others (If, Loop) count those again; there are none.
    taken = [(event["args"]["op_name"] in SELECTING, event["dur"]) for event in nodes]
    return sum(duration for inside, duration in taken if inside) / sum(duration for _, duration in taken)


# --- Ultralytics ------------------------------------------------------------------------------------------------------

# What runs in the other environment: it exports, says its FLOPs, then takes a photo a line and says how long it took.
_WORKER = """
import base64, sys, time
import cv2, numpy as np, onnxruntime as ort, torch
from torch.utils.flop_counter import FlopCounterMode
out, sys.stdout = sys.stdout, sys.stderr
name, wanted, threads = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
cv2.setNumThreads(threads)
before = ort.InferenceSession.__init__
def limited(self, path, sess_options=None, *args, **more):
    sess_options = sess_options or ort.SessionOptions()
    sess_options.intra_op_num_threads = threads
    before(self, path, sess_options, *args, **more)
ort.InferenceSession.__init__ = limited
from ultralytics import YOLO
net = YOLO(name)
def gflops(side):
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        net.model.eval()(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 1e9
side = min(range(64, 1281, 32), key=lambda side: abs(gflops(side) - wanted))
flops = gflops(side)
model = YOLO(net.export(format="onnx", imgsz=side, simplify=False), task="detect")
print(side, flops, file=out, flush=True)
for line in sys.stdin:
    photo = np.frombuffer(base64.b64decode(line), np.uint8)
    start = time.perf_counter()
    found = model.predict(cv2.imdecode(photo, cv2.IMREAD_COLOR), imgsz=side, device="cpu", verbose=False)
    print(time.perf_counter() - start, len(found[0].boxes), file=out, flush=True)
"""


@app.command()
def ultralytics(run: str, python: str, model: str = "yolo26n.yaml", threads: int = Threads, rounds: int = 30) -> None:
    """Against Ultralytics' own export and predict, on a canvas where the network has as many FLOPs."""
    import base64

    photos = _photos()
    trained = _trained(run)
    with tempfile.TemporaryDirectory() as folder:
        path, predictor = _exported(trained, folder)
        session = Session(path, device="cpu", threads=threads)
        flops = _flops(predictor, session.manifest.size)
        command = [python, "-c", _WORKER, model, str(flops), str(threads)]
        worker = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        their_side, their_flops = map(float, worker.stdout.readline().split())
        found = 0

        def their(photo: bytes) -> list[str]:
            worker.stdin.write(base64.b64encode(photo).decode() + "\n")
            worker.stdin.flush()
            return worker.stdout.readline().split()

        taken: dict[str, list[float]] = {"detkit": [], "theirs": []}
        for number in range(rounds + 2):
            photo = photos[number % len(photos)]
            start = time.perf_counter()
            (ours,) = session.detect([imaging.decode(photo)])
            own = time.perf_counter() - start
            seconds, count = their(photo)
            if number >= 2:
                taken["detkit"].append(own)
                taken["theirs"].append(float(seconds))
                found += len(ours.above(0.25)) + int(count) * 1j
        worker.stdin.close()
        worker.wait(60)
    rows = [{
        "detkit": f"{trained.config.name}, {session.manifest.size[0]} x {session.manifest.size[1]}",
        "GFLOPs": f"{flops:.2f}",
        "theirs": f"{Path(model).stem}, {their_side:.0f} x {their_side:.0f}",
        "their GFLOPs": f"{their_flops:.2f}",
        "detkit is faster by": f"{_faster(taken, 'theirs'):.2f}",
        "boxes above 0.25: detkit, theirs": f"{found.real:.0f}, {found.imag:.0f}",
    }]  # fmt: skip
    note = (
        f"From JPEG bytes (640 x 480) to boxes, one photo at a time, {threads} thread(s) a side, fp32. Theirs: "
        f"`export(format='onnx')`, then `cv2.imdecode` and `YOLO(...).predict`, in a process of its own; its canvas is "
        f"the square (a multiple of 32) at which its network's FLOPs come nearest. Median of the ratios of {rounds} "
        f"interleaved rounds."
    )
    title = f"Against Ultralytics' ONNX path, {threads} thread(s)"
    save("inference", f"ultralytics {threads}", title, note, rows, **_VERSIONS)


# --- start ------------------------------------------------------------------------------------------------------------


class _Memory(threading.Thread):
    """This process' memory, in MB, every half second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: list[float] = []
        self._done = threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.5):
            self.seen.append(process.memory_info().rss / 1e6)

    def __enter__(self) -> list[float]:
        self.start()
        return self.seen

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


@app.command()
def folder(
    models: list[str], photos: int = 2000, width: int = 1280, jobs: int = os.cpu_count() or 1, rounds: int = 5
) -> None:
    """A folder of large photos, read, detected in and recorded, against decoding and the network alone."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "made"
        synth.synthesise(made, train=min(photos, 50), val=0, size=(width, width * 3 // 4), seed=0, workers=jobs)
        contents = [path.read_bytes() for path in sorted(made.rglob("*.jpg"))]
        rows = [_folder(model, contents, Path(scratch), photos, jobs, rounds) for model in models]
    note = (
        f"Photos of {width} x {width * 3 // 4} (made up) to JSON lines, {jobs} threads of one each; photos a second, "
        f"in {rounds} rounds in which all had their turn. d: `imaging.decode` alone; n: network and NMS alone, on "
        f"canvases made before, so that resizing counts as overhead. Ratio: of `detkit predict` to 1/(1/d + 1/n); of "
        f"the rounds the median, the least and the most. Memory: first fifth of the time and last."
    )
    save("inference", "folder", "A folder of large photos", note, rows, **_VERSIONS)


def _folder(named: str, contents: list[bytes], scratch: Path, photos: int, jobs: int, rounds: int) -> dict[str, Any]:
    """The figures of one model, MODEL.onnx or MODEL.onnx@PHOTOS."""
    name, _, count = named.partition("@")
    share = int(count or photos) // rounds
    session = Session(name, "cpu", 1)
    canvases = [_batch(session, content)[1] for content in contents[:32]]
    taken: dict[str, list[float]] = {"decoding": [], "network": [], "predict": []}
    with tempfile.TemporaryDirectory(dir=scratch) as place, ThreadPoolExecutor(jobs) as pool:
        parts: list[list[Path]] = []
        for part in range(rounds):
            (Path(place) / str(part)).mkdir()
            parts.append([Path(place) / str(part) / f"{number:04d}.jpg" for number in range(share)])
            for number, path in enumerate(parts[-1]):
                path.write_bytes(contents[number % len(contents)])

        def clocked(what: str, work: Callable[[], object]) -> None:
            start = time.perf_counter()
            work()
            taken[what].append((time.perf_counter() - start) / share)

        def predicted(part: list[Path], out: str) -> None:
            predict.predict(
                session, part, Path(place) / out, predict.Output("jsonl"), jobs=jobs, console=Console(quiet=True)
            )

        predicted(parts[0][:32], "warm")
        with _Memory() as memory:
            for number, part in enumerate(parts):
                clocked("decoding", lambda part=part: list(pool.map(imaging.decode, part)))
                clocked("network", lambda: list(pool.map(lambda i: session.run(canvases[i % 32]), range(share))))
                clocked("predict", lambda part=part, number=number: predicted(part, f"out{number}"))
    ratios = [(d + n) / whole for d, n, whole in zip(*taken.values(), strict=True)]
    d, n, whole = (statistics.median(times) for times in taken.values())
    fifth = max(1, len(memory) // 5)
    first, last = statistics.median(memory[:fifth]), statistics.median(memory[-fifth:])
    row = {
        "model": session.manifest.name.removesuffix("-overfit"),
        "canvas": " x ".join(map(str, session.manifest.size)),
        "photos": str(share * rounds),
        "d": f"{1 / d:.1f}",
        "n": f"{1 / n:.1f}",
        "1/(1/d + 1/n)": f"{1 / (d + n):.1f}",
        "detkit predict": f"{1 / whole:.1f}",
        "ratio": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        "memory, MB": f"{first:.0f}, {last:.0f}",
    }
    console.print(row)
    return row


@app.command()
def start(run: str, rounds: int = 7) -> None:
    """Seconds from the start of the process: `import detkit`, and `tools/predict.py` to its end."""
    tool = Path(__file__).parent.parent / "tools" / "predict.py"
    with tempfile.TemporaryDirectory() as folder:
        trained = _trained(run)
        path, _ = _exported(trained, folder)
        photo = Path(folder) / "photo.jpg"
        Image.open(io.BytesIO(_photos(1)[0])).save(photo)
        commands = {
            "python alone": [sys.executable, "-c", "pass"],
            "import detkit": [sys.executable, "-c", "import detkit"],
            "detkit.Session, one detection": [
                sys.executable, "-c", DETECT, path, photo,
            ],
            "tools/predict.py": [sys.executable, tool, photo, "--model", path, "--device", "cpu", "--threads", "1"],
        }  # fmt: skip

        spent: dict[str, list[float]] = {name: [] for name in commands}

        def run_one(name: str) -> Callable[[], float]:
            def seconds() -> float:
                before, begun = os.times(), time.perf_counter()
                subprocess.run(commands[name], check=True, cwd=folder, capture_output=True)
                wall, after = time.perf_counter() - begun, os.times()
                spent[name].append(sum(after[2:4]) - sum(before[2:4]))
                return wall

            return seconds

        taken = interleaved({name: run_one(name) for name in commands}, rounds)
    rows = [
        {
            "what": name,
            "median, s": f"{statistics.median(times):.3f}",
            "best, s": f"{min(times):.3f}",
            "of the processor, median, s": f"{statistics.median(spent[name]):.3f}",
        }
        for name, times in taken.items()
    ]
    note = (
        f"Wall-clock seconds of a whole process, {trained.config.name}; tools/predict.py draws and writes its picture "
        f"too. {rounds} interleaved rounds. Where other work runs, the processor's seconds say what an idle machine "
        f"takes."
    )
    save("inference", "start", "From the start of the process", note, rows, **_VERSIONS)


if __name__ == "__main__":
    app()

"""The command line: one function a verb. What a verb needs is imported inside it, so that ``--help`` is instant."""

from __future__ import annotations

import errno
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from detkit import __version__
from detkit.errors import Interrupted, UserError, missing

if TYPE_CHECKING:
    from rich.console import Console

    from detkit.config import Config, Data
    from detkit.runtime.predict import Detector

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Object detection for product images: from photos and Pascal-VOC XML to a trained, measured, deployed model.",
)
data_app = typer.Typer(no_args_is_help=True, help="Make and inspect data sets.")
app.add_typer(data_app, name="data")

SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="settings to change: --set train.epochs=5 data.root=PATH")
]
MoreSets = Annotated[list[str] | None, typer.Argument(hidden=True)]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="a run folder, a checkpoint or an .onnx; default: the newest run")
]
Device = Literal["auto", "cpu", "cuda", "mps"]
DeviceOption = Annotated[Device, typer.Option(help="where the network runs")]
RuntimeDevice = Literal["auto", "cpu", "cuda", "mps", "tensorrt", "openvino", "openvino-bf16", "coreml", "directml"]
Nms = Literal["none", "hard", "soft", "weighted"]
NmsOption = Annotated[Nms, typer.Option(help="overlapping boxes: as they are, NMS, soft-NMS, or weighted boxes fusion")]

FileFormat = Literal["voc", "coco", "yolo", "labelme", "cvat", "openimages", "csv"]
FormatOption = Annotated[
    FileFormat | None, typer.Option("--format", help="what the annotations are written in; default: voc")
]
UnlabelledOption = Annotated[
    Literal["error", "skip", "negative"] | None,
    typer.Option(help="what a photo without annotation means; default: error"),
]


# Tells the processes that this one launches, and those started in their place, when the time is up.
ENDS = "DETKIT_ENDS"


def _version(show: bool) -> None:
    if show:
        typer.echo(f"detkit {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
) -> None:
    """Object detection for product images."""


@app.command("config")
def show_config(
    name: Annotated[str | None, typer.Argument(help="the config")] = None,
    more: MoreSets = None,
    sets: SetOption = None,
    schema: Annotated[bool, typer.Option("--schema", help="print the JSON schema, for editors")] = False,
) -> None:
    """Print a config with every setting resolved, or the JSON schema of all settings."""
    from detkit import config

    if schema:
        import json

        typer.echo(json.dumps(config.Config.model_json_schema(), indent=1))
    elif name is None:
        raise UserError("name a config, such as  detkit config ssd_vgg.yaml , or use --schema")
    else:
        typer.echo(config.dump(config.load(name, [*(sets or []), *(more or [])])), nl=False)


@app.command()
def train(
    context: typer.Context,
    config_name: Annotated[
        str | None, typer.Option("--config", "-c", help="a path, a file in ./configs, or a shipped config")
    ] = None,
    sets: SetOption = None,
    more: MoreSets = None,
    resume: Annotated[
        str | None, typer.Option(help="go on with a stopped run: its folder, or nothing for the newest")
    ] = None,
    overfit: Annotated[
        int | None,
        typer.Option(min=1, help="learn only so many photos by heart: whether config and data can be learnt at all"),
    ] = None,
    init: Annotated[
        str | None,
        typer.Option(help="start from this run or checkpoint, by its config unless one is named; classes may differ"),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            min=0, help="end after the step at which so much time has passed, with an evaluation; can be resumed"
        ),
    ] = None,
    nproc: Annotated[
        int, typer.Option(min=1, help="processes on this machine, one a GPU; under torchrun, what torchrun says")
    ] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="times that all processes are started anew after one of them is lost")
    ] = 0,
) -> None:
    """Train a detector; the run goes to runs/<name>-<n>."""
    ends = _ends(max_minutes)
    from detkit import checkpoint, config

    if resume:
        if overfit or init:
            raise UserError("--resume goes on with the run's own settings: leave out --overfit and --init")
        folder = checkpoint.newest_stopped() if resume == "newest" else Path(resume)
        settings = None
    elif config_name or init:
        settings = _settings(config_name, init, [*(sets or []), *(more or [])])
        settings = config.overfit(settings, overfit) if overfit else settings
    else:
        raise UserError("name a config, such as  --config ssd_mobilenet.yaml")
    from detkit import distributed

    if (nproc > 1 or max_restarts or distributed.several_machines()) and "RANK" not in os.environ:
        # Else torchrun has started this.
        os.environ[ENDS] = str(ends)
        distributed.launch(context.obj, nproc, max_restarts)
    from detkit import train as job

    console = _console()
    changes = [*(sets or []), *(more or [])]
    run = job.start(settings, console, ends) if settings else job.resume(folder, console, changes, ends)
    console.print(f"\ndone: {run}\nnext:  detkit predict PHOTO --model {run}\n       detkit export {run}")


@app.command("lr-find")
def lr_find(
    config_name: Annotated[
        str, typer.Option("--config", "-c", help="a path, a file in ./configs, or a shipped config")
    ],
    sets: SetOption = None,
    more: MoreSets = None,
    least: Annotated[float, typer.Option("--min", min=0, help="the first learning rate")] = 1e-6,
    most: Annotated[float, typer.Option("--max", min=0, help="the last one, unless the loss has left its bounds")] = 10,
    steps: Annotated[int, typer.Option(min=20, help="mini-batches")] = 100,
) -> None:
    """Find a learning rate: train on mini-batches at rising rates (Smith 2017), and look at the loss."""
    from detkit import config
    from detkit import lr_find as job

    settings = config.load(config_name, [*(sets or []), *(more or [])])
    job.run(settings, least, most, steps, _console())


@app.command()
def tune(
    config_name: Annotated[
        str | None, typer.Option("--config", "-c", help="the starting configuration, which is the first trial")
    ] = None,
    sets: SetOption = None,
    more: MoreSets = None,
    space_name: Annotated[
        str | None,
        typer.Option("--space", help="what is varied: a path, a file in ./configs/search, or a shipped one"),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="trials of the study in all, of all its processes")] = 30,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="of a trial, where shorter than the config's, which best.yaml keeps")
    ] = None,
    study: Annotated[str | None, typer.Option(help="its folder in the config's runs; default: NAME-tune")] = None,
    resume: Annotated[
        str | None, typer.Option(help="go on with the study in this folder, or nothing for the newest")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="a database's URL, as Optuna has it, or a file; default: in the study's folder")
    ] = None,
    objective: Annotated[
        Literal["mAP", "mAP50", "mAP75", "VOC_AP50", "AR"], typer.Option(help="the figure that is to be high")
    ] = "mAP",
    sampler: Annotated[Literal["tpe", "random", "grid"], typer.Option(help="how values are chosen")] = "tpe",
    pruner: Annotated[
        Literal["median", "hyperband", "none"], typer.Option(help="which trials are ended early")
    ] = "median",
    jobs: Annotated[int, typer.Option(min=1, help="processes on this machine; GPUs are shared out")] = 1,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="end after the step at which so much time has passed")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of what the sampler draws")] = 0,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of search spaces, for editors")
    ] = False,
) -> None:
    """Seek better settings by trials; the same command, once more or elsewhere, goes on with the study."""
    from detkit import config, space

    if schema:
        import json

        typer.echo(json.dumps(space.schema(), indent=1))
        return
    if (resume is None) == (config_name is None):
        raise UserError("name a config, such as  --config ssd_mobilenet.yaml , or a study to go on with by --resume")
    from detkit import tune as job

    console, ends = _console(), _ends(max_minutes)
    if config_name:
        settings = config.load(config_name, [*(sets or []), *(more or [])])
        _, tree, left_out = space.load(space_name, settings)
        for line in left_out:
            console.print(f"not varied: {line}", style="yellow", markup=False, highlight=False)
        plan = job.Plan(
            start=settings,
            space=tree,
            epochs=epochs,
            objective=objective,
            sampler=sampler,
            pruner=pruner,
            seed=seed,
        )
        folder = settings.runs / (study or f"{settings.name}-tune")
        job.create(folder, plan)
    else:
        given = {"--set": sets or more, "--space": space_name, "--study": study, "--epochs": epochs}
        for option in (option for option, value in given.items() if value):
            raise UserError(f"--resume goes on with the study as it was begun: leave out {option}")
        folder = job.newest() if resume == "newest" else Path(resume or "")
    job.run(folder, console, most=trials, jobs=jobs, storage=storage, ends=ends)


def _ends(minutes: float | None) -> float:
    """When the time is up, as time.time() has it: in so many minutes, or when what launched this process says."""
    if ENDS in os.environ:
        return float(os.environ[ENDS])
    return math.inf if minutes is None else time.time() + 60 * minutes


def _settings(config_name: str | None, init: str | None, sets: Sequence[str]) -> Config:
    """The settings of a new run. init: the run or checkpoint that it starts from, and whose config it has unless
    another is named."""
    from detkit import checkpoint, config

    if init is None:
        return config.load(config_name or "", sets)
    path = checkpoint.find(init).absolute()
    trained = checkpoint.read(path)
    if config_name:
        settings = config.load(config_name, sets)
    else:
        tree = trained.config.model_dump(mode="json")
        config.override(tree, sets)
        settings = config.parse(tree, str(path))
    model = settings.model.model_copy(update={"weights": str(path)})
    return settings.model_copy(update={"model": model})


MeasuredOption = Annotated[
    str | None,
    typer.Argument(help="a run, a checkpoint, an .onnx, or detections as .json, .jsonl, .csv; default: the newest run"),
]
DataOption = Annotated[Path | None, typer.Option(help="another data set's folder")]
SplitOption = Annotated[str | None, typer.Option(help="default: the run's validation split")]
IdsOption = Annotated[Path | None, typer.Option(help="COCO annotations whose ids COCO results have")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="write the figures to this file")]
MarkdownOption = Annotated[Path | None, typer.Option("--md", help="the same as Markdown")]
HtmlOption = Annotated[Path | None, typer.Option(help="write a page with plots and photos to this file")]
ResamplesOption = Annotated[int, typer.Option(min=0, help="of the photos, for 95 % intervals; 0: none")]
SpeedOption = Annotated[bool, typer.Option("--speed/--no-speed", help="measure latency and throughput too")]
MeasuredFormat = Annotated[
    FileFormat | None, typer.Option("--format", help="what DATA's annotations are written in; default: as the run's")
]


@app.command("eval")
def evaluate(
    model: MeasuredOption = None,
    data: DataOption = None,
    split: SplitOption = None,
    file_format: MeasuredFormat = None,
    ids: IdsOption = None,
    class_agnostic: Annotated[
        bool, typer.Option("--class-agnostic", help="an object counts as found whatever its class")
    ] = False,
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    suspects: Annotated[
        Path | None, typer.Option(help="a new folder for VOC XML of photos whose labels may be wrong")
    ] = None,
    iou: Annotated[
        list[float] | None, typer.Option(min=0.05, max=1, help="AP and AR at this IoU too (may be repeated)")
    ] = None,
    resamples: ResamplesOption = 1000,
    speed: SpeedOption = True,
    nms: NmsOption = "hard",
) -> None:
    """Measure a detector: AP, counts, thresholds, kinds of error, speed."""
    from detkit import assess
    from detkit.sources import Where

    where = Where(data, split, file_format, ids, class_agnostic, device, nms)
    files = assess.Files(json_file, markdown, html, suspects)
    assess.run(model, where, _console(), files, resamples=resamples, timed=speed, ious=iou or ())


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(help="runs, checkpoints, .onnx files, detections")],
    data: DataOption = None,
    split: SplitOption = None,
    file_format: MeasuredFormat = None,
    ids: IdsOption = None,
    figure: Annotated[str, typer.Option(help="by which they are compared: mAP, mAP50, f1, cAcc, ...")] = "mAP",
    device: DeviceOption = "auto",
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    resamples: Annotated[int, typer.Option(min=100, help="of the photos, for intervals and p")] = 1000,
    speed: SpeedOption = True,
) -> None:
    """Set detectors side by side on the same photos, and say whether each is better than the first."""
    from detkit import assess
    from detkit.sources import Where

    where = Where(data, split, file_format, ids, device=device)
    files = assess.Files(json_file, markdown, html)
    assess.compare(models, where, _console(), files, resamples=resamples, figure=figure, timed=speed)


@app.command()
def calibrate(
    model: Annotated[
        str | None, typer.Argument(help="a run, a checkpoint or an .onnx; default: the newest run")
    ] = None,
    data: DataOption = None,
    split: SplitOption = None,
    aim: Annotated[
        str, typer.Option(help="of the thresholds: f1, cacc, precision=P or recall=R, such as precision=0.9")
    ] = "f1",
    method: Annotated[
        Literal["none", "temperature", "isotonic"],
        typer.Option(help="how scores are made to say how often they are right"),
    ] = "temperature",
    device: DeviceOption = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="a copy of the model; default: the model itself")
    ] = None,
) -> None:
    """Choose a threshold for each class, calibrate scores, and keep both in the model, where predict finds them."""
    from detkit import calibrate as job
    from detkit.sources import Where

    job.run(model, Where(data, split, device=device), _console(), aim=aim, method=method, out=out)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="a run or a checkpoint")],
    photos: Annotated[list[str], typer.Argument(help="photos, folders, globs")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="a new folder; default: explanations/<n>")] = None,
    data: Annotated[Path | None, typer.Option(help="data set whose labels are shown; default: the run's")] = None,
    layer: Annotated[
        str | None, typer.Option(help="module to look into, such as backbone or head.tower.0; default: backbone, neck")
    ] = None,
    class_name: Annotated[str | None, typer.Option("--class", help="only objects and detections of this class")] = None,
    detections: Annotated[int, typer.Option(min=1, help="how many, the surest first; and how many objects")] = 6,
    device: DeviceOption = "auto",
) -> None:
    """Show what a detector sees in photos: feature maps, Grad-CAM, matched anchors, proposals, scores before NMS."""
    from detkit import explain as job

    job.run(model, photos, out, job.Options(data, layer, class_name, detections, device), _console())


@app.command()
def predict(
    photos: Annotated[
        list[str] | None,
        typer.Argument(help="photos, folders, globs; or one video file, URL, or camera:0 (needs the extra video)"),
    ] = None,
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="a new folder; default: predictions/<n>")] = None,
    file_format: Annotated[
        Literal["json", "voc", "yolo", "jsonl", "coco", "csv"],
        typer.Option("--format", help="json, voc, yolo: a file a photo; jsonl, coco, csv: one for all"),
    ] = "json",
    pictures: Annotated[
        bool | None, typer.Option(help="photos with their boxes drawn; default: with a file a photo")
    ] = None,
    count: Annotated[bool, typer.Option("--count", help="products per class per photo, and counts.csv")] = False,
    tiles: Annotated[
        str | None,
        typer.Option(
            help="look at large photos in tiles of 640 or 640x480 pixels of theirs; auto: as large as those "
            "trained on; default: off, but auto for a model trained on tiles"
        ),
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(min=0, help="longest side, in pixels, of products that tiles are to show whole")
    ] = None,
    flip: Annotated[bool, typer.Option("--flip", help="look at each photo mirrored as well, and fuse")] = False,
    score: Annotated[float | None, typer.Option(min=0, max=1, help="lowest score shown; default: the model's")] = None,
    device: Annotated[
        RuntimeDevice,
        typer.Option(help="where the network runs; tensorrt, openvino, coreml and directml are for .onnx files"),
    ] = "auto",
    threads: Annotated[
        int, typer.Option(min=0, help="of the network on the CPU; 0: one a core, or, of many photos, one a photo")
    ] = 0,
    nms: NmsOption = "hard",
    resume: Annotated[Path | None, typer.Option(help="go on in this folder of results")] = None,
    url: Annotated[
        str | None, typer.Option(help="a model server's (detkit serve): --model is a name there, or left out")
    ] = None,
) -> None:
    """Find the products in photos: a table, annotated pictures, and files in six formats; or in a video."""
    from detkit.runtime import predict as job
    from detkit.runtime import tiles as tiling
    from detkit.runtime import video

    films = [name for name in photos or () if video.is_video(name)]
    if resume:
        asked = job.read_job(resume)
    elif not photos:
        raise UserError("name photos, folders or glob patterns; or --resume OUT, to go on with what was stopped")
    elif films and (len(photos) > 1 or file_format not in ("json", "jsonl")):
        raise UserError(f"{films[0]}: a video is looked at by itself, and what is found is written as JSON lines")
    else:
        asked = job.Job(
            photos=tuple(photos),
            folder=str(Path.cwd()),
            model=_found(model) if url is None else model or "",
            url=url,
            format=file_format,
            pictures=pictures,
            counts=count,
            score=score,
            nms=nms,
            flip=flip,
        )
    if asked.url is None and not asked.model.endswith(".onnx"):
        _for_torch(device)  # told before photos are looked for
    many = not films and len(job.expand(asked.photos)) > job.MANY
    jobs = 1
    if many and threads == 0 and device in ("auto", "cpu") and asked.model.endswith(".onnx"):
        threads, jobs = 1, os.cpu_count() or 1
    detector = _remote(asked.url, asked.model) if asked.url else _detector(asked.model, device, threads, asked.nms)
    if getattr(detector, "device", "") != "cpu":
        jobs = 1
    if resume and asked.sha256 != detector.manifest.sha256:
        raise UserError(f"{resume}: was begun with another model than {asked.model} is now; begin anew with --out")
    if not resume:
        looks = tiling.chosen(tiles, overlap, detector.manifest, asked.model)
        asked = asked.model_copy(update={"sha256": detector.manifest.sha256, "tiles": looks})
    if films:
        looking, drawn = asked.views(detector), pictures is not False
        video.predict(looking, films[0], out, score=score, pictures=drawn, console=_console())
        return
    failures = job.predict(
        asked.views(detector), asked.photos, resume or out, asked.output,
        score=asked.score, jobs=jobs, asked=asked, console=_console(),
    )  # fmt: skip
    raise typer.Exit(1 if failures else 0)


def _found(model: str | None) -> str:
    """The file that `--model` means."""
    if model is not None and Path(model).suffix == ".onnx":
        return model
    from detkit import checkpoint

    return str(checkpoint.find(model))


def _detector(model: str, device: RuntimeDevice, threads: int, nms: Nms) -> Detector:
    """What `detkit predict` runs: a Session for an .onnx file (torch-free), else a checkpoint under torch."""
    if Path(model).suffix == ".onnx":
        from detkit.runtime.session import Session

        return Session(model, device, threads, nms)
    from detkit import checkpoint

    return checkpoint.TorchSession(Path(model), _for_torch(device), nms, threads)


def _for_torch(device: RuntimeDevice) -> Device:
    """The device, where torch knows it. Raises UserError."""
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"--device {device}: is for ONNX files; write one with  detkit export  first")
    return device


def _remote(url: str, model: str | None) -> Detector:
    from detkit.client import Client, Remote

    return Remote(Client(url), model or None)


@app.command()
def export(
    run: Annotated[str | None, typer.Argument(help="a run folder or a checkpoint; default: the newest run")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="NAME.onnx; beside it NAME-image.onnx; default: beside the model")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="data set to check it on; default: the run's")] = None,
    takes: Annotated[
        Literal["canvas", "image", "both"],
        typer.Option("--input", help="canvas: batches, resized before; image: one photo of any size, for any language"),
    ] = "canvas",
    precision: Annotated[
        Literal["fp32", "fp16", "int8"], typer.Option(help="of the network; int8 is calibrated on training photos")
    ] = "fp32",
    max_ap_drop: Annotated[
        float, typer.Option(min=0, max=1, help="refuse fp16 or int8 where it costs more mAP than that")
    ] = 0.01,
    photos: Annotated[int, typer.Option(min=0, help="validation photos to check it on; 0: all")] = 1000,
    nms: Annotated[
        Literal["hard", "none"], typer.Option(help="none: left to  detkit predict --nms, or to your own code")
    ] = "hard",
    triton: Annotated[
        Path | None,
        typer.Option(help="also put it into this repository of Triton Inference Server; RUN may be an .onnx then"),
    ] = None,
) -> None:
    """Write an ONNX file that takes pixels and gives boxes, after proving it against torch on real photos."""
    if triton is not None and run is not None and Path(run).suffix == ".onnx":
        _to_triton([Path(run)], triton)
        return
    from detkit import export as job

    inputs: tuple[Literal["canvas", "image"], ...] = ("canvas", "image") if takes == "both" else (takes,)
    written = job.run(run, out, data, _console(), job.Plan(inputs, precision, nms, max_ap_drop, photos))
    if triton is not None:
        _to_triton(written, triton)


def _to_triton(models: Sequence[Path], repository: Path) -> None:
    from detkit import triton as job
    from detkit.manifest import read

    for model in models:
        name = None
        if len(models) > 1:  # both files of a run have its name
            said = read(model.read_bytes(), str(model))
            name = f"{said.name}-{said.input}"
        _console().print(f"{job.write(model, repository, name)}: for Triton Inference Server", soft_wrap=True)


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="an .onnx file that detkit exported")],
    device: Annotated[RuntimeDevice, typer.Option(help="where the network runs")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="of the network on the CPU; 0: one a core")] = 0,
) -> None:
    """Check that an exported file finds, on this machine, what it found where it was exported: exit code 1 if not."""
    from detkit.runtime import verify as job

    raise typer.Exit(0 if job.run(model, device, threads, _console()) else 1)


@app.command()
def serve(
    models: Annotated[list[str], typer.Argument(help="ONNX files: PATH, NAME=PATH or NAME:VERSION=PATH")],
    host: Annotated[str, typer.Option(help="0.0.0.0: for other machines too")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="of HTTP and the page")] = 8000,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="also the Open Inference Protocol over gRPC")
    ] = None,
    device: Annotated[RuntimeDevice, typer.Option(help="where the network runs")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="of the network on the CPU; 0: one a core")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="processes; one that dies is started anew")] = 1,
    max_batch: Annotated[int, typer.Option(min=1, help="photos through the network at once; 1: no batching")] = 8,
    max_delay: Annotated[float, typer.Option(min=0, help="milliseconds that a batch waits to be filled")] = 5,
    queue: Annotated[int, typer.Option(min=1, help="photos accepted and not answered; more are told to wait")] = 128,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for a request to arrive, and to be answered")] = 30,
    max_mb: Annotated[float, typer.Option(min=0.01, help="MiB of a request")] = 32,
    max_megapixels: Annotated[float, typer.Option(min=0.01, help="of a photo")] = 50,
    reload: Annotated[float, typer.Option(min=0, help="seconds between looks at the files; 0: never")] = 2,
    token_file: Annotated[
        Path | None, typer.Option(help="clients must send its content; or set DETKIT_TOKEN; default: no token")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="certificate chain, PEM")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its key, PEM")] = None,
    log: Annotated[Literal["auto", "json", "text"], typer.Option(help="auto: text on a terminal")] = "auto",
) -> None:
    """Serve exported models: a web page, photos over HTTP, and the Open Inference Protocol."""
    from detkit.errors import need

    for module in ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "grpc"):
        need(module)
    from detkit.serve import run as job
    from detkit.serve.settings import Settings

    if log == "auto":
        log = "text" if sys.stderr.isatty() else "json"
    job.run(
        Settings(
            models=tuple(models),
            host=host,
            port=port,
            grpc_port=grpc_port,
            device=device,
            threads=threads,
            workers=workers,
            max_batch=max_batch,
            max_delay=max_delay / 1000,
            queue=queue,
            timeout=timeout,
            max_bytes=round(max_mb * 2**20),
            max_pixels=round(max_megapixels * 1e6),
            reload=reload,
            token=job.token(token_file),
            certificate=tls_cert,
            key=tls_key,
            log=log,
        )
    )


@data_app.command()
def synth(
    out: Annotated[Path, typer.Option(help="a new folder")],
    train: Annotated[int, typer.Option(min=0, help="photos of the train split")] = 400,
    val: Annotated[int, typer.Option(min=0, help="photos of the val split")] = 100,
    size: Annotated[tuple[int, int], typer.Option(help="width and height in pixels")] = (640, 480),
    seed: Annotated[int, typer.Option(min=0)] = 0,
    workers: Annotated[int, typer.Option(min=0, help="processes; 0: one a core")] = 0,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="your products: class folders of cut-outs, or a VOC data set to cut them out of"),
    ] = None,
    backgrounds: Annotated[Path | None, typer.Option(help="a folder of photos; default: made-up ones")] = None,
    items: Annotated[tuple[int, int] | None, typer.Option(help="fewest and most in a scene [default: 1 24]")] = None,
    scale: Annotated[
        tuple[float, float] | None,
        typer.Option(help="an item's longer side in shorter sides of the scene [default: 0.08 0.95]"),
    ] = None,
    layout: Annotated[
        Literal["auto", "scatter", "shelf"] | None, typer.Option(help="auto: half of the scenes are shelves [default]")
    ] = None,
    masks: Annotated[
        Literal["grabcut", "box"] | None, typer.Option(help="of what has no transparency [default: grabcut]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="of the VOC data set [default: train]")] = None,
) -> None:
    """Render photos of product shelves with Pascal-VOC XML; with --from, scenes of your own products."""
    from detkit.console import counting
    from detkit.data.synth import synthesise

    console = _console()
    look = {"items": items, "scale": scale, "layout": layout}
    others = {"backgrounds": backgrounds, "masks": masks, "split": split}
    if source is None:
        for name, value in (look | others).items():
            if value is not None:
                raise UserError(f"--{name} is for scenes of your own products: name their folder with --from")
        with counting(console, "rendering") as progress:
            synthesise(out, train=train, val=val, size=size, seed=seed, workers=workers, progress=progress)
    else:
        from detkit.data import compose

        chosen: dict[str, Any] = {name: value for name, value in others.items() if value is not None}
        settings: dict[str, Any] = {name: value for name, value in look.items() if value is not None}
        chosen["look"] = compose.Look(size, **settings)
        with counting(console, "composing") as progress:
            lines = compose.compose(
                out, source, train=train, val=val, seed=seed, workers=workers, progress=progress, **chosen
            )
        for line in lines:
            console.print(line)
    console.print(f"{out}: {train} train and {val} val photos")


@data_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="the data set's folder, or its COCO or CSV file")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    target: Annotated[str, typer.Option("--to", help="voc, coco, yolo, labelme, cvat, openimages or csv")],
    source_format: Annotated[str | None, typer.Option("--from", help="default: found out")] = None,
    split: Annotated[list[str] | None, typer.Option(help="only this one (may be repeated)")] = None,
    images: Annotated[Literal["copy", "link", "none"], typer.Option(help="what becomes of the photos")] = "copy",
    image_folder: Annotated[Path | None, typer.Option(help="where the photos are, if not below IN")] = None,
    convention: Annotated[Literal["auto", "edges", "devkit"], typer.Option(help="coordinates in VOC XML")] = "auto",
) -> None:
    """Write a data set in another format, and say what that can't hold."""
    from detkit.console import counting
    from detkit.data import convert as job

    console = _console()
    with counting(console, "converting") as progress:
        done = job.convert(
            source,
            out,
            target,
            source_format=source_format,
            split=split or (),
            images=images,
            image_folder=image_folder,
            convention=convention,
            progress=progress,
        )
    for line in done.lines():
        console.print(line, markup=False, highlight=False)
    console.print(f"{out}: {done.target}, from {done.source}", markup=False, highlight=False)


@data_app.command()
def split(
    path: Annotated[Path, typer.Argument(help="the data set's folder")],
    val: Annotated[float, typer.Option(min=0, max=1, help="share of photos and of each class to evaluate on")] = 0.2,
    test: Annotated[float, typer.Option(min=0, max=1, help="share that is kept for the end; 0: none")] = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="an empty folder; default: PATH/ImageSets/Main")
    ] = None,
    unlabelled: UnlabelledOption = None,
    file_format: FormatOption = None,
    workers: Annotated[int, typer.Option(min=0, help="processes; 0: one a core")] = 0,
) -> None:
    """Divide a data set into train, val and test, with near-duplicate photos on one side."""
    from detkit.console import counting
    from detkit.data import cache, scan
    from detkit.data import split as job
    from detkit.files import require_free

    console = _console()
    if val + test >= 1:
        raise UserError(f"--val {val:g} and --test {test:g} leave nothing to train on: make them smaller")
    shares = {"train": 1 - val - test, "val": val, "test": test}
    folder = out or path / "ImageSets" / "Main"
    require_free(folder)
    data = _data(path, None, unlabelled=unlabelled, format=file_format)
    scan.require_no_splits(data)
    dataset = cache.load_split(data, "all", console)
    with counting(console, "comparing photos") as progress:
        division = job.divide(
            dataset,
            {name: share for name, share in shares.items() if share},
            seed,
            workers=workers,
            progress=progress,
        )
    job.write(division, folder)
    console.print(division.table())
    console.print(f"{division.grouped} photos are in {division.groups} groups of near-duplicates: none is divided")
    console.print(f"written to {folder}", markup=False, highlight=False)


def _data(path: Path, settings: Config | None, **given: str | None) -> Data:
    """The data set at `path`, read as the config says, or as the options that are not None do."""
    from detkit.config import Data

    chosen = {"root": path} | {name: value for name, value in given.items() if value is not None}
    return (settings.data if settings else Data(root=path)).model_copy(update=chosen)


@data_app.command()
def audit(
    path: Annotated[Path, typer.Argument(help="the data set's folder")],
    config_name: Annotated[
        str | None, typer.Option("--config", "-c", help="take data settings and canvas from this config")
    ] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="height and width of the training canvas; default: 300 300")
    ] = None,
    train: Annotated[str | None, typer.Option(help="the split to train on; default: train")] = None,
    val: Annotated[str | None, typer.Option(help="the split to evaluate on; default: val")] = None,
    unlabelled: UnlabelledOption = None,
    file_format: FormatOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all findings to this file")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="write a page with thumbnails to this file")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="exit with 1 for any error, change, or photo that splits share")
    ] = False,
    fix: Annotated[Path | None, typer.Option(metavar="OUT", help="write a mended copy to this new folder")] = None,
    workers: Annotated[int, typer.Option(min=0, help="processes; 0: one a core")] = 0,
) -> None:
    """Read every annotation and every photo, and list what is wrong or unusual and what detkit does about it."""
    from detkit import config
    from detkit.console import counting
    from detkit.data import audit as job

    console, settings = _console(), config.load(config_name) if config_name else None
    data = _data(path, settings, train=train, val=val, unlabelled=unlabelled, format=file_format)
    canvas = size or (settings.input.size if settings else job.SIZE)
    rule = settings.input.resize if settings else "stretch"
    with counting(console, "reading photos") as progress:
        found = job.run(data, canvas, rule, workers, progress)
    job.print_summary(found, console)
    if json_file:
        job.write_json(json_file, found)
    if html_file:
        job.write_html(html_file, found)
    if fix:
        from detkit.data import fix as mending

        with counting(console, "copying") as progress:
            changes = mending.fix(found, fix, progress)
        for line in mending.summary(changes):
            console.print(line, markup=False, highlight=False)
        console.print(f"{fix}: the mended copy; every change is in {fix / mending.LOG}", markup=False, highlight=False)
    raise typer.Exit(1 if strict and found.bad() else 0)


@data_app.command()
def stats(
    path: Annotated[Path, typer.Argument(help="the data set's folder")],
    split: Annotated[str, typer.Option(help="which photos; 'all': every one")] = "train",
    config_name: Annotated[
        str | None, typer.Option("--config", "-c", help="measure this config's default boxes, and suggest better ones")
    ] = None,
    size: Annotated[
        tuple[int, int] | None, typer.Option(help="the canvas' height and width; default: the config's, or the photos'")
    ] = None,
    clusters: Annotated[int, typer.Option(min=1, help="clusters of box shapes")] = 9,
    unlabelled: UnlabelledOption = None,
    file_format: FormatOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page to this file")] = None,
    plots: Annotated[Path | None, typer.Option(help="write plots to this folder")] = None,
) -> None:
    """Count classes, sizes, shapes and places of objects; suggest default boxes."""
    from detkit import config, overview

    settings = config.load(config_name) if config_name else None
    overview.run(
        _data(path, settings, unlabelled=unlabelled, format=file_format),
        split,
        size=size,
        settings=settings,
        clusters=clusters,
        json_file=json_file,
        html=html,
        plots=plots,
        console=_console(),
    )


@data_app.command()
def show(
    path: Annotated[Path, typer.Argument(help="the data set's folder")],
    split: Annotated[str, typer.Option(help="which photos; 'all': every one")] = "train",
    out: Annotated[Path, typer.Option("--out", "-o", help="a .jpg or .png file")] = Path("contact_sheet.jpg"),
    count: Annotated[int, typer.Option(min=1, help="photos, drawn at random")] = 24,
    columns: Annotated[int, typer.Option(min=1, max=40, help="photos in a row")] = 6,
    class_name: Annotated[str | None, typer.Option("--class", help="only photos that show this class")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    config_name: Annotated[
        str | None, typer.Option("--config", "-c", help="read the data as this config says; its augmentation")
    ] = None,
    augmented: Annotated[bool, typer.Option("--augmented", help="as training sees them")] = False,
    only: Annotated[str | None, typer.Option(help="one change alone, in each photo, such as mosaic")] = None,
    unlabelled: UnlabelledOption = None,
    file_format: FormatOption = None,
) -> None:
    """Draw photos with their boxes and names on one contact sheet."""
    from detkit import config
    from detkit.console import counting
    from detkit.data import cache
    from detkit.data import show as job

    if (augmented or only) and config_name is None:
        raise UserError("--augmented shows what a config does: name it, such as  --config ssd_mobilenet.yaml")
    job.file_format(out)
    settings = config.load(config_name) if config_name else None
    console = _console()
    dataset = cache.load_split(_data(path, settings, unlabelled=unlabelled, format=file_format), split, console)
    if settings and (augmented or only):
        from detkit.data import tiles

        dataset = tiles.cut(dataset, settings.input.tiles)
    index = job.choose(dataset, count, class_name, seed)
    with counting(console, "drawing") as progress:
        if settings and (augmented or only):
            pictures = job.samples(dataset, index, job.WIDTH // columns, settings, seed, only, progress)
        else:
            pictures = job.photos(dataset, index, job.WIDTH // columns, progress)
    job.write(pictures, columns, out)
    console.print(f"{out}: {len(index)} of {len(dataset)} photos", markup=False, highlight=False)


@data_app.command()
def diff(
    path: Annotated[Path, typer.Argument(help="the data set's folder")],
    detections: Annotated[
        Path, typer.Argument(help="a folder of  detkit predict --format jsonl , or detections as .json, .jsonl or .csv")
    ],
    split: Annotated[str, typer.Option(help="which photos; 'all': every one that the detections are of")] = "all",
    score: Annotated[float, typer.Option(min=0, max=1, help="lowest score that counts")] = 0.0,
    iou: Annotated[float, typer.Option(min=0.05, max=1, help="overlap from which two boxes are one object")] = 0.5,
    ids: Annotated[Path | None, typer.Option(help="the COCO annotations that the results' ids are of")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write every difference to this file")] = None,
    xml: Annotated[
        Path | None, typer.Option(help="a new folder for XML of the photos that differ, to be mended in LabelImg")
    ] = None,
    unlabelled: UnlabelledOption = "negative",
    file_format: FormatOption = None,
) -> None:
    """Compare detections with the labels that are there: matched, of another class, missed, and extra."""
    from detkit import difference

    data = _data(path, None, unlabelled=unlabelled, format=file_format)
    difference.run(
        data, detections, _console(), split=split, score=score, iou=iou, ids=ids, json_file=json_file, xml=xml
    )


@data_app.command("cache")
def show_cache(
    path: Annotated[Path, typer.Argument(help="the data set's folder")],
    info: Annotated[bool, typer.Option("--info", help="list the cache files (the default)")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="remove them")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read every file anew and compare")] = False,
    location: Annotated[Path | None, typer.Option("--cache", help="where they lie, if data.cache is set")] = None,
    file_format: FormatOption = None,
) -> None:
    """List, check or remove the caches of a data set."""
    from rich.filesize import decimal
    from rich.table import Table

    from detkit.config import Data
    from detkit.console import counting
    from detkit.data import cache

    if info + clear + verify > 1:
        raise UserError("--info, --clear and --verify: choose one")
    data, console = Data(root=path, cache=location, format=file_format or "voc"), _console()
    if clear:
        removed = cache.clear(data)
        console.print(f"{path}: {len(removed)} cache files removed")
    elif verify:
        with counting(console, "reading") as progress:
            changed = cache.verify(data, progress)
        for name in changed:
            console.print(f"{name}: changed, though its size and times are the same", style="yellow", highlight=False)
        console.print(f"{path}: {len(changed)} files differed from the cache; it is up to date now")
        raise typer.Exit(1 if changed else 0)
    else:
        table = Table("split", "photos", "objects", "size", "file", title=f"caches of {path}", title_justify="left")
        for entry in cache.info(data):
            counts = ("damaged", "") if entry.photos < 0 else (str(entry.photos), str(entry.objects))
            table.add_row(entry.split or "(each file)", *counts, decimal(entry.size), str(entry.path))
        console.print(table if table.row_count else f"{path}: no caches")


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Argument(help="the run's folder; default: the newest")] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with plots to this file")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the findings to this file")] = None,
) -> None:
    """Say what is wrong with a run by the curves it has recorded, and what to change; exit with 1 if something is."""
    from detkit import diagnose as job

    found = job.run(run or job.newest(), _console(), html=html, json_file=json_file)
    raise typer.Exit(1 if found else 0)


@app.command()
def demo() -> None:
    """The whole job on made-up shelf photos: data, training, evaluation, prediction, export."""
    from detkit import demo as job

    job.run(_console())


def _console() -> Console:
    from rich.console import Console

    from detkit.console import rank

    # Off a terminal (a log file, CI) lines are not wrapped to 80 columns.
    return Console(width=None if sys.stdout.isatty() else 200, quiet=rank() > 0)


def _complain(reason: Exception) -> None:
    from detkit.console import rank

    if rank() == 0:  # of several processes, which all have met it
        print(f"detkit: {reason}", file=sys.stderr)  # noqa: T201


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a UserError is one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # wherever it stands
    if "--resume" in words:
        # A bare --resume means the newest stopped run; typer has no options whose value may be left out.
        after = words.index("--resume") + 1
        if after == len(words) or words[after].startswith("-"):
            words.insert(after, "newest")
    try:
        app(words, obj=words)
    except (UserError, ModuleNotFoundError) as error:
        known = error if isinstance(error, UserError) else missing(error)
        if debug or known is None:
            raise
        _complain(known)
        sys.exit(2)
    except Interrupted as stop:
        _complain(stop)
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(UserError(f"{error.filename or 'a file'}: can't be written ({error.strerror}): make room"))
        sys.exit(2)

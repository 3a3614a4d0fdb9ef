"""How fast training is on one device, and on several processes of one machine with the same global batch.

    python benchmarks/scaling.py processes                   1 process against 2 on the CPU, canvases made smaller
    python benchmarks/scaling.py processes --device cuda     1 GPU against 2, canvases and batches of the configs
    python benchmarks/scaling.py throughput --device cuda    one GPU: images a second, share of the time without data

Each figure is from the loop of `detkit train` itself, loader and augmentation included, on made-up photos (`detkit data
synth`) and random weights. Each command writes its section of results/scaling.json and results/scaling.md and leaves
the others as they are.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from report import console, save
from rich.console import Console
from rich.progress import track

from detkit import config, distributed, train
from detkit.checkpoint import pick_device
from detkit.console import bar
from detkit.data.synth import synthesise

CONFIGS = ("ssd_vgg", "yolo_resnet", "faster_rcnn_resnet")
# On a CPU; SSD300 has no other canvas.
SMALL = {"ssd_vgg": 300, "yolo_resnet": 160, "faster_rcnn_resnet": 192}
QUIET = Console(quiet=True)
LOOP = "`detkit train`'s own loop over an epoch of made-up photos of 640x480, after one that isn't counted"
# A rate at which random weights stay finite; many epochs, so that none is without mosaic for being among the last.
COMMON = (
    "model.weights=none",
    "train.epochs=100",
    "train.progressive=[]",
    "train.optimizer.lr=1e-6",
    "train.patience=0",
)
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Where = typer.Option("cpu", help="cpu or cuda")
Sets = typer.Option([], "--set", help="more settings, such as train.compile=true; one each time")
Names = typer.Option(list(CONFIGS), "--config", help="configs; one each time")
Rounds = typer.Option(3, min=1, help="of which the median is taken")
Photos = typer.Option(0, min=0, help="an epoch of which is timed, after another; 0: 4 batches on a CPU, 40 on GPUs")


class Job(NamedTuple):
    """A config with its settings, trained by so many processes of so many threads."""

    name: str
    settings: tuple[str, ...]
    processes: int = 1
    threads: int | None = None


def _train(job: Job) -> dict[str, float]:
    """An epoch of one process, after one that isn't counted: images a second of all processes, share of the time that
    the slowest waited for data, and memory."""
    if job.threads:
        torch.set_num_threads(job.threads)
    settings = config.load(job.name, job.settings)
    device = pick_device(settings.train.device)
    row: dict[str, float] = {}
    with distributed.group(device, 600):
        run = train.Run(settings, QUIET)
        run.wrap()
        for epoch in range(2):
            run.epoch, run.step_in_epoch, run.totals, run.counted = epoch, 0, {}, 0
            with bar(QUIET) as progress:
                row = run.train_epoch(progress, lambda: 0)
    if device.type == "cuda":
        row["memory"] = torch.cuda.max_memory_allocated() / 2**30
    return row


def _work(job: Job, rank: int, port: int, results: Any) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.processes, "LOCAL_WORLD_SIZE": job.processes}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    row = _train(job)
    if rank == 0:
        results.put(row)


def _measure(job: Job) -> dict[str, float]:
    """What `_train` says, in processes of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_work, args=(job, rank, port, results)) for rank in range(job.processes)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit(f"{job}: a process failed")
    row: dict[str, float] = results.get()
    return row


def _in_turns(jobs: dict[str, Job], rounds: int) -> dict[str, dict[str, float]]:
    """The medians of each job's figures, over rounds in which each has its turn."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    for _ in track(range(rounds), description=next(iter(jobs.values())).name, console=console):
        for name, job in jobs.items():
            found[name].append(_measure(job))
    return {name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()}


def _settings(name: str, device: str, folder: Path, more: list[str]) -> list[str]:
    small = [f"input.size=[{SMALL[name]}, {SMALL[name]}]", "train.batch_size=4", "train.precision=fp32"]
    places = [f"data.root={folder / 'photos'}", f"data.cache={folder / 'cache'}", f"train.device={device}"]
    return [*COMMON, *(small if device == "cpu" else []), *places, *more]


def _photos(folder: Path, names: list[str], device: str, photos: int, more: list[str]) -> None:
    batch = max(config.load(name, _settings(name, device, folder, more)).train.images for name in names)
    synthesise(folder / "photos", train=photos or batch * (4 if device == "cpu" else 40), val=1)


def _what(name: str, settings: tuple[str, ...]) -> str:
    cfg = config.load(name, settings)
    height, width = cfg.input.size
    return f"{name}, {height}x{width}, batch {cfg.train.batch_size}, {cfg.train.precision}"


@app.command()
def processes(
    device: str = Where,
    rounds: int = Rounds,
    photos: int = Photos,
    names: list[str] = Names,
    more: list[str] = Sets,
) -> None:
    """1 process against 2 on this machine, with the same global batch."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _photos(folder, names, device, photos, more)
        for name in names:
            # On a CPU the loader's processes would take the cores whose use is compared.
            own = ["train.workers=0"] if device == "cpu" else []
            settings = (*_settings(name, device, folder, [*own, *more]),)
            if device == "cpu":
                jobs = {
                    "1 process, 1 thread": Job(name, settings, 1, 1),
                    "1 process, 2 threads": Job(name, settings, 1, 2),
                }
                jobs["2 processes of 1 thread"] = Job(name, settings, 2, 1)
            else:
                jobs = {"1 GPU": Job(name, settings), "2 GPUs": Job(name, settings, 2)}
            found = _in_turns(jobs, rounds)
            one, *_ = found.values()
            for words, row in found.items():
                used = max(jobs[words].processes, jobs[words].threads or 1)
                rows.append({
                    "config": _what(name, settings),
                    "by": words,
                    "img/s": f"{row['img_s']:.2f}",
                    "speed, the first = 1": f"{row['img_s'] / one['img_s']:.2f}",
                    "efficiency": f"{row['img_s'] / one['img_s'] / used:.0%}",
                    "data": f"{row['data_wait']:.0%}",
                })  # fmt: skip
    note = (
        f"{LOOP}; medians of {rounds} rounds in turns. All rows of a config have the same global batch. Efficiency: "
        "the speed over that of the first row, over the threads or GPUs used. data: share of the time that the slowest "
        "process waited for data"
    )
    note += "; it decodes and augments them itself (train.workers=0)." if device == "cpu" else "."
    note += " Connected by gloo." if device == "cpu" else " Connected by NCCL."
    save("scaling", f"processes {device}", f"1 against 2 processes, {device}", note, rows)


@app.command()
def throughput(
    device: str = Where,
    rounds: int = Rounds,
    photos: int = Photos,
    names: list[str] = Names,
    more: list[str] = Sets,
    precisions: list[str] = typer.Option(["fp32", "bf16"], "--precision"),  # noqa: B008
) -> None:
    """One device: images a second, and the share of the time spent waiting for data."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _photos(folder, names, device, photos, more)
        for name in names:
            variants = {
                precision: Job(name, (*_settings(name, device, folder, [f"train.precision={precision}", *more]),))
                for precision in precisions
            }
            for precision, row in _in_turns(variants, rounds).items():
                found = {
                    "config": _what(name, variants[precision].settings),
                    "img/s": f"{row['img_s']:.1f}",
                    "data": f"{row['data_wait']:.0%}",
                }
                rows.append(found | ({"memory, GB": f"{row['memory']:.1f}"} if "memory" in row else {}))
    workers = config.load(names[0], _settings(names[0], device, Path(), more)).train.workers
    note = (
        f"{LOOP}; medians of {rounds} rounds in turns; {min(workers, os.cpu_count() or 1)} loader processes. "
        f"data: share of the time that it waited for data. {' '.join(more)}"
    ).rstrip()
    save("scaling", f"throughput {device}", f"One device, {device}", note, rows)


if __name__ == "__main__":
    app()

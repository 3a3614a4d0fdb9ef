"""Training: a readable loop around Trainable, with evaluation, checkpoints and resuming."""

from __future__ import annotations

import csv
import itertools
import math
import platform
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter

from detkit import checkpoint, config
from detkit.checkpoint import pick_device
from detkit.console import bar, counting, duration
from detkit.data import cache, findings, pixels, stats
from detkit.data.batch import Loader, repeat_factors
from detkit.data.dataset import EvalSet, TrainSet
from detkit.data.labels import DataSet
from detkit.errors import Interrupted, UserError
from detkit.evaluate import evaluate, table
from detkit.files import atomic_write, next_folder
from detkit.nn import weights
from detkit.nn.contract import Losses
from detkit.nn.detector import Detector, Predictor, Trainable
from detkit.nn.layers import batch_norms
from detkit.optim import Muon
from detkit.types import Batch

# What of a Run is saved for resuming.
PARTS = ("detector", "predictor", "optimizer", "schedule", "scaler")
COUNTERS = ("best", "epoch", "step_in_epoch", "totals", "finished")
LOG_EVERY = 60.0  # seconds between lines of progress where there is no terminal for a bar
FIGURES = ("mAP", "mAP50", "mAP75", "VOC_AP50")


def make_optimizer(detector: Detector, settings: config.Optimizer) -> Optimizer:
    """The optimiser: weight decay off for norms and biases, the backbone's rate scaled."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    parameters = [
        {
            "params": members,
            "lr": settings.lr * (settings.backbone_lr if in_backbone else 1.0),
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), members in groups.items()
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in detector.parameters())
    if settings.name == "muon":
        return Muon(parameters, settings.lr, settings.momentum)
    if settings.name == "adamw":
        return AdamW(parameters, betas=(settings.momentum, 0.999), fused=fused)
    return SGD(parameters, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=fused)


def rate(settings: config.Schedule, step: int, steps: int) -> float:
    """The learning rate at a step as a share of the optimiser's setting."""
    warmup = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    if settings.name == "multistep":
        return warmup * settings.gamma ** sum(step >= share * steps for share in settings.milestones)
    done = max(0, step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return warmup * (settings.final + (1 - settings.final) * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def divide(losses: Losses) -> dict[str, Tensor]:
    """Each part of the loss: its sum over its denominator, which is at least 1."""
    return {name: total / losses.denoms[name].clamp(min=1) for name, total in losses.sums.items()}


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Within, the first Ctrl-C or SIGTERM is only noted (the yielded function returns its number); a second Ctrl-C
    interrupts at once."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Run:
    """Everything a run in progress consists of."""

    def __init__(self, settings: config.Config, console: Console) -> None:
        cfg = settings.train
        self.settings, self.console = settings, console
        self.folder = Path()
        self.best, self.epoch, self.step_in_epoch, self.finished = -1.0, 0, 0, False
        self.totals: dict[str, float] = {}  # of the losses, in this epoch
        self.device = pick_device(cfg.device)
        self.train_data = cache.load_split(settings.data, settings.data.train, console)
        if cfg.overfit:
            self.train_data = _spread(self.train_data, cfg.overfit)
            self.val_data = self.train_data
        else:
            self.val_data = cache.load_split(settings.data, settings.data.val, console)
        self.classes = self.train_data.classes
        torch.manual_seed(cfg.seed)
        self.detector = Detector(settings.model, settings.input, len(self.classes))
        layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.detector.to(self.device).to(memory_format=layout)
        self.predictor = Predictor(self.detector, settings.model.select)
        self.model = Trainable(self.detector.train())
        self.optimizer = make_optimizer(self.detector, cfg.optimizer)
        train_set = TrainSet(self.train_data, settings.input, settings.augment, cfg.seed, self._source())
        pin = self.device.type == "cuda"
        rare = cfg.sampler == "repeat-factor"
        factors = repeat_factors(self.train_data, cfg.repeat_threshold) if rare else None
        self.loader = Loader(train_set, cfg.batch_size, cfg.workers, seed=cfg.seed, factors=factors, pin=pin)
        self.val_loader = Loader(EvalSet(self.val_data, settings.input), cfg.batch_size, cfg.workers, pin=pin)
        self.steps = cfg.epochs * len(self.loader)
        self.schedule = LambdaLR(self.optimizer, lambda step: rate(cfg.schedule, step, self.steps))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")

    def _source(self) -> pixels.Source:
        """Where the training photos' pixels come from."""
        settings, cfg = self.settings, self.settings.train
        files = pixels.Files(self.train_data, cfg.decode == "reduced")
        if cfg.cache == "none" or cfg.overfit:
            return files
        canvas, rule = cfg.largest_canvas(settings.input.size), settings.input.resize
        with counting(self.console, f"decoding {settings.data.train}") as progress:
            if cfg.cache == "ram":
                return pixels.in_memory(files, canvas, rule, cfg.workers, progress)
            places = cache.pixels(settings.data, settings.data.train, canvas, rule)
            return pixels.on_disk(files, canvas, rule, places, cfg.workers, progress)

    @torch.no_grad()
    def recalibrate(self) -> None:
        """Measure the backbone's BatchNorm statistics on the first batches of training photos, held layers included:
        for weights whose statistics are approximate or from other photos."""
        backbone = self.detector.backbone
        norms = batch_norms(backbone)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over the batches
            norm.train()
        total = min(self.settings.train.recalibrate_bn, len(self.loader))
        batches = itertools.islice(self.loader.epoch(0), total)
        with bar(self.console) as progress:
            for batch in progress.track(batches, total=total, description="measuring BatchNorm statistics"):
                backbone(self.detector.normalise(batch.images.to(self.device)))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.detector.train()

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        return {name: getattr(self, name).state_dict() for name in PARTS} | counters | {"rng": torch.get_rng_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken."""
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in COUNTERS:
            setattr(self, name, state[name])
        torch.set_rng_state(state["rng"])

    def save_state(self) -> None:
        """Write what resuming needs."""
        checkpoint.write_state(self.folder / checkpoint.STATE, self.state())

    def rng(self) -> torch.Generator:
        """What the head draws its samples with in this step; it depends on the seed and the step alone."""
        key = random.Random(f"{self.settings.train.seed} {self.schedule.last_epoch}").getrandbits(63)
        return torch.Generator(self.device).manual_seed(key)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns the parts of the loss. Raises UserError where the loss is not finite."""
        cfg = self.settings.train
        batch = Batch(
            batch.images.to(self.device, non_blocking=True),
            type(batch.targets)(*(tensor.to(self.device, non_blocking=True) for tensor in batch.targets)),
            batch.plans,
            batch.index,
        )
        dtype = torch.float16 if cfg.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=cfg.precision != "fp32"):
            parts = divide(self.model(batch, self.rng()))
        values = dict(zip(parts, torch.stack([*parts.values()]).detach().tolist(), strict=True))
        if not all(math.isfinite(value) for value in values.values()):
            names = ", ".join(Path(self.train_data[int(i)].path).name for i in batch.index)
            raise UserError(f"the loss is no longer finite ({values}); lower the learning rate. Photos: {names}")
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(torch.stack([*parts.values()]).sum()).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        if cfg.clip_norm:
            nn.utils.clip_grad_norm_(self.detector.parameters(), cfg.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        step = self.schedule.last_epoch
        # The average follows fast at first (the weights move far), then with the set decay.
        self.predictor.follow(self.detector, min(cfg.ema, step / (step + 10)))
        return values

    def train_epoch(self, progress: Progress, stop: Callable[[], int]) -> dict[str, float]:
        """Train to the end of the current epoch, or until asked to stop; returns mean losses and images a second."""
        cfg = self.settings.train
        task = progress.add_task("", total=len(self.loader), completed=self.step_in_epoch)
        images, told, start = 0, 0.0, time.perf_counter()
        size, first = self.settings.input.size, self.epoch * len(self.loader)
        close = self.epoch >= cfg.epochs - self.settings.augment.close_epochs
        batches = self.loader.epoch(
            self.epoch,
            start=self.step_in_epoch,
            close=close,
            canvas=lambda batch: cfg.canvas(size, self.epoch, first + batch),
        )
        for done, batch in enumerate(batches, 1):
            parts = self.train_step(batch)
            self.step_in_epoch += 1
            images += len(batch.images)
            for name, value in parts.items():
                self.totals[name] = self.totals.get(name, 0.0) + value
            passed = time.perf_counter() - start
            left = self.steps - self.epoch * len(self.loader) - self.step_in_epoch
            losses = " ".join(f"{name} {total / self.step_in_epoch:.3f}" for name, total in self.totals.items())
            status = (
                f"epoch {self.epoch + 1}/{cfg.epochs}  {losses}  {images / passed:.1f} img/s  "
                f"run ends in {duration(left * passed / done)}"
            )
            progress.update(task, advance=1, description=status)
            if not self.console.is_terminal and passed > told + LOG_EVERY:
                told = passed
                self.console.print(f"{status}  step {self.step_in_epoch}/{len(self.loader)}", highlight=False)
            if stop():
                break
        progress.remove_task(task)
        means = {f"loss_{name}": total / self.step_in_epoch for name, total in self.totals.items()}
        return means | {"img_s": images / (time.perf_counter() - start)}

    def validate(self) -> dict[str, Any]:
        """Evaluate the averaged weights and write the last and, where it is, the best checkpoint."""
        figures = evaluate(self.predictor, self.val_loader, self.val_data, self.device, self.console)
        names = [checkpoint.LAST]
        if figures["mAP"] > self.best:
            self.best = figures["mAP"]
            names.append(checkpoint.BEST)
        for name in names:
            self.write(name, figures)
        return figures

    def write(self, name: str, figures: dict[str, Any]) -> None:
        """Write the averaged weights as a checkpoint of that name."""
        weights_now = self.predictor.detector.state_dict()
        checkpoint.write(self.folder / name, weights_now, self.settings, self.classes, self.epoch, figures)


def _spread(data: DataSet, photos: int) -> DataSet:
    """So many photos with objects, evenly spread over the data set."""
    filled = np.flatnonzero(np.diff(data.box_ends, prepend=0))
    chosen = np.unique(np.linspace(0, len(filled) - 1, min(photos, len(filled))).round().astype(np.int64))
    return data.take(filled[chosen])


def remark(run: Run) -> str | None:
    """What the head has to say of the training photos' objects, as they lie on the canvas; None: nothing."""
    data, canvas = run.train_data, run.settings.input
    learnt = stats.measured(data)
    boxes = stats.on_canvas(data, canvas.size, canvas.resize, learnt)
    return run.detector.head.remark(torch.from_numpy(boxes), torch.from_numpy(stats.photo_index(data)[learnt]))


def _slow_precision(run: Run) -> str | None:
    """What to say where the device only emulates the run's precision."""
    precision = run.settings.train.precision
    if run.device.type != "cpu" or precision == "fp32" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    quick: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version supported
    if not quick or any(quick.get(f"{kind}_{precision}") for kind in ("avx512", "amx")):
        return None
    return f"this processor has no {precision} instructions: train.precision=fp32 is several times as fast here"


def start(settings: config.Config, console: Console) -> Path:
    """Train a new run. Returns its folder. Raises UserError for the user's mistakes, Interrupted when stopped."""
    # Absolute, so that the run can be resumed, measured and exported from any folder.
    folders = {name: path.absolute() for name in ("root", "cache") if (path := getattr(settings.data, name))}
    settings = settings.model_copy(update={"data": settings.data.model_copy(update=folders)})
    run = Run(settings, console)
    report = weights.load(run.detector, settings.model)
    if report:
        console.print(str(report), highlight=False)
    if settings.train.recalibrate_bn and report:
        run.recalibrate()
    run.predictor.follow(run.detector, 0)
    for said in (remark(run), _slow_precision(run)):
        if said:
            console.print(said, highlight=False, style="yellow")
    run.folder = next_folder(settings.runs / f"{settings.name}-")
    atomic_write(run.folder / "config.yaml", config.dump(settings))
    findings.write(run.folder / "findings.jsonl", (*run.train_data.findings, *run.val_data.findings))
    return _loop(run)


def resume(folder: Path, console: Console) -> Path:
    """Go on with a run that was stopped, from its last saved state."""
    state = checkpoint.read_state(folder)
    settings = config.load(folder / "config.yaml")
    if state["finished"]:
        raise UserError(f"{folder}: this run is finished ({state['epoch']} epochs); start a new one to train longer")
    run = Run(settings, console)
    run.folder = folder
    run.restore(state)
    return _loop(run)


class _Log:
    """metrics.csv and TensorBoard events of a run; a resumed run's are continued."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self.path = folder / "metrics.csv"
        self.events = SummaryWriter(folder) if tensorboard else None

    def add(self, row: dict[str, float]) -> None:
        """One epoch's figures."""
        new = not self.path.exists()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow([round(value, 6) for value in row.values()])
        if self.events:
            for name, value in row.items():
                self.events.add_scalar(name, value, int(row["epoch"]))
            self.events.flush()


def _loop(run: Run) -> Path:
    """Train, evaluate and save until the last epoch."""
    cfg, console = run.settings.train, run.console
    log = _Log(run.folder, cfg.tensorboard)
    console.print(f"run: {run.folder}   device: {run.device}   {len(run.loader)} steps an epoch")
    with _stop_signals() as stop:
        while not run.finished:
            began = time.perf_counter()
            with bar(console) as progress:
                row = run.train_epoch(progress, stop)
            if stop():
                run.save_state()
                run.write(checkpoint.LAST, {})  # not measured, but it can be looked at
                raise Interrupted(f"stopped; go on with  detkit train --resume {run.folder}", stop())
            run.epoch, run.step_in_epoch, run.totals = run.epoch + 1, 0, {}
            run.finished = run.epoch == cfg.epochs
            row = {"epoch": run.epoch, "lr": float(run.schedule.get_last_lr()[-1]), **row}
            if run.epoch % cfg.eval_every == 0 or run.finished:
                figures = run.validate()
                run.finished |= bool(cfg.until) and figures["mAP50"] >= cfg.until
                row |= {name: figures[name] for name in FIGURES}
            else:
                row |= dict.fromkeys(FIGURES, math.nan)
            row["seconds"] = time.perf_counter() - began
            log.add(row)
            run.save_state()
            console.print(_line(row, cfg.epochs), highlight=False)
    measured = f"{len(run.val_data)} photos of {run.settings.data.train}" if cfg.overfit else run.settings.data.val
    console.print(table(figures, f"{measured}, last epoch"))
    if figures["mAP50"] < cfg.until:
        console.print(f"mAP50 is {figures['mAP50']:.3f}, not yet {cfg.until}: train.epochs ran out", style="yellow")
    return run.folder


def _line(row: dict[str, float], epochs: int) -> str:
    losses = " ".join(f"{name.removeprefix('loss_')} {row[name]:.3f}" for name in row if name.startswith("loss_"))
    figures = "" if math.isnan(row["mAP"]) else f"mAP {row['mAP']:.3f}  mAP50 {row['mAP50']:.3f}  "
    return f"epoch {row['epoch']}/{epochs}  {losses}  {figures}{row['img_s']:.1f} img/s  {duration(row['seconds'])}"

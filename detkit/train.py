"""Training: a readable loop around Trainable, with evaluation, checkpoints and resuming."""

from __future__ import annotations

import itertools
import math
import platform
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from detkit import checkpoint, config, distributed, guards, loggers, watch
from detkit.checkpoint import pick_device
from detkit.console import bar, counting, duration
from detkit.data import cache, findings, pixels, stats, tiles
from detkit.data.batch import Loader, Part, repeat_factors
from detkit.data.dataset import EvalSet, TrainSet
from detkit.data.labels import DataSet
from detkit.errors import Interrupted, UserError
from detkit.evaluate import evaluate, table
from detkit.files import atomic_write, next_folder
from detkit.nn import weights
from detkit.nn.contract import Losses
from detkit.nn.detector import Detector, Predictor, Trainable
from detkit.nn.layers import batch_norms
from detkit.optim import Schedule, make_optimizer
from detkit.types import Batch, Detections, Targets

# What of a Run is saved for resuming.
PARTS = ("detector", "predictor", "optimizer", "schedule", "scaler", "watch")
COUNTERS = ("best", "stale", "epoch", "step_in_epoch", "totals", "counted", "skipped", "finished")
# What of a run's settings may be others once it is resumed: the weights stay what they would be (with another number of
# micro-batches, but for rounding).
CHANGEABLE = (
    "train.workers",
    "train.device",
    "train.accumulate",
    "train.skip",
    "train.save_steps",
    "train.timeout",
    "train.compile",
)
LOG_EVERY = 60.0  # seconds between lines of progress where there is no terminal for a bar
# train.batch_size auto: most images that a process takes at a time, and fewest steps that an epoch is to have.
MOST, MOST_CPU, FEWEST_STEPS = 1024, 32, 8
FEW = 8  # images from which BatchNorm's statistics can be relied on
TIME_UP = 1  # why a run stops, where it is no signal; this number's is none that it listens to
PICTURES = 20  # evaluations about, in a run, whose sample photos and curves are recorded
FIGURES = ("mAP", "mAP50", "mAP75", "VOC_AP50")


def by_denominator(losses: Losses) -> list[list[int]]:
    """The parts of the loss by their places, those with one denominator together."""
    groups: dict[int, list[int]] = {}
    for place, denom in enumerate(losses.denoms.values()):
        groups.setdefault(id(denom), []).append(place)
    return [*groups.values()]


def stacked(losses: Losses) -> Tensor:
    """Sums and denominators, float32 [2, parts], without gradient."""
    return torch.stack([*losses.sums.values(), *losses.denoms.values()]).detach().view(2, -1)


Judge = Callable[["Run", dict[str, Any]], None]


class NotFiniteError(UserError):
    """A loss or a gradient is not finite."""


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Within, the first Ctrl-C or SIGTERM is only noted (the yielded function returns its number); a second Ctrl-C
    interrupts at once. Of several processes each hears it once more, from torchrun."""
    received: list[int] = []
    heard = 2 if distributed.ranks() > 1 else 1

    def note(number: int, _frame: FrameType | None) -> None:
        if len(received) >= heard and number == signal.SIGINT:
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
        self.stale = 0  # evaluations since the best one
        self.skipped = 0  # steps that were left out
        self.ends = math.inf  # when its time is up, as time.time() has it
        self.totals: dict[str, float] = {}  # of the losses, in this epoch
        self.counted = 0  # steps that they are of
        self.stopped = 0  # number of the signal that asked for an end, or TIME_UP
        self.device = distributed.own_device(pick_device(cfg.device))
        with distributed.first_on_node("data"):
            self.train_data = cache.load_split(settings.data, settings.data.train, console)
            if cfg.overfit:
                self.train_data = self.val_data = _spread(self.train_data, cfg.overfit)
            else:
                self.val_data = cache.load_split(settings.data, settings.data.val, console)
        # From here on, where tiles are set, the training photos are these.
        self.train_data = tiles.cut(self.train_data, settings.input.tiles)
        self.photos = stats.photos(self.train_data, settings.input.tiles)
        model = settings.model
        self.settings = settings = settings.model_copy(
            update={"model": model.model_copy(update={"select": model.select.raised(self.photos.most)})}
        )
        self.classes = self.train_data.classes
        torch.manual_seed(cfg.seed)
        self.detector = Detector(settings.model, settings.input, len(self.classes))
        layout = torch.channels_last if cfg.channels_last else torch.contiguous_format
        self.detector.to(self.device).to(memory_format=layout)
        self.predictor = Predictor(self.detector, settings.model.select)
        if cfg.compile:
            self.detector.quicken()
        self.trainable = Trainable(self.detector.train())
        self.model: nn.Module = self.trainable  # or what several processes train it with
        self.optimizer = make_optimizer(self.detector, cfg.optimizer)
        self.pieces = distributed.ranks() * cfg.accumulate  # that a batch is divided into
        self._check_pieces()
        train_set = TrainSet(self.train_data, settings.input, settings.augment, cfg.seed, self._source())
        pin, workers = self.device.type == "cuda", distributed.workers(cfg.workers)
        rank, ranks = distributed.rank(), distributed.ranks()
        rare = cfg.sampler == "repeat-factor"
        factors = repeat_factors(self.train_data, cfg.repeat_threshold) if rare else None
        part = Part(rank, ranks, cfg.accumulate)
        self.loader = Loader(train_set, cfg.images, workers, seed=cfg.seed, factors=factors, pin=pin, part=part)
        val_set, val_batch = EvalSet(self.val_data, settings.input), cfg.images // cfg.accumulate
        self.val_loader = Loader(val_set, val_batch, workers, pin=pin, part=Part(rank, ranks))
        self.steps = cfg.steps(len(self.loader))
        self.epochs = -(-self.steps // len(self.loader))  # the last may end early
        self.schedule = Schedule(self.optimizer, cfg.schedule, self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.precision == "fp16")
        self.watch = watch.Watch(self.detector, self.steps, cfg.clip_norm)
        self.log = loggers.Loggers()  # in the first process, those of the run
        self.measured: dict[str, float] = {}  # by the last evaluation, beside its figures

    def _check_pieces(self) -> None:
        """Raise UserError where the batches can't be divided."""
        cfg, ranks = self.settings.train, distributed.ranks()
        if cfg.images % self.pieces:
            over = f"{ranks} processes" + f" of {cfg.accumulate} micro-batches" * (cfg.accumulate > 1)
            raise UserError(f"train.batch_size: {cfg.batch_size} images can't be divided equally over {over}")
        if len(self.train_data) < self.pieces:
            raise UserError(
                f"data.train: {len(self.train_data)} photos are too few for {self.pieces} parts of a batch; start "
                "fewer processes, or set train.accumulate=1"
            )
        if self.settings.model.norm == "sync_bn" and ranks > 1 and self.device.type != "cuda":
            raise UserError(f"model.norm=sync_bn is for GPUs, not for several processes on {self.device.type}: set bn")

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
            with distributed.first_on_node("pixels"):
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
            for statistic in (norm.running_mean, norm.running_var):
                assert statistic is not None
                distributed.add(statistic).div_(distributed.ranks())
        self.detector.train()

    def state(self) -> dict[str, Any]:
        """What `restore` takes."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        counters |= {"classes": self.classes, "data": self.train_data.digest()}
        return {name: getattr(self, name).state_dict() for name in PARTS} | counters

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken. Raises UserError where the data are others."""
        if tuple(state["classes"]) != self.classes:
            difference = checkpoint.class_difference(self.classes, state["classes"])
            raise UserError(f"{self.train_data.root}: its classes are not those of {self.folder}: {difference}")
        if state["data"] != self.train_data.digest():
            raise UserError(
                f"{self.train_data.root}: its training photos or their annotations are not what they were when "
                f"{self.folder} began; start a new run, from this one's weights with  --init {self.folder}"
            )
        for name in PARTS:
            getattr(self, name).load_state_dict(state[name])
        for name in COUNTERS:
            setattr(self, name, state[name])

    def save_state(self) -> None:
        """Write what resuming needs. Nothing random is in it: what is drawn depends on seed, epoch, step and sample."""
        if distributed.is_first():
            checkpoint.write_state(self.folder / checkpoint.STATE, self.state())

    @property
    def epoch_steps(self) -> int:
        """Steps of the current epoch."""
        return min(len(self.loader), self.steps - self.epoch * len(self.loader))

    def hold(self) -> None:
        """Freeze the backbone's stages that are to be frozen in the current epoch."""
        stages = self.settings.frozen(self.epoch)
        if stages != self.detector.backbone.freeze:
            self.detector.hold(stages)
            self.wrap()

    def wrap(self) -> None:
        """Make `model` of the detector as it is now: again whenever other parameters are to be trained."""
        self.model = distributed.wrap(self.trainable)

    def _seed(self, *what: int) -> random.Random:
        """Draws of this step, and of `what` in it."""
        return random.Random(f"{(self.settings.train.seed, self.schedule.last_epoch, *what)}")

    def losses(self, model: nn.Module, batch: Batch, piece: int) -> Losses:
        """The losses of this process' micro-batch of that number in the step. An image's samples depend on seed, step
        and image alone; dropout, which is drawn for a whole micro-batch, also on how the batch is divided."""
        cfg = self.settings.train
        torch.manual_seed(self._seed(distributed.rank(), piece).getrandbits(63))
        batch = batch.to(self.device)
        rng = batch.index ^ self._seed().getrandbits(32)
        dtype = torch.float16 if cfg.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=cfg.precision != "fp32"):
            losses: Losses = model(batch, rng)
        return losses

    def train_step(self, *pieces: Batch) -> dict[str, float]:
        """One optimiser step on this process' micro-batches of the batch; returns the parts of the whole batch's loss;
        none where the step was left out. Raises NotFiniteError where loss or gradient is not finite once too often.

        Each part of the loss is its sum over the batch divided by its denominator over the batch, which is known when
        the last micro-batch of every process has been through the network. Until then gradients are kept apart that
        have different denominators (with Faster R-CNN, two), each divided by that of the first micro-batch, so that
        they fit into 16 bits.
        """
        cfg, *earlier = self.settings.train, *pieces[:-1]
        step = self.schedule.last_epoch + 1
        parameters = [parameter for parameter in self.detector.parameters() if parameter.requires_grad]
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self.detector.buffers()] if cfg.skip else []
        groups: list[list[int]] = []
        held: list[tuple[Tensor, ...]] = []  # the gradients of each group, in order of the parameters
        seen: list[Tensor] = []
        for piece, batch in enumerate(earlier):
            losses = self.losses(self.trainable, batch, piece)
            seen.append(stacked(losses))
            groups, sums = by_denominator(losses), torch.stack([*losses.sums.values()])
            for number, group in enumerate(groups):
                total = self.scaler.scale(sums[group].sum() / seen[0][1, group[0]].clamp(min=1))
                more = number + 1 < len(groups)
                gradients = torch.autograd.grad(total, parameters, retain_graph=more, materialize_grads=True)
                if piece:
                    held[number] = torch._foreach_add(held[number], gradients)
                else:
                    held.append(gradients)
        losses = self.losses(self.model, pieces[-1], len(earlier))
        seen.append(stacked(losses))
        sums, denoms = distributed.add(torch.stack(seen).sum(0))
        # Processes add up what DistributedDataParallel makes the mean of.
        weights = distributed.ranks() / denoms.clamp(min=1)
        for group, gradients in zip(groups, held, strict=True):
            scaled = torch._foreach_mul(gradients, weights[group[0]] * seen[0][1, group[0]].clamp(min=1))
            for parameter, gradient in zip(parameters, scaled, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        total = (torch.stack([*losses.sums.values()]) * weights).sum()
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimizer)
        norm = self.watch.gradients(step)
        *means, size = torch.cat([sums / denoms.clamp(min=1), norm.view(1)]).tolist()
        values = dict(zip(losses.sums, means, strict=True))
        broken = [name for name, value in values.items() if not math.isfinite(value)]
        # In 16 bits gradients overflow now and then: the scaler leaves such a step out, and makes them smaller.
        if not broken and not math.isfinite(size) and self.scaler.get_scale() <= 1:
            broken = ["gradient"]
        if broken:
            self._leave_out(broken, values, pieces, torch.stack(seen))
            for buffer, before in zip(self.detector.buffers(), buffers, strict=True):
                buffer.copy_(before)  # BatchNorm has seen what broke the loss
        else:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.watch.moved([group["lr"] for group in self.optimizer.param_groups])
        self.schedule.step()
        # The average follows fast at first (the weights move far), then with the set decay.
        self.predictor.follow(self.detector, min(cfg.ema, step / (step + 10)))
        return {} if broken else values

    def _leave_out(self, broken: list[str], values: dict[str, float], pieces: Sequence[Batch], seen: Tensor) -> None:
        """Note a step in which those parts of the loss are not finite. Raises NotFiniteError where it is one too many.

        seen: sums and denominators of each micro-batch of this process, float32 [pieces, 2, parts].
        """
        guilty = ~seen.isfinite().all((1, 2)).cpu()
        bad = [batch for batch, is_bad in zip(pieces, guilty, strict=True) if is_bad]
        found = distributed.gather([self.train_data.name(int(i)) for batch in bad for i in batch.index])
        names = ", ".join(itertools.chain(*found)) or "those of the whole batch"
        what = f"step {self.schedule.last_epoch + 1}: not finite: {', '.join(broken)}"
        self.skipped += 1
        budget = self.settings.train.skip
        if self.skipped > budget:
            what += f", after {budget} such steps left out" * (budget > 0)
            self.log.scalars("steps", self.schedule.last_epoch + 1, self.watch.broken(values))
            how = "lower train.optimizer.lr, or leave a few such steps out with train.skip=10"
            raise NotFiniteError(f"{what}; {how}. Photos: {distributed.broadcast(names)}")
        self.console.print(f"{what}; left out ({self.skipped} of {budget}). Photos: {names}", style="yellow")
        self.watch.left_out(values)

    def guarded_step(self, pieces: Sequence[Batch]) -> dict[str, float]:
        """`train_step`; what torch raises where memory or a compiler is short becomes a UserError."""
        try:
            with distributed.contact():
                return self.train_step(*pieces)
        except (RuntimeError, MemoryError) as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                reason = next(filter(None, str(error).splitlines()), type(error).__name__)
                raise UserError(
                    f"train.compile: torch can't compile this network here ({reason[:200]}); set train.compile=false"
                ) from error
            if not guards.is_short(error):
                raise
            guards.release(error, self.device)
        raise self.short(pieces)

    def rehearse(self, batch: Batch) -> None:
        """A step on a batch by this process alone, for the memory that it takes: what it does to the weights is of no
        use."""
        several = self.settings.train.accumulate > 1 or distributed.ranks() > 1
        # Gradients of earlier micro-batches, or those that the processes add up.
        held = [torch.empty_like(parameter) for parameter in self.detector.parameters() for _ in range(2 * several)]
        losses = self.losses(self.trainable, batch, 0)
        torch.stack([*losses.sums.values()]).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        del held

    def short(self, pieces: Sequence[Batch]) -> UserError:
        """What to say where the memory was too small for these micro-batches."""
        cfg, batch = self.settings.train, max(pieces, key=lambda piece: len(piece.index))
        count = len(batch.index)
        said = f"{self.device}: out of memory with {count} images at a time"
        self.settings = changed(self.settings, accumulate=2)
        self.optimizer.zero_grad(set_to_none=True)
        while count := count // 2:
            if guards.fits(lambda: self.rehearse(_first(batch, count)), self.device):
                break
        if not count:
            return UserError(f"{said}, and with a single one: set a smaller input.size, or another backbone")
        if not self.folder.name:
            return UserError(f"{said}; {count} fit: set train.batch_size={count * self.pieces}")
        ranks = distributed.ranks()
        each = cfg.images // ranks
        parts = next(n for n in range(1, each + 1) if each % n == 0 and each <= n * count)
        how = f"go on with  detkit train --resume {self.folder} --set train.accumulate={parts}"
        return UserError(
            f"{said}; {count} fit: {how} , which keeps the batch of {cfg.images}, or start anew with "
            f"train.batch_size={count * self.pieces}"
        )

    def train_epoch(self, progress: Progress, stop: Callable[[], int]) -> dict[str, float]:
        """Train to the end of the current epoch, or until asked to stop; returns mean losses and images a second."""
        cfg = self.settings.train
        task = progress.add_task("", total=self.epoch_steps, completed=self.step_in_epoch)
        done, told, waited, start = 0, 0.0, 0.0, time.perf_counter()
        size, first = self.settings.input.size, self.epoch * len(self.loader)
        batch_size = min(cfg.images, len(self.train_data))
        close = self.epoch >= self.epochs - self.settings.augment.close_epochs
        batches = self.loader.epoch(
            self.epoch,
            start=self.step_in_epoch,
            close=close,
            canvas=lambda batch: cfg.canvas(size, self.epoch, first + batch, self.epochs),
        )
        while self.step_in_epoch < self.epoch_steps:
            asked = time.perf_counter()
            pieces, error = _fetch(batches, cfg.accumulate)
            word = distributed.agree(stop() or TIME_UP * (time.time() > self.ends), time.perf_counter() - asked, error)
            self.stopped, waited = word.stop, waited + word.waited
            if self.stopped:
                break
            parts = self.guarded_step(pieces)
            self.step_in_epoch, done = self.step_in_epoch + 1, done + 1
            self.counted += bool(parts)
            self._note(parts, word.waited, time.perf_counter() - asked)
            for name, value in parts.items():
                self.totals[name] = self.totals.get(name, 0.0) + value
            passed = time.perf_counter() - start
            left = self.steps - self.epoch * len(self.loader) - self.step_in_epoch
            losses = " ".join(f"{name} {total / self.counted:.3f}" for name, total in self.totals.items())
            status = (
                f"epoch {self.epoch + 1}/{self.epochs}  {losses}  {done * batch_size / passed:.1f} img/s  "
                f"data {waited / passed:.0%}  run ends in {duration(left * passed / done)}"
            )
            progress.update(task, advance=1, description=status)
            if not self.console.is_terminal and passed > told + LOG_EVERY:
                told = passed
                self.console.print(f"{status}  step {self.step_in_epoch}/{self.epoch_steps}", highlight=False)
            if cfg.save_steps and self.schedule.last_epoch % cfg.save_steps == 0:
                self.save_state()
        progress.remove_task(task)
        means = {f"loss_{name}": total / self.counted for name, total in self.totals.items()}
        passed = time.perf_counter() - start
        return means | {"img_s": done * batch_size / passed, "data_wait": waited / passed}

    def _note(self, losses: dict[str, float], waited: float, seconds: float) -> None:
        """Record the step that has been done, where a row ends with it."""
        images, step = min(self.settings.train.images, len(self.train_data)), self.schedule.last_epoch
        row = self.watch.step(step, losses, images=images, waited=waited, seconds=seconds)
        if row:
            self.log.scalars("steps", step, row)

    def validate(self, stop: Callable[[], int]) -> dict[str, Any]:
        """Evaluate the averaged weights and write the last and, where it is, the best checkpoint."""
        distributed.copy_buffers(self.predictor)
        found: list[Detections] = []
        averaged, step = self.predictor.detector, self.schedule.last_epoch
        with watch.first_batch(averaged) as images:
            figures = evaluate(
                self.predictor, self.val_loader, self.val_data, self.device, self.console, stop, found.extend
            )
        self.measured = {f"val_loss_{name}": value for name, value in figures.pop("losses").items()}
        if distributed.is_first():
            cfg, most = self.settings.train, max(1, self.epochs // PICTURES)
            pictures, histograms = (self.log.pictures and cfg.due(self.epoch, n) for n in (most, cfg.histograms))
            seen = watch.look(averaged, self.detector, images[0], histograms)
            self.measured |= seen.shares
            watch.record(self.log, step, self.val_data, figures, found, pictures)
            if histograms:
                self.log.histograms(step, watch.weights(self.detector) | seen.histograms)
        names = [checkpoint.LAST]
        self.stale += 1
        if figures["mAP"] > self.best:
            self.best, self.stale = figures["mAP"], 0
            names.append(checkpoint.BEST)
        for name in names:
            self.write(name, figures)
        return figures

    def unmeasured(self) -> dict[str, float]:
        """What the row of an epoch without evaluation has in its place."""
        losses = [f"val_loss_{name}" for name in self.totals]
        return dict.fromkeys((*FIGURES, *losses, *watch.CHANNELS), math.nan)

    def write(self, name: str, figures: dict[str, Any]) -> None:
        """Write the averaged weights as a checkpoint of that name."""
        if distributed.is_first():
            weights_now = self.predictor.detector.state_dict()
            epochs = self.epoch + (self.step_in_epoch == self.epoch_steps)
            checkpoint.write(
                self.folder / name, weights_now, self.settings, self.classes, epochs, figures, photos=self.photos
            )


def _fetch(batches: Iterator[Batch], pieces: int) -> tuple[list[Batch], str | None]:
    """The micro-batches of one step, and the words of the UserError that they met."""
    try:
        return list(itertools.islice(batches, pieces)), None
    except UserError as error:
        return [], str(error)


def _spread(data: DataSet, photos: int) -> DataSet:
    """So many photos with objects, evenly spread over the data set."""
    filled = np.flatnonzero(np.diff(data.box_ends, prepend=0))
    chosen = np.unique(np.linspace(0, len(filled) - 1, min(photos, len(filled))).round().astype(np.int64))
    return data.take(filled[chosen])


def changed(settings: config.Config, **changes: Any) -> config.Config:
    """The settings with other ones of `train`."""
    return settings.model_copy(update={"train": settings.train.model_copy(update=changes)})


def _first(batch: Batch, count: int) -> Batch:
    """Its first so many images."""
    targets = type(batch.targets)(*(column[:count] for column in batch.targets))
    return Batch(batch.images[:count], targets, batch.plans[:count], batch.index[:count])


def _dense(run: Run, count: int) -> Batch:
    """A batch of so many images that takes as much memory as any of the run's: on its largest canvas, with the objects
    of its densest photo (with mosaic, of four)."""
    height, width = run.settings.train.largest_canvas(run.settings.input.size)
    most = int(np.diff(run.train_data.box_ends, prepend=0).max()) * (4 if run.settings.augment.mosaic else 1)
    padded = 1 << max(0, most - 1).bit_length()
    corners = torch.rand(count, padded, 2, 2).sort(2).values.flatten(2)
    boxes = corners * torch.tensor([width, height, width, height])
    labels = torch.zeros(count, padded, dtype=torch.int64)
    images = torch.zeros(count, height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    return Batch(images, Targets(boxes, labels, labels.bool()), (None,) * count, torch.arange(count))


def settled(settings: config.Config, console: Console) -> config.Config:
    """The settings with a number for `train.batch_size`: where they leave it open, one that fits into memory."""
    if settings.train.batch_size != "auto":
        return settings
    parts = distributed.ranks() * settings.train.accumulate
    run = Run(changed(settings, batch_size=parts, cache="none", compile=False, workers=0), console)
    most = MOST if run.device.type == "cuda" else MOST_CPU
    limit = max(1, min(most, len(run.train_data) // FEWEST_STEPS // parts))
    count = guards.largest(lambda images: run.rehearse(_dense(run, images)), run.device, limit)
    why = f"twice as many might not fit into the memory of {run.device}" if count * 2 <= limit else "as many as help"
    console.print(f"train.batch_size auto is {count * parts}: {why}", highlight=False)
    return changed(settings, batch_size=count * parts)


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


def _few(run: Run) -> str | None:
    """What to say where BatchNorm sees few images at a time."""
    each = run.settings.train.images // run.pieces
    if run.settings.model.norm == "sync_bn":
        each *= distributed.ranks()
    if each >= FEW or not any(norm.training for norm in batch_norms(run.detector)):
        return None
    return (
        f"BatchNorm sees only {each} images at a time, whose statistics are rough: set model.norm to group, frozen or "
        "(on several GPUs) sync_bn, or train with more images a process"
    )


def _cut(run: Run) -> str | None:
    """What to say of tiles."""
    parts = run.train_data.parts
    if parts is None:
        return None
    return (
        f"input.tiles: {len(np.unique(parts.photos))} photos are looked at in {len(run.train_data)} parts; evaluation "
        "joins what is found in them"
    )


def _raised(run: Run, settings: config.Config) -> str | None:
    """What to say where there is room for more boxes than `settings` have."""
    before, now = settings.model.select, run.settings.model.select
    if before == now:
        return None
    return (
        f"model.select: keep {now.keep} (was {before.keep}) and candidates {now.candidates} (was {before.candidates}), "
        f"for the densest training {'tile' if run.photos.tiled else 'photo'} shows {run.photos.most} objects"
    )


def _connected(settings: config.Config) -> AbstractContextManager[None]:
    return distributed.group(pick_device(settings.train.device), settings.train.timeout)


def start(settings: config.Config, console: Console, ends: float = math.inf, judge: Judge | None = None) -> Path:
    """Train a new run. Returns its folder. Raises UserError for the user's mistakes, Interrupted when stopped.

    ends: the time (as time.time() has it) after which no step begins: the run is evaluated, and can be resumed. judge:
    is told the figures of each epoch's evaluation, and ends the run by raising what it likes.
    """
    with _connected(settings):
        begun = distributed.remembered()
        return _resume(begun, console, (), ends, judge) if begun else _start(settings, console, ends, judge)


def _start(settings: config.Config, console: Console, ends: float, judge: Judge | None) -> Path:
    rule, settings = settings.train.scaling, distributed.scaled(settings)
    if rule != settings.train.scaling:
        lr, images = settings.train.optimizer.lr, settings.train.images
        console.print(f"train.scaling {rule}: optimizer.lr is {lr:g} and batch_size {images}", highlight=False)
    # Absolute, so that the run can be resumed, measured and exported from any folder.
    folders = {name: path.absolute() for name in ("root", "cache") if (path := getattr(settings.data, name))}
    settings = settings.model_copy(update={"data": settings.data.model_copy(update=folders)})
    with distributed.joint():
        loggers.check(settings)
        settings = settled(settings, console)
        run = Run(settings, console)
        report = weights.load(run.detector, settings.model, run.classes)
    if report:
        console.print(str(report), highlight=False)
        if report.classes:
            console.print(str(report.classes), highlight=False, markup=False)
    if settings.train.recalibrate_bn and report:
        run.recalibrate()
    run.predictor.follow(run.detector, 0)
    for said in (remark(run), _slow_precision(run), _few(run)):
        if said:
            console.print(said, highlight=False, style="yellow")
    for said in (_cut(run), _raised(run, settings)):
        if said:
            console.print(said, highlight=False)
    with distributed.joint():
        if distributed.is_first():
            run.folder = next_folder(settings.runs / f"{settings.name}-")
            atomic_write(run.folder / "config.yaml", config.dump(run.settings))
            atomic_write(run.folder / loggers.CLASSES, watch.objects(train=run.train_data, val=run.val_data))
            findings.write(run.folder / "findings.jsonl", (*run.train_data.findings, *run.val_data.findings))
            run.save_state()
    run.folder = distributed.broadcast(run.folder)
    distributed.remember(run.folder)
    with _alone(run.folder):
        return _loop(run, ends, judge)


def resume(
    folder: Path,
    console: Console,
    changes: Sequence[str] = (),
    ends: float = math.inf,
    judge: Judge | None = None,
) -> Path:
    """Go on with a run that was stopped, from its last saved state, to what it would have come to without a stop.

    changes: assignments to settings of `CHANGEABLE`. Raises UserError for others. ends, judge: as `start` has
    them.
    """
    for change in changes:
        if change.partition("=")[0] not in CHANGEABLE:
            raise UserError(f"--set {change}: a resumed run keeps its settings, but for {', '.join(CHANGEABLE)}")
    with _connected(config.load(folder / "config.yaml", changes)):
        return _resume(folder, console, changes, ends, judge)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other job may train this run. Raises UserError where one does."""
    with ExitStack() as held:
        with distributed.joint():
            if distributed.is_first():
                held.enter_context(checkpoint.locked(folder))
        yield


def _resume(folder: Path, console: Console, changes: Sequence[str], ends: float, judge: Judge | None) -> Path:
    folder = distributed.broadcast(folder)
    with _alone(folder):
        return _resume_alone(folder, console, changes, ends, judge)


def _resume_alone(folder: Path, console: Console, changes: Sequence[str], ends: float, judge: Judge | None) -> Path:
    with distributed.joint():
        state, damaged = checkpoint.read_state(folder) if distributed.is_first() else ({}, "")
        settings = config.load(folder / "config.yaml", changes)
    state, settings = distributed.broadcast((state, settings))
    if damaged:
        console.print(f"{damaged}; taking the one before it, {checkpoint.PREVIOUS}", style="yellow", highlight=False)
    if state["finished"]:
        raise UserError(f"{folder}: this run is finished ({state['epoch']} epochs); start a new one to train longer")
    with distributed.joint():
        run = Run(settings, console)
        run.folder = folder
        run.restore(state)
    console.print(f"going on after step {run.step_in_epoch} of epoch {run.epoch + 1}", highlight=False)
    distributed.remember(folder)
    return _loop(run, ends, judge)


def _loop(run: Run, ends: float, judge: Judge | None) -> Path:
    """Train, evaluate and save until the last epoch, until the time is up, or until `judge` raises."""
    run.ends = ends
    cfg, console = run.settings.train, run.console
    with distributed.joint():
        if distributed.is_first():
            within = run.step_in_epoch > 0
            run.log = loggers.open_all(run.folder, run.settings, run.schedule.last_epoch, console, within)
    processes = f"   {distributed.ranks()} processes" if distributed.ranks() > 1 else ""
    console.print(f"run: {run.folder}   device: {run.device}{processes}   {len(run.loader)} steps an epoch")
    figures: dict[str, Any] = {}
    run.wrap()
    with _stop_signals() as stop, closing(run.log), closing(run.loader), closing(run.val_loader):
        while not run.finished:
            began = time.perf_counter()
            run.hold()
            with bar(console) as progress:
                row = run.train_epoch(progress, stop)
            if run.stopped == TIME_UP:
                break
            if run.stopped:
                _halt(run, run.stopped)
            row = {"epoch": run.epoch + 1, "lr": float(run.schedule.get_last_lr()[-1]), **row}
            last = run.epoch + 1 == run.epochs
            if (run.epoch + 1) % cfg.eval_every == 0 or last:
                figures = _measured(run, stop)
                run.schedule.measured(figures["mAP"])
                last |= bool(cfg.until) and figures["mAP50"] >= cfg.until
                last |= 0 < cfg.patience <= run.stale
                row |= {name: figures[name] for name in FIGURES} | run.measured
            else:
                figures = {}
                row |= run.unmeasured()
            run.epoch, run.step_in_epoch, run.totals, run.counted, run.finished = run.epoch + 1, 0, {}, 0, last
            row |= {"memory": watch.memory(run.device), "seconds": time.perf_counter() - began}
            run.log.scalars("metrics", run.schedule.last_epoch, row)
            if judge and figures:
                judge(run, figures)  # before the state is saved: after a kill it is told again, rather than never
            run.save_state()
            console.print(_line(row, run.epochs), highlight=False)
        if not run.finished:
            figures = figures if figures and not run.step_in_epoch else _measured(run, stop)
            console.print(
                f"the time is up after step {run.schedule.last_epoch} of {run.steps}; go on with  "
                f"detkit train --resume {run.folder}",
                style="yellow",
            )
    measured = f"{len(run.val_data)} photos of {run.settings.data.train}" if cfg.overfit else run.settings.data.val
    console.print(table(figures, f"{measured}, last epoch"))
    if run.finished and 0 < cfg.patience <= run.stale:
        console.print(
            f"{run.stale} evaluations without a better mAP than {run.best:.3f} (train.patience)", style="yellow"
        )
    elif run.finished and figures["mAP50"] < cfg.until:
        console.print(f"mAP50 is {figures['mAP50']:.3f}, not yet {cfg.until}, and the run is over", style="yellow")
    return run.folder


def _measured(run: Run, stop: Callable[[], int]) -> dict[str, Any]:
    run.save_state()  # a kill in a long evaluation must cost no training
    try:
        return run.validate(stop)
    except Interrupted as asked:
        _halt(run, asked.exit_code - 128)


def _halt(run: Run, number: int) -> NoReturn:
    """End a run that a signal of that number has stopped."""
    run.save_state()
    run.write(checkpoint.LAST, {})  # not measured, but it can be looked at
    distributed.agree()  # torchrun ends them all once one has gone
    raise Interrupted(f"stopped; go on with  detkit train --resume {run.folder}", number) from None


def _line(row: dict[str, float], epochs: int) -> str:
    losses = " ".join(f"{name.removeprefix('loss_')} {row[name]:.3f}" for name in row if name.startswith("loss_"))
    figures = "" if math.isnan(row["mAP"]) else f"mAP {row['mAP']:.3f}  mAP50 {row['mAP50']:.3f}  "
    speed = f"{row['img_s']:.1f} img/s  data {row['data_wait']:.0%}  {duration(row['seconds'])}"
    return f"epoch {row['epoch']}/{epochs}  {losses}  {figures}{speed}"

# ruff: noqa: D102 - Logger says what its methods do
"""Where a run's record goes: CSV files always; TensorBoard, MLflow and Weights & Biases where `train.loggers` says.

Everything is recorded at a step, the number of optimiser steps done. A run that is resumed goes on after the step of
its saved state: what was recorded beyond it comes again, the same, and is not kept twice. So does what an epoch's end
recorded, where that state was saved before the epoch was over.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from detkit import config
from detkit.errors import UserError, need
from detkit.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# steps: means over a few steps. metrics: an epoch. classes: an evaluation, by class.
Table = Literal["steps", "metrics", "classes"]
TABLES: tuple[Table, ...] = ("steps", "metrics", "classes")
CLASSES = "classes.json"  # how many objects of each class there are, by split
_MOST_METRICS = 1000  # that MLflow takes at a time


class Histogram(NamedTuple):
    """counts: int64 [bins]. edges: float64 [bins + 1]. total, squares: the sums of all values and of their squares."""

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]
    total: float
    squares: float


class Logger(Protocol):
    """One place that a record goes to. What it has no use for it leaves out."""

    def scalars(self, table: Table, step: int, values: Mapping[str, float]) -> None:
        """A row of a table; NaN where a column has no value at this step."""

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Of weights and activations."""

    def images(self, step: int, values: Mapping[str, NDArray[np.uint8]]) -> None:
        """Each uint8 [H, W, 3]."""

    def figures(self, step: int, values: Mapping[str, Figure]) -> None:
        """Plots of matplotlib."""

    def close(self) -> None:
        """The record is complete, or the run stops for now."""


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """A plot as an image, uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.array(Image.open(buffer).convert("RGB"))


class _Pictures(Logger, Protocol):
    """A place where a plot is an image like any other."""

    def figures(self, step: int, values: Mapping[str, Figure]) -> None:
        self.images(step, {name: _pixels(figure) for name, figure in values.items()})


class CSVFiles(Logger):
    """A file a table in the run's folder, its first column the step."""

    def __init__(self, folder: Path, step: int, within: bool = False) -> None:
        self.folder = folder
        last = {table: step - (within and table != "steps") for table in TABLES}
        self.past = {table: self._cut(self.path(table), last[table]) for table in TABLES}

    def path(self, table: Table) -> Path:
        """The file of a table."""
        return self.folder / f"{table}.csv"

    @staticmethod
    def _cut(path: Path, step: int) -> int:
        """Leave out what a file has beyond the step, or half a line that a kill left; returns the last step it had."""
        if not path.exists():
            return 0
        head, *lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if int(line.split(",", 1)[0]) <= step]
        if len(kept) < len(lines):
            atomic_write(path, head + "".join(kept))
        return int(whole[-1].split(",", 1)[0]) if whole else 0

    def scalars(self, table: Table, step: int, values: Mapping[str, float]) -> None:
        path = self.path(table)
        new = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(["step", *values])
            writer.writerow([step, *(f"{value:.6g}" for value in values.values())])

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        pass

    def images(self, step: int, values: Mapping[str, NDArray[np.uint8]]) -> None:
        pass

    def figures(self, step: int, values: Mapping[str, Figure]) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoard(_Pictures):
    """Event files in the run's folder."""

    def __init__(self, folder: Path, step: int) -> None:
        need("tensorboard")
        # Not SummaryWriter, which takes as long for one scalar as this does for a row.
        from torch.utils.tensorboard import FileWriter

        self.proto: Any = need("tensorboard.compat.proto.summary_pb2")
        event: Any = need("tensorboard.compat.proto.event_pb2")
        self.events: Any = FileWriter(str(folder))
        # What was recorded from this step on before, TensorBoard leaves out.
        start = event.SessionLog(status=event.SessionLog.START)
        self.events.add_event(event.Event(step=step + 1, session_log=start))

    def _add(self, step: int, values: Iterable[Any]) -> None:
        self.events.add_summary(self.proto.Summary(value=values), step)

    def scalars(self, table: Table, step: int, values: Mapping[str, float]) -> None:
        finite = [(name, value) for name, value in values.items() if math.isfinite(value)]
        self._add(step, [self.proto.Summary.Value(tag=f"{table}/{n}", simple_value=value) for n, value in finite])
        if table != "steps":
            self.events.flush()

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        for name, (counts, edges, total, squares) in values.items():
            histogram = self.proto.HistogramProto(
                min=edges[0], max=edges[-1], num=counts.sum(), sum=total, sum_squares=squares,
                bucket_limit=edges[1:].tolist(), bucket=counts.tolist(),
            )  # fmt: skip
            self._add(step, [self.proto.Summary.Value(tag=name, histo=histogram)])

    def images(self, step: int, values: Mapping[str, NDArray[np.uint8]]) -> None:
        for name, image in values.items():
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG", quality=85)
            height, width = image.shape[:2]
            picture = self.proto.Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=buffer.getvalue()
            )
            self._add(step, [self.proto.Summary.Value(tag=name, image=picture)])

    def close(self) -> None:
        self.events.close()


class _Service(_Pictures):
    """A place that keeps what it has once been told: up to the step `past` of their table, rows are not told again."""

    def __init__(self, past: Mapping[Table, int]) -> None:
        self.past = past

    def told(self, table: Table, step: int) -> bool:
        """Whether it knows the row of that step."""
        return step <= self.past[table]


class MLflow(_Service):
    """A run where MLflow's own environment variables say; its experiment by default `detkit`."""

    def __init__(self, folder: Path, settings: config.Config, past: Mapping[Table, int]) -> None:
        super().__init__(past)
        self.client: Any = need("mlflow").MlflowClient()
        self.metric: Any = need("mlflow.entities").Metric
        known = folder / "mlflow.txt"
        if not known.exists():
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "detkit")
            found = self.client.get_experiment_by_name(name)
            where = found.experiment_id if found else self.client.create_experiment(name)
            run = self.client.create_run(where, run_name=folder.name).info.run_id
            self.client.log_dict(run, settings.model_dump(mode="json"), "config.yaml")
            atomic_write(known, run)
        self.run = known.read_text(encoding="utf-8")
        self.client.update_run(self.run, "RUNNING")

    @staticmethod
    def _name(name: str) -> str:
        """As MLflow lets metrics and files be called."""
        return re.sub(r"[^A-Za-z0-9_./ -]", "_", name)

    def scalars(self, table: Table, step: int, values: Mapping[str, float]) -> None:
        if not self.told(table, step):
            now = int(1000 * time.time())
            finite = {name: value for name, value in values.items() if math.isfinite(value)}
            rows = [self.metric(self._name(f"{table}/{name}"), value, now, step) for name, value in finite.items()]
            for first in range(0, len(rows), _MOST_METRICS):
                self.client.log_batch(self.run, metrics=rows[first : first + _MOST_METRICS])

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        if not self.told("metrics", step):
            tree = {name: {"counts": h.counts.tolist(), "edges": h.edges.tolist()} for name, h in values.items()}
            self.client.log_dict(self.run, tree, f"histograms/{step}.json")

    def images(self, step: int, values: Mapping[str, NDArray[np.uint8]]) -> None:
        for name, image in values.items() if not self.told("metrics", step) else ():
            self.client.log_image(self.run, image, f"{self._name(name)}/{step}.png")

    def close(self) -> None:
        self.client.update_run(self.run, "FINISHED")


class WandB(_Service):
    """A run of Weights & Biases; what it needs (an account, a project, or WANDB_MODE=offline) are its own environment
    variables. The project is by default `detkit`."""

    def __init__(self, folder: Path, settings: config.Config, past: Mapping[Table, int]) -> None:
        super().__init__(past)
        self.module: Any = need("wandb")
        known = folder / "wandb.txt"
        if not known.exists():
            atomic_write(known, uuid.uuid4().hex)
        self.run = self.module.init(
            project=os.environ.get("WANDB_PROJECT", "detkit"),
            name=folder.name,
            id=known.read_text(encoding="utf-8"),
            resume="allow",
            dir=folder,
            config=settings.model_dump(mode="json"),
            settings=self.module.Settings(silent=True, console="off"),  # else it takes stdout from the progress bar
        )

    def scalars(self, table: Table, step: int, values: Mapping[str, float]) -> None:
        if not self.told(table, step):
            finite = {f"{table}/{name}": value for name, value in values.items() if math.isfinite(value)}
            self.run.log(finite, step=step)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        if not self.told("metrics", step):
            made = {name: self.module.Histogram(np_histogram=(h.counts, h.edges)) for name, h in values.items()}
            self.run.log(made, step=step)

    def images(self, step: int, values: Mapping[str, NDArray[np.uint8]]) -> None:
        if not self.told("metrics", step):
            self.run.log({name: self.module.Image(image) for name, image in values.items()}, step=step)

    def close(self) -> None:
        self.run.finish()


class Loggers(Logger):
    """All of a run's loggers as one. A service that fails in mid-run is left out from then on, and that is said: no
    run is lost for its record."""

    def __init__(self, *loggers: Logger, console: Console | None = None) -> None:
        # The files come first: what they have decides, at the next start, what a service has been told.
        self.all, self.console = list(loggers), console or Console(quiet=True)

    @property
    def pictures(self) -> bool:
        """Whether some place takes histograms and pictures."""
        return any(not isinstance(logger, CSVFiles) for logger in self.all)

    def scalars(self, table: Table, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda logger: logger.scalars(table, step, values))

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        self._each(lambda logger: logger.histograms(step, values))

    def images(self, step: int, values: Mapping[str, NDArray[np.uint8]]) -> None:
        self._each(lambda logger: logger.images(step, values))

    def figures(self, step: int, values: Mapping[str, Figure]) -> None:
        self._each(lambda logger: logger.figures(step, values))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(self, tell: Callable[[Logger], None]) -> None:
        for logger in list(self.all):
            try:
                tell(logger)
            except Exception as error:  # of whatever kind: each service has its own
                if not isinstance(logger, _Service):
                    raise
                self.all.remove(logger)
                name, reason = type(logger).__name__, (str(error) or type(error).__name__).splitlines()[0]
                said = f"{name} is told no more: {reason[:200]}"
                self.console.print(said, style="yellow", highlight=False, markup=False)


def open_all(folder: Path, settings: config.Config, step: int, console: Console, within: bool = False) -> Loggers:
    """The loggers of a run that has done so many steps. Raises UserError where a package is missing or a service can't
    be reached.

    within: its epoch is not over: if its evaluation has been recorded, that comes again.
    """
    files = CSVFiles(folder, step, within)
    others: list[Logger] = []
    for name in settings.train.loggers:
        try:
            match name:
                case "tensorboard":
                    others.append(TensorBoard(folder, step))
                case "mlflow":
                    others.append(MLflow(folder, settings, files.past))
                case "wandb":
                    others.append(WandB(folder, settings, files.past))
        except UserError:
            raise
        except Exception as error:  # of whatever kind: each service has its own
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"train.loggers: {name} can't be begun: {reason[:300]}") from error
    return Loggers(files, *others, console=console)


def check(settings: config.Config) -> None:
    """Raise UserError where a package of `train.loggers` is missing: before a run's folder is made."""
    for name in settings.train.loggers:
        need(name)

"""Evaluation: Predictor over a split, measured on the original photos."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from detkit import distributed, metrics
from detkit.console import bar
from detkit.data.batch import Loader
from detkit.data.labels import DataSet
from detkit.errors import Interrupted, UserError
from detkit.nn.contract import Losses
from detkit.nn.detector import Predictor
from detkit.runtime import merge
from detkit.runtime.session import detections
from detkit.types import Detections


class Totals:
    """The losses of many batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._denoms: dict[str, Tensor] = {}

    def add(self, losses: Losses) -> None:
        """Another batch's."""
        for known, more in ((self._sums, losses.sums), (self._denoms, losses.denoms)):
            for name, value in more.items():
                known[name] = known[name] + value if name in known else value

    def means(self) -> dict[str, float]:
        """Each part's mean over the batches of all processes, in the first."""
        pairs = {name: (float(total), float(self._denoms[name])) for name, total in self._sums.items()}
        parts: list[dict[str, tuple[float, float]]] = distributed.gather(pairs)
        names = dict.fromkeys(name for part in parts for name in part)
        sums = {name: np.sum([part[name] for part in parts if name in part], axis=0) for name in names}
        return {name: float(total / max(1.0, denom)) for name, (total, denom) in sums.items()}


def detect(
    predictor: Predictor,
    loader: Loader,
    device: torch.device,
    console: Console,
    nms: merge.Kind = "hard",
    stop: Callable[[], int] | None = None,
    totals: Totals | None = None,
) -> list[Detections]:
    """The detections of every photo that the loader gives, in order of the data set, in pixels of the original photo.
    Of several processes, each with its part of the batches, the first has those of all, and the others none.

    nms: what becomes of candidates that overlap, where the predictor's rule leaves that open. stop: gives the number of
    a signal once work is to end; then this raises Interrupted. totals: what the losses are added to.
    """
    found: dict[int, Detections] = {}
    error = None
    with bar(console) as progress, torch.inference_mode():
        task = progress.add_task("evaluating", total=len(loader))
        try:
            for batch in loader.epoch():
                batch = batch.to(device)
                if totals is None:
                    raw = predictor(batch.images)
                else:
                    raw, losses = predictor.measure(batch)
                    totals.add(losses)
                outputs = [tensor.cpu().numpy() for tensor in raw]
                for index, plan, *rows in zip(batch.index.tolist(), batch.plans, *outputs, strict=True):
                    found[index] = merge.merge(detections(plan, *rows), nms, predictor.rule)
                progress.advance(task)
                if stop and stop():
                    break
        except UserError as raised:
            error = str(raised)
    ending = distributed.agree(stop() if stop else 0, error=error).stop
    if ending:
        raise Interrupted("stopped while evaluating", ending)
    parts = distributed.gather(found)
    if not distributed.is_first():
        return []
    whole = {index: each for part in parts for index, each in part.items()}
    return loader.samples.joined([whole[index] for index in sorted(whole)], predictor.rule)


def evaluate(
    predictor: Predictor,
    loader: Loader,
    dataset: DataSet,
    device: torch.device,
    console: Console,
    stop: Callable[[], int] | None = None,
    seen: Callable[[list[Detections]], object] | None = None,
) -> dict[str, Any]:
    """The figures of `metrics.evaluate` for a predictor on a split, in every process, and `losses`: each part's mean.
    stop: as in `detect`. seen: gets the detections, in the first process."""
    totals = Totals()
    found = detect(predictor, loader, device, console, stop=stop, totals=totals)
    losses, figures = totals.means(), None
    if distributed.is_first():
        if seen:
            seen(found)
        figures = metrics.evaluate([dataset[i] for i in range(len(dataset))], found, dataset.classes)
        figures["losses"] = losses
    shared: dict[str, Any] = distributed.broadcast(figures)
    return shared


def table(figures: dict[str, Any], title: str) -> Table:
    """The figures as a table: one row a class, best first, and the mean last."""
    result = Table(title=title, title_justify="left")
    result.add_column("class")
    for name in ("AP", "AP50"):
        result.add_column(name, justify="right")
    known = {name: pair for name, pair in figures["per_class"].items() if pair}
    for name, (ap, ap50) in sorted(known.items(), key=lambda item: -item[1][0]):
        result.add_row(name, f"{ap:.3f}", f"{ap50:.3f}")
    result.add_section()
    result.add_row("mean", f"{figures['mAP']:.3f}", f"{figures['mAP50']:.3f}", style="bold")
    absent = len(figures["per_class"]) - len(known)
    if absent:
        result.caption = f"{absent} classes have no object in this split"
    return result

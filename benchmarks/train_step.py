"""Training steps, losses and inference against torchvision's reference detectors: side by side in one run, as ratios.

    python benchmarks/train_step.py step         whole steps of SSD300-VGG16 and Faster R-CNN R50-FPN
    python benchmarks/train_step.py losses       loss and matching alone, from the head's raw outputs
    python benchmarks/train_step.py inference    photos to boxes, one and eight at a time
    python benchmarks/train_step.py boxes        how every head's loss grows with the boxes of an image
    python benchmarks/train_step.py all

Both sides have the same weights, photos and optimiser. Each writes its section of results/train_step.json and
results/train_step.md and leaves the others as they are.
"""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from report import console, interleaved, save
from rich.progress import track
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, ssd300_vgg16
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops import box_iou

from detkit import config
from detkit.data import cache
from detkit.data.batch import Loader
from detkit.data.dataset import EvalSet
from detkit.nn import weights
from detkit.nn.contract import Losses
from detkit.nn.detector import Detector, Predictor, Trainable
from detkit.nn.heads import faster_rcnn, ssd
from detkit.types import Batch, Targets

SHELF = Path(__file__).parent.parent / "datasets" / "shelf-mini"
CLASSES = 25
BOXES = 100  # an image, where the loss alone is timed
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
Where = typer.Option("cpu", help="cpu or cuda")


def divide(losses: Losses) -> dict[str, Tensor]:
    """Each part of the loss: its sum over its denominator, which is at least 1."""
    return {name: total / losses.denoms[name].clamp(min=1) for name, total in losses.sums.items()}


class Reference(NamedTuple):
    """A detector of torchvision's, and the config and settings that make ours equal to it."""

    words: str
    side: int
    batch: int
    build: Callable[..., nn.Module]
    config: str
    settings: tuple[str, ...]


SSD = Reference(
    "SSD300-VGG16",
    300,
    2,
    lambda classes=CLASSES: ssd300_vgg16(weights=None, weights_backbone=None, num_classes=1 + classes),
    "ssd_vgg",
    ("model.select.candidates=1000",),
)
RCNN = Reference(
    "Faster R-CNN R50-FPN",
    320,
    2,
    lambda classes=CLASSES: fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=1 + classes, min_size=320, max_size=320
    ),
    "faster_rcnn_resnet",
    (
        "model.backbone.freeze=0", "model.backbone.frozen_bn=false", "model.head.candidates=1000",
        "model.head.proposals=1000", "model.head.train_proposals=2000", "model.select.score=0.05",
        "model.select.keep=100",
    ),
)  # fmt: skip
REFERENCES = (SSD, RCNN)


def _ours(reference: Reference, theirs: nn.Module) -> tuple[Detector, config.Config]:
    """Our detector with torchvision's weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.pth"
        torch.save(theirs.state_dict(), path)
        side = f"input.size=[{reference.side}, {reference.side}]"
        settings = config.load(reference.config, [side, *reference.settings, f"model.weights={path}"])
        ours = Detector(settings.model, settings.input, CLASSES)
        report = weights.load(ours, settings.model)
    assert report is not None
    assert report.missing + report.mismatched + report.unexpected == (), str(report)
    return ours, settings


def _batches(size: int, batch: int, device: str) -> list[Batch]:
    """The photos of shelf-mini on a canvas of that size, with their ground truth; difficult objects, which torchvision
    can't leave out, are taken for others."""
    settings = config.load("ssd_vgg", [f"data.root={SHELF}", f"input.size=[{size}, {size}]"])
    with tempfile.TemporaryDirectory() as folder:
        data = cache.load(settings.data.model_copy(update={"cache": Path(folder)}), "train")
    found = [each for each in Loader(EvalSet(data, settings.input), batch, 0).epoch() if len(each.images) == batch]
    result = []
    for each in found:
        boxes, labels, ignore = (part.to(device) for part in each.targets)
        targets = Targets(boxes, labels, torch.zeros_like(ignore))
        result.append(Batch(each.images.to(device), targets, each.plans, each.index))
    return result


def _listed(targets: Targets) -> list[dict[str, Tensor]]:
    """Ground truth as torchvision takes it: an image at a time, 0 is background."""
    return [
        {"boxes": boxes[labels >= 0], "labels": labels[labels >= 0] + 1}
        for boxes, labels in zip(targets.boxes, targets.labels, strict=True)
    ]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def _timed(device: str) -> Iterator[Callable[[], float]]:
    """Yields a function that says how many seconds have passed."""
    _wait(device)
    start = time.perf_counter()

    def passed() -> float:
        _wait(device)
        return time.perf_counter() - start

    yield passed


# --- whole steps ------------------------------------------------------------------------------------------------------


class Stepper:
    """A detector in training: `step` makes one and returns its seconds; `losses` are those of all steps."""

    def __init__(
        self, model: nn.Module, parts: Callable[[Batch], dict[str, Tensor]], device: str, kind: str = "fp32"
    ) -> None:
        self.parts, self.device, self.bf16 = parts, device, "bf16" in kind
        self.model = model.to(device).train()
        if "channels last" in kind:
            self.model.to(memory_format=torch.channels_last)
        # Low enough for random weights: at 0.001 SSD's loss is at the edge of what is stable, on either side.
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.0002, momentum=0.9)
        self.losses: list[float] = []

    def step(self, batch: Batch) -> float:
        """Forward, loss, backward and the optimiser's step on a batch; returns the seconds they took."""
        with _timed(self.device) as passed:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                loss = torch.stack([*self.parts(batch).values()]).sum()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.item())
            return passed()


KINDS = ("fp32", "fp32, channels last", "bf16, channels last")


def _steppers(reference: Reference, device: str, compiled: bool) -> dict[str, Stepper]:
    """torchvision's detector and ours, of every kind, from the same weights."""
    torch.manual_seed(0)
    first = reference.build()
    found = {}
    for kind in KINDS:
        theirs = copy.deepcopy(first)
        run = torch.compile(theirs, dynamic=False) if compiled else theirs

        def listed(batch: Batch, run: Any = run) -> dict[str, Tensor]:
            result: dict[str, Tensor] = run(list(batch.images.float() / 255), _listed(batch.targets))
            return result

        ours = Trainable(_ours(reference, first)[0])
        own = torch.compile(ours, dynamic=False) if compiled else ours

        def padded(batch: Batch, own: Any = own) -> dict[str, Tensor]:
            return divide(own(batch))

        found[f"torchvision, {kind}"] = Stepper(theirs, listed, device, kind)
        found[f"detkit, {kind}"] = Stepper(ours, padded, device, kind)
    return found


@app.command()
def step(device: str = Where, rounds: int = 6, compiled: bool = False) -> None:
    """Whole training steps: forward, loss, backward, optimiser. --compiled allows both torch.compile."""
    rows = []
    quick = bf16_is_quick(device)
    base = "torchvision, fp32"
    compared = (base, f"detkit, {KINDS[-1] if quick else KINDS[1]}")
    for reference, steps in ((SSD, 100), (RCNN, 50)):
        runs = _steppers(reference, device, compiled)
        batches = cycle(_batches(reference.side, reference.batch, device))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        # All in turns for some rounds; then the two whose losses are compared.
        for done in track(range(steps), description=reference.words, console=console):
            batch = next(batches)
            for name, run in runs.items():
                # Emulated bf16 is as slow in two rounds as in many.
                few = 2 if "bf16" in name and not quick else rounds
                if done <= few or name in compared:
                    seconds[name].append(run.step(batch))
        for name, run in runs.items():
            count = len(run.losses)
            against = sum(run.losses) / sum(runs[base].losses[:count])
            rows.append({
                "detector": f"{reference.words}, {reference.side} px, batch {reference.batch}",
                "what": name,
                "speed, torchvision in fp32 = 1": f"{_ratio(seconds[base][1:count], seconds[name][1:]):.2f}",
                "mean loss, the same": f"{against:.4f} ({count} steps)",
            })  # fmt: skip
    note = (
        "Photos of shelf-mini, SGD, the same random weights on all sides; every variant takes its step in turn, each "
        "round on the same photos. Ratios of the medians over the rounds that a variant took part in, the first left "
        "out. torchvision's own normalisation and lists of boxes are part of its step, as detkit's normalisation and "
        "padded boxes are of its. "
    )
    note += "The device has bf16 instructions." if quick else "This CPU has no bf16 instructions: bf16 is emulated."
    note += " Both sides are compiled." if compiled else ""
    save("train_step", f"step {device}", f"Training step, {device}", note, rows)


def bf16_is_quick(device: str) -> bool:
    """Whether the device computes in bf16, and doesn't only emulate it."""
    return device == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """By how much ours is faster."""
    return statistics.median(theirs) / statistics.median(ours)


# --- loss and matching ------------------------------------------------------------------------------------------------


def _ground(B: int, G: int, boxes: int, side: int, device: str) -> Targets:
    """Random ground truth, `boxes` an image, padded to G."""
    rng = torch.Generator().manual_seed(0)
    size = side * (0.03 + 0.4 * torch.rand(B, G, 2, generator=rng).square())
    corner = torch.rand(B, G, 2, generator=rng) * (side - size)
    labels = torch.randint(CLASSES, (B, G), generator=rng)
    labels[:, boxes:] = -1
    found = torch.cat([corner, corner + size], 2)
    found[:, boxes:] = 0
    return Targets(found.to(device), labels.to(device), torch.zeros(B, G, dtype=torch.bool, device=device))


def _leaf(*shape: int, device: str, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device=device)).requires_grad_()


def _ssd_losses(B: int, boxes: int, device: str) -> dict[str, Callable[[], float]]:
    """One forward and backward of each side's loss; returns it."""
    theirs = SSD.build()
    ours, _ = _ours(SSD, theirs)
    targets = _ground(B, max(1, boxes), boxes, SSD.side, device)
    listed = _listed(targets)
    priors = _outputs(ours.to(device), SSD, device).priors
    A = len(priors)
    logits, offsets = _leaf(B, A, 1 + CLASSES, device=device), _leaf(B, A, 4, device=device)
    anchors = [priors] * B

    def reference() -> float:
        matched = [
            theirs.proposal_matcher(box_iou(image["boxes"], anchor))
            for image, anchor in zip(listed, anchors, strict=True)
        ]
        raw = {"bbox_regression": offsets, "cls_logits": logits}
        parts = theirs.compute_loss(listed, raw, anchors, matched)
        return _back(parts, logits, offsets)

    def own() -> float:
        return _back(divide(ours.head.loss(ssd.Outputs(logits, offsets, priors), targets)), logits, offsets)

    return {"torchvision": reference, "detkit": own}


def _outputs(ours: Detector, reference: Reference, device: str) -> Any:
    """What the head gives for a grey photo: its default boxes or anchors."""
    with torch.inference_mode(False), torch.no_grad():
        side = reference.side
        return ours.eval()(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))


def _back(parts: dict[str, Tensor], *leaves: Tensor) -> float:
    loss = torch.stack([*parts.values()]).sum()
    for leaf in leaves:
        leaf.grad = None
    loss.backward()
    return float(loss.detach())


def _rcnn_losses(B: int, boxes: int, device: str) -> dict[str, Callable[[], float]]:
    """Both stages: anchors and proposals matched and sampled, four losses, backward."""
    theirs = RCNN.build()
    ours, _ = _ours(RCNN, theirs)
    head, cfg = ours.head, ours.head.settings
    targets = _ground(B, max(1, boxes), boxes, RCNN.side, device)
    listed = _listed(targets)
    anchors = _outputs(ours.to(device), RCNN, device).anchors
    A, N = len(anchors), cfg.samples
    objectness, deltas = _leaf(B, A, device=device), _leaf(B, A, 4, device=device)
    logits, offsets = _leaf(B, N, 1 + CLASSES, device=device), _leaf(B, N, 1 + CLASSES, 4, device=device)
    leaves = (objectness, deltas, logits, offsets)
    centre = RCNN.side * torch.rand(B, 2000 - boxes, 2, device=device)
    half = RCNN.side * 0.2 * torch.rand(B, 2000 - boxes, 2, device=device)
    near = targets.boxes[:, :boxes] + 4 * torch.randn(B, boxes, 4, device=device)
    proposals = torch.cat([near, torch.cat([centre - half, centre + half], 2)], 1)
    real = torch.ones(proposals.shape[:2], dtype=torch.bool, device=device)

    def reference() -> float:
        rpn, roi = theirs.rpn, theirs.roi_heads
        labels, matched = rpn.assign_targets_to_anchors([anchors] * B, listed)
        wanted = rpn.box_coder.encode(matched, [anchors] * B)
        first, second = rpn.compute_loss(objectness.view(-1, 1), deltas.view(-1, 4), labels, wanted)
        _, _, classes, regions = roi.select_training_samples(list(proposals), listed)
        count = sum(map(len, classes))
        third, fourth = fastrcnn_loss(
            logits.view(-1, 1 + CLASSES)[:count], offsets.view(-1, (1 + CLASSES) * 4)[:count], classes, regions
        )
        return _back({"a": first, "b": second, "c": third, "d": fourth}, *leaves)

    def own() -> float:
        regions, taken, samples = head._sample(anchors, proposals, real, targets, None)
        count = regions.shape[1]
        outputs = faster_rcnn.Outputs(
            objectness, deltas, anchors, regions, logits[:, :count], offsets[:, :count], taken, *samples
        )
        return _back(divide(head.loss(outputs, targets)), *leaves)

    return {"torchvision": reference, "detkit": own}


LOSSES = {"SSD300-VGG16": _ssd_losses, "Faster R-CNN R50-FPN": _rcnn_losses}


def _peak(detector: str, side: str, B: int, device: str) -> float:
    """Extra MB at the worst moment of one forward and backward, beside what is there before it."""
    if device == "cuda":
        run = LOSSES[detector](B, BOXES, device)[side]
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "memory", detector, side, str(B)]
    # So that freed memory goes back at once, and what is used again counts again.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout)


@app.command(hidden=True)
def memory(detector: str, side: str, batch: int) -> None:
    """Print by how many MB this process's peak grows in one forward and backward."""
    run = LOSSES[detector](batch, BOXES, "cpu")[side]
    LOSSES[detector](1, 1, "cpu")[side]()  # what is loaded at the first call is not the loss's
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what is in use now
    before = _resident("VmHWM")
    run()
    print((_resident("VmHWM") - before) / 2**10)


def _resident(name: str) -> int:
    """A figure of Linux on this process' memory, in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@app.command()
def losses(device: str = Where, rounds: int = 10) -> None:
    """Loss and matching alone, forward and backward from the head's raw outputs, 100 boxes an image."""
    rows = []
    for detector, make in LOSSES.items():
        for B in (8, 32):
            runs = make(B, BOXES, device)

            def timed(run: Callable[[], float]) -> Callable[[], float]:
                def seconds() -> float:
                    with _timed(device) as passed:
                        run()
                        return passed()

                return seconds

            taken = interleaved({name: timed(run) for name, run in runs.items()}, rounds)
            rows.append({
                "detector": detector,
                "batch": B,
                "detkit is faster by": f"{_ratio(taken['torchvision'], taken['detkit']):.2f}",
                "detkit's extra memory, MB": f"{_peak(detector, 'detkit', B, device):.0f}",
                "torchvision's": f"{_peak(detector, 'torchvision', B, device):.0f}",
            })  # fmt: skip
    note = (
        f"Forward and backward from the head's raw outputs, {BOXES} boxes an image, {CLASSES} classes, fp32. Faster "
        "R-CNN: both stages with their sampling, from 2,000 proposals. Ratios of the medians of "
        f"{rounds} interleaved rounds. Memory: the peak of one call less what was in use before it, gradients of the "
        "raw outputs included."
    )
    save("train_step", f"losses {device}", f"Loss and matching, {device}", note, rows)


# --- growth with the boxes --------------------------------------------------------------------------------------------

HEADS = ("ssd_vgg", "ssd_mobilenet", "yolo_nano", "yolo_v1_vgg", "faster_rcnn_mobilenet")


@app.command()
def boxes(device: str = Where, rounds: int = 7) -> None:
    """Every head's matching and loss with 1, 10 and 300 boxes an image: forward and backward."""
    rows = []
    counts = (1, 10, 300)
    for name in HEADS:
        settings = config.load(name, ["model.weights=none"])
        torch.manual_seed(0)
        detector = Detector(settings.model, settings.input, CLASSES).to(device).train()
        images = torch.randint(0, 256, (4, 3, *settings.input.size), dtype=torch.uint8, device=device)
        with torch.no_grad():
            feats = detector.neck(detector.backbone(detector.normalise(images)))
        feats = tuple(feat.detach().requires_grad_() for feat in feats)

        def run(
            count: int, detector: Detector = detector, feats: Any = feats, side: int = settings.input.size[0]
        ) -> Any:
            targets = _ground(4, 1 << (count - 1).bit_length(), count, side, device)

            def seconds() -> float:
                with torch.no_grad():
                    given = detector.head(feats, (side, side), targets)
                raw = type(given)(*(_as_leaf(part) for part in given))
                with _timed(device) as passed:
                    torch.stack([*divide(detector.head.loss(raw, targets)).values()]).sum().backward()
                    return passed()

            return seconds

        taken = interleaved({str(count): run(count) for count in counts}, rounds)
        least = statistics.median(taken["1"])
        rows.append({"config": name} | {f"{count} boxes": f"{statistics.median(taken[str(count)]) / least:.2f}"
                                        for count in counts})  # fmt: skip
    note = (
        "Time of a head's loss, matching included, forward and backward, batch 4, over that with 1 box an image. "
        "Medians of interleaved rounds. Faster R-CNN matches in its forward pass, which is not part of this."
    )
    save("train_step", f"boxes {device}", f"Growth with the boxes of an image, {device}", note, rows)


def _as_leaf(part: Any) -> Any:
    floating = isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 2
    return part.detach().requires_grad_() if floating else part


# --- inference --------------------------------------------------------------------------------------------------------


@app.command()
def inference(device: str = Where, rounds: int = 10, training: int = 20) -> None:
    """Photos to boxes, both in fp32, after some steps of training, so that scores are those of a detector."""
    rows = []
    for reference in REFERENCES:
        torch.manual_seed(0)
        theirs = reference.build()
        batches = _batches(reference.side, 2, device)

        def listed(batch: Batch, theirs: Any = theirs) -> dict[str, Tensor]:
            result: dict[str, Tensor] = theirs(list(batch.images.float() / 255), _listed(batch.targets))
            return result

        trainer = Stepper(theirs, listed, device)
        for _, batch in zip(track(range(training), description=reference.words, console=console), cycle(batches)):
            trainer.step(batch)
        theirs.eval()
        ours, settings = _ours(reference, theirs)
        predictor = Predictor(ours, settings.model.select).to(device).to(memory_format=torch.channels_last)
        for B in (1, 8):
            images = torch.cat([batch.images for batch in batches])[:B]

            def their(images: Tensor = images, theirs: Any = theirs) -> float:
                with torch.inference_mode(), _timed(device) as passed:
                    theirs(list(images.float() / 255))
                    return passed()

            def own(images: Tensor = images, predictor: Predictor = predictor) -> float:
                with torch.inference_mode(), _timed(device) as passed:
                    predictor(images)
                    return passed()

            taken = interleaved({"torchvision": their, "detkit": own}, rounds)
            with torch.inference_mode():
                found = int((predictor(images)[1] > 0).sum())
                wanted = sum(len(each["scores"]) for each in theirs(list(images.float() / 255)))
            rows.append({
                "detector": reference.words,
                "batch": B,
                "detkit is faster by": f"{_ratio(taken['torchvision'], taken['detkit']):.2f}",
                "boxes found, detkit": found,
                "torchvision": wanted,
            })  # fmt: skip
    note = (
        f"uint8 photos to boxes after NMS, fp32, torchvision as it comes, detkit with channels last (its default). "
        f"{training} training steps before, so that scores are sparse. torchvision's SSD takes the 400 best boxes of a "
        "class to NMS, detkit's config the 1,000 best of an image."
    )
    save("train_step", f"inference {device}", f"Inference, {device}", note, rows)


@app.command("all")
def everything(device: str = Where, compiled: bool = False) -> None:
    """All of them."""
    losses(device)
    boxes(device)
    inference(device)
    step(device, compiled=compiled)


if __name__ == "__main__":
    app()

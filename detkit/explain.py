"""``detkit explain``: what a detector sees in photos. Feature maps, class activation maps, the candidates that answer
for objects, proposals, and scores before and after NMS."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from detkit import checkpoint, geometry, imaging, page, report
from detkit.checkpoint import Checkpoint
from detkit.config import Device, FasterRCNN
from detkit.console import counting
from detkit.data import cache, voc
from detkit.data.batch import collate
from detkit.data.dataset import Sample
from detkit.data.labels import DataSet
from detkit.errors import UserError, nearest, need
from detkit.files import atomic_write, next_folder, whole_folder
from detkit.manifest import Manifest
from detkit.nn.contract import Decoded
from detkit.nn.detector import Detector, Predictor
from detkit.nn.matching import match_regions
from detkit.nn.necks import Plain
from detkit.nn.select import select
from detkit.runtime import decide, render
from detkit.runtime.predict import expand, unique_stems
from detkit.types import CROWD, DIFFICULT, Detections, Targets

SIDE = 400  # pixels: the longer side of a picture, at least
TILE, CHANNELS = 110, 7  # of feature maps: the longer side in pixels, and how many channels are shown
PROPOSALS = 50  # drawn
ROWS = 12  # of the table of scores

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Options:
    """root: of the data set whose labels are shown; default: the run's. layer: the module that is looked into; default:
    backbone and neck. class_name: only its objects and detections. detections: how many of these, the surest."""

    root: Path | None = None
    layer: str | None = None
    class_name: str | None = None
    detections: int = 6
    device: Device = "auto"


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The candidates of a photo that reach NMS, the surest first, with scores as the network gives them, in pixels of
    the canvas. certain: float32 [N], the calibrated scores. shown: bool [N], whose reach the thresholds. kept: bool
    [N], what NMS leaves. rival: int64 [N], of what goes, the surest that stays and overlaps it; -1 where none is."""

    found: Detections
    certain: NDArray[np.float32]
    shown: NDArray[np.bool_]
    kept: NDArray[np.bool_]
    rival: NDArray[np.int64]


class Section(NamedTuple):
    """A part of the page: its title, what is to be known, and pictures with captions."""

    title: str
    text: str
    pictures: list[tuple[Picture, str]]


def candidates(predictor: Predictor, decoded: Decoded, hw: tuple[int, int], manifest: Manifest) -> Candidates:
    """The candidates of one photo, before and after NMS. decoded: of a batch of one."""

    def chosen(nms: str) -> Detections:
        rule = predictor.rule.model_copy(update={"nms": nms})
        boxes, scores, labels = (each[0].cpu().numpy() for each in select(decoded, rule, hw))
        return Detections(boxes[scores > 0], scores[scores > 0], labels[scores > 0], hw)

    before, after = chosen("none"), chosen("hard")
    alike = (before.boxes[:, None] == after.boxes).all(2) & (before.labels[:, None] == after.labels)
    kept = (alike & (before.scores[:, None] == after.scores)).any(1)
    rivals = kept & ~kept[:, None] & (geometry.iou(before.boxes, before.boxes) > predictor.rule.iou)
    if not predictor.rule.agnostic:
        rivals &= before.labels[:, None] == before.labels
    # The surest come first, and argmax gives the first.
    rival = np.where(rivals.any(1), rivals.argmax(1), -1) if len(before) else np.zeros(0, np.int64)
    certain, shown = decide.scored(before, manifest), decide.are_shown(before, manifest)
    return Candidates(before, certain.scores, shown, kept, rival)


def origin(decoded: Decoded, found: Detections, number: int) -> int:
    """Which of the A candidates a detection is."""
    score, label = float(found.scores[number]), int(found.labels[number])
    height, width = found.hw
    boxes = decoded.boxes[0, :, label if decoded.boxes.shape[2] > 1 else 0].float()
    limits = boxes.new_tensor([width, height, width, height])
    apart = (boxes.clamp(min=0).minimum(limits) - boxes.new_tensor(found.boxes[number])).abs().sum(1)
    return int((apart + (decoded.scores[0, :, label].float() - score).abs()).argmin())


# --- class activation maps --------------------------------------------------------------------------------------------


def activation(detector: Detector, layer: nn.Module, images: Tensor, target: tuple[int, int], *, local: bool) -> Tensor:
    """Where in an image, uint8 [1, 3, H, W], a layer finds what raises a candidate's score: float32 [H, W], 0 to 1.

    layer: of the detector, with one map or several, which are added. target: candidate and class. Grad-CAM (Selvaraju
    2017) weighs a channel by its mean gradient, so what looks alike shows, wherever it is; `local` weighs each cell of
    it by its own (HiResCAM, Draelos 2020), so only what this score rests on does. Raises UserError where the layer
    gives no maps.
    """
    captum = need("captum.attr")
    method = captum.LayerGradientXActivation if local else captum.LayerGradCam
    scores: Callable[[Tensor], Tensor] = lambda x: detector.head.decode(detector(x)).scores  # noqa: E731
    # Of several levels, a score may rest on one alone.
    parts = method(scores, layer).attribute(images.float(), target, grad_kwargs={"materialize_grads": True})
    total = images.new_zeros(images.shape[2:], dtype=torch.float32)
    for part in parts if isinstance(parts, tuple) else (parts,):
        if part.dim() != 4:
            raise UserError(f"its output has {part.dim()} dimensions, and feature maps have 4; take another layer")
        whole = F.interpolate(part.detach().sum(1, keepdim=True).relu(), size=total.shape, mode="bilinear")
        total += whole[0, 0]
    return total / total.max().clamp(min=1e-30)


def _layers(detector: Detector, name: str | None) -> dict[str, nn.Module]:
    """The layers that are looked into, by name: the named one, or backbone and neck. Raises UserError."""
    known = dict(detector.named_modules())
    if name is not None and name not in known:
        raise UserError(f"--layer {name}: the detector has no such module{nearest(name, known)}; backbone, neck, ...")
    if name is not None:
        return {name: known[name]}
    return {each: known[each] for each in ("backbone", "neck") if not isinstance(known[each], Plain)}


def _maps(detector: Detector, layer: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """What a layer gives for an image: float [C, h, w] each."""
    given: list[Any] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: given.append(output))
    try:
        detector(images)
    finally:
        handle.remove()
    maps = given[0] if given else ()
    maps = maps if isinstance(maps, tuple) else (maps,)
    if not maps or not all(isinstance(each, Tensor) and each.dim() == 4 for each in maps):
        raise UserError("gives no feature maps; take a convolution, backbone or neck")
    return tuple(each[0].float() for each in maps)


# --- pictures ---------------------------------------------------------------------------------------------------------


def _coloured(values: NDArray[np.floating], name: str) -> Picture:
    """Values [h, w] from 0 to 1 as colours."""
    return np.asarray(mpl.colormaps[name](values, bytes=True)[..., :3])


def _resized(picture: Picture, side: int, how: Image.Resampling) -> Picture:
    """The picture with that longer side."""
    height, width = picture.shape[:2]
    scale = side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(picture).resize(size, how))


def _strip(level: Tensor) -> Picture:
    """A level's mean over channels, and the channels that change most over it, side by side."""
    level = level.cpu()
    order = level.flatten(1).std(1, correction=0).argsort(descending=True)[:CHANNELS]
    tiles = []
    for each in (level.mean(0), *level[order]):
        spread = (each - each.min()) / (each.max() - each.min()).clamp(min=1e-12)
        tile = _resized(_coloured(spread.numpy(), "viridis"), TILE, Image.Resampling.NEAREST)
        tiles.append(np.pad(tile, ((0, 0), (0, 4), (0, 0)), constant_values=255))
    return np.concatenate(tiles, 1)


class _Canvas:
    """The photo as the network gets it, large enough to draw on."""

    def __init__(self, image: Picture) -> None:
        self.hw = image.shape[0], image.shape[1]
        self.picture = _resized(image, max(SIDE, *self.hw), Image.Resampling.BICUBIC)
        self.scale = np.tile([self.picture.shape[1] / self.hw[1], self.picture.shape[0] / self.hw[0]], 2)

    def detections(self, found: Detections, classes: Sequence[str], *, scores: bool = True) -> Picture:
        """With boxes and names."""
        hw = self.picture.shape[0], self.picture.shape[1]
        larger = replace(found, boxes=(found.boxes * self.scale).astype(np.float32), hw=hw)
        return render.draw(self.picture, larger, classes, scores=scores)

    def boxes(self, picture: Picture, *groups: tuple[Any, tuple[int, int, int], int]) -> Picture:
        """With frames on it. groups: boxes [N, 4] in pixels of the canvas, their colour, and the lines' width."""
        result = Image.fromarray(picture)
        pen = ImageDraw.Draw(result)
        for boxes, colour, width in groups:
            for x1, y1, x2, y2 in np.asarray(boxes).reshape(-1, 4) * self.scale:
                pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
        return np.array(result)

    def heat(self, values: Tensor) -> Picture:
        """With values [H, W], 0 to 1, in colours over it."""
        flat = Image.fromarray(values.cpu().numpy())
        large = np.asarray(flat.resize(self.picture.shape[1::-1], Image.Resampling.BILINEAR))
        weight = (0.25 + 0.45 * large)[..., None]
        return np.asarray(self.picture * (1 - weight) + _coloured(large, "turbo") * weight, np.uint8)


_WHITE, _FREE, _TAKEN = (255, 255, 255), (86, 180, 233), (230, 159, 0)


def _plot(seen: Candidates) -> Picture:
    """Scores of the candidates in their order, before and after NMS."""

    def draw(axes: Any) -> None:
        places, scores = np.arange(1, len(seen.kept) + 1), seen.found.scores
        axes.scatter(places, scores, s=8, color="0.7", label=f"before NMS ({len(places)})")
        left = seen.kept
        axes.scatter(places[left], scores[left], s=14, color="#0072B2", label=f"after NMS ({left.sum()})")
        both = left & seen.shown
        axes.scatter(places[both], scores[both], s=22, color="#D55E00", label=f"shown ({both.sum()})")
        axes.set(xscale="log", ylim=(0, 1), xlabel="candidates, the surest first", ylabel="score")
        axes.legend(fontsize=8, frameon=False)

    return np.asarray(Image.open(io.BytesIO(report.png(draw, (6.4, 3.6)))).convert("RGB"))


# --- labels -----------------------------------------------------------------------------------------------------------


class Labelled(NamedTuple):
    """The objects of a photo: float64 [G, 4] in its pixels, class numbers int64 [G], and flags uint8 [G]."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    flags: NDArray[np.uint8]


class Labels:
    """The labels of photos: a data set's, or those in a VOC XML beside the photo or in ../Annotations."""

    def __init__(self, trained: Checkpoint, root: Path | None) -> None:
        self.data, self.classes = trained.data(root), trained.classes

    @cached_property
    def _splits(self) -> list[DataSet]:
        return [cache.load(self.data, split) for split in (self.data.val, self.data.train)]

    def of(self, photo: Path, hw: tuple[int, int]) -> Labelled | None:
        """What is known of a photo of that size; None where there are no labels. Raises UserError."""
        root, path = self.data.root.resolve(), photo.resolve()
        if path.is_relative_to(root):
            name = path.relative_to(root).as_posix()
            for found in self._splits:
                for i in range(len(found)):
                    if found.name(i) == name:
                        names = [found.classes[label] for label in found[i].labels]
                        return self._labelled(found[i].boxes, names, found[i].flags)
        for path in (photo.with_suffix(".xml"), photo.parent.parent / "Annotations" / f"{photo.stem}.xml"):
            if path.is_file():
                said = voc.read(path)
                boxes = said.boxes
                if said.hw:
                    boxes, _ = geometry.fitted(boxes, said.hw, hw, imaging.orientation(photo))
                return self._labelled(np.clip(boxes, 0, np.tile(hw[::-1], 2)), said.names, said.flags)
        return None

    def _labelled(self, boxes: NDArray[np.float64], names: Sequence[str], flags: NDArray[np.uint8]) -> Labelled:
        """The objects of classes that the detector knows."""
        numbers = {name: i for i, name in enumerate(self.classes)}
        ours = np.array([name in numbers for name in names], bool) & (boxes[:, :2] < boxes[:, 2:]).all(1)
        labels = np.array([numbers.get(name, -1) for name in names], np.int64)
        return Labelled(boxes[ours], labels[ours], flags[ours])


# --- a photo ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Explained:
    """What is said of a photo."""

    photo: Path
    sections: list[Section]
    candidates: Candidates
    plan: geometry.ResizePlan


class Explainer:
    """A checkpoint that says what it sees. Raises UserError where an option doesn't fit it."""

    def __init__(self, trained: Checkpoint, options: Options) -> None:
        self.options, self.classes = options, trained.classes
        if options.class_name is not None and options.class_name not in trained.classes:
            known = nearest(options.class_name, trained.classes)
            raise UserError(f"--class {options.class_name}: the detector has no such class{known}")
        self.manifest, self.input = trained.manifest(), trained.config.input
        self.predictor = trained.predictor().to(checkpoint.pick_device(options.device))
        self.detector = self.predictor.detector
        self.layers = _layers(self.detector, options.layer)
        self.labels = Labels(trained, options.root)

    def __call__(self, photo: Path) -> Explained:
        """Raises UserError where the photo can't be read."""
        image = imaging.decode(photo)
        hw = image.shape[0], image.shape[1]
        plan = geometry.plan(hw, self.input.size, self.input.resize)
        known = self.labels.of(photo, hw)
        truth = known or Labelled(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0, np.uint8))
        pixels = np.array(imaging.to_canvas(image, plan, imaging.fill(self.input.mean)))
        boxes = plan.to_canvas(truth.boxes).astype(np.float32)
        sample = Sample(pixels, boxes, truth.labels, (truth.flags & (DIFFICULT | CROWD)) != 0, plan, 0)
        batch = collate([sample]).to(next(self.detector.parameters()).device)
        canvas, head = _Canvas(pixels), self.detector.head
        with torch.no_grad():
            outputs = self.detector(batch.images)
            decoded = head.decode(outputs)
            seen = candidates(self.predictor, decoded, self.input.size, self.manifest)
            maps = self._feature_maps(batch.images)
            anchors = self._matched(canvas, outputs, batch.targets if known else None, decoded, seen)
        sections = [self._detections(canvas, seen, boxes if known else None, truth.labels), self._scores(seen)]
        sections += [self._activations(canvas, batch.images, decoded, seen), *anchors, *maps]
        return Explained(photo, [each for each in sections if each.pictures], seen, plan)

    def _chosen(self, seen: Candidates) -> list[int]:
        """The detections that are looked at: the surest that are shown or, where none is, that are left."""
        own = seen.kept
        if self.options.class_name is not None:
            own = own & (seen.found.labels == self.classes.index(self.options.class_name))
        some = own & seen.shown if (own & seen.shown).any() else own
        return [int(place) for place in np.flatnonzero(some)[: self.options.detections]]

    def _said(self, seen: Candidates, place: int) -> str:
        return f"{self.classes[seen.found.labels[place]]} {seen.certain[place]:.2f}"

    def _detections(
        self, canvas: _Canvas, seen: Candidates, boxes: NDArray[np.float32] | None, labels: NDArray[np.int64]
    ) -> Section:
        pictures = []
        if boxes is not None:
            truth = Detections(boxes, np.ones(len(labels), np.float32), labels, canvas.hw)
            pictures.append((canvas.detections(truth, self.classes, scores=False), f"labels: {len(labels)}"))
        calibrated = replace(seen.found, scores=seen.certain)
        for mask, said in ((seen.shown, "before NMS"), (seen.shown & seen.kept, "after NMS: what is shown")):
            some = Detections(calibrated.boxes[mask], calibrated.scores[mask], calibrated.labels[mask], canvas.hw)
            pictures.append((canvas.detections(some, self.classes), f"{said}: {len(some)}"))
        text = "The photo on the network's canvas, with candidates whose scores reach the thresholds."
        return Section("Detections", text, pictures)

    def _scores(self, seen: Candidates) -> Section:
        text = (
            f"Candidates with a score above {self.predictor.rule.score:g}, as the network gives it. NMS removes what "
            f"overlaps a surer one of its class by an IoU above {self.predictor.rule.iou:g}."
        )
        return Section("Scores before and after NMS", text, [(_plot(seen), "")] if len(seen.kept) else [])

    def _activations(self, canvas: _Canvas, images: Tensor, decoded: Decoded, seen: Candidates) -> Section:
        """Grad-CAM of the last of the layers, and cell by cell of the first."""
        names = list(self.layers)
        ways = ((names[-1], False, "Grad-CAM"), (names[0], True, "this one's cells"))
        pictures = []
        for place in self._chosen(seen):
            target = origin(decoded, seen.found, place), int(seen.found.labels[place])
            for name, local, said in ways:
                try:
                    heat = activation(self.detector, self.layers[name], images, target, local=local)
                except UserError as error:
                    raise UserError(f"--layer {name}: {error}") from None
                frame = (seen.found.boxes[place], _WHITE, 2)
                pictures.append((canvas.boxes(canvas.heat(heat), frame), f"{self._said(seen, place)}: {said}, {name}"))
        text = (
            "What raises the score of a detection, red most. Grad-CAM weighs each channel by its mean gradient, so all "
            "that looks like the class shows; cell by cell (HiResCAM), only what this one score rests on."
        )
        return Section("Class activation maps", text, pictures)

    def _matched(
        self, canvas: _Canvas, outputs: Any, targets: Targets | None, decoded: Decoded, seen: Candidates
    ) -> list[Section]:
        """Candidates that answer for objects or, without labels, those that detections came from; and proposals."""
        head = self.detector.head
        places, pictures = head.places(outputs), []
        what = "anchor" if head.two_stage else "candidate"
        if targets is not None:
            match = head.match(outputs, targets)
            for number in self._objects(targets):
                own = (match.positive & (match.object == number))[0]
                label = int(targets.labels[0, number])
                frames = (places[own].cpu(), _TAKEN, 1), (targets.boxes[0, number].cpu(), _WHITE, 2)
                count = int(own.sum())
                answer = f"{what} answers" if count == 1 else f"{what}s answer"
                said = f"{self.classes[label]}: {count} {answer} for it"
                pictures.append((canvas.boxes(canvas.picture, *frames), said))
            title = "Anchors and cells that matched"
            text = (
                "White: an object. Orange: the default boxes, anchors or cells that answer for it in training, as the "
                "network is now."
            )
        else:
            title, text = "Where detections came from", "White: a detection. Orange: its default box, cell or proposal."
            origins = outputs.regions[0] if head.two_stage else places
            for place in self._chosen(seen):
                start = origins[origin(decoded, seen.found, place)].cpu()
                frames = (start, _TAKEN, 2), (seen.found.boxes[place], _WHITE, 2)
                pictures.append((canvas.boxes(canvas.picture, *frames), self._said(seen, place)))
        sections = [Section(title, text, pictures)]
        if head.two_stage:
            sections.append(self._proposals(canvas, outputs, targets))
        return sections

    def _objects(self, targets: Targets) -> list[int]:
        """Those that are looked at."""
        own = (targets.labels[0] >= 0) & ~targets.ignore[0]
        if self.options.class_name is not None:
            own &= targets.labels[0] == self.classes.index(self.options.class_name)
        return [int(number) for number in own.nonzero().flatten()[: self.options.detections]]

    def _proposals(self, canvas: _Canvas, outputs: Any, targets: Targets | None) -> Section:
        """The best of what the first stage hands on to the second."""
        real = outputs.real[0]
        regions, settings = outputs.regions[0][real], cast("FasterRCNN", self.detector.head.settings)
        good = torch.zeros(len(regions), dtype=torch.bool)
        if targets is not None:
            good = match_regions(regions[None], targets, settings.match_iou, settings.match_iou)[0][0].cpu()
        best = regions[:PROPOSALS].cpu()
        frames = (best[~good[:PROPOSALS]], _FREE, 1), (best[good[:PROPOSALS]], _TAKEN, 2)
        text = "What the region proposal network hands on, whatever the class."
        said = f"the best {len(best)} of {len(regions)}"
        if targets is not None:
            said += f"; orange: IoU {settings.match_iou:g} or more with an object, {int(good.sum())} of all"
        return Section("Proposals", text, [(canvas.boxes(canvas.picture, *frames), said)])

    def _feature_maps(self, images: Tensor) -> list[Section]:
        pictures = []
        for name, layer in self.layers.items():
            try:
                maps = _maps(self.detector, layer, images)
            except UserError as error:
                raise UserError(f"--layer {name}: {error}") from None
            for level in maps:
                channels, height, width = level.shape
                pictures.append((_strip(level), f"{name}: {channels} channels of {height} x {width}"))
        text = (
            f"The mean over channels on the left, then the {CHANNELS} channels that change most over the photo; each "
            "from its lowest value, dark, to its highest."
        )
        return [Section("Feature maps", text, pictures)]


# --- what is written --------------------------------------------------------------------------------------------------


def run(model: str | None, photos: Sequence[str], out: Path | None, options: Options, console: Console) -> Path:
    """Explain what a run or a checkpoint sees in photos: a page, PNGs and the scores as JSON in a new folder, `out`, by
    default explanations/<n>. Returns the folder. Raises UserError."""
    if model is not None and Path(model).suffix == ".onnx":
        raise UserError(
            f"{model}: an ONNX file has no gradients to explain it by; name the run or checkpoint it is made of"
        )
    explainer, paths = Explainer(checkpoint.read(checkpoint.find(model)), options), expand(photos)
    stems = unique_stems(paths)
    target = out or next_folder("explanations/")
    with whole_folder(target) as folder, counting(console, "explaining") as progress:
        shown = []
        for done, (path, stem) in enumerate(zip(paths, stems, strict=True), 1):
            explained = explainer(path)
            shown.append(_write(folder, stem, explained, explainer))
            progress(done, len(paths))
        page.write(folder / "index.html", "explain.html", said=explainer.manifest, photos=shown)
    console.print(f"written: {target / 'index.html'}", highlight=False, markup=False)
    return target


def _write(folder: Path, stem: str, explained: Explained, explainer: Explainer) -> dict[str, Any]:
    """A photo's PNGs and scores; returns what the page says of it."""
    sections = []
    for number, section in enumerate(explained.sections, 1):
        pictures = []
        for i, (picture, caption) in enumerate(section.pictures, 1):
            name = f"{stem}-{number}-{section.title.split()[0].lower()}-{i}.png"
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG")
            atomic_write(folder / name, buffer.getvalue())
            pictures.append((page.data_uri(picture), caption))
        sections.append((section.title, section.text, pictures))
    seen = explained.candidates
    lines = [
        {
            "label": explainer.classes[seen.found.labels[i]],
            "score": float(seen.found.scores[i]),
            "calibrated": float(seen.certain[i]),
            "box": [round(float(side), 2) for side in box],
            "kept": bool(seen.kept[i]),
            "shown": bool(seen.shown[i] and seen.kept[i]),
            "removed by": int(seen.rival[i]) if seen.rival[i] >= 0 else None,
        }
        for i, box in enumerate(explained.plan.to_source(seen.found.boxes))
    ]
    tree = {"photo": str(explained.photo), "candidates": lines}
    atomic_write(folder / f"{stem}.json", json.dumps(tree, ensure_ascii=False, indent=1) + "\n")
    gone = np.bincount(seen.rival[seen.rival >= 0], minlength=len(seen.kept))
    kept = [line | {"removed": int(gone[i])} for i, line in enumerate(lines) if seen.kept[i]]
    return {"name": explained.photo.name, "sections": sections, "kept": kept[:ROWS], "left": len(kept)}

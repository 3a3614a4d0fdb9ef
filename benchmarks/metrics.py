"""How long COCO's figures take: detkit's numpy beside pycocotools, and faster-coco-eval where it is installed.

    python benchmarks/metrics.py            5,000 photos, 100 detections each, 25 classes
    python benchmarks/metrics.py --photos 500

Each gets made-up boxes as it wants them, and its time runs from there to the figures. Writes results/metrics.json
and results/metrics.md.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Callable
from importlib import metadata, util
from typing import Any

import numpy as np
import typer
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from report import interleaved, save

from detkit import metrics
from detkit.types import Detections, Record

CLASSES = 25
SIDE = 640
FIGURES = ("mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large", "AR1", "AR10", "AR100")
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def made_up(photos: int, found: int) -> tuple[list[Record], list[Detections]]:
    """Photos of 5 to 20 objects; detections near them, of the right class or another, and anywhere."""
    rng = np.random.default_rng(0)
    records, detections = [], []
    for _ in range(photos):
        objects = int(rng.integers(5, 21))
        size = np.exp(rng.uniform(np.log(12), np.log(240), (objects, 2)))
        corner = rng.uniform(0, 1, (objects, 2)) * (SIDE - size)
        boxes = np.concatenate([corner, corner + size], 1)
        labels = rng.integers(0, CLASSES, objects)
        flags = np.where(rng.random(objects) < 0.02, 8, 0).astype(np.uint8)  # crowds
        records.append(Record("photo.jpg", (SIDE, SIDE), boxes, labels, flags))
        of = rng.integers(0, objects, found)
        near = boxes[of] + rng.normal(0, 0.12, (found, 4)) * np.tile(size[of], 2)
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        named = np.where(rng.random(found) < 0.6, labels[of], rng.integers(0, CLASSES, found))
        scores = np.sort(rng.beta(0.5, 2, found))[::-1]
        detections.append(Detections(near.astype(np.float32), scores.astype(np.float32), named, (SIDE, SIDE)))
    return records, detections


def rows(records: list[Record], found: list[Detections]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same as COCO's annotations and results."""
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for image, (record, detections) in enumerate(zip(records, found, strict=True), 1):
        for box, label, flag in zip(record.boxes.tolist(), record.labels.tolist(), record.flags.tolist(), strict=True):
            x, y, w, h = box[0], box[1], box[2] - box[0], box[3] - box[1]
            row = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "bbox": [x, y, w, h]}
            annotations.append({**row, "area": w * h, "iscrowd": int(flag > 0)})
        found_boxes = detections.boxes.astype(float).tolist()
        for box, label, score in zip(found_boxes, detections.labels.tolist(), detections.scores.tolist(), strict=True):
            bbox = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": image, "category_id": label, "bbox": bbox, "score": float(score)})
    tree = {
        "info": {},
        "images": [{"id": i + 1, "height": SIDE, "width": SIDE} for i in range(len(records))],
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in range(CLASSES)],
    }
    return tree, results


@app.command()
def main(
    photos: int = typer.Option(5000, min=1), found: int = typer.Option(100, min=1), rounds: int = typer.Option(3, min=1)
) -> None:
    """See the file's beginning."""
    records, detections = made_up(photos, found)
    tree, results = rows(records, detections)
    said: dict[str, list[float]] = {}

    def ours() -> float:
        start = time.perf_counter()
        figures = metrics.coco_ap(records, detections, [str(i) for i in range(CLASSES)])
        taken = time.perf_counter() - start
        said["detkit"] = [figures[name] for name in FIGURES]
        return taken

    def theirs(name: str, coco: Any, evaluation: Any) -> Callable[[], float]:
        def run() -> float:
            with contextlib.redirect_stdout(io.StringIO()):
                truth = coco()
                truth.dataset = tree
                truth.createIndex()
                loaded = truth.loadRes([dict(row) for row in results])
                start = time.perf_counter()
                job = evaluation(truth, loaded, "bbox")
                job.evaluate()
                job.accumulate()
                job.summarize()
            taken = time.perf_counter() - start
            said[name] = [float(value) for value in job.stats[:9]]
            return taken

        return run

    runs = {"detkit": ours, "pycocotools": theirs("pycocotools", COCO, COCOeval)}
    if util.find_spec("faster_coco_eval"):
        import faster_coco_eval  # an optional package

        runs["faster-coco-eval"] = theirs("faster-coco-eval", faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster)
    times = interleaved(runs, rounds)
    base = statistics.median(times["pycocotools"])
    table = [
        {
            "what": name,
            "seconds": f"{statistics.median(taken):.2f}",
            "times as fast as pycocotools": f"{base / statistics.median(taken):.1f}",
            "largest difference from pycocotools": f"{np.abs(np.subtract(said[name], said['pycocotools'])).max():.1e}",
        }
        for name, taken in times.items()
    ]
    versions = {name: metadata.version(name) for name in times if name != "detkit"}
    note = (
        f"{photos:,} photos of 5 to 20 objects, {found} detections each, {CLASSES} classes, 2 % crowds: from boxes in "
        f"memory to the figures; loading the detections, which pycocotools needs, is not counted. Medians of {rounds} "
        f"interleaved rounds. Compared: {', '.join(FIGURES)}."
    )
    save("metrics", "coco", "COCO's figures", note, table, versions=versions)


if __name__ == "__main__":
    app()

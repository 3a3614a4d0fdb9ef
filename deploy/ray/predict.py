"""`detkit predict --format jsonl` on a Ray cluster: the same Session in a Ray Data job, and the same bytes.

    python deploy/ray/predict.py best.onnx OUT PHOTOS ...

Photos, folders and globs are those that every machine sees under the same path, as is the model; detkit is in the image
that the cluster runs, or in Ray's runtime environment. The same command goes on with a job that was ended.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray

from detkit import formats, imaging
from detkit.errors import UserError
from detkit.runtime import decide
from detkit.runtime.predict import Job, expand
from detkit.runtime.record import Record
from detkit.runtime.session import Session
from detkit.runtime.tiles import Tiled, chosen


class Detect:
    """An actor: one Session, on one core or one GPU. asked: how it is to look at photos."""

    def __init__(self, asked: Job, device: str) -> None:
        self.session, self.score = Session(asked.model, device, threads=1), asked.score
        self.detector = asked.views(self.session)
        self.read = getattr(self.detector, "read", imaging.decode)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """From a column `photo` of paths to a column `line`, what was found in each, as JSON, and a column `full`, how
        often the network's list of boxes was."""
        trees, full = zip(*map(self.one, batch["photo"]), strict=True)
        return {"line": np.array([json.dumps(tree) for tree in trees], dtype=object), "full": np.array(full)}

    def one(self, photo: str) -> tuple[dict[str, Any], int]:
        """A photo's line in the record, and how often the network could say no more."""
        before = self.detector.full if isinstance(self.detector, Tiled) else 0
        try:
            (found,) = self.detector.detect([self.read(photo)])
        except UserError as error:
            return {"image": photo, "error": str(error)}, 0
        shown = decide.shown(found, self.session.manifest, self.score)
        tree = formats.detections_dict(photo, shown, self.session.classes)
        if isinstance(self.detector, Tiled):
            return tree, self.detector.full - before
        return tree, int(decide.fills(shown, self.session.manifest))


def main() -> int:
    """Returns the exit code: 1 where photos could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", help="a folder for detections.jsonl")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--score", type=float, help="lowest score; default: the model's")
    parser.add_argument("--tiles", help="as detkit predict has it")
    parser.add_argument("--overlap", type=int, help="likewise")
    parser.add_argument("--actors", type=int, help="Sessions at a time; default: as many as the cluster has room for")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each; default: the CPU")
    options = parser.parse_args()
    manifest = Session(options.model, "cpu", threads=1).manifest  # what is wrong with it is said at once
    tiles = chosen(options.tiles, options.overlap, manifest, options.model)
    asked = Job(photos=options.photos, folder="", model=options.model, score=options.score, tiles=tiles)
    photos = [str(photo) for photo in expand(options.photos)]
    ray.init(log_to_driver=False)
    actors = options.actors or max(
        1, int(ray.cluster_resources()["GPU" if options.gpus else "CPU"] / (options.gpus or 1))
    )
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    with Record(Path(options.out)) as record:
        unread, full = record.errors, 0
        left = [photo for photo in photos if photo not in record.done]
        found = ray.data.from_items([{"photo": photo} for photo in left]).map_batches(
            Detect,
            fn_constructor_args=(asked, "cuda" if options.gpus else "cpu"),
            batch_size=8,
            concurrency=actors,
            num_cpus=1,
            num_gpus=options.gpus,
        )
        for row in found.iter_rows() if left else ():
            tree = json.loads(row["line"])
            record.add(tree)
            unread += [tree["error"]] if "error" in tree else []
            full += int(row["full"])
    if full:
        sys.stderr.write(f"{full} times the network's list of boxes was full: objects may be missing\n")
    sys.stderr.writelines(f"{reason}\n" for reason in unread)
    return int(bool(unread))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.stderr.write(f"detkit: {error}\n")
        sys.exit(2)

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

from detkit import formats
from detkit.errors import UserError
from detkit.runtime import decide
from detkit.runtime.predict import expand
from detkit.runtime.record import Record
from detkit.runtime.session import Session


class Detect:
    """An actor: one Session, on one core or one GPU."""

    def __init__(self, model: str, device: str, score: float | None) -> None:
        self.session, self.score = Session(model, device, threads=1), score

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """From a column `photo` of paths to a column `line`, what was found in each, as JSON."""
        return {"line": np.array([json.dumps(self.tree(photo)) for photo in batch["photo"]], dtype=object)}

    def tree(self, photo: str) -> dict[str, Any]:
        """A photo's line in the record."""
        try:
            (found,) = self.session.detect([self.session.read(photo)])
        except UserError as error:
            return {"image": photo, "error": str(error)}
        shown = decide.shown(found, self.session.manifest, self.score)
        return formats.detections_dict(photo, shown, self.session.classes)


def main() -> int:
    """Returns the exit code: 1 where photos could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", help="a folder for detections.jsonl")
    parser.add_argument("photos", nargs="+")
    parser.add_argument("--score", type=float, help="lowest score; default: the model's")
    parser.add_argument("--actors", type=int, help="Sessions at a time; default: as many as the cluster has room for")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each; default: the CPU")
    options = parser.parse_args()
    ray.init(log_to_driver=False)
    actors = options.actors or max(
        1, int(ray.cluster_resources()["GPU" if options.gpus else "CPU"] / (options.gpus or 1))
    )
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    unread = 0
    with Record(Path(options.out)) as record:
        left = [str(photo) for photo in expand(options.photos) if str(photo) not in record.done]
        found = ray.data.from_items([{"photo": photo} for photo in left]).map_batches(
            Detect,
            fn_constructor_args=(options.model, "cuda" if options.gpus else "cpu", options.score),
            batch_size=8,
            concurrency=actors,
            num_cpus=1,
            num_gpus=options.gpus,
        )
        for row in found.iter_rows():
            tree = json.loads(row["line"])
            record.add(tree)
            unread += "error" in tree
    return int(unread > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"detkit: {error}")

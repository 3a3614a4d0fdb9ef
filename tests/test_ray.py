"""deploy/ray/predict.py on a Ray of its own, beside `detkit predict`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.runtime.conftest import make_model as make_model

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent / "deploy" / "ray" / "predict.py"


def test_the_record_is_that_of_one_machine_to_the_byte(tmp_path, make_model):
    model, photos = make_model(), tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        image = rng.integers(0, 256, (40 + number, 90, 3), dtype=np.uint8)
        Image.fromarray(image).save(photos / f"{number:02d}.png")
    (photos / "17.png").write_bytes(b"junk")
    local, cluster = tmp_path / "local", tmp_path / "cluster"
    command = [sys.executable, "-m", "detkit", "predict", photos, "--model", model, "--out", local, "--format", "jsonl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    expected = (local / "detections.jsonl").read_bytes()
    assert expected.count(b"\n") == 40
    assert expected.count(b'"score"') > 30
    command = [sys.executable, SCRIPT, model, cluster, photos, "--actors", "2"]
    cluster.mkdir()
    lines = expected.splitlines(keepends=True)
    (cluster / "detections.jsonl").write_bytes(b"".join(lines[:9]) + lines[9][:20])  # it was killed here, and goes on
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert (cluster / "detections.jsonl").read_bytes() == expected

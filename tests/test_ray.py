"""deploy/ray/predict.py on a Ray of its own, beside `detkit predict`."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from detkit.runtime.predict import Job, predict
from detkit.runtime.session import Session
from detkit.runtime.tiles import parse
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
    assert "17.png: not an image" in done.stderr
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "gone.onnx", cluster, photos], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, f"detkit: {tmp_path / 'gone.onnx'}: no such ONNX file\n")


def test_an_actor_looks_at_tiles_as_predict_does(tmp_path, make_model):
    pytest.importorskip("ray")
    Detect = runpy.run_path(str(SCRIPT))["Detect"]
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    photo = str(tmp_path / "a.png")
    job = Job(photos=(photo,), folder="", model=str(make_model()), format="jsonl", tiles=parse("120x90", 30), score=0.0)
    predict(
        job.views(Session(job.model)), job.photos, tmp_path / "out", job.output, score=0.0, console=Console(quiet=True)
    )
    expected = json.loads((tmp_path / "out" / "detections.jsonl").read_text(encoding="utf-8"))
    told = Detect(job, "cpu")({"photo": [photo, str(tmp_path / "none.png")]})
    assert json.loads(told["line"][0]) == expected
    assert len(expected["detections"]) > 1
    assert "no such image" in told["line"][1]
    assert told["full"].tolist() == [0, 0]

"""``pip install detkit`` alone, in a new virtual environment, runs a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.runtime.conftest import Make

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_the_base_install_runs_a_model(make_model: Make, tmp_path: Path) -> None:
    model, photo = make_model("x.onnx"), tmp_path / "photo.jpg"
    Image.new("RGB", (192, 128), "red").save(photo)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True, timeout=120)
    folder = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = folder / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, ROOT], check=True, timeout=900)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8", timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run(folder / "python", "-c", "import detkit; print(detkit.__file__)").startswith(str(tmp_path))
    said = run(folder / "detkit", "predict", "--model", model.name, photo.name, "--device", "cpu", "--out", "out")
    assert "1 photo; results in out" in said
    found = json.loads((tmp_path / "out" / "photo.json").read_text(encoding="utf-8"))["detections"]
    assert [round(each["score"], 1) for each in found] == [0.9, 0.6, 0.5]
    run(
        python,
        "-c",
        "import sys; from pathlib import Path; from detkit import snippets; snippets.write(Path('x.onnx'))",
    )
    assert (tmp_path / "x-detect.mjs").exists()
    names = {line.split("==")[0].lower() for line in run(python, "-m", "pip", "freeze").splitlines()}
    assert not names & {"torch", "torchvision", "onnx", "opencv-python-headless", "lxml"}

"""`detkit eval`, `compare` and `calibrate` on detections in files, an .onnx file, and their pages in a browser."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from rich.console import Console

from detkit import assess, calibrate, config, report, snippets
from detkit.cli import main
from detkit.data import cache
from detkit.errors import UserError
from detkit.formats import detections_dict
from detkit.manifest import Decision
from detkit.runtime.session import Session
from detkit.sources import Where
from detkit.types import Detections
from tests.runtime.conftest import onnx_model
from tests.test_manifest import manifest

SHELF = Path(__file__).parent.parent / "datasets" / "shelf-mini"
QUIET = Console(quiet=True)
WHERE = Where(SHELF)


def write(path: Path, noise: float, seed: int = 0) -> Path:
    """Detections of shelf-mini's val: the ground truth, each object lost or misnamed with a chance of `noise`."""
    dataset = cache.load_split(config.Data(root=SHELF, cache=path.parent / "cache"), "val", QUIET)
    rng = np.random.default_rng(seed)
    lines = []
    for place in range(len(dataset)):
        record = dataset[place]
        there = rng.random(len(record.labels)) >= noise
        boxes, labels = record.boxes[there], record.labels[there].copy()
        wrong = rng.random(len(labels)) < noise
        labels[wrong] = rng.integers(0, len(dataset.classes), int(wrong.sum()))
        scores = np.sort(np.where(wrong, rng.uniform(0, 0.6, len(labels)), rng.uniform(0.3, 1, len(labels))))[::-1]
        found = Detections(boxes.astype(np.float32), scores.astype(np.float32), labels, record.hw)
        lines.append(json.dumps(detections_dict(record.path, found, dataset.classes)))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("good") / "good.jsonl", 0.1)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bad") / "bad.jsonl", 0.6, 1)


@pytest.fixture(scope="module")
def pages(good: Path, bad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that eval and compare write."""
    out = tmp_path_factory.mktemp("out")
    files = assess.Files(out / "bad.json", out / "bad.md", out / "bad.html", out / "suspects")
    assess.run(str(bad), WHERE, QUIET, files, resamples=50, ious=[0.3, 0.9])
    files = assess.Files(out / "both.json", out / "both.md", out / "both.html")
    assess.compare([str(bad), str(good)], WHERE, QUIET, files, resamples=200)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_eval_writes_what_it_knows_in_three_ways(pages: Path) -> None:
    tree = read(pages / "bad.json")
    assert tree["photos"] == 8
    assert 0 < tree["mAP"] < tree["mAP50"] + 1e-9 < 1
    assert set(tree["intervals"]) == set(assess.SHARES)
    for name, (low, high) in tree["intervals"].items():
        assert low <= high, name
    assert tree["speed"] is None
    assert sum(map(sum, tree["confusion"]["table"][:-1])) == tree["objects"]
    assert sum(each["number"] for each in tree["tide"].values()) > 0
    levels = [each["iou"] for each in tree["by_iou"]]
    assert levels == [0.3, *np.linspace(0.5, 0.95, 10).round(2)]
    assert np.mean([each["AP"] for each in tree["by_iou"][1:]]) == pytest.approx(tree["mAP"])
    text = (pages / "bad.md").read_text(encoding="utf-8")
    assert "| IoU | AP |" in text
    assert f"{tree['mAP']:.3f}" in text
    for each in tree["classes"]:
        assert f"| {each['class']} | {each['objects']} |" in text
    html = (pages / "bad.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html)
    assert html.count("data:image/jpeg") > 8
    assert len(list((pages / "suspects").rglob("*.xml"))) == len({each["photo"] for each in tree["suspects"]})


def test_compare_says_which_is_better(pages: Path) -> None:
    tree = read(pages / "both.json")
    (verdict,) = tree["comparisons"]
    assert verdict["p"] < 0.05
    assert verdict["difference"] == pytest.approx(tree["models"][1]["mAP"] - tree["models"][0]["mAP"])
    assert "good.jsonl is better than bad.jsonl: mAP +" in (pages / "both.md").read_text(encoding="utf-8")
    assert "good.jsonl is better than bad.jsonl" in (pages / "both.html").read_text(encoding="utf-8")


def test_a_lower_counting_error_is_better(good: Path, bad: Path) -> None:
    tree = assess.compare([str(bad), str(good)], WHERE, QUIET, resamples=200, figure="count_MAE")
    assert tree["comparisons"][0]["difference"] < 0
    assert report.verdict(tree["comparisons"][0]).startswith("good.jsonl is better")


@pytest.mark.slow
def test_the_page_in_chromium_filters_by_class_and_by_error(pages: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs Chromium")
    html = (pages / "bad.html").read_text(encoding="utf-8")
    chosen = read(pages / "bad.json")["look_alikes"][0]["first"]
    act = (
        f"<script>const box = document.getElementById('class'); box.value = {json.dumps(chosen)};"
        "box.dispatchEvent(new Event('change'));"
        "document.title = [...document.querySelectorAll('[data-classes]')].map(each => "
        "`${+each.hidden}${+JSON.parse(each.dataset.classes).includes(box.value)}`).join(' ');"
        "const error = document.getElementById('error'); error.value = 'Detected as another class';"
        "error.dispatchEvent(new Event('change'));"
        "document.title += '|' + [...document.querySelectorAll('[data-errors]')].map(each => `${+each.hidden}"
        "${+(each.dataset.errors.includes(error.value) && JSON.parse(each.dataset.classes).includes(box.value))}`"
        ").join(' ') + '|' + document.getElementById('count').textContent;</script></body>"
    )
    page = tmp_path / "page.html"
    page.write_text(html.replace("</body>", act), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title
    by_class, by_both, count = title[1].split("|")
    for states in (by_class.split(), by_both.split()):
        assert set(states) == {"01", "10"}  # shown with the class, hidden without; some of each
    assert count == f"{by_both.split().count('01')} photos"


def one_onnx(tmp_path: Path) -> Path:
    """A file that always finds the same three boxes; its classes are those of the data."""
    path = tmp_path / "model.onnx"
    classes = cache.load_split(config.Data(root=SHELF, cache=tmp_path / "cache"), "val", QUIET).classes
    onnx.save(onnx_model(manifest(classes=classes, resize="stretch")), path)
    return path


def test_an_onnx_file_is_measured_with_its_speed(tmp_path: Path) -> None:
    figures = assess.run(str(one_onnx(tmp_path)), WHERE, QUIET, resamples=0)
    assert figures["detections"] == 8 * 3
    assert figures["intervals"] == {}
    assert figures["speed"]["provider"] == "ONNX Runtime, cpu"
    assert 0 < figures["speed"]["latency"] <= figures["speed"]["latency95"]


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_a_calibrated_file_shows_by_its_thresholds(tmp_path: Path, method: Any) -> None:
    path, out = one_onnx(tmp_path), tmp_path / "out.onnx"
    before = path.read_bytes()
    decision = calibrate.run(str(path), WHERE, QUIET, aim="recall=0.9", method=method, out=out)
    assert path.read_bytes() == before
    known = Session(out).manifest
    assert known.decision == decision
    assert len(decision.thresholds) == len(known.classes)
    assert known.model_copy(update={"decision": None}) == Session(path).manifest
    image = np.full((64, 96, 3), 255, np.uint8)
    assert np.allclose(Session(out).detect([image])[0].boxes, Session(path).detect([image])[0].boxes)
    figures = assess.run(str(out), WHERE, QUIET, resamples=0)
    assert figures["thresholds"] == "for recall=0.9"


def test_programs_beside_a_calibrated_file_are_written_anew_unless_somebody_changed_them(tmp_path: Path) -> None:
    path = one_onnx(tmp_path)
    python, *others = snippets.write(path)
    python.write_text("mine", encoding="utf-8")
    before = [each.read_text(encoding="utf-8") for each in others]
    said = io.StringIO()
    calibrate.run(str(path), WHERE, Console(file=said, width=1000), aim="recall=0.9")
    assert python.read_text(encoding="utf-8") == "mine"
    assert f"{python}: not detkit's own text" in said.getvalue()
    assert snippets.present(path) == {python: False} | dict.fromkeys(others, True)
    assert all(each.read_text(encoding="utf-8") != text for each, text in zip(others, before, strict=True))


def one_line(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.count("\n") == 1
    return said


def test_mistakes_are_one_line(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--data" in one_line(capsys, "eval", good)
    assert "can't be read" in one_line(capsys, "eval", tmp_path / "none.jsonl", "--data", SHELF)
    assert "--figure" in one_line(capsys, "compare", good, good, "--data", SHELF, "--figure", "loss")
    assert "kept in a model" in one_line(capsys, "calibrate", good, "--data", SHELF)
    assert "--aim" in one_line(capsys, "calibrate", good, "--data", SHELF, "--aim", "best")
    path = one_onnx(tmp_path)
    assert ".onnx" in one_line(capsys, "calibrate", path, "--data", SHELF, "--out", tmp_path / "x.safetensors")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="not empty"):
        assess.run(str(good), WHERE, QUIET, assess.Files(suspects=tmp_path / "full"), resamples=0)
    with pytest.raises(UserError, match="not empty"):  # before it measures for an hour
        assess.run("no such file.jsonl", WHERE, QUIET, assess.Files(suspects=tmp_path / "full"))


def test_a_checkpoint_keeps_its_decision(tmp_path: Path, tiny_config: config.Config) -> None:
    from detkit import checkpoint
    from detkit.nn.detector import Detector

    path = tmp_path / "best.safetensors"
    weights = Detector(tiny_config.model, tiny_config.input, 2).state_dict()
    decision = Decision(thresholds=(0.2, 0.4), aim="f1")
    checkpoint.write(path, weights, tiny_config, ("a", "b"), 1, {"score": 0.3})
    calibrate.write(path, path, decision)
    trained = checkpoint.read(path)
    assert trained.decision == trained.manifest().decision == decision
    assert trained.metrics == {"score": 0.3}
    assert all((trained.weights[name] == value).all() for name, value in weights.items())

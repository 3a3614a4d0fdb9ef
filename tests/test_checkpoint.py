"""Checkpoints: written and read back whole, found where a person means them, and nothing else believed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from detkit import checkpoint, config
from detkit.errors import UserError
from detkit.manifest import Manifest
from detkit.nn.detector import Detector, Predictor

CLASSES = ("tin", "box", "Müsli")
FIGURES: dict[str, Any] = {"mAP": 0.25, "mAP50": 0.5, "score": 0.3125, "per_class": {"tin": [0.1, 0.2], "box": None}}


def detector(settings: config.Config) -> Detector:
    return Detector(settings.model, settings.input, len(CLASSES))


def save(path: Path, settings: config.Config) -> Detector:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = detector(settings)
    checkpoint.write(path, source.state_dict(), settings, CLASSES, 7, FIGURES)
    return source


def refused(act: Any, *given: Any) -> str:
    with pytest.raises(UserError) as error:
        act(*given)
    line = str(error.value)
    assert "\n" not in line
    assert str(given[0]) in line
    return line


def test_what_is_written_is_read_back(tiny_config: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    source = save(path, tiny_config)
    got = checkpoint.read(path)
    assert (got.path, got.config, got.classes, got.epoch, got.metrics) == (path, tiny_config, CLASSES, 7, FIGURES)
    wanted = source.state_dict()
    assert got.weights.keys() == wanted.keys()
    for name, value in got.weights.items():
        assert value.dtype == wanted[name].dtype
        assert torch.equal(value, wanted[name])
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    for ours, theirs in zip(got.predictor()(images), Predictor(source, tiny_config.model.select)(images), strict=True):
        assert torch.equal(ours, theirs)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_channels_last_and_shared_weights_are_written(tiny_config: config.Config, tmp_path: Path) -> None:
    source = detector(tiny_config).to(memory_format=torch.channels_last)
    path = tmp_path / "a.safetensors"
    checkpoint.write(path, source.state_dict(), tiny_config, CLASSES, 1, FIGURES)
    for name, value in checkpoint.read(path).weights.items():
        assert torch.equal(value, source.state_dict()[name])


def test_a_checkpoint_is_replaced_whole(tiny_config: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, tiny_config)
    second = save(path, tiny_config)
    weights = checkpoint.read(path).weights
    assert all(torch.equal(weights[name], value) for name, value in second.state_dict().items())


def test_the_manifest_says_what_was_trained(tiny_config: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save(path, tiny_config)
    manifest = checkpoint.read(path).manifest()
    assert Manifest.from_json(manifest.to_json(), "x.onnx") == manifest
    assert (manifest.classes, manifest.size, manifest.resize) == (CLASSES, (64, 64), tiny_config.input.resize)
    assert (manifest.mean, manifest.std) == (tiny_config.input.mean, tiny_config.input.std)
    assert manifest.nms == tiny_config.model.select
    assert manifest.score == FIGURES["score"]
    assert manifest.metrics == {"mAP": 0.25, "mAP50": 0.5, "score": 0.3125}
    assert manifest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_session_detects_in_the_photos_pixels(tiny_config: config.Config, tmp_path: Path) -> None:
    settings = tiny_config.model_copy(
        update={"model": tiny_config.model.model_copy(update={"select": config.Select(score=0.0, iou=1.0)})}
    )
    path = tmp_path / "best.safetensors"
    save(path, settings)
    session = checkpoint.TorchSession(path, "cpu")
    assert session.classes == CLASSES
    photos = [np.full((50, 200, 3), 90, np.uint8), np.zeros((300, 70, 3), np.uint8)]
    for photo, found in zip(photos, session.detect(photos), strict=True):
        assert found.hw == photo.shape[:2]
        assert len(found) > 0
        assert (found.boxes >= 0).all()
        assert (found.boxes <= [photo.shape[1], photo.shape[0]] * 2).all()
        assert found.boxes[:, 2].max() > photo.shape[1] * 0.75
        assert found.boxes[:, 3].max() > photo.shape[0] * 0.75


# What is no checkpoint


def test_foreign_weights_are_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "backbone.safetensors"
    save_file({"features.0.weight": torch.zeros(3)}, path)
    assert f"model.weights={path}" in refused(checkpoint.read, path)
    save_file({"features.0.weight": torch.zeros(3)}, path, {"format": "pt"})
    assert "not a checkpoint of detkit" in refused(checkpoint.read, path)


@pytest.mark.parametrize("damage", ["cut", "header", "empty", "text", "folder", "absent"])
def test_a_damaged_file(tiny_config: config.Config, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.safetensors"
    save(path, tiny_config)
    whole = path.read_bytes()
    path.unlink()
    match damage:
        case "folder":
            path.mkdir()
        case "absent":
            pass
        case _:
            cut = {"cut": whole[: len(whole) // 2], "header": b"\xff" * 8 + whole[8:], "empty": b"", "text": b"hello\n"}
            path.write_bytes(cut[damage])
    refused(checkpoint.read, path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"classes": "[", "config": None},
        {"metrics": "no json"},
        {"epoch": "many"},
        {"config": "a: [1"},
        {"config": "- 1"},
        {"config": "name: x"},
        {"classes": ""},
    ],
)
def test_metadata_that_is_not_ours(tiny_config: config.Config, tmp_path: Path, metadata: dict[str, str]) -> None:
    good = {
        "detkit": "0",
        "config": config.dump(tiny_config),
        "classes": json.dumps(CLASSES),
        "epoch": "1",
        "metrics": "{}",
    }
    path = tmp_path / "a.safetensors"
    changed = {name: value for name, value in (good | metadata).items() if value is not None}
    save_file(detector(tiny_config).state_dict(), path, changed)
    refused(checkpoint.read, path)


# Which one is meant


def test_find_takes_a_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "any.onnx"
    path.touch()
    assert checkpoint.find(path) == path
    assert checkpoint.find(str(path)) == path


def test_find_takes_a_runs_best_then_its_last(tmp_path: Path) -> None:
    (tmp_path / "last.safetensors").touch()
    assert checkpoint.find(tmp_path).name == "last.safetensors"
    (tmp_path / "best.safetensors").touch()
    assert checkpoint.find(str(tmp_path)).name == "best.safetensors"


def test_find_without_a_name_takes_the_newest_run(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for age, name in enumerate(("b-2", "a-9", "b-10")):
        (runs / name).mkdir(parents=True)
        path = runs / name / ("last.safetensors" if name == "a-9" else "best.safetensors")
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    (runs / "empty-1").mkdir()
    (runs / "note.txt").touch()
    assert checkpoint.find(None, runs) == runs / "b-2" / "best.safetensors"
    os.utime(runs / "a-9" / "last.safetensors", (2e9, 2e9))
    assert checkpoint.find(None, runs) == runs / "a-9" / "last.safetensors"


def test_find_says_what_is_missing(tmp_path: Path) -> None:
    assert "no such model file or run folder" in refused(checkpoint.find, tmp_path / "nowhere")
    assert "best.safetensors" in refused(checkpoint.find, tmp_path)
    for runs in (tmp_path, tmp_path / "runs"):
        with pytest.raises(UserError, match="no trained run yet; train one with"):
            checkpoint.find(None, runs)


# What resuming needs


def test_the_state_is_read_back(tmp_path: Path) -> None:
    state = {"weights": {"a": torch.arange(3.0)}, "epoch": 3, "best": 0.5, "rng": torch.get_rng_state(), "more": [None]}
    checkpoint.write_state(tmp_path / checkpoint.STATE, state)
    got = checkpoint.read_state(tmp_path)[0]
    assert torch.equal(got["weights"].pop("a"), torch.arange(3.0))
    assert torch.equal(got.pop("rng"), state["rng"])
    assert got == {"weights": {}, "epoch": 3, "best": 0.5, "more": [None]}
    assert [file.name for file in tmp_path.iterdir()] == [checkpoint.STATE]


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_state_that_would_run_code_is_refused(tmp_path: Path, how: str) -> None:
    trap, state = tmp_path / "owned", tmp_path / checkpoint.STATE
    if how == "torch":
        checkpoint.write_state(state, {"epoch": Evil(trap)})
    else:
        content = pickle.dumps({"epoch": Evil(trap)}, protocol=2)
        state.write_bytes(checkpoint._HEAD + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
    with pytest.raises(UserError, match="cannot be read") as error:
        checkpoint.read_state(tmp_path)
    assert str(state) in str(error.value)
    assert "\n" not in str(error.value)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()  # it would have


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", "cut"])
def test_a_damaged_state(tmp_path: Path, content: bytes | str) -> None:
    state = tmp_path / checkpoint.STATE
    checkpoint.write_state(state, {"a": torch.zeros(100)})
    state.write_bytes(state.read_bytes()[:300] if isinstance(content, str) else content)
    refused(checkpoint.read_state, tmp_path)


def test_a_flipped_bit_is_found_in_weights_and_words(tiny_config: config.Config, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, tiny_config)
    whole = path.read_bytes()
    for at in (whole.index(b"Caf") if b"Caf" in whole else whole.index(b"epoch") + 10, len(whole) - 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        refused(checkpoint.read, path)
    path.write_bytes(whole)
    checkpoint.read(path)


def test_of_two_states_the_one_before_serves_where_the_last_is_damaged(tmp_path: Path) -> None:
    run = tmp_path / "a-1"
    state, previous = run / checkpoint.STATE, run / checkpoint.PREVIOUS
    for step in range(3):
        checkpoint.write_state(state, {"step": step})
    assert sorted(file.name for file in run.iterdir()) == [checkpoint.PREVIOUS, checkpoint.STATE]
    assert checkpoint.read_state(run) == ({"step": 2}, "")
    content = bytearray(state.read_bytes())
    content[200] ^= 1
    state.write_bytes(content)
    got, said = checkpoint.read_state(run)
    assert got == {"step": 1}
    assert said.startswith(f"{state}: damaged")
    state.unlink()  # as a kill between two renamings leaves it
    assert checkpoint.read_state(run) == ({"step": 1}, "")
    assert checkpoint.newest_stopped(tmp_path) == run
    previous.write_bytes(b"")
    state.write_bytes(content)
    assert str(state) in refused(checkpoint.read_state, run)


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    with checkpoint.locked(tmp_path):
        other = "import sys\nfrom pathlib import Path\nfrom detkit import checkpoint\n"
        other += "with checkpoint.locked(Path(sys.argv[1])): pass"
        done = subprocess.run([sys.executable, "-c", other, tmp_path], capture_output=True, text=True, check=False)
        assert "another process is training this run" in done.stderr.splitlines()[-1]
    with checkpoint.locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        ("abc", "ab", "also c"),
        ("a", "abc", "no b, c"),
        ("ax", "ay", "also x; no y"),
        ("ab", "ba", "another order"),
        ("abcdefgh", "a", "also b, c, d, e, f and 2 more"),
    ],
)
def test_the_difference_of_two_class_maps(data: str, model: str, words: str) -> None:
    assert checkpoint.class_difference(data, model) == words


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert "nothing to resume" in refused(checkpoint.read_state, tmp_path)
    assert "no run to resume" in refused(checkpoint.newest_stopped, tmp_path)


def test_the_newest_state_is_resumed(tmp_path: Path) -> None:
    for age, name in enumerate(("a-1", "b-1", "c-1")):
        (tmp_path / name).mkdir()
        if name != "a-1":
            checkpoint.write_state(tmp_path / name / checkpoint.STATE, {})
            os.utime(tmp_path / name / checkpoint.STATE, (1e9 - age, 1e9 - age))
    assert checkpoint.newest_stopped(tmp_path) == tmp_path / "b-1"


def test_pick_device() -> None:
    assert checkpoint.pick_device("cpu").type == "cpu"
    assert checkpoint.pick_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        refused(checkpoint.pick_device, "cuda")

"""A run that starts from another with other classes, through the command line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from detkit import checkpoint, config
from detkit.cli import main
from tests.test_train import SHELF, TINY


def train(*words: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["train", *words])
    assert end.value.code == 0


def test_a_run_starts_from_one_with_other_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    shutil.copytree(SHELF, data, ignore=shutil.ignore_patterns(".detkit-cache"))
    own = [*TINY, "train.epochs=1", "train.eval_every=1", f"data.cache={tmp_path / 'cache'}"]
    train("--config", "ssd_shelf.yaml", "--set", *own)
    first = checkpoint.read(Path("runs/ssd_shelf-1/best.safetensors"))
    gone = first.classes[3]
    for path in (data / "classes.txt", *(data / "Annotations").glob("*.xml")):
        path.write_text(path.read_text(encoding="utf-8").replace(gone, "a-new-one"), encoding="utf-8")

    # A rate of next to nothing: what is in the second run's checkpoint is what it started from.
    still = ["train.seed=5", "train.optimizer.lr=1e-12", "train.optimizer.weight_decay=0", f"data.root={data}"]
    capsys.readouterr()
    train("--init", "runs/ssd_shelf-1", "--set", *still)
    said = capsys.readouterr().out
    kept = [name for name in first.classes if name != gone]
    assert f"classes kept: {len(kept)}  " in said
    assert "classes new: 1  a-new-one" in said
    assert f"classes dropped: 1  {gone}" in said

    second = checkpoint.read(Path("runs/ssd_shelf-2/last.safetensors"))
    assert second.config.model.weights == str(first.path.absolute())
    assert second.config.model.head == first.config.model.head
    slots = [each.weights["head.scores.0.weight"].unflatten(0, (-1, len(each.classes))) for each in (first, second)]
    for name in kept:
        old, new = (each[:, model.classes.index(name)] for each, model in zip(slots, (first, second), strict=True))
        assert (old - new).abs().max() < 1e-6
    old, new = slots[0][:, 3], slots[1][:, second.classes.index("a-new-one")]
    assert (old - new).abs().max() > 1e-3
    assert config.load("runs/ssd_shelf-2/config.yaml").data.root == data


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--init", "nowhere"], "nowhere: no such model file or run folder"),
        (["--init", "runs", "--resume", "runs"], "leave out --overfit and --init"),
        (["--init", "broken.safetensors"], "broken.safetensors: "),
    ],
)
def test_what_is_no_run_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.safetensors").write_bytes(b"broken")
    with pytest.raises(SystemExit) as end:
        main(["train", *words])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1

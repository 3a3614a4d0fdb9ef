"""One line that helps: the nearest name, and which extra brings a missing package."""

from __future__ import annotations

import signal
import sys
import tomllib
from pathlib import Path

import pytest

from detkit.errors import Interrupted, UserError, missing, nearest, need


def test_the_nearest_name_is_named() -> None:
    assert nearest("trian.epochs", ["name", "train.epochs", "train.ema"]) == " (did you mean 'train.epochs'?)"
    assert nearest("epochs", iter(["epoch"])) == " (did you mean 'epoch'?)"


@pytest.mark.parametrize("known", [[], ["quite", "other"]])
def test_nothing_near_is_nothing_said(known: list[str]) -> None:
    assert nearest("zzz", known) == ""


def test_need_imports_what_is_there() -> None:
    assert need("json.decoder") is sys.modules["json.decoder"]


@pytest.mark.parametrize(
    ("module", "package", "extra"), [("lxml.etree", "lxml", "data"), ("cv2", "cv2", "train"), ("onnx", "onnx", "train")]
)
def test_need_says_what_to_install(monkeypatch: pytest.MonkeyPatch, module: str, package: str, extra: str) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=package)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(UserError) as error:
        need(module)
    assert str(error.value).startswith(f"{package} is not installed: ")
    assert f"'detkit[{extra}]'" in str(error.value)
    assert "\n" not in str(error.value)


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = ("lxml", "albumentations", "onnx", "safetensors", "scipy", "timm", "torch", "torchvision")
    for package in (*packages, "filelock", "optuna"):
        answer = missing(ModuleNotFoundError(name=package))
        assert answer is not None
        extra = str(answer).partition("[")[2].partition("]")[0]
        assert any(line.startswith(package) for line in project["optional-dependencies"][extra])


def test_need_does_not_blame_the_wrong_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is there but lacks one of its own is not answered with an extra that wouldn't help."""
    (tmp_path / "halfway_there.py").write_text("import lacking_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="lacking_dependency"):
        need("halfway_there")
    assert missing(ModuleNotFoundError("nameless")) is None


def test_an_interruption_exits_as_its_signal_does() -> None:
    stopped = Interrupted("go on with --resume", signal.SIGTERM)
    assert str(stopped) == "go on with --resume"
    assert stopped.exit_code == 143
    assert not isinstance(stopped, UserError)

"""One line that helps: the nearest name, and which extra brings a missing package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from detkit.errors import UserError, nearest, need


def test_the_nearest_name_is_named() -> None:
    assert nearest("trian.epochs", ["name", "train.epochs", "train.ema"]) == " (did you mean 'train.epochs'?)"
    assert nearest("epochs", iter(["epoch"])) == " (did you mean 'epoch'?)"


@pytest.mark.parametrize("known", [[], ["quite", "other"]])
def test_nothing_near_is_nothing_said(known: list[str]) -> None:
    assert nearest("zzz", known) == ""


def test_need_imports_what_is_there() -> None:
    assert need("json.decoder") is sys.modules["json.decoder"]


@pytest.mark.parametrize(("module", "extra"), [("lxml.etree", "data"), ("torch", "train"), ("pycocotools.mask", "train")])
def test_need_says_what_to_install(module: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = module.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", sys.meta_path[:2])  # no finder of editable installs
    with pytest.raises(UserError, match=rf"{package} is not installed: .*'detkit\[{extra}\]'") as error:
        need(module)
    assert "\n" not in str(error.value)


def test_need_does_not_blame_the_wrong_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is there but lacks one of its own is not answered with an extra that wouldn't help."""
    (tmp_path / "halfway_there.py").write_text("import lacking_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="lacking_dependency"):
        need("halfway_there")

"""Settings: where a config is found, what is said of a mistake, overrides, and what is shipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from detkit import config
from detkit.errors import UserError
from detkit.nn.detector import Detector

SHIPPED = sorted(path.name for path in config.shipped().glob("*.yaml"))


def complaint(act: Callable[..., object], *given: Any) -> str:
    """The one line of the UserError that `act` raises."""
    with pytest.raises(UserError) as error:
        act(*given)
    line = str(error.value)
    assert "\n" not in line
    assert len(line) < 300
    return line


def refused(*assignments: str, name: str = "ssd_vgg.yaml") -> str:
    return complaint(config.load, name, assignments)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes ssd_mobilenet.yaml, edited, as a.yaml."""

    def edited(edit: Callable[[dict[str, Any]], object]) -> Path:
        tree = yaml.safe_load((config.shipped() / "ssd_mobilenet.yaml").read_text())
        edit(tree)
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return edited


# Where a config is found


def test_found_by_path_then_in_configs_then_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.find("ssd_vgg.yaml").parent == config.shipped()
    (tmp_path / "configs").mkdir()
    for place in (Path("configs/ssd_vgg.yaml"), Path("ssd_vgg.yaml")):
        place.touch()
        assert config.find("ssd_vgg.yaml") == place
        assert config.find("ssd_vgg") == place
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.touch()
    assert config.find(elsewhere) == elsewhere
    assert config.find(elsewhere.with_suffix("")) == elsewhere


@pytest.mark.parametrize("typo", ["ssd_vg.yaml", "ssd_vg", "configs/ssd_vg.yaml", "sdd_vgg.yml"])
def test_a_wrong_name_is_answered_with_the_nearest(typo: str) -> None:
    line = complaint(config.find, typo)
    assert line.startswith(f"{typo}: no such config (did you mean 'ssd_vgg.yaml'?)")
    assert "ssd_mobilenet.yaml" in line


def test_a_folder_is_no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ssd_vgg").mkdir()
    assert config.find("ssd_vgg").is_file()
    assert "no such config" in complaint(config.find, tmp_path)


# Overrides


@pytest.mark.parametrize(
    ("assignment", "get", "value"),
    [
        ("train.epochs=5", lambda c: c.train.epochs, 5),
        ("train.optimizer.lr=1e-3", lambda c: c.train.optimizer.lr, 0.001),
        ("train.optimizer.name=adamw", lambda c: c.train.optimizer.name, "adamw"),
        ("train.channels_last=false", lambda c: c.train.channels_last, False),
        ("train.schedule.milestones=[0.5, 0.75]", lambda c: c.train.schedule.milestones, (0.5, 0.75)),
        ("input.size=[320, 512]", lambda c: c.input.size, (320, 512)),
        ("data.root=some/where", lambda c: c.data.root, Path("some/where")),
        ("data.classes=[tin, box]", lambda c: c.data.classes, ("tin", "box")),
        ("data.classes=names.txt", lambda c: c.data.classes, Path("names.txt")),
        ("data.classes=null", lambda c: c.data.classes, None),
        ("model.weights=a=b.pth", lambda c: c.model.weights, "a=b.pth"),
        ("model.neck={name: pan}", lambda c: c.model.neck, config.PAN()),
        ("train.progressive=[[0.5, 0.4]]", lambda c: c.train.progressive, ((0.5, 0.4),)),
    ],
)
def test_set(assignment: str, get: Callable[[config.Config], Any], value: object) -> None:
    before = config.load("ssd_vgg")
    after = config.load("ssd_vgg", [assignment])
    got = get(after)
    assert got == value
    assert type(got) is type(value)
    assert (before == after) == (get(before) == value)


def test_set_applies_in_order_and_leaves_the_rest() -> None:
    before = config.load("ssd_vgg").model_dump()
    after = config.load("ssd_vgg", ["train.epochs=5", "train.epochs=6", "runs=else"]).model_dump()
    assert after["train"].pop("epochs") == 6
    assert after.pop("runs") == Path("else")
    del before["train"]["epochs"], before["runs"]
    assert before == after


def test_set_reaches_a_group_that_the_file_leaves_out(write: Callable[..., Path]) -> None:
    path = write(lambda tree: tree["model"].pop("select"))
    assert config.load(path, ["model.select.keep=7"]).model.select == config.Select(keep=7)


def test_set_switches_a_union() -> None:
    before, after = (config.load("ssd_mobilenet", more).model.neck for more in ([], ["model.neck.name=fpn"]))
    assert after == config.FPN(channels=before.channels, levels=before.levels)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("trian.epochs=5", "no setting 'trian.epochs' (did you mean 'train.epochs'?)"),
        ("train.epoch=5", "did you mean 'train.epochs'?"),
        ("model.neck.chanels=5", "did you mean 'model.neck.channels'?"),
        ("data.root.x=5", "did you mean 'data.root'?"),
        ("train.epochs", "name=value"),
        ("train.epochs=[1", "not YAML"),
        ("train.epochs=", "train: set either epochs or iterations"),
        ("train.iterations=9", "train: set either epochs or iterations"),
        ("train.epochs=many", "train.epochs: input should be a valid integer"),
        ("train.epochs=1.5", "train.epochs: "),
        ("train.epochs=0", "train.epochs: input should be greater than 0, not 0"),
        ("augment.flip=.nan", "augment.flip: "),
        ("data.classes=5", "data.classes: "),
        ("data.classes=[tin, 1]", "data.classes.1: "),
        ("input.mean=[1, 2]", "input.mean.2: "),
        ("model.backbone.name=vgg12", "(did you mean 'vgg1"),
        (
            "model.neck.name=pam",
            "model.neck.name: should be one of ssd_extras, pan, fpn, none, not pam (did you mean 'pan'?)",
        ),
        ("model.neck={levels: 3}", "model.neck.name: missing"),
        # A setting of another neck: said so, not suggested again.
        ("model.neck.channels=5", "'model.neck.channels' is no setting of ssd_extras"),
        ("model.head.ratios=[[2]]", "model.head: 1 levels of ratios need 2 scales"),
        ("model.head.steps=[8]", "model.head: 6 levels of ratios need as many steps"),
        ("name=a/b", "name: "),
        ("model=3", "model: "),
        ("train=null", "train: "),
    ],
)
def test_set_refuses(assignment: str, words: str) -> None:
    assert words in refused(assignment)


def test_set_under_something_that_is_no_group(write: Callable[..., Path]) -> None:
    path = write(lambda tree: tree.update(train=7))
    assert "'train' is not a group" in complaint(config.load, path, ["train.epochs=5"])


# Files


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tree: tree.update(trian={}), "no setting 'trian' (did you mean 'train'?)"),
        (lambda tree: tree["train"].update(epoch=3), "no setting 'train.epoch' (did you mean 'train.epochs'?)"),
        (lambda tree: tree["model"]["neck"].update(chanels=3), "'model.neck.chanels' (did you mean 'model.neck.chann"),
        (lambda tree: tree["model"]["head"].update(scale=3), "'model.head.scale' (did you mean 'model.head.scales'?)"),
        (lambda tree: tree["train"].pop("epochs"), "train: set either epochs or iterations"),
        (lambda tree: tree["model"].pop("neck"), "model.neck: field required"),
        (lambda tree: tree["model"]["neck"].pop("name"), "model.neck.name: missing"),
        (lambda tree: tree["train"].update({1: 2}), "train"),
    ],
)
def test_a_mistake_in_the_file(write: Callable[..., Path], edit: Callable[[Any], object], words: str) -> None:
    path = write(edit)
    line = complaint(config.load, path)
    assert line.startswith(f"{path}: ")
    assert words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: a\nmodel: [1", "not valid YAML (line "),
        (b"", "not a config"),
        (b"- a\n", "not a config"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"name: a\x00b", "not valid YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (b"name: a\n", "field required"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    line = complaint(config.load, path)
    assert line.startswith(f"{path}: ")
    assert words in line


# The whole


def test_frozen(tiny_config: config.Config) -> None:
    for group, key in ((tiny_config, "name"), (tiny_config.train, "epochs"), (tiny_config.model.neck, "levels")):
        with pytest.raises(ValidationError):
            setattr(group, key, getattr(group, key))


@pytest.mark.parametrize("name", SHIPPED)
def test_dump_is_read_back_equal(name: str, tmp_path: Path) -> None:
    odd = ["train.optimizer.lr=0.00001", "data.classes=['1', 'yes', 'Müsli', 'a: b']", "train.clip_norm=0"]
    for settings in (config.load(name), config.load(name, odd), config.load(name, ["data.classes=a/b.txt"])):
        path = tmp_path / "config.yaml"
        path.write_text(config.dump(settings), encoding="utf-8")
        assert config.load(path) == settings


def test_every_setting_is_named_and_described_in_the_schema() -> None:
    schema = json.loads(json.dumps(config.Config.model_json_schema()))
    assert set(schema["properties"]) == set(config.Config.model_fields)
    assert set(schema["required"]) == {"name", "data", "input", "model", "train"}
    assert schema["additionalProperties"] is False
    listed = list(config.names())
    assert {"train.optimizer.lr", "model.neck.channels", "model.neck.reduced_fc", "model.head.scales"} <= set(listed)
    leaves = {name.rpartition(".")[2] for name in listed}
    assert leaves == {key for group in (schema, *schema["$defs"].values()) for key in group.get("properties", {})}


def test_configs_are_shipped() -> None:
    assert {"ssd_vgg.yaml", "ssd_resnet.yaml", "ssd_mobilenet.yaml"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_makes_a_detector_that_fits(name: str) -> None:
    settings = config.load(name)
    assert settings.name == Path(name).stem
    canvases = {settings.train.canvas(settings.input.size, epoch) for epoch in range(settings.train.epochs)}
    with torch.device("meta"):
        detector = Detector(settings.model, settings.input, 20)
        for hw in canvases | {settings.input.size}:
            boxes, scores = detector.head.decode(detector(torch.zeros(1, 3, *hw, dtype=torch.uint8)))
            assert boxes.shape[2] in (1, 20)
            assert boxes.shape == (1, scores.shape[1], boxes.shape[2], 4)
            assert scores.shape[2] == 20


@pytest.mark.parametrize("levels", [2, 7])
def test_a_head_that_does_not_fit_its_neck(levels: int) -> None:
    settings = config.load("ssd_vgg", [f"model.neck.levels={levels}"])
    with torch.device("meta"):
        line = complaint(Detector, settings.model, settings.input, 3)
    assert f"6 levels of default boxes for {levels} feature maps" in line
    assert "model.neck.levels" in line


# The canvas of training


def train(epochs: int, progressive: list[tuple[float, float]]) -> config.Train:
    return config.Train(epochs=epochs, batch_size=1, optimizer=config.SGD(lr=0.1), progressive=progressive)


def test_the_canvas_grows_as_said() -> None:
    settings = train(10, [(0.4, 0.5), (0.7, 0.75)])
    sizes = [settings.canvas((256, 512), epoch) for epoch in range(10)]
    assert sizes == [(128, 256)] * 4 + [(192, 384)] * 3 + [(256, 512)] * 3


def test_the_canvas_is_as_set_without_progressive() -> None:
    assert {train(3, []).canvas((300, 301), epoch) for epoch in range(3)} == {(300, 301)}


@given(st.integers(1, 1000), st.integers(1, 1000), st.floats(0, 1), st.floats(0, 1))
def test_a_reduced_canvas_is_a_multiple_of_32(height: int, width: int, until: float, share: float) -> None:
    settings = train(4, [(until, share)])
    for epoch in range(4):
        canvas = settings.canvas((height, width), epoch)
        if epoch >= until * 4 or share == 1:
            assert canvas == (height, width)
        else:
            assert all(side % 32 == 0 and side >= 32 for side in canvas)
            assert all(abs(side - share * full) <= 32 for side, full in zip(canvas, (height, width), strict=True))

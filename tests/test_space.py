"""Search spaces: what they may say, for which config, and what a wrong one is answered with."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from detkit import config, space
from detkit.errors import UserError


@pytest.fixture(scope="module")
def settings() -> config.Config:
    return config.load("ssd_shelf.yaml")


def parsed(text: str, settings: config.Config) -> space.Space:
    return space.parse(yaml.safe_load(text), settings, "mine.yaml")


def test_numbers_are_whole_where_the_setting_is(settings: config.Config) -> None:
    found = parsed("{train.batch_size: {low: 4, high: 16}, augment.mosaic: {low: 0, high: 1}}", settings)
    rng = random.Random(0)
    assert {found["train.batch_size"].draw(rng) for _ in range(200)} == set(range(4, 17))
    assert any(found["augment.mosaic"].draw(rng) % 1 for _ in range(9))


def test_multiples_are_of_what_the_config_has(settings: config.Config) -> None:
    (values,) = parsed("train.optimizer.lr: {times: [0.1, 10]}", settings).values()
    assert isinstance(values, space.Numbers)
    assert (values.low, values.high) == pytest.approx((0.0002, 0.02))
    assert values.log


def test_numbers_may_be_written_as_yaml_takes_for_text(settings: config.Config) -> None:
    (values,) = parsed("train.optimizer.lr: {low: 1e-4, high: 1e-2, log: true}", settings).values()
    assert isinstance(values, space.Numbers)
    assert values.low == 1e-4
    assert space.starting(parsed("train.optimizer.lr: [2e-3, 1e-2]", settings), settings) == {
        "train.optimizer.lr": 0.002
    }


@given(st.floats(1e-6, 1.0), st.floats(1.01, 1e4), st.booleans(), st.integers(0, 99))
def test_what_is_drawn_lies_between_the_ends(low: float, factor: float, log: bool, seed: int) -> None:
    values = space.Numbers(low, low * factor, log, None, False)
    assert low * (1 - 1e-9) <= values.draw(random.Random(seed)) <= low * factor * (1 + 1e-9)


@given(st.integers(-9, 9), st.integers(1, 40), st.sampled_from([0.1, 0.25, 1.0, 3.0]), st.integers(0, 99))
def test_steps_are_counted_from_the_low_end(low: int, count: int, step: float, seed: int) -> None:
    values = space.Numbers(low, low + count * step, False, step, False)
    value = values.draw(random.Random(seed))
    assert values.has(value)
    assert not values.has(value + step / 2)
    assert not values.has(low + (count + 1) * step)


def test_a_group_is_set_whole_and_a_setting_of_it_after_that(settings: config.Config) -> None:
    found = parsed(
        """
        train.optimizer.lr: {low: 0.001, high: 0.1, log: true}
        train.optimizer: [{name: sgd, lr: 1, nesterov: false}, {name: muon, lr: 1}]
        """,
        settings,
    )
    labels = {"train.optimizer.lr": 0.02, "train.optimizer": "{name: sgd, lr: 1, nesterov: false}"}
    optimizer = space.applied(settings.model_dump(mode="json"), found, labels, "x").train.optimizer
    assert optimizer == config.SGD(lr=0.02, nesterov=False)
    assert space.starting(found, settings) == {"train.optimizer.lr": 0.002}  # AdamW is not among the groups


def test_the_starting_values_are_found_among_choices(settings: config.Config) -> None:
    text = "{input.size: [[96, 128], [240, 320]], train.schedule: [{name: plateau}, {name: cosine, warmup_steps: 100}]}"
    assert space.starting(parsed(text, settings), settings) == {
        "input.size": "[240, 320]",
        "train.schedule": "{name: cosine, warmup_steps: 100}",
    }


def test_a_value_that_is_possible_with_some_others_is_one(settings: config.Config) -> None:
    """Milestones are of one schedule alone."""
    text = "{train.schedule.milestones: [[0.5], [0.6, 0.8]], train.schedule.name: [cosine, multistep]}"
    assert len(parsed(text, settings)) == 2
    with pytest.raises(UserError, match=r"milestones=\[0.5\].*milestones is of multistep, not of cosine"):
        parsed("train.schedule.milestones: [[0.5], [0.6, 0.8]]", settings)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2]", "not a search space"),
        ("{}", "not a search space"),
        ("train.optimiser.lr: [1, 2]", "'train.optimiser.lr' (did you mean 'train.optimizer.lr'?)"),
        ("train.optimizer.lr: 5", "train.optimizer.lr: give a range, such as {low: 1, high: 9}, or a list"),
        ("train.optimizer.lr: {low: 1}", "train.optimizer.lr: give low and high, or times"),
        ("train.optimizer.lr: {hihg: 1, low: 0}", "hihg: no such part of a range (did you mean 'high'?)"),
        ("train.optimizer.lr: {low: 1, high: 0.1}", "the first end is to be below the second, not 1 and 0.1"),
        ("train.optimizer.lr: {low: 0, high: 1, log: true}", "log needs a low above 0"),
        ("train.optimizer.lr: {low: 1, high: 9, log: true, step: 1}", "step goes with low and high, without log"),
        ("train.optimizer.lr: {low: -1, high: 1}", "lr=-1.0: train.optimizer.lr: input should be greater than 0"),
        ("train.batch_size: {low: 0.2, high: 0.8}", "train.batch_size: there are no two whole numbers"),
        ("train.batch_size: [4, 0]", "train.batch_size=0: train.batch_size: input should be greater than 0"),
        ("train.batch_size: [4, 4]", "train.batch_size: a value is there twice"),
        ("train.batch_size: [4]", "train.batch_size: give two values or more"),
        ("train.channels_last: {low: 0, high: 1}", "train.channels_last: this is no number"),
        ("augment.flip: {times: [1, 2]}", "augment.flip: times needs a number above 0 in the config, not 0.0"),
        ("model.head.dropout: [0, 0.1]", "'model.head.dropout' is no setting of ssd"),
        ("model.neck: [{name: pan}, {name: fpm}]", "model.neck.name: should be one of"),
        ("data.val: [a, b]", "data.val: all trials of a study have the same data"),
    ],
)
def test_a_wrong_space_is_one_line_that_names_file_and_setting(text: str, said: str, settings: config.Config) -> None:
    with pytest.raises(UserError) as error:
        parsed(text, settings)
    line = str(error.value)
    assert line.startswith("mine.yaml: ")
    assert said in line
    assert "\n" not in line


def test_grids_are_finite(settings: config.Config) -> None:
    found = parsed(
        "{train.batch_size: {low: 4, high: 16, step: 6}, augment.flip: {low: 0, high: 0.5, step: 0.25}}", settings
    )
    assert space.combinations(found, "x") == {"train.batch_size": [4, 10, 16], "augment.flip": [0, 0.25, 0.5]}
    with pytest.raises(UserError, match=r"train\.optimizer\.lr: a grid needs a list of values, or a step"):
        space.combinations(parsed("train.optimizer.lr: {times: [0.5, 2]}", settings), "x")
    with pytest.raises(UserError, match="a grid of"):
        space.combinations(parsed("train.seed: {low: 0, high: 1000000000}", settings), "x")


@pytest.mark.parametrize("name", sorted(path.stem for path in config.shipped().glob("*.yaml")))
def test_the_default_space_fits_every_shipped_config(name: str) -> None:
    settings = config.load(name)
    found, tree, left_out = space.load(None, settings)
    assert found.keys() == tree.keys()
    assert {"train.optimizer.lr", "train.optimizer.weight_decay", "augment.colour"} <= found.keys()
    assert not left_out
    assert space.starting(found, settings).keys() >= {"train.optimizer.lr", "train.optimizer.weight_decay"}


def test_the_default_space_leaves_out_what_does_not_fit() -> None:
    settings = config.load("ssd_shelf.yaml", ["train.optimizer.weight_decay=0"])
    found, _, left_out = space.load(None, settings)
    assert "train.optimizer.weight_decay" not in found
    assert len(left_out) == 1
    assert "train.optimizer.weight_decay" in left_out[0]


def test_spaces_are_found_as_configs_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "search").mkdir(parents=True)
    mine = tmp_path / "configs" / "search" / "mine.yaml"
    mine.write_text("train.seed: [0, 1]\n", encoding="utf-8")
    assert space.find("mine") == Path("configs/search/mine.yaml")
    with pytest.raises(UserError, match="defualt: no such search space"):
        space.find("defualt")
    mine.write_text("a: [1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine.yaml: not valid YAML \(line "):
        space.load("mine", config.load("ssd_shelf.yaml"))


def test_the_schema_knows_every_setting_that_can_be_varied(settings: config.Config) -> None:
    schema: dict[str, Any] = json.loads(json.dumps(space.schema()))
    assert {"train.optimizer", "train.optimizer.lr", "augment.mosaic", "input.size"} <= schema["properties"].keys()
    assert "data.root" not in schema["properties"]
    assert schema["$defs"]["Range"]["properties"].keys() == space.Range.model_fields.keys()

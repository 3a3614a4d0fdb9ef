"""Tuning: how trials are given out, gone on with and counted; and real studies on shelf-mini."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState
from rich.console import Console

from detkit import checkpoint, config, trials, tune
from detkit.cli import main
from detkit.errors import Interrupted, UserError
from detkit.files import next_folder
from tests.test_train import TINY, same_weights, settings

Figure = Callable[[config.Config, int], float]
SPACE = {"train.optimizer.lr": {"low": 1e-4, "high": 1.0, "log": True}, "augment.crop": {"low": 0, "high": 1}}


class Killed(BaseException):
    """What ends a process from outside: nothing catches it."""


class Stub:
    """Runs that are not trained: an epoch's figure is a function of the config, which a run leaves as a real one."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.epochs: list[tuple[str, int]] = []  # each that was trained, and its run's folder
        self.kill_at = -1  # the epoch, counted over all runs, before which the process is killed

    def start(self, cfg: config.Config, _console: Console, ends: float, judge: Any) -> Path:
        folder = next_folder(cfg.runs / f"{cfg.name}-")
        (folder / "config.yaml").write_text(config.dump(cfg), encoding="utf-8")
        return self.go_on(folder, 0, ends, judge)

    def resume(self, folder: Path, _console: Console, _changes: tuple[str, ...], ends: float, judge: Any) -> Path:
        return self.go_on(folder, checkpoint.read_state(folder)[0]["epoch"], ends, judge)

    def go_on(self, folder: Path, done: int, ends: float, judge: Any) -> Path:
        cfg = config.load(folder / "config.yaml")
        checkpoint.write_state(folder / checkpoint.STATE, {"epoch": done, "finished": False})
        last = cfg.train.epochs or 0
        for epoch in range(done + 1, last + 1):
            if time.time() > ends:
                break
            if len(self.epochs) == self.kill_at:
                self.kill_at = -1
                raise Killed
            self.epochs.append((folder.name, epoch))
            figures = dict.fromkeys(("mAP", "mAP50", "mAP75", "VOC_AP50", "AR"), self.figure(cfg, epoch))
            checkpoint.write(folder / checkpoint.BEST, {}, cfg, (), epoch, figures)
            judge(SimpleNamespace(epoch=epoch, epochs=last, finished=epoch == last), figures)
            checkpoint.write_state(folder / checkpoint.STATE, {"epoch": epoch, "finished": epoch == last})
        return folder


def near(cfg: config.Config, epoch: int) -> float:
    """High for rates near 0.03 and little cropping, and growing with the epochs."""
    off = abs(math.log10(cfg.train.optimizer.lr / 0.03)) + cfg.augment.crop
    return max(0.0, 1 - off / 4) * epoch / (cfg.train.epochs or 1)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    runs = Stub(near)
    monkeypatch.setattr(tune.train, "start", runs.start)
    monkeypatch.setattr(tune.train, "resume", runs.resume)
    return runs


def plan(tmp_path: Path, *more: str, **others: Any) -> tune.Plan:
    start = settings(tmp_path, "train.epochs=4", "train.eval_every=1", *more)
    return tune.Plan(start=start, **{"space": SPACE, "sampler": "random", "pruner": "none", **others})


def made(tmp_path: Path, one: tune.Plan, name: str = "study") -> Path:
    folder = tmp_path / "runs" / name
    tune.create(folder, one)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def figures(folder: Path) -> list[list[str]]:
    """What of trials.csv does not depend on the machine."""
    return [[value for name, value in row.items() if name != "minutes"] for row in rows(folder)]


def said(folder: Path, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=300)
    tune.run(folder, console, **options)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_starting_configuration_is_the_first_trial_and_the_best_is_ready_to_train(
    tmp_path: Path, stub: Stub
) -> None:
    one = plan(tmp_path, "train.optimizer.lr=0.0005")
    folder = made(tmp_path, one)
    text = said(folder, most=8)
    found = rows(folder)
    assert [row["trial"] for row in found] == [str(number) for number in range(8)]
    assert {row["state"] for row in found} == {"complete"}
    assert config.load(folder / "trial-0-1" / "config.yaml").train.optimizer == one.start.train.optimizer
    best = max(found, key=lambda row: float(row["mAP"]))
    assert float(best["mAP"]) > float(found[0]["mAP"])
    assert f"trial {best['trial']}: mAP {float(best['mAP']):.4f}, the starting configuration's" in text
    tuned = config.load(folder / "best.yaml")
    assert tuned.train.optimizer.lr == float(best["train.optimizer.lr"])
    assert tuned.augment.crop == float(best["augment.crop"])
    assert (tuned.name, tuned.runs, tuned.train.epochs) == ("ssd_shelf-tuned", one.start.runs, 4)
    run = config.load(folder / f"trial-{best['trial']}-1" / "config.yaml")
    assert tuned.model_copy(update={"name": run.name, "runs": run.runs}) == run
    assert {path.name for path in folder.glob("*.png")} == {"history.png", "slices.png", "importance.png"}


def test_where_no_trial_is_better_that_is_said_and_the_config_stays(tmp_path: Path, stub: Stub) -> None:
    one = plan(tmp_path, "train.optimizer.lr=0.03", "augment.crop=0")
    folder = made(tmp_path, one)
    assert "no trial was better than the starting configuration" in said(folder, most=4)
    assert config.load(folder / "best.yaml").train == one.start.train


def test_a_start_outside_the_space_is_tried_as_it_is(tmp_path: Path, stub: Stub) -> None:
    folder = made(tmp_path, plan(tmp_path, "train.optimizer.lr=7"))
    said(folder, most=2)
    assert config.load(folder / "trial-0-1" / "config.yaml").train.optimizer.lr == 7
    assert [row["train.optimizer.lr"] == "" for row in rows(folder)] == [True, False]
    assert rows(folder)[0]["augment.crop"] == "0.5"


def test_trials_are_drawn_from_seed_and_number(tmp_path: Path, stub: Stub) -> None:
    """So neither a pause nor other processes change them, nor does one draw what another has."""
    whole, parts, other = (
        made(tmp_path, plan(tmp_path, seed=seed), name) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    said(whole, most=6)
    said(other, most=6)
    for most in (2, 3, 6):
        said(parts, most=most)
    assert figures(whole) == figures(parts)
    assert figures(whole)[0] == figures(other)[0]
    drawn = {row["train.optimizer.lr"] for folder in (whole, other) for row in rows(folder)}
    assert len(drawn) == 11


@pytest.mark.parametrize("kill_at", [0, 1, 3, 4, 5, 8, 11, 12])
def test_a_killed_study_goes_on_to_what_it_would_have_come_to(tmp_path: Path, stub: Stub, kill_at: int) -> None:
    whole = made(tmp_path, plan(tmp_path), "whole")
    said(whole, most=3)
    epochs = Counter(epoch for _, epoch in stub.epochs)
    stub.epochs.clear()
    stub.kill_at = kill_at
    killed = made(tmp_path, plan(tmp_path), "killed")
    if kill_at < 12:
        with pytest.raises(Killed):
            said(killed, most=3)
    said(killed, most=3)
    assert figures(killed) == figures(whole)
    assert Counter(epoch for _, epoch in stub.epochs) == epochs  # nothing was trained twice
    assert len(list(killed.glob("trial-*-*/"))) == 3


def test_a_run_that_ended_unseen_is_not_trained_again(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path, plan(tmp_path))

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(optuna.Study, "tell", killed)
        with pytest.raises(Killed):
            said(folder, most=1)
    assert len(stub.epochs) == 4
    said(folder, most=1)
    assert len(stub.epochs) == 4
    assert rows(folder)[0]["state"] == "complete"


def test_a_trial_that_another_process_works_on_is_left_to_it(tmp_path: Path, stub: Stub) -> None:
    folder = made(tmp_path, plan(tmp_path))
    one, other = (tune.Study(folder, None, 3, Console(quiet=True), math.inf) for _ in range(2))
    with one._claimed() as first:
        with other._claimed() as second:
            assert first is not None
            assert second is not None
            assert (first.number, second.number) == (0, 1)
        with other._claimed() as second:  # let go unfinished, so it is taken up again
            assert second is not None
            assert second.number == 1
        other.work()
    states = [trial.state for trial in one.study.get_trials()]
    assert states == [TrialState.RUNNING, TrialState.COMPLETE, TrialState.COMPLETE]
    other.work()
    assert other.study.get_trials()[0].state == TrialState.COMPLETE
    assert len({name for name, _ in stub.epochs}) == 3


@given(cut=st.integers(0, 400))
def test_half_a_line_of_a_journal_costs_no_more_than_itself(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """What a crash in the middle of a write leaves: Optuna alone could not read on after the next line."""
    tmp_path = tmp_path_factory.mktemp("journal")
    (tmp_path / "locks").mkdir()
    storage = tune._storage(None, tmp_path)
    study = optuna.create_study(storage=storage, study_name="x")
    for _ in range(3):
        study.ask()
    journal = tmp_path / tune.JOURNAL
    content = journal.read_bytes()
    journal.write_bytes(content[: max(len(content) - cut, content.index(b"\n") + 1)])
    again = optuna.load_study(storage=tune._storage(None, tmp_path), study_name="x")
    begun = len(again.get_trials())
    again.ask()
    again.ask()
    last = optuna.load_study(storage=tune._storage(None, tmp_path), study_name="x")
    assert len(last.get_trials()) == begun + 2
    for line in journal.read_text(encoding="utf-8").splitlines():
        json.loads(line)


@pytest.mark.parametrize("pruner", ["median", "hyperband", "none"])
def test_bad_trials_are_pruned_but_never_the_first(tmp_path: Path, stub: Stub, pruner: str) -> None:
    stub.figure = lambda cfg, _epoch: 0.5 if cfg.train.optimizer.lr > 0.001 else 0.001
    folder = made(tmp_path, plan(tmp_path, "train.epochs=9", "train.optimizer.lr=0.0002", pruner=pruner))
    said(folder, most=20)
    pruned = [row for row in rows(folder) if row["state"] == "pruned"]
    assert bool(pruned) == (pruner != "none")
    assert rows(folder)[0]["state"] == "complete"
    for row in pruned:
        assert int(row["epoch"]) < 9
        assert row["reason"] == f"mAP {float(row['mAP']):.4f} after epoch {row['epoch']} of 9"
    if pruner == "median":
        assert {row["mAP"] for row in pruned} == {"0.001"}


def test_a_grid_is_gone_through_once_with_the_start_first(tmp_path: Path, stub: Stub) -> None:
    grid = {"train.optimizer.lr": [1e-3, 2e-3, 1e-2], "augment.crop": {"low": 0, "high": 1, "step": 0.5}}
    folder = made(tmp_path, plan(tmp_path, sampler="grid", space=grid))
    said(folder, most=5)
    assert len(rows(folder)) == 5
    said(folder, most=99)
    found = [(float(row["train.optimizer.lr"]), float(row["augment.crop"])) for row in rows(folder)]
    assert found[0] == (0.002, 0.5)
    assert sorted(found) == [(lr, crop) for lr in (1e-3, 2e-3, 1e-2) for crop in (0, 0.5, 1)]


def test_combinations_that_are_no_config_fail_with_their_reason_and_do_not_count(tmp_path: Path, stub: Stub) -> None:
    searched = {"train.accumulate": [1, 3], "train.batch_size": [8, 6]}
    folder = made(tmp_path, plan(tmp_path, sampler="grid", space=searched))
    said(folder, most=3)
    (failed,) = [row for row in rows(folder) if row["state"] == "fail"]
    assert len(rows(folder)) == 4
    assert failed["reason"] == f"trial-{failed['trial']}: train: batch_size 8 is no multiple of accumulate, 3"


def test_values_that_were_tried_are_not_trained_again(tmp_path: Path, stub: Stub) -> None:
    folder = made(tmp_path, plan(tmp_path, space={"train.ema": [0.9, 0.99]}))
    said(folder, most=7)
    assert len({name for name, _ in stub.epochs}) == 3  # the start, whose decay is another, and two
    assert sum("the same as trial" in row["reason"] for row in rows(folder)) == 4


def test_what_fails_in_training_is_pruned_and_what_fails_alike_ends_the_study(tmp_path: Path, stub: Stub) -> None:
    def figure(cfg: config.Config, epoch: int) -> float:
        if cfg.train.optimizer.lr > 0.01:
            raise UserError("the loss is no longer finite" + str(cfg.train.optimizer.lr) * varied)
        return 0.5

    stub.figure = figure
    varied = 1
    folder = made(tmp_path, plan(tmp_path))
    said(folder, most=12)
    for row in rows(folder):
        high = float(row["train.optimizer.lr"]) > 0.01
        assert row["state"] == ("pruned" if high else "complete")
        assert ("no longer finite" in row["reason"]) == high
    varied = 0
    folder = made(tmp_path, plan(tmp_path, space=SPACE | {"train.optimizer.lr": {"low": 0.02, "high": 1}}), "alike")
    with pytest.raises(UserError, match="too many trials in a row have failed: the loss is no longer finite"):
        said(folder, most=12)
    assert len(rows(folder)) == 6


def test_a_start_that_cannot_be_trained_at_all_is_an_error_until_it_is_mended(
    tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> Path:
        raise UserError("no such folder")

    folder = made(tmp_path, plan(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(tune.train, "start", broken)
        for _ in range(2):
            with pytest.raises(UserError, match=r"^no such folder$"):
                said(folder, most=3)
    said(folder, most=3)
    assert [row["state"] for row in rows(folder)] == ["complete"] * 3


def test_a_defect_is_not_met_again(tmp_path: Path, stub: Stub) -> None:
    def figure(cfg: config.Config, epoch: int) -> float:
        if cfg.runs.name == "study" and cfg.name == "trial-1":
            raise ZeroDivisionError("a defect")
        return 0.5

    stub.figure = figure
    folder = made(tmp_path, plan(tmp_path))
    with pytest.raises(ZeroDivisionError):
        said(folder, most=3)
    said(folder, most=3)
    assert [row["state"] for row in rows(folder)] == ["complete", "fail", "complete", "complete"]
    assert rows(folder)[1]["reason"] == "ZeroDivisionError: a defect"


def test_time_that_is_up_leaves_a_trial_to_go_on_with(tmp_path: Path, stub: Stub) -> None:
    folder = made(tmp_path, plan(tmp_path))
    now = time.time()

    def figure(cfg: config.Config, epoch: int) -> float:
        if len(stub.epochs) == 6:
            time.sleep(max(0.0, now + 1.5 - time.time()))
        return near(cfg, epoch)

    stub.figure = figure
    assert "the time is up; go on with  detkit tune --resume" in said(folder, most=3, ends=now + 1.4)
    assert len(stub.epochs) == 6
    assert [row["state"] for row in rows(folder)] == ["complete", "running"]
    said(folder, most=3)
    assert len(stub.epochs) == 12


def test_a_shortened_study_gives_a_config_of_the_whole_length(tmp_path: Path, stub: Stub) -> None:
    more = ["train.epochs=20", "train.eval_every=5", "train.schedule.warmup_steps=100", "augment.close_epochs=5"]
    one = plan(tmp_path, *more, "train.unfreeze=[[10, 0]]", "train.optimizer.lr=1e-4", epochs=4)
    folder = made(tmp_path, one)
    said(folder, most=3)
    short = config.load(folder / "trial-1-1" / "config.yaml")
    assert (short.train.epochs, short.train.eval_every, short.train.schedule.warmup_steps) == (4, 1, 20)
    assert (short.augment.close_epochs, short.train.unfreeze) == (1, ((2, 0),))
    tuned = config.load(folder / "best.yaml")
    assert tuned.train.model_copy(update={"optimizer": one.start.train.optimizer}) == one.start.train
    assert tuned.train.optimizer.lr != 1e-4
    assert "4 epochs; this is the whole length" in (folder / "best.yaml").read_text(encoding="utf-8")


def test_a_study_is_not_mixed_with_another(tmp_path: Path, stub: Stub) -> None:
    folder = made(tmp_path, plan(tmp_path))
    tune.create(folder, plan(tmp_path))  # the same
    with pytest.raises(UserError, match=r"study: the study there has train\.optimizer\.lr 0\.002, not 0\.1: name"):
        made(tmp_path, plan(tmp_path, "train.optimizer.lr=0.1"))
    with pytest.raises(UserError, match=r"has objective mAP, not AR: name another with --study"):
        made(tmp_path, plan(tmp_path, objective="AR"))
    other = tmp_path / "runs" / "other"
    other.mkdir(parents=True)
    (other / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        made(tmp_path, plan(tmp_path), "other")
    with pytest.raises(UserError, match=r"it has no study\.yaml"):
        tune.run(other, Console(quiet=True))


def test_plans_that_cannot_be_carried_out_leave_nothing(tmp_path: Path) -> None:
    for one, reason in (
        (plan(tmp_path, sampler="grid"), "a grid needs a list"),
        (plan(tmp_path, epochs=2, space={"train.epochs": [1, 2]}), "--epochs: the search space varies"),
        (plan(tmp_path, "train.epochs=null", "train.iterations=9", epochs=2), "--epochs is for a config of"),
    ):
        with pytest.raises(UserError, match=reason):
            made(tmp_path, one)
    assert not (tmp_path / "runs").exists()


def test_a_database_holds_a_study_whose_folders_are_apart(tmp_path: Path, stub: Stub) -> None:
    """As on machines that share no disk: neither takes up what the other has begun."""
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    one, other = (tmp_path / place / "study" for place in ("a", "b"))
    for folder in (one, other):
        tune.create(folder, plan(tmp_path, f"runs={folder.parent}"))
    here, there = (tune.Study(folder, url, 4, Console(quiet=True), math.inf) for folder in (one, other))
    with here._claimed() as first:
        assert first is not None
        there.work()
    assert [path.name for path in sorted(other.glob("trial-*/"))] == ["trial-1-1", "trial-2-1", "trial-3-1"]
    here.work()
    assert [path.name for path in one.glob("trial-*/")] == ["trial-0-1"]
    assert {trial.state for trial in here.study.get_trials()} == {TrialState.COMPLETE}
    tune.create(tmp_path / "c" / "study", plan(tmp_path, "train.optimizer.lr=0.5"))
    with pytest.raises(UserError, match="has another plan"):
        tune.run(tmp_path / "c" / "study", Console(quiet=True), storage=url)


def test_a_storage_that_is_not_there_is_one_line_without_its_password(tmp_path: Path) -> None:
    folder = made(tmp_path, plan(tmp_path))
    for url in ("nosuch://me:secret@host/db", "mysql+nosuch://me:secret@host/db"):
        with pytest.raises(UserError, match="--storage") as error:
            tune.run(folder, Console(quiet=True), storage=url)
        assert "secret" not in str(error.value)
        assert "\n" not in str(error.value)


def test_ctrl_c_between_trials_says_how_to_go_on(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path, plan(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    written = trials.write

    def interrupted(*arguments: Any) -> None:
        written(*arguments)
        if len(stub.epochs) == 8:
            stub.epochs.append(("", 0))
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trials, "write", interrupted)
    with pytest.raises(Interrupted, match=r"go on with  detkit tune --resume .*study") as stop:
        said(folder, most=3)
    assert stop.value.exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [row["state"] for row in rows(folder)] == ["complete"] * 2


def test_importances_name_the_setting_that_matters(tmp_path: Path, stub: Stub) -> None:
    stub.figure = lambda cfg, epoch: 1 - abs(math.log10(cfg.train.optimizer.lr / 0.03)) / 4
    folder = made(tmp_path, plan(tmp_path))
    said(folder, most=5)
    assert not (folder / "importance.png").exists()
    said(folder, most=30)
    shares = trials.importances(tune.Study(folder, None, 30, Console(quiet=True), math.inf).study)
    assert [*shares] == ["train.optimizer.lr", "augment.crop"]
    assert shares["train.optimizer.lr"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)
    for name in ("history", "slices", "importance"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_tpe_seeks_where_trials_were_good(tmp_path: Path, stub: Stub) -> None:
    folder = made(tmp_path, plan(tmp_path, sampler="tpe"))
    said(folder, most=40)
    figure = [float(row["mAP"]) for row in rows(folder)]
    assert sum(figure[20:]) > sum(figure[:20]) * 1.1


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


def test_the_command_line(tmp_path: Path, stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    searched = tmp_path / "mine.yaml"
    searched.write_text(yaml.safe_dump(SPACE), encoding="utf-8")
    own = [*TINY, f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}"]
    command = ["tune", "--config", "ssd_shelf", "--space", searched, "--set", *own]
    assert call(*command, "--trials", 3) == 0
    folder = tmp_path / "runs" / "ssd_shelf-tune"
    assert len(rows(folder)) == 3
    assert call(*command, "--trials", 4) == 0
    assert call("tune", "--resume", folder, "--trials", 5) == 0
    assert len(rows(folder)) == 5
    out = capsys.readouterr().out
    assert "next:  detkit train --config" in out
    for wrong, words in (
        (["tune"], "--config ssd_mobilenet.yaml"),
        (["tune", "--resume", folder, "--set", "train.epochs=5"], "leave out --set"),
        ([*command[:-1], "train.epochs=9"], "name another with --study"),
        (["tune", "-c", "ssd_shelf", "--space", "nosuch"], "nosuch: no such search space"),
    ):
        assert call(*wrong) == 2
        line = capsys.readouterr().err.strip()
        assert words in line
        assert "\n" not in line
    assert call("tune", "--schema") == 0
    assert "train.optimizer.lr" in json.loads(capsys.readouterr().out)["properties"]


# --- real runs --------------------------------------------------------------------------------------------------------

# Eight photos of shelf-mini, learnt in a step an epoch and measured on the same.
REAL = [
    *TINY, "input.size=[64, 96]", "train.cache=ram", "augment.crop=0", "augment.colour=0", "train.overfit=8",
    "train.schedule.warmup_steps=5", "train.ema=0.9",
]  # fmt: skip


def command(tmp_path: Path, study: str, searched: dict[str, Any], *more: str) -> list[str]:
    space_file = tmp_path / "space.yaml"
    space_file.write_text(yaml.safe_dump(searched), encoding="utf-8")
    own = [*REAL, f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}", *more]
    return ["tune", "-c", "ssd_shelf", "--space", str(space_file), "--study", study, "--set", *own]


def started(*words: str) -> subprocess.Popen[str]:
    """A process of its own group, as a terminal would start it."""
    whole = [sys.executable, "-m", "detkit", *words]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, (process.returncode, out, err)
    return out


@pytest.mark.slow
def test_a_better_configuration_is_found_and_trains_to_the_same_figure(tmp_path: Path) -> None:
    searched = {"train.optimizer.lr": {"times": [1, 100]}}
    more = ["train.optimizer.lr=0.001", "train.epochs=30", "train.eval_every=10"]
    assert call(*command(tmp_path, "study", searched, *more), "--trials", 7) == 0
    folder = tmp_path / "runs" / "study"
    found = rows(folder)
    figure = {int(row["trial"]): float(row["mAP"]) for row in found if row["state"] == "complete"}
    best = max(figure, key=lambda number: figure[number])
    assert figure[best] > 3 * figure[0] > 0
    assert call("train", "--config", folder / "best.yaml") == 0
    tuned = tmp_path / "runs" / "ssd_shelf-tuned-1"
    assert checkpoint.read(tuned / "best.safetensors").metrics["mAP"] == figure[best]
    same_weights(tuned, folder / f"trial-{best}-1")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_kills_and_other_processes_change_nothing(tmp_path: Path) -> None:
    """A study in one go, one whose process is killed in the middle of a trial, and one of two processes."""
    searched = {"train.optimizer.lr": {"low": 1e-3, "high": 1e-1, "log": True}, "train.seed": [0, 1, 2]}
    more = ["train.epochs=12", "train.eval_every=6", "train.save_steps=2"]
    last = ["--trials", "6", "--sampler", "random", "--pruner", "none"]
    assert call(*command(tmp_path, "whole", searched, *more), *last) == 0
    whole = tmp_path / "runs" / "whole"

    broken = tmp_path / "runs" / "broken"
    words = [*command(tmp_path, "broken", searched, *more), *last]
    process = started(*words)
    saved: set[int] = set()
    while len(saved) < 3:  # in the middle of the second trial
        with contextlib.suppress(FileNotFoundError):
            saved.add((broken / "trial-1-1" / checkpoint.STATE).stat().st_mtime_ns)
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert rows(broken)[-1]["trial"] == "0"
    ended(started(*words))
    assert "going on after step" in (broken / "trial-1.log").read_text(encoding="utf-8")

    words = [*command(tmp_path, "shared", searched, *more), *last]
    outs = [ended(process) for process in [started(*words), started(*words)]]
    done = [re.findall(r"^trial-(\d+): mAP", out, re.MULTILINE) for out in outs]
    assert sorted(done[0] + done[1]) == [str(number) for number in range(6)]
    assert all(done)

    shared = tmp_path / "runs" / "shared"
    assert figures(whole) == figures(broken) == figures(shared)
    for number in range(6):
        for folder in (broken, shared):
            assert [path.name for path in folder.glob(f"trial-{number}-*/")] == [f"trial-{number}-1"]
            same_weights(whole / f"trial-{number}-1", folder / f"trial-{number}-1")


@pytest.mark.slow
def test_jobs_share_the_trials(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    searched = {"train.optimizer.lr": [0.001, 0.01, 0.02, 0.03]}
    words = command(tmp_path, "study", searched, "train.epochs=6", "train.eval_every=6")
    assert call(*words, "--sampler", "grid", "--jobs", 2) == 0
    assert {row["state"] for row in rows(tmp_path / "runs" / "study")} == {"complete"}
    assert len(rows(tmp_path / "runs" / "study")) == 5
    assert len(set(re.findall(r"^trial-(\d+): mAP", capfd.readouterr().out, re.MULTILINE))) == 5

"""What a run is kept from: losses that are no numbers, short memory, damaged and full disks, data that have changed."""

import csv
import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from detkit import checkpoint, config, guards, train
from detkit.errors import Interrupted, UserError
from detkit.nn.contract import Losses
from detkit.nn.detector import Detector, Trainable
from tests.test_interrupt import config as arguments
from tests.test_interrupt import finish, start
from tests.test_train import SHELF, TINY, same_weights, settings


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=1000)


# Losses that are no numbers


def test_a_rate_far_too_high_ends_the_run_with_the_part_and_the_photos(tmp_path, console):
    with pytest.raises(
        UserError, match=r"step \d+: not finite: (class|box).*lower train.optimizer.lr.*Photos: .*\.jpg"
    ):
        train.start(settings(tmp_path, "train.optimizer.lr=1e18", "train.clip_norm=0", "train.epochs=9"), console)


@pytest.fixture
def broken(monkeypatch):
    """Makes the part `box` of the loss NaN in some calls, and BatchNorm's statistics with it."""

    def at(*calls):
        forward, count = Trainable.forward, 0

        def breaking(model, batch, rng=None):
            nonlocal count
            losses = forward(model, batch, rng)
            count += 1
            if count in calls:
                norm = next(buffer for name, buffer in model.detector.named_buffers() if "running_mean" in name)
                norm.data.fill_(torch.nan)
                return Losses(losses.sums | {"box": losses.sums["box"] * torch.nan}, losses.denoms)
            return losses

        monkeypatch.setattr(Trainable, "forward", breaking)

    return at


def finite(run):
    return all(bool(value.isfinite().all()) for value in checkpoint.read(run / "last.safetensors").weights.values())


def test_a_few_such_steps_can_be_left_out(tmp_path, console, broken):
    broken(2, 4)
    run = train.start(settings(tmp_path, "train.skip=2", "train.epochs=2"), console)
    said = re.findall(r"step (\d): not finite: box; left out \((\d) of 2\). Photos: (.*)", console.file.getvalue())
    assert [(step, count) for step, count, _ in said] == [("2", "1"), ("4", "2")]
    assert all(len(photos.split(", ")) == 8 for _, _, photos in said)
    assert finite(run)
    state, _ = checkpoint.read_state(run)
    assert state["skipped"] == 2
    assert all(bool(value.isfinite().all()) for value in state["detector"].values())
    with (run / "steps.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["skipped"], row["loss_box"] == "nan") for row in rows[:4]] == [
        ("1", "0", False), ("2", "1", True), ("3", "0", False), ("4", "1", True),
    ]  # fmt: skip


def test_but_not_more_than_that_and_a_resumed_run_knows_how_many(tmp_path, console, broken):
    broken(2, 4)
    with pytest.raises(UserError, match="step 4: not finite: box, after 1 such steps left out"):
        train.start(settings(tmp_path, "train.skip=1", "train.save_steps=1"), console)
    run = tmp_path / "runs" / "ssd_shelf-1"
    broken(1)
    with pytest.raises(UserError, match="step 4: not finite: box, after 1 such"):
        train.resume(run, console)
    broken()
    train.resume(run, console, ["train.skip=9"])
    assert finite(run)


def test_only_the_micro_batch_that_broke_is_named(tmp_path, console, broken):
    broken(2)
    with pytest.raises(UserError, match=r"step 1: not finite: box.*Photos: \S+, \S+, \S+, \S+$"):
        train.start(settings(tmp_path, "train.accumulate=2"), console)


def test_a_gradient_that_is_no_number_never_reaches_the_weights(tmp_path, console, monkeypatch):
    run = train.Run(settings(tmp_path, "train.skip=1"), console)
    run.wrap()
    batch = next(run.loader.epoch(0))
    weight = next(parameter for parameter in run.detector.parameters() if parameter.requires_grad)
    hook = weight.register_hook(lambda gradient: gradient * torch.nan)
    before = weight.detach().clone()
    assert run.train_step(batch) == {}
    assert "not finite: gradient; left out (1 of 1). Photos: those of the whole batch" in console.file.getvalue()
    assert torch.equal(weight, before)
    with pytest.raises(UserError, match="not finite: gradient, after 1"):
        run.train_step(batch)
    hook.remove()


def test_half_precision_overflows_and_goes_on(tmp_path, console):
    """The scaler begins at 65536, which tiny networks bear; from 2 ** 28 their gradients overflow."""
    run = train.Run(settings(tmp_path, "train.precision=fp16", "train.batch_size=2"), console)
    run.wrap()
    if not run.scaler.is_enabled():
        pytest.skip("this torch scales no gradients on the CPU")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)
    batch = next(run.loader.epoch(0))
    weight = next(iter(run.detector.parameters()))
    before = weight.detach().clone()
    assert run.train_step(batch)
    assert torch.equal(weight, before)
    assert run.scaler.get_scale() < 2.0**28
    while torch.equal(weight, before) and run.scaler.get_scale() > 1:
        run.train_step(batch)
    assert not torch.equal(weight, before)
    assert all(bool(parameter.isfinite().all()) for parameter in run.detector.parameters())


# Memory


STARVED = """
import resource, sys
from pathlib import Path
from rich.console import Console
from detkit import config, train
from detkit.errors import UserError
settings = config.load("ssd_shelf.yaml", sys.argv[1:])
step = train.Run.train_step
def starving(run, *pieces):
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20, resource.RLIM_INFINITY))
    return step(run, *pieces)
train.Run.train_step = starving
try:
    train.start(settings, Console())
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits a process' memory as Linux does")
def test_out_of_memory_says_what_fits_and_that_does(tmp_path):
    """With a real limit of memory that a real allocator meets."""
    sets = [f"data.root={SHELF}", f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}", "train.workers=0"]
    sets += ["train.progressive=[]", "model.backbone.width=0.35", "train.batch_size=16", "train.iterations=1"]
    sets += ["train.epochs=null", "train.loggers=[]", "input.size=[256, 256]"]
    # The limit is one of addresses, of which malloc's heap gives none back: so it is to map each tensor by itself.
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    starved = subprocess.run(
        [sys.executable, "-c", STARVED, *sets], capture_output=True, text=True, env=quiet, timeout=200, check=False
    )
    assert starved.returncode == 2, starved.stderr
    line = starved.stderr.splitlines()[-1]
    said = re.fullmatch(
        r"cpu: out of memory with 16 images at a time; (\d+) fit: go on with  detkit train --resume (\S+) "
        r"--set train.accumulate=(\d+) , which keeps the batch of 16, or start anew with train.batch_size=\1",
        line,
    )
    assert said, line
    count, run, parts = said.groups()
    assert int(count) * int(parts) == 16
    finish(start("--resume", run, "--set", f"train.accumulate={parts}"))


def test_a_batch_size_is_found(tmp_path, console, monkeypatch):
    need, tried = 2**20, []

    def taken(step, device):
        step()
        return need * tried[-1]

    rehearse = train.Run.rehearse

    def noted(run, batch):
        tried.append(len(batch.index))
        rehearse(run, batch)

    monkeypatch.setattr(guards, "taken", taken)
    monkeypatch.setattr(guards, "free", lambda device: 7 * need)
    monkeypatch.setattr(train.Run, "rehearse", noted)
    monkeypatch.setattr(train, "FEWEST_STEPS", 1)
    cfg = settings(tmp_path, "train.batch_size=auto", "train.epochs=1", "train.seed=3")
    run = train.start(cfg, console)
    assert tried == [1, 2, 4]
    assert "batch_size auto is 4: twice as many might not fit" in console.file.getvalue()
    assert checkpoint.read(run / "last.safetensors").config.train.batch_size == 4
    same_weights(run, train.start(settings(tmp_path, "train.batch_size=4", "train.epochs=1", "train.seed=3"), console))
    tried.clear()
    train.start(settings(tmp_path, "train.batch_size=auto", "train.accumulate=2", "train.epochs=1"), console)
    assert "batch_size auto is 8" in console.file.getvalue()
    with pytest.raises(UserError, match="scaling linear grows with batch_size"):
        settings(tmp_path, "train.batch_size=auto", "train.scaling=linear")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the highest ever counts, and that of earlier tests is")
def test_memory_is_measured():
    cpu = torch.device("cpu")
    assert 2**20 < guards.free(cpu) < 2**50
    torch.ones(2**28).sum()
    grows = guards.taken(lambda: torch.ones(2**27).sum(), cpu)  # half a gigabyte
    assert 2**29 * 0.9 < grows < 2**29 * 1.5
    assert guards.taken(lambda: None, cpu) < 2**27


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(guards, "_CGROUP", tmp_path)
    cpu = torch.device("cpu")
    (tmp_path / "memory.current").write_text("1000000\n")
    for limit, free in (("max", None), ("5000000", 4000000)):
        (tmp_path / "memory.max").write_text(limit)
        assert (guards.free(cpu) == free) == (free is not None)


# Disks


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_a_full_disk_keeps_what_was_saved_whole_and_the_run_goes_on_once_there_is_room(tmp_path):
    """A file system of its own, that is full after two states."""
    small = tmp_path / "runs"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100m", "none", small], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system")
    try:
        finish(start(*arguments(tmp_path, "train.workers=0", "train.save_steps=1")))
        whole = small / "ssd_shelf-1"
        used = sum(path.stat().st_size for path in whole.glob("state*.pt")) // 2
        ballast = small / "ballast"
        with ballast.open("wb") as file:
            file.write(bytes(shutil.disk_usage(small).free - int(2.5 * used)))
        err = finish(start(*arguments(tmp_path, "train.workers=0", "train.save_steps=1")), 2)
        run = small / "ssd_shelf-2"
        assert err.splitlines()[-1].startswith(f"detkit: {run}")
        assert "No space left on device" in err
        assert "Traceback" not in err
        state, damaged = checkpoint.read_state(run)
        assert not damaged
        assert not state["finished"]
        assert not list(run.glob("*.tmp"))
        ballast.unlink()
        finish(start("--resume", str(run)))
        same_weights(whole, run)
    finally:
        subprocess.run(["umount", small], check=True)


# Data that have changed


@pytest.fixture
def stopped(tmp_path, console, monkeypatch):
    """A run that was stopped in its first epoch, on a copy of the photos."""
    data = shutil.copytree(SHELF, tmp_path / "data")
    step = train.Run.train_step

    def stopping(run, *pieces):
        train.signal.raise_signal(train.signal.SIGINT)
        return step(run, *pieces)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_step", stopping)
        with pytest.raises(Interrupted):
            train.start(settings(tmp_path, f"data.root={data}"), console)
    return data, tmp_path / "runs" / "ssd_shelf-1"


def rename(data, old, new):
    for path in (data / "Annotations").glob("*.xml"):
        path.write_text(path.read_text(encoding="utf-8").replace(f"<name>{old}<", f"<name>{new}<"), encoding="utf-8")


def test_a_resumed_run_has_the_classes_that_it_began_with(stopped, console):
    data, run = stopped
    state, _ = checkpoint.read_state(run)
    name = state["classes"][0]
    rename(data, name, "zz_new")
    listed = data / "classes.txt"
    words = listed.read_text(encoding="utf-8")
    listed.write_text(words.replace(name, "zz_new"), encoding="utf-8")
    with pytest.raises(UserError, match=f"its classes are not those of {run}: also zz_new; no {name}$"):
        train.resume(run, console)
    rename(data, "zz_new", name)
    listed.write_text(words, encoding="utf-8")
    train.resume(run, console)


def test_and_the_annotations(stopped, console):
    data, run = stopped
    path = next(
        data / "Annotations" / f"{name}.xml" for name in (data / "ImageSets/Main/train.txt").read_text().split()
    )
    text = path.read_text(encoding="utf-8")
    path.write_text(re.sub(r"<xmin>\d+<", "<xmin>1<", text, count=1), encoding="utf-8")
    with pytest.raises(UserError, match=r"not what they were when .* began; start a new run, .* --init"):
        train.resume(run, console)


def test_a_second_job_can_not_train_the_same_run(stopped, console):
    _, run = stopped
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    with checkpoint.locked(run):
        err = finish(start("--resume", str(run)), 2)
    assert err.splitlines() == [f"detkit: {run}: another process is training this run; wait for it, or start a new run"]
    after = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert after | {".lock": 0} == before | {".lock": 0}


# torch.compile


@pytest.mark.slow
def test_compiled_is_equal(tmp_path, console):
    """With torch's own compiler, on a network that it makes few kernels for."""
    tiny = [item for item in TINY if "width" not in item and "neck" not in item]
    tiny += ["input.size=[64, 64]", "model.backbone.name=vgg11", "model.head.grid=2", "model.head.hidden=8"]
    tiny += [f"data.cache={tmp_path}", "model.weights=none", "train.optimizer={name: sgd, lr: 0.1}"]
    tiny += ["train.schedule.warmup_steps=0"]
    runs = [
        train.Run(config.load("yolo_v1_vgg.yaml", [*tiny, *more]), console) for more in ([], ["train.compile=true"])
    ]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        losses = []
        for run in runs:
            run.wrap()
            losses.append(run.train_step(next(run.loader.epoch(0))))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    one, other = (run.state()["detector"] for run in runs)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], rtol=1e-3, atol=1e-5), name


def test_what_can_not_be_compiled_is_one_line(tmp_path, console, monkeypatch):
    def backend(*_):
        raise OSError("no C++ compiler")

    def quicken(detector):
        detector.backbone.compile(backend=backend)

    monkeypatch.setattr(Detector, "quicken", quicken)
    with pytest.raises(UserError, match=r"train.compile: torch can't compile this network here.*compile=false"):
        train.start(settings(tmp_path, "train.compile=true"), console)

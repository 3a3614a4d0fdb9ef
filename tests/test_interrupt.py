"""Real processes, interrupted with real signals."""

import contextlib
import csv
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from detkit import checkpoint
from tests.test_train import TINY, same_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]


def config(folder, *more):
    """Arguments of a new run of twelve steps."""
    sets = [*TINY, "train.epochs=4", "train.workers=2", f"runs={folder / 'runs'}", f"data.cache={folder / 'cache'}"]
    return ["-c", "ssd_shelf.yaml", "--set", *sets, *more]


def start(*arguments, launcher=()):
    """A training process of its own group, as a terminal would start it, with one thread: sums depend on how many."""
    quick = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"}  # 30 s for a process that hears nothing
    command = [sys.executable, *launcher, "-m", "detkit", "train", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **pipes, env=os.environ | quick, start_new_session=True)


def finish(process, code=0, seconds=300):
    """Wait for its end; what it wrote to stderr."""
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, (process.returncode, out, err)
    return err


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def equal(one, other):
    """Whether two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(value, other[key]) for key, value in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def rows(run, table):
    """What a run has recorded, without what a clock has measured."""
    with (run / f"{table}.csv").open(encoding="utf-8") as file:
        told = list(csv.DictReader(file))
    return [{name: row[name] for name in row.keys() - {"seconds", "img_s", "data_wait", "memory"}} for row in told]


def after_saves(run, count, process):
    """Wait until so many states of the run have been seen, the one there is among them."""
    seen, deadline = set(), time.monotonic() + 200
    while len(seen) < count:
        with contextlib.suppress(FileNotFoundError):
            seen.add((run / "state.pt").stat().st_mtime_ns)
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_run_killed_and_stopped_at_any_step_ends_in_the_same_bits_whatever_the_workers(tmp_path):
    """Dropout, mosaic, moving average, warm-up and all; at random moments."""
    more = ["model.dropout=0.2", "augment.mosaic=0.3", "train.save_steps=2", "train.batch_size=4", "train.eval_every=4"]
    finish(start(*config(tmp_path, *more, "train.workers=0")))
    process = start(*config(tmp_path, *more))
    run = tmp_path / "runs" / "ssd_shelf-2"
    rng = random.Random(os.environ.get("DETKIT_KILL_SEED", "0"))
    ends = (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
    for how, workers in zip(ends, (1, 0, 1, 0), strict=True):
        after_saves(run, rng.randint(2, 3), process)  # the one there is counts
        time.sleep(rng.uniform(0, 0.4))
        os.killpg(process.pid, how)  # a terminal's Ctrl-C reaches the loader processes too
        if how == signal.SIGKILL:
            process.communicate(timeout=60)
        else:
            err = finish(process, 128 + how, 60)
            assert err.strip().splitlines() == [f"detkit: stopped; go on with  detkit train --resume {run}"]
        assert checkpoint.read_state(run)[0]["epoch"] < 4
        process = start("--resume", str(run), "--set", f"train.workers={workers}")
    finish(process)
    whole = tmp_path / "runs" / "ssd_shelf-1"
    one, other = (checkpoint.read_state(folder)[0] for folder in (whole, run))
    assert one["finished"]
    assert all(one[part] for part in ("detector", "predictor", "optimizer", "schedule"))
    for part in one:
        assert equal(one[part], other[part]), part
    same_weights(whole, run)
    assert len(rows(run, "metrics")) == 4
    for table in ("metrics", "steps", "classes"):
        assert rows(whole, table) == rows(run, table)


def worker(launcher, rank):
    """The process of that rank which a launcher has started, once there is one."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
                if f"RANK={rank}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                    return int(child)
        time.sleep(0.05)
    raise AssertionError("no such process")


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_two_processes_are_stopped_killed_and_hung_and_end_as_two_nodes_that_never_were(tmp_path):
    more = ["train.workers=0", "train.epochs=6", "train.eval_every=6", "train.save_steps=1", "train.timeout=10"]
    arguments = config(tmp_path, *more)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"--rdzv-endpoint=localhost:{free.getsockname()[1]}"
    node = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", place]
    nodes = [start(*arguments, launcher=node) for _ in range(2)]
    for each in nodes:
        finish(each)
    whole, run = (tmp_path / "runs" / f"ssd_shelf-{number}" for number in (1, 2))

    two = ("--nproc", "2")
    process = start(*arguments, *two)
    after_saves(run, 3, process)
    os.kill(process.pid, signal.SIGTERM)  # as a scheduler does
    err = finish(process, 143, 60)
    assert f"detkit: stopped; go on with  detkit train --resume {run}" in err.splitlines()
    process = start("--resume", str(run), *two)
    after_saves(run, 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    err = finish(process, 130, 60)
    assert err.count("detkit: stopped") == 1

    process = start("--resume", str(run), *two, "--max-restarts", "2")
    after_saves(run, 3, process)
    os.kill(worker(process, 1), signal.SIGKILL)
    after_saves(run, 3, process)
    os.kill(worker(process, 1), signal.SIGSTOP)  # it is there and says nothing
    finish(process)
    one, other = (checkpoint.read_state(folder)[0] for folder in (whole, run))
    for part in one:
        assert equal(one[part], other[part]), part
    same_weights(whole, run)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes by /proc")
def test_without_restarts_a_lost_process_ends_the_run_and_is_named(tmp_path):
    process = start(*config(tmp_path, "train.workers=0", "train.save_steps=1"), "--nproc", "2")
    after_saves(tmp_path / "runs" / "ssd_shelf-1", 2, process)
    os.kill(worker(process, 1), signal.SIGKILL)
    err = finish(process, 128 + signal.SIGKILL, 100)
    assert "detkit: process 1 of 2 was ended by SIGKILL" in err
    assert "Traceback" not in err

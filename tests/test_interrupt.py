"""Real processes, interrupted with real signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from detkit import checkpoint
from tests.test_train import TINY, same_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]


def start(folder, *more):
    """A training process of its own group, as a terminal would start it."""
    sets = [*TINY, "train.epochs=4", "train.workers=2", f"runs={folder / 'runs'}", f"data.cache={folder / 'cache'}"]
    command = [sys.executable, "-m", "detkit", "train", *(more or ["-c", "ssd_shelf.yaml", "--set", *sets])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_cleanly_and_resume_ends_where_an_unbroken_run_does(tmp_path, number, code):
    whole = start(tmp_path)
    assert whole.wait(300) == 0, whole.stderr.read()
    stopped = start(tmp_path)
    run = tmp_path / "runs" / "ssd_shelf-2"
    wait_for(run / "metrics.csv")  # the first epoch is done
    os.killpg(stopped.pid, number)  # a terminal's Ctrl-C reaches the loader processes too
    out, err = stopped.communicate(timeout=60)
    assert stopped.returncode == code, (out, err)
    assert err.strip().splitlines() == [f"detkit: stopped; go on with  detkit train --resume {run}"]
    assert checkpoint.read_state(run)["epoch"] < 4
    resumed = start(tmp_path, "--resume", str(run))
    assert resumed.wait(300) == 0, resumed.stderr.read()
    same_weights(tmp_path / "runs" / "ssd_shelf-1", run)


def test_a_killed_run_goes_on_from_its_last_epoch(tmp_path):
    whole = start(tmp_path)
    assert whole.wait(300) == 0, whole.stderr.read()
    killed = start(tmp_path)
    run = tmp_path / "runs" / "ssd_shelf-2"
    wait_for(run / "state.pt")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait(60)
    resumed = start(tmp_path, "--resume", str(run))
    assert resumed.wait(300) == 0, resumed.stderr.read()
    same_weights(tmp_path / "runs" / "ssd_shelf-1", run)

"""`detkit predict` on many photos, ended from without: real processes, real signals."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")]
COUNT, BAD = 300, "0005.jpg"


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "0000.jpg")
    content = (folder / "0000.jpg").read_bytes()
    for number in range(1, COUNT):
        (folder / f"{number:04d}.jpg").write_bytes(content)
    (folder / BAD).write_bytes(content[:5000])
    return folder


# As on a terminal: tests that a shell has put into the background inherit that SIGINT is ignored.
DETKIT = """
import signal
from detkit.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""


def start(folder, *arguments):
    command = [sys.executable, "-c", DETKIT, "predict", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)


def lines(out):
    return [json.loads(line) for line in (out / "detections.jsonl").read_text(encoding="utf-8").splitlines()]


def half_way(process, out):
    """Wait until a third is done."""
    deadline = time.monotonic() + 120
    record = out / "detections.jsonl"
    while not record.exists() or record.read_bytes().count(b"\n") < COUNT // 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_each_photo_is_in_the_record_once_however_the_job_was_ended(tmp_path: Path, photos, make_model, number):
    out = tmp_path / "out"
    process = start(tmp_path, photos, "--model", make_model(), "--out", out, "--format", "csv", "--count")
    half_way(process, out)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130, err
        assert err.strip() == f"detkit: stopped; go on with  detkit predict --resume {out}"
        lines(out)  # each of them whole
    done = (out / "detections.jsonl").read_bytes().count(b"\n")
    assert COUNT // 3 <= done < COUNT
    assert not (out / "counts.csv").exists()
    process = start(tmp_path, "--resume", out)
    said, err = process.communicate(timeout=120)
    assert process.returncode == 1, err  # for the photo that can't be read, whichever process met it
    assert f"{done} of {COUNT} photos are done" in said
    assert f"1 of {COUNT} photos could not be read:" in said
    assert BAD in said.splitlines()[-1]
    rows = lines(out)
    assert [Path(row["image"]).name for row in rows] == [f"{place:04d}.jpg" for place in range(COUNT)]
    assert [Path(row["image"]).name for row in rows if "error" in row] == [BAD]
    assert len((out / "counts.csv").read_text().splitlines()) == COUNT  # a header, and each but one

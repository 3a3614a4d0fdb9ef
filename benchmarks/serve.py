"""The model server under load, and what it adds to a Session. Everything stays on this machine's loopback.

    python benchmarks/serve.py load MODEL.onnx        photos a second and latencies at 1, 8 and 64 clients
    python benchmarks/serve.py overhead MODEL.onnx    from request to JSON, less Session, and less decoding; one client

`load` needs Apache's `ab` (Debian: apache2-utils). The photos are made up, 640 x 480; the one that is sent has some
100 kB. Each command writes its section of results/serve.json and results/serve.md.
"""

from __future__ import annotations

import csv
import http.client
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import typer
from PIL import Image
from report import console, save

from detkit import imaging
from detkit.data import synth
from detkit.runtime.session import Session

CLIENTS = (1, 8, 64)
app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)


def _photo(size: int = 100_000) -> bytes:
    """A shelf photo as a JPEG of some `size` bytes."""
    with tempfile.TemporaryDirectory() as folder:
        synth.synthesise(Path(folder) / "set", train=1, val=0, size=(640, 480), seed=0, workers=1)
        image = Image.open(next((Path(folder) / "set").rglob("*.jpg"))).convert("RGB")

    def file(quality: int) -> bytes:
        content = io.BytesIO()
        image.save(content, "JPEG", quality=quality)
        return content.getvalue()

    return min((file(quality) for quality in range(60, 101)), key=lambda content: abs(len(content) - size))


@contextmanager
def _server(model: Path, threads: int, batch: int) -> Iterator[tuple[psutil.Process, int]]:
    """`detkit serve` -> its process and port."""
    command = [sys.executable, "-m", "detkit", "serve", str(model), "--port", "0", "--device", "cpu", "--log", "json"]
    command += ["--threads", str(threads), "--max-batch", str(batch), "--max-delay", "20"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr
    try:
        for line in server.stderr:
            if '"serving"' in line:
                port = int(line.rsplit(":", 1)[1].strip(' }"\n'))
            if "startup complete" in line:
                break
        else:
            raise SystemExit("the server did not start")
        # What it logs must go somewhere, or it would wait.
        with subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL):
            try:
                yield psutil.Process(server.pid), port
            finally:  # or `cat` would never end
                server.terminate()
                server.wait()
    finally:
        server.kill()


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _loop(session: Session, image: Any, batch: int, seconds: float) -> float:
    """Photos a second of Session alone."""
    session.detect([image] * batch)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        session.detect([image] * batch)
        done += batch
    return done / (time.perf_counter() - start)


def _ab(port: int, photo: Path, clients: int, requests: int) -> dict[str, float]:
    """Apache's load tool: photos a second, latencies in ms, and its own seconds on the CPU."""
    before = os.times()
    with tempfile.NamedTemporaryFile(suffix=".tsv") as each:
        options = ["-q", "-k", "-l", "-n", str(requests), "-c", str(clients), "-g", each.name, "-p", str(photo)]
        address = f"http://127.0.0.1:{port}/v1/detect"
        done = subprocess.run(["ab", *options, "-T", "image/jpeg", address], capture_output=True, text=True, check=True)
        rows = list(csv.DictReader(Path(each.name).read_text().splitlines(), delimiter="\t"))
    after = os.times()
    fields = {line.partition(":")[0]: line.partition(":")[2].split() for line in done.stdout.splitlines()}
    assert fields["Failed requests"] == ["0"], done.stdout
    assert "Non-2xx responses" not in fields, done.stdout
    latency = [float(row["ttime"]) for row in rows]
    return {
        "rate": float(fields["Requests per second"][0]),
        **{f"p{share}": float(np.percentile(latency, share)) for share in (50, 95, 99)},
        "cpu": after.children_user - before.children_user + after.children_system - before.children_system,
    }


@app.command()
def load(
    model: Path, seconds: float = typer.Option(15.0, help="of each measurement"), threads: int = 0, batch: int = 8
) -> None:
    """Throughput and latency, with and without batches, against a loop of Session in one process."""
    if not shutil.which("ab"):
        raise SystemExit("ab is not installed (Debian: apache2-utils)")
    photo = _photo()
    image, session = imaging.decode(photo), Session(model, "cpu", threads)
    cores = os.cpu_count() or 1
    _loop(session, image, batch, 1)
    bare: dict[int, list[float]] = {1: [], batch: []}
    rows: list[dict[str, Any]] = []
    with tempfile.NamedTemporaryFile(suffix=".jpg") as file:
        Path(file.name).write_bytes(photo)
        for size in (batch, 1):
            with _server(model, threads, size) as (process, port):
                _ab(port, Path(file.name), 8, 16)
                for clients in CLIENTS:
                    loops = [_loop(session, image, size, seconds / 2)]
                    requests = max(3 * clients, round(loops[0] * seconds))
                    before, start = _cpu(process), time.perf_counter()
                    told = _ab(port, Path(file.name), clients, requests)
                    wall, taken = time.perf_counter() - start, _cpu(process) - before
                    loops.append(_loop(session, image, size, seconds / 2))
                    bare[size] += loops
                    of_loop = told["rate"] / statistics.mean(loops)
                    rows.append({
                        "batches of": size if size > 1 else "1 (off)", "clients": clients,
                        "photos/s": f"{told['rate']:.1f}", "of the loop": f"{of_loop:.2f}",
                        **{f"{name} ms": f"{told[name]:.0f}" for name in ("p50", "p95", "p99")},
                        "server's CPU": f"{taken / wall / cores:.0%}",
                        "clients' CPU": f"{told['cpu'] / wall / cores:.1%}",
                    })  # fmt: skip
                    console.print(rows[-1])
    rates = ", ".join(f"{statistics.mean(rates):.1f} photos/s in batches of {size}" for size, rates in bare.items())
    height, width = session.manifest.size
    note = (
        f"{session.manifest.name}, canvas {width} x {height}, a JPEG of {len(photo)} bytes. A loop of "
        f"Session.detect on the decoded photo, in one process before and after each measurement: {rates}. The "
        "server also decodes each photo, and shares the cores with its clients; CPU is of all cores."
    )
    save("serve", "load", f"Load: {session.manifest.name}", note, rows)


@app.command()
def overhead(model: Path, requests: int = 300, threads: int = 1) -> None:
    """What a request takes longer than Session.detect, and than that and decoding the photo, in turns with them."""
    photo = _photo()
    session = Session(model, "cpu", threads)
    taken: dict[str, list[float]] = {"request": [], "decoding": [], "Session": []}
    with _server(model, threads, 8) as (_, port):
        line = http.client.HTTPConnection("127.0.0.1", port)
        for _ in range(requests + 10):
            start = time.perf_counter()
            line.request("POST", "/v1/detect", photo, {"Content-Type": "image/jpeg"})
            answer = line.getresponse()
            answer.read()
            taken["request"].append(time.perf_counter() - start)
            assert answer.status == 200
            start = time.perf_counter()
            image = imaging.decode(photo)
            taken["decoding"].append(time.perf_counter() - start)
            start = time.perf_counter()
            session.detect([image])
            taken["Session"].append(time.perf_counter() - start)
        line.close()
    middle = {name: 1000 * statistics.median(times[10:]) for name, times in taken.items()}
    more = middle["request"] - middle["Session"]
    row = {f"{name}, p50 ms": f"{value:.2f}" for name, value in middle.items()}
    row |= {"more than Session, ms": f"{more:.2f}", "and than decoding, ms": f"{more - middle['decoding']:.2f}"}
    note = (
        f"{session.manifest.name}, {threads} thread(s), a JPEG of {len(photo)} bytes, one client, {requests} requests."
    )
    save("serve", "overhead", f"Overhead: {session.manifest.name}", note, [row])


if __name__ == "__main__":
    app()

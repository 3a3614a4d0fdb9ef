"""The server as a process: started, drained, killed, loaded. All on the loopback."""

import contextlib
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import psutil
import pytest
from PIL import Image

from detkit.client import Client
from detkit.serve import run
from detkit.serve.settings import Settings
from tests.serve.conftest import photo, save, wait_until

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


@contextlib.contextmanager
def process(*words):
    """`detkit serve` on a free port -> the process and its address."""
    command = [sys.executable, "-m", "detkit", "serve", "--port", "0", "--device", "cpu", "--threads", "1", *words]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True, env=env)
    lines, listening = [], threading.Event()

    def read():
        for line in server.stderr:
            lines.append(line)
            if '"serving"' in line:
                listening.set()
        listening.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert listening.wait(60)
        urls = [json.loads(line)["url"] for line in lines if '"serving"' in line]
        assert urls, lines
        with httpx2.Client(verify=False) as client:
            wait_until(lambda: ready(client, urls[0]) or server.poll() is not None)
        assert server.poll() is None, lines
        yield server, urls[0], lines
    finally:
        if server.poll() is None:
            server.terminate()
        server.wait(60)
        reader.join()


def ready(client, url):
    try:
        return client.get(f"{url}/health/ready").status_code == 200
    except httpx2.TransportError:
        return False


def test_what_can_t_be_served_is_one_line_and_exit_code_2(tmp_path):
    model = save(tmp_path / "m.onnx")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words, reason in (
            ([tmp_path / "none.onnx"], "none.onnx: can't be read"),
            ([model, "--port", port], "can't be listened to"),
            ([model, "--port", "0", "--grpc-port", port], f"127.0.0.1:{port}: can't be listened to"),
            ([model, "--tls-cert", model], "TLS needs both"),
            ([model, "--tls-cert", model, "--tls-key", model], "not a certificate and its private key"),
            ([model, "--token-file", tmp_path / "none"], "none: can't be read"),
        ):
            command = [sys.executable, "-m", "detkit", "serve", "--log", "json", *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert done.returncode == 2, done.stderr
            assert reason in done.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_workers_that_can_t_start_end_the_server(tmp_path):
    command = [sys.executable, "-m", "detkit", "serve", str(save(tmp_path / "m.onnx")), "--workers", "2"]
    command += ["--device", "openvino", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("detkit: a worker could not start")
    assert "device 'openvino'" in done.stderr


def test_answers_are_not_held_back(tmp_path, serve):
    """Nagle's algorithm, which asyncio turns off on sockets that say they are TCP, would add 40 ms to each."""
    settings = serve(save(tmp_path / "m.onnx")).settings
    with run._listening(run._config(settings, None, factory=False)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_once_the_log_says_that_it_serves_no_client_is_refused(caplog):
    settings = Settings(models=("m.onnx",), port=0)
    with caplog.at_level("INFO", "detkit.serve"), run._listening(run._config(settings, None, factory=False)) as one:
        assert "serving" in caplog.messages
        socket.create_connection(one.getsockname(), timeout=5).close()


def test_the_server_needs_no_torch(tmp_path):
    script = (
        "import sys, importlib.abc\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.split('.')[0] in ('torch', 'lxml', 'cv2'): raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from detkit.serve import run; import detkit.client\n"
        "from detkit.serve.models import Repository; from detkit.serve.observe import Metrics\n"
        "from detkit.serve.settings import Settings\n"
        "Repository(Settings(models=(sys.argv[1],), device='cpu'), Metrics()).load()\n"
    )
    subprocess.run([sys.executable, "-c", script, save(tmp_path / "m.onnx")], check=True, timeout=60)


@POSIX
def test_sigterm_answers_what_was_asked_and_ends_with_0(tmp_path):
    with process(save(tmp_path / "m.onnx")) as (server, url, lines):
        host, port = url.removeprefix("http://").split(":")
        body = photo()
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            head = f"POST /v1/detect?version=1 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            slow.sendall(head.encode() + body[:50])
            time.sleep(0.3)
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: any("Shutting down" in line for line in lines))
            with pytest.raises(OSError, match=r".*"):  # nobody new is let in
                wait_until(lambda: socket.create_connection((host, int(port)), timeout=5).close(), 5)
            slow.sendall(body[50:])
            answer = slow.recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 200 OK")
        assert server.wait(60) == 0


@POSIX
@pytest.mark.slow
def test_tls(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate,
         "-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with process(save(tmp_path / "m.onnx"), "--tls-cert", certificate, "--tls-key", key) as (server, url, lines):
        assert url.startswith("https://")
        with Client(url, verify=str(certificate)) as client:
            assert client.detect(photo())
        with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as plain:
            ssl.create_default_context().wrap_socket(plain, server_hostname="127.0.0.1")
        with Client(url, verify=str(certificate)) as idle:  # which doesn't hear that the server would like to end
            assert idle.detect(photo())
            server.terminate()
            assert server.wait(15) == 0
        assert not any("exceeded" in line for line in lines)


def workers(pid):
    """The processes that serve, of the one that starts them."""
    found = []
    for one in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # ended in the meantime, or not yet waited for
            if "spawn_main" in " ".join(one.cmdline()):
                found.append(one)
    return found


@POSIX
@pytest.mark.slow
def test_a_worker_killed_under_load_is_started_anew_and_no_client_notices(tmp_path):
    with process(save(tmp_path / "m.onnx"), "--workers", "2") as (server, url, lines):

        def spawned():
            return workers(server.pid)

        wait_until(lambda: len(spawned()) == 2)
        stop, answered, failed = threading.Event(), [], []

        def load():
            with Client(url, retries=8) as client:
                while not stop.is_set():
                    try:
                        answered.append(len(client.detect(photo())[0]["detections"]))
                    except Exception as error:  # noqa: BLE001 - told below
                        failed.append(str(error))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(2):
                wait_until(lambda: len(spawned()) == 2)
                before = len(answered)
                victim = spawned()[0]
                victim.kill()
                wait_until(lambda victim=victim: victim.pid not in [one.pid for one in spawned()])
                wait_until(lambda: len(spawned()) == 2)
                wait_until(lambda before=before: len(answered) > before + 50)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failed
        assert set(answered) == {3}
        assert sum("died" in line for line in lines) == 2
        with httpx2.Client() as client:
            text = client.get(f"{url}/metrics").text
        assert "detkit_requests_open 1.0" in text  # what the dead had in work is forgotten


@pytest.mark.slow
def test_memory_stays_flat_over_many_requests(tmp_path):
    with process(save(tmp_path / "m.onnx"), "--grpc-port", "0") as (server, url, _):
        memory = psutil.Process(server.pid).memory_info
        file = io.BytesIO()
        Image.effect_noise((640, 480), 60).convert("RGB").save(file, "JPEG", quality=80)

        def ask(count):
            with Client(url) as client:
                for number in range(count):
                    client.detect(file.getvalue() if number % 10 == 0 else photo(number % 256, (32 + number % 50, 64)))

        def soak(requests):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(ask, [requests // 8] * 8))

        soak(2_000)
        before = memory().rss
        soak(8_000)
        assert memory().rss < before + 24 * 2**20

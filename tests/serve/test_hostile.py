"""A thousand requests that mean ill, against a server that others use meanwhile. All on the loopback."""

import contextlib
import json
import random
import socket
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from detkit.client import Client
from detkit.serve import run
from tests.serve.conftest import photo, save, serving

pytestmark = pytest.mark.slow


def bomb():
    """A PNG of 30,000 x 30,000 pixels in some kilobytes."""
    head = (30_000).to_bytes(4, "big") * 2 + b"\x01\x00\x00\x00\x00"

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    rows = zlib.compress(bytes(3751 * 30_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMB = bomb()
PATHS = (
    *["/v1/detect"] * 6, "/v1/detect?score=nan", "/v1/detect?score=%ff&label=%00", "/v1/detect?format=picture",
    "/v1/detect?model=../../x&format=voc", *["/v2/models/shelf/infer"] * 2, "/v2/models/%2e%2e%2f/infer",
    "/v2/repository/index", "/v1/models/%00", "/../../etc/passwd", "/" + "a" * 3000, "/%ff%fe", "//", "/metrics",
)  # fmt: skip
TYPES = (
    "image/jpeg", "multipart/form-data; boundary=b", "multipart/form-data", "application/json", "a; charset=\xff",
    "multipart/form-data; boundary=" + "x" * 500, "multipart/form-data; boundary=b; charset=none", "",
)  # fmt: skip
DISPOSITIONS = (
    'form-data; name="a"; filename="b.jpg"', "form-data", "", 'form-data; name="\xff"; filename="\xfe"',
    'form-data; name="a"; filename*=utf-9\'\'%ff', 'form-data; name="a"; filename="../\x01<&.jpg"',
)  # fmt: skip
HEADERS = (
    *[""] * 9, "Transfer-Encoding: chunked\r\n", "X: " + "y" * 100_000 + "\r\n", "Expect: 100-continue\r\n",
    "Inference-Header-Content-Length: 7\r\n", "Content-Encoding: gzip\r\n", "Host: y\r\n", "A\x00: b\r\n",
    "Authorization: \xff\r\n", "Upgrade: websocket\r\nConnection: Upgrade\r\n", "X-Request-ID: \t\t\r\n",
    "Range: bytes=0-\r\n",
)  # fmt: skip


def tensors(draw):
    shape = draw.choice([[-1], [0, 3, 64, 96], [1, 3, 64, 96], "x", None, [10**30] * 4])
    data = draw.choice([[float("nan")], "x", [[1], 2], None, [float("inf")] * 18432, [1e300, -1]])
    return json.dumps({"inputs": [{"name": "images", "datatype": "UINT8", "shape": shape, "data": data}]}).encode()


def content(draw):
    good = photo(draw.randrange(256), kind=draw.choice(("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")))
    damaged = bytearray(good)
    for _ in range(draw.randint(1, 20)):
        damaged[draw.randrange(len(damaged))] = draw.randrange(256)
    noise = draw.randbytes(draw.randint(0, 2000))
    return draw.choice([
        good[: draw.randrange(len(good))], bytes(damaged), noise, b"", BOMB, b"\xff\xd8\xff" + noise, bytes(2 << 20),
        b"%PDF-1.7" + noise, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n" + noise,
        b"\x80\x04cos\nsystem\n." + noise, tensors(draw), b'{"inputs": ' * 3000, b"\xff\xfe" * 500,
    ])  # fmt: skip


def hostile(draw):
    """What goes down the line."""
    body = content(draw)
    if draw.random() < 0.3:
        disposition = draw.choice(DISPOSITIONS).encode("latin-1")
        end = draw.choice([b"\r\n--b--\r\n", b"", b"\r\n--b"])
        body = b"--b\r\nContent-Disposition: " + disposition + b"\r\n\r\n" + body + end
    length = draw.choice([len(body)] * 8 + [-1, 10**18, "x", len(body) // 2, len(body) + 10])
    method = draw.choice(["POST"] * 8 + ["GET", "PUT", "BREW", "\x00", "HEAD", "OPTIONS"])
    version = draw.choice(["HTTP/1.1"] * 9 + ["HTTP/9.9", "HTTP/1.0"])
    head = f"{method} {draw.choice(PATHS)} {version}\r\nHost: x\r\nContent-Type: {draw.choice(TYPES)}\r\n"
    return f"{head}Content-Length: {length}\r\n{draw.choice(HEADERS)}\r\n".encode("latin-1") + body


def attack(address, seed):
    """One of them -> the answer's status; 'closed' where there is no answer, 'gone' where nobody waited for it."""
    draw = random.Random(seed)
    with socket.create_connection(address, timeout=20) as line:
        with contextlib.suppress(OSError):  # the server need not hear it all
            line.sendall(hostile(draw))
            if draw.random() < 0.1:
                line.shutdown(socket.SHUT_WR)
        if draw.random() < 0.05:
            return "gone"
        answer = b""
        with contextlib.suppress(ConnectionError):
            while b"\r\n" not in answer and (more := line.recv(4096)):
                answer += more
        return answer[9:12].decode() or "closed"


def loris(address, head):
    """A request that comes a byte at a time -> what it was told, or b'' where the line was cut."""
    with socket.create_connection(address, timeout=30) as line:
        with contextlib.suppress(OSError):
            line.sendall(head)
            for _ in range(200):
                line.sendall(b"a")
                time.sleep(0.05)
            raise AssertionError("it was listened to for 10 s")
        with contextlib.suppress(OSError):
            return line.recv(100)
        return b""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_none_is_answered_with_a_failure_and_others_are_served_meanwhile(tmp_path):
    model = save(tmp_path / "m.onnx")
    with serving(model, max_bytes=1 << 20, max_pixels=1_000_000, timeout=1.0) as one:
        host, port = one.url.removeprefix("http://").split(":")
        good = []
        with ThreadPoolExecutor(8) as pool, Client(one.url) as client:
            attacks = [pool.submit(attack, (host, int(port)), seed) for seed in range(1000)]
            while not all(each.done() for each in attacks):
                good.append(len(client.detect(photo())[0]["detections"]))
            statuses = Counter(each.result() for each in attacks)
        with Client(one.url, retries=0) as client:
            assert len(client.detect(photo())[0]["detections"]) == 3
        assert set(good) == {3}
        assert {"400", "404", "405", "408", "413", "415", "422"} <= statuses.keys(), statuses
        assert not [status for status in statuses if status.startswith("5") and status != "503"], statuses
        assert all(entry.engine.batcher.held == 0 for entry in one.models)


def test_who_dawdles_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HEAD_SECONDS", 2.0)
    heads = [b"GET / HTTP/1.1\r\nX: ", b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n"] * 10
    with serving(save(tmp_path / "m.onnx"), timeout=1.0) as one:
        host, port = one.url.removeprefix("http://").split(":")
        with ThreadPoolExecutor(len(heads)) as pool, Client(one.url) as client:
            lines = [pool.submit(loris, (host, int(port)), head) for head in heads]
            assert client.detect(photo())
            assert not any(line.exception() for line in lines)


def test_names_are_harmless(tmp_path):
    head = b'--b\r\nContent-Disposition: form-data; name="a"; filename="../<&\x01\x7f\xe2\x80\xae.png"\r\n\r\n'
    form = {
        "content": head + photo() + b"\r\n--b--\r\n",
        "headers": {"content-type": "multipart/form-data; boundary=b"},
    }
    with serving(save(tmp_path / "m.onnx")) as one, httpx2.Client(base_url=one.url) as client:
        assert client.post("/v1/detect", **form).json()["photos"][0]["image"] == "<&.png"
        assert "<filename>&lt;&amp;.png</filename>" in client.post("/v1/detect?format=voc", **form).text

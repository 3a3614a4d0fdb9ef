import asyncio
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest

from detkit import cli, client
from detkit.client import AsyncClient, Client, Remote, ServerError
from detkit.errors import UserError
from detkit.runtime.session import Session
from tests.serve.conftest import photo, pixels, save, serve, shared  # noqa: F401 - fixtures


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(client, "_LONGEST", 0.01)


def test_detections_pictures_xml_and_models(shared, tmp_path):  # noqa: F811
    (tmp_path / "a.png").write_bytes(photo())
    with Client(shared.url) as one:
        assert [model["name"] for model in one.models()] == ["shelf", "shelf", "whole"]
        both = one.detect(tmp_path / "a.png", photo(0), version="1")
        assert [(found["image"], len(found["detections"])) for found in both] == [("a.png", 3), ("2", 0)]
        assert one.detect(photo(), version="1", labels=["żur"], score=0.1)[0]["detections"][0]["score"] == 0.5
        assert one.picture(photo()).startswith(b"\xff\xd8")
        assert "<name>牛奶</name>" in one.voc(photo())
        assert one.manifest("shelf", "2").resize == "stretch"
        with pytest.raises(ServerError, match=r"no model 'beer'.*\(404\)") as error:
            one.detect(photo(), model="beer")
        assert error.value.status == 404
        with pytest.raises(UserError, match=r"none\.jpg: can't be read"):
            one.detect(tmp_path / "none.jpg")


def test_the_async_client_does_the_same(shared):  # noqa: F811
    async def main():
        async with AsyncClient(shared.url) as one:
            found = await asyncio.gather(*(one.detect(photo(red), version="1") for red in (255, 0, 255)))
            images = np.zeros((2, 3, 64, 96), np.uint8)
            return found, await one.infer(images, "shelf"), await one.models(), await one.picture(photo())

    found, raw, models, picture = asyncio.run(main())
    assert [len(one[0]["detections"]) for one in found] == [3, 0, 3]
    assert raw.boxes.shape == (2, 4, 4)
    assert len(models) == 3
    assert picture


@pytest.mark.parametrize("version", ["1", "2"])
def test_infer_is_a_session_s_run(shared, version):  # noqa: F811
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 64, 96), np.uint8)
    session = Session(shared.models.find("shelf", version).path, "cpu", threads=1)
    with Client(shared.url) as one:
        for here, there in zip(session.run(images), one.infer(images, "shelf", version), strict=True):
            np.testing.assert_array_equal(here, there)
        whole = one.infer(pixels(255, (20, 10)), "whole")
        assert whole.boxes.tolist() == [[[0, 0, 0, 0], [0, 0, 10, 10]]]


def test_remote_detects_as_a_session_does(shared):  # noqa: F811
    images = [pixels(255, (300, 40)), pixels(128, (5, 5))]
    session = Session(shared.models.find("shelf").path, "cpu", threads=1)
    with Client(shared.url) as one:
        remote = Remote(one)
        assert remote.classes == session.classes
        for here, there in zip(session.detect(images), remote.detect(images), strict=True):
            np.testing.assert_array_equal(here.boxes, there.boxes)
            np.testing.assert_array_equal(here.scores, there.scores)
        with pytest.raises(UserError, match="takes whole photos"):
            Remote(one, "whole").detect(images)


def test_predict_writes_with_a_server_what_it_writes_with_the_file(shared, tmp_path, capsys):  # noqa: F811
    (tmp_path / "a.png").write_bytes(photo(255, (200, 100)))
    entry = shared.models.find("shelf", "2")
    for words in (["--url", shared.url, "--out", "there"], ["--model", str(entry.path), "--out", "here"]):
        words[-1] = str(tmp_path / words[-1])
        with pytest.raises(SystemExit) as stop:
            cli.main(["predict", str(tmp_path / "a.png"), *words])
        assert not stop.value.code
    here, there = (json.loads((tmp_path / name / "a.json").read_text("utf-8")) for name in ("here", "there"))
    assert here == there
    assert here["detections"]


class Flaky(BaseHTTPRequestHandler):
    """Answers as it is told, one after the other."""

    answers: list
    seen: int

    def do_GET(self):
        type(self).seen += 1
        status, headers = type(self).answers.pop(0)
        if status is None:
            self.connection.close()
            return
        body = b'[{"name": "m"}]' if status == 200 else b'{"error": "busy"}'
        self.send_response(status)
        for name, value in {"content-length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def flaky():
    handler = type("Handler", (Flaky,), {"answers": [], "seen": 0})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_busy_and_lost_are_tried_again(flaky, kind):
    handler, url = flaky
    handler.answers += [(503, {"retry-after": "0"}), (None, {}), (429, {}), (200, {})]
    if kind is Client:
        with Client(url) as one:
            models = one.models()
    else:

        async def main():
            async with AsyncClient(url) as one:
                return await one.models()

        models = asyncio.run(main())
    assert models == [{"name": "m"}]
    assert handler.seen == 4


def test_it_waits_as_long_as_the_server_says(flaky, monkeypatch):
    handler, url = flaky
    waits = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    handler.answers += [(503, {"retry-after": "7"}), (429, {"retry-after": "soon"}), (200, {})]
    with Client(url) as one:
        one.models()
    assert waits[0] == 7
    assert waits[1] < 1


def test_tries_have_an_end_and_other_errors_none(flaky):
    handler, url = flaky
    handler.answers += [(503, {})] * 3
    with Client(url, retries=2) as one, pytest.raises(ServerError, match=r"busy \(503\)"):
        one.models()
    assert handler.seen == 3
    handler.answers += [(500, {})]
    with Client(url) as one, pytest.raises(ServerError, match=r"\(500\)"):
        one.models()
    assert handler.seen == 4
    handler.answers += [(None, {})] * 2
    with Client(url, retries=1) as one, pytest.raises(UserError, match="no answer"):
        one.models()


def test_an_address_that_is_none():
    with pytest.raises(UserError, match="begins with http"):
        Client("localhost:8000")
    with Client("http://127.0.0.1:9", retries=0) as one, pytest.raises(UserError, match="no answer"):
        one.models()


def test_the_token_is_sent(serve, tmp_path, monkeypatch):  # noqa: F811
    server = serve(save(tmp_path / "m.onnx"), token="s3cret")
    with Client(server.url) as one, pytest.raises(ServerError, match="token"):
        one.models()
    with Client(server.url, token="s3cret") as one:
        assert one.models()
    monkeypatch.setenv("DETKIT_TOKEN", "s3cret")
    with Client(server.url) as one:
        assert one.models()

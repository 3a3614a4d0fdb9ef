"""Models by name and version, and the files behind them replaced while they are served."""

import shutil
import threading
import time

import httpx2
import pytest

from detkit.errors import UserError
from detkit.serve.models import Repository, place
from detkit.serve.observe import Metrics
from detkit.serve.settings import Settings
from tests.serve.conftest import photo, save, wait_until


def load(*texts):
    repository = Repository(Settings(models=texts, device="cpu", threads=1), Metrics())
    repository.load()
    return [(one.name, one.version) for one in repository]


def test_names_and_versions(tmp_path):
    a, b = save(tmp_path / "a.onnx"), save(tmp_path / "b=c.onnx", name="Zupa / 2")
    assert load(str(a)) == [("shelf", "1")]
    assert load(str(a), str(b), f"shelf={a}", f"beer:v7={b}") == [
        ("shelf", "1"), ("shelf", "2"), ("Zupa-2", "1"), ("beer", "v7")
    ]  # fmt: skip
    assert place("m:2=x/y.onnx")[:2] == ("m", "2")


@pytest.mark.parametrize("text", ["a/b={}", "../x={}", "a:={}", ":1={}", "a b={}"])
def test_names_that_are_none(tmp_path, text):
    with pytest.raises(UserError, match="letters, digits"):
        load(text.format(save(tmp_path / "a.onnx")))


def test_what_can_t_be_loaded_is_one_line(tmp_path):
    model = save(tmp_path / "a.onnx")
    with pytest.raises(UserError, match=r"^.*none\.onnx: can't be read"):
        load(str(tmp_path / "none.onnx"))
    with pytest.raises(UserError, match="model m has a version 1 already"):
        load(f"m:1={model}", f"m:1={model}")
    (tmp_path / "bad.onnx").write_bytes(model.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"bad\.onnx: "):
        load(str(tmp_path / "bad.onnx"))


def test_a_replaced_file_is_served_without_a_failed_request(serve, tmp_path):
    path = save(tmp_path / "m.onnx", score=0.1)
    one = serve(path, reload=0.05)
    statuses, stop = [], threading.Event()

    def load():
        with httpx2.Client(base_url=one.url) as client:
            while not stop.is_set():
                statuses.append(client.post("/v1/detect", content=photo()).status_code)

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        with httpx2.Client(base_url=one.url) as client:

            def score():
                return client.get("/v1/models").json()[0]["score"]

            assert score() == 0.1
            for new in (0.2, 0.3):
                save(path, score=new)
                wait_until(lambda new=new: score() == new)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}


def test_a_bad_file_keeps_the_old_one_until_a_good_one_comes(serve, tmp_path):
    path = save(tmp_path / "m.onnx", score=0.1)
    good = path.read_bytes()
    one = serve(path, reload=0.05)
    with httpx2.Client(base_url=one.url) as client:

        def figure(result):
            lines = [line for line in client.get("/metrics").text.splitlines() if f'result="{result}"' in line]
            return float(lines[0].rsplit(" ", 1)[1]) if lines else 0

        for number, bad in enumerate((good[:-100], b"", b"no model"), 1):
            (tmp_path / "bad").write_bytes(bad)
            (tmp_path / "bad").replace(path)  # at once: a file half written would be one more
            wait_until(lambda number=number: figure("refused") == number)
            assert client.post("/v1/detect", content=photo()).json()["photos"][0]["detections"]
        time.sleep(0.2)
        assert figure("refused") == 3  # each is looked at once
        path.unlink()
        time.sleep(0.2)
        assert client.get("/v1/models").json()[0]["score"] == 0.1
        shutil.move(save(tmp_path / "new.onnx", score=0.2), path)
        wait_until(lambda: client.get("/v1/models").json()[0]["score"] == 0.2)

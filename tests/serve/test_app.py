import io
import json
import zipfile
from xml.etree import ElementTree as ET

import httpx2
import numpy as np
import pytest
from PIL import Image

from detkit import formats, imaging
from detkit.manifest import Decision
from detkit.runtime.session import Session
from detkit.serve.observe import _Formatter
from tests.serve.conftest import CLASSES, photo, pixels, save, wait_until


@pytest.fixture(scope="module")
def http(shared):
    with httpx2.Client(base_url=shared.url) as client:
        yield client


def refused(answer, status, fragment):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    reason = answer.json()["error"]
    assert fragment in reason
    assert "\n" not in reason


@pytest.mark.parametrize("size", [(96, 64), (30, 90), (1, 1)])
@pytest.mark.parametrize("version", ["1", "2"])
def test_detections_are_those_of_a_session(http, shared, size, version):
    session = Session(shared.models.find("shelf", version).path, "cpu", threads=1)
    (found,) = session.detect([pixels(200, size)])
    told = http.post("/v1/detect", params={"version": version, "score": 0}, content=photo(200, size)).json()
    assert told == {
        "model": "shelf", "version": version, "photos": [formats.detections_dict("photo", found, CLASSES)]
    }  # fmt: skip
    assert size == (1, 1) or told["photos"][0]["detections"]


def test_the_model_s_threshold_holds_unless_the_request_says(http):
    def scores(**params):
        found = http.post("/v1/detect", params=params, content=photo()).json()["photos"][0]["detections"]
        return [one["score"] for one in found]

    assert scores(version="1") == [0.9, 0.6, 0.5]  # its own is 0.4
    assert scores() == [0.9]  # the last version's is 0.8
    assert scores(version="1", score=0.55) == [0.9, 0.6]
    assert scores(version="1", label="żur") == [0.5]


def test_several_photos_keep_order_and_names(http):
    files = [("a", ("x/one.png", photo(255))), ("b", ("C:\\two.png", photo(0))), ("c", ("", photo(128)))]
    photos = http.post("/v1/detect", params={"version": 1}, files=files[:2]).json()["photos"]
    assert [one["image"] for one in photos] == ["one.png", "two.png"]
    assert [len(one["detections"]) for one in photos] == [3, 0]


def test_a_picture_and_voc_xml_come_back_and_several_in_a_zip(http):
    picture = http.post("/v1/detect", params={"format": "picture"}, content=photo())
    assert picture.headers["content-type"] == "image/jpeg"
    image = np.asarray(Image.open(io.BytesIO(picture.content)))
    assert image.shape == (64, 96, 3)
    assert np.abs(image.astype(int) - pixels()).max() > 50  # something is drawn

    voc = http.post("/v1/detect", params={"format": "voc", "version": 1}, files={"photo": ("a&b.png", photo())})
    assert voc.headers["content-type"] == "application/xml"
    tree = ET.fromstring(voc.text)
    assert tree.findtext("filename") == "a&b.png"
    assert [one.findtext("name") for one in tree.iter("object")] == ["牛奶", "milk", "żur"]

    two = [("photo", ("a.png", photo())), ("photo", ("A.png", photo()))]
    packed = http.post("/v1/detect", params={"format": "voc"}, files=two)
    assert packed.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
        assert archive.namelist() == ["a.xml", "A-2.xml"]
        assert ET.fromstring(archive.read("a.xml")).find("object") is not None


def test_exif_is_applied(http):
    turned = Image.new("RGB", (40, 20), (255, 0, 0))
    exif = turned.getexif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "JPEG", exif=exif)
    told = http.post("/v1/detect", content=file.getvalue()).json()["photos"][0]
    assert (told["height"], told["width"]) == (40, 20) == imaging.decode(file.getvalue()).shape[:2]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"", "no photo"),
        (b"not a photo", "photo: not an image that can be read"),
        (photo()[:60], "photo: damaged or cut-off image"),
        (photo(size=(101, 100)), "photo: more than 0 megapixels"),
    ],
)
def test_what_is_no_photo_is_one_line(http, content, fragment):
    refused(http.post("/v1/detect", content=content), 422, fragment)


def test_one_bad_photo_of_several_is_named(http):
    files = [("p", ("good.png", photo())), ("p", ("bad.jpg", b"text"))]
    refused(http.post("/v1/detect", files=files), 422, "bad.jpg: not an image")
    assert http.post("/v1/detect", files=files[:1]).status_code == 200


def test_limits_are_told_before_anything_is_decoded(http):
    refused(http.post("/v1/detect", content=bytes(2 << 20)), 413, "more than 1 MiB")

    def parts():
        for _ in range(20):
            yield bytes(1 << 16)

    refused(http.post("/v1/detect", content=parts()), 413, "more than 1 MiB")
    refused(http.post("/v1/detect", files=[("p", ("a.png", photo()))] * 5), 413, "at most 4 photos")
    zipped = http.post("/v1/detect", content=photo(), headers={"content-encoding": "gzip"})
    refused(zipped, 415, "compressed")


@pytest.mark.parametrize(
    ("params", "status", "fragment"),
    [
        ({"model": "../../etc/passwd"}, 404, "no model"),
        ({"version": "9"}, 404, "model shelf has no version '9'; there are: 1, 2"),
        ({"score": "nan"}, 422, "score"),
        ({"score": "2"}, 422, "score"),
        ({"label": "wine"}, 422, "'wine' is no class of shelf"),
        ({"format": "exe"}, 422, "format"),
    ],
)
def test_parameters_that_are_none(http, params, status, fragment):
    refused(http.post("/v1/detect", params=params, content=photo()), status, fragment)


def test_damaged_forms(http):
    head = {"content-type": "multipart/form-data; boundary=x"}
    for content in (b"--x\r\n\r\nabc", b"", b"--x--", b"--x\r\ncontent-disposition: form-data\r\n\r\na\r\n--x--\r\n"):
        refused(http.post("/v1/detect", content=content, headers=head), 422, "form")
    refused(http.post("/v1/detect", content=b"x", headers={"content-type": "multipart/form-data"}), 422, "damaged")


def test_unknown_paths_and_methods_are_json_too(http):
    refused(http.get("/v3"), 404, "Not Found")
    refused(http.get("/v1/detect"), 405, "Method Not Allowed")


def test_health_models_and_manifest(http):
    assert http.get("/health/live").json() == {"live": True}
    assert http.get("/health/ready").json() == {"ready": True}
    models = http.get("/v1/models").json()
    assert [(one["name"], one["version"], one["score"]) for one in models] == [
        ("shelf", "1", 0.4), ("shelf", "2", 0.8), ("whole", "1", 0.4)
    ]  # fmt: skip
    assert models[0]["classes"] == list(CLASSES)
    assert http.get("/v1/models/shelf/versions/1").json()["resize"] == "letterbox"
    assert http.get("/v1/models/shelf").json()["resize"] == "stretch"


def test_thresholds_of_each_class_kept_in_the_model(serve, tmp_path):
    decision = Decision(thresholds=(0.55, 0.7, 0.95))  # the photo's scores are 0.5, 0.6 and 0.9
    server = serve(save(tmp_path / "chosen.onnx", decision=decision))
    with httpx2.Client(base_url=server.url) as client:
        assert client.get("/v1/models").json()[0]["thresholds"] == [0.55, 0.7, 0.95]

        def found(**params):
            told = client.post("/v1/detect", params=params, content=photo()).json()["photos"][0]["detections"]
            return [(one["label"], one["score"]) for one in told]

        everything = found(score=0)
        limits = dict(zip(CLASSES, decision.thresholds, strict=True))
        wanted = [(label, score) for label, score in everything if score >= limits[label]]
        assert found() == wanted != everything


def test_a_model_of_whole_photos(http, shared):
    found = http.post("/v1/detect", params={"model": "whole"}, content=photo(255, (80, 50))).json()["photos"][0]
    assert found["detections"] == [{"label": "牛奶", "score": 1.0, "box": [0, 0, 40, 50]}]


def test_metrics_count(http):
    def figure(name):
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = figure("detkit_batch_photos_sum"), figure('detkit_objects_total{label="milk"')
    http.post("/v1/detect", params={"version": 1}, content=photo())
    assert figure("detkit_batch_photos_sum") == before[0] + 1
    assert figure('detkit_objects_total{label="milk"') == before[1] + 1
    assert figure("detkit_request_bytes_held") == 0
    assert figure("detkit_requests_open") == 1  # this one
    assert figure('detkit_model_loads_total{model="shelf"') == 2


def test_openapi_has_examples_and_every_route(http):
    document = http.get("/openapi.json").json()
    detect = document["paths"]["/v1/detect"]["post"]
    assert {"image/jpeg", "multipart/form-data"} == detect["requestBody"]["content"].keys()
    assert {"200", "401", "413", "422", "429", "503"} <= detect["responses"].keys()
    example = document["components"]["schemas"]["Answer"]["example"]
    assert example["photos"][0]["detections"][0]["label"] == "milk"
    told = http.post("/v1/detect", content=photo()).json()
    assert told.keys() == example.keys()
    assert told["photos"][0].keys() == example["photos"][0].keys()
    for path in ("/v2/models/{name}/infer", "/v2/repository/index", "/metrics", "/health/ready"):
        assert path in document["paths"]


def test_openapi_s_examples_of_the_protocol_are_what_is_answered(http):
    document = http.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]  # ours is {"error": ...}

    def example(of):
        return of["content"]["application/json"]["example"]

    for path, methods in document["paths"].items():
        if path.startswith(("/v2", "/health")) and not path.endswith("/infer"):
            ((method, operation),) = methods.items()
            told = http.request(method, path.format(name="shelf", version="1")).json()
            wanted = example(operation["responses"]["200"])
            for one, other in zip(*([x] if isinstance(x, dict) else x[:1] for x in (told, wanted)), strict=True):
                assert one.keys() == other.keys(), path

    infer = document["paths"]["/v2/models/{name}/infer"]["post"]
    asked = example(infer["requestBody"])
    asked["inputs"][0] |= {"shape": [1, 3, 64, 96], "data": [0] * 18432}
    answer = http.post("/v2/models/shelf/infer", json=asked)
    assert answer.status_code == 200
    wanted = example(infer["responses"]["200"])
    assert answer.json().keys() == wanted.keys()
    assert [one.keys() for one in answer.json()["outputs"]] == [one.keys() for one in wanted["outputs"]]


def test_a_token_guards_all_but_health_and_the_page(serve, tmp_path):
    one = serve(save(tmp_path / "m.onnx"), token="s3cret")
    with httpx2.Client(base_url=one.url) as http:
        for path in ("/", "/health/live", "/health/ready", "/v2/health/ready"):
            assert http.get(path).status_code == 200
        for path in ("/v1/models", "/v2", "/metrics", "/nowhere"):
            answer = http.get(path)
            refused(answer, 401, "token")
            assert answer.headers["www-authenticate"] == "Bearer"
        wrong = {"authorization": "Bearer s3cre"}
        refused(http.post("/v1/detect", content=photo(), headers=wrong), 401, "token")
        right = {"authorization": "Bearer s3cret"}
        assert http.post("/v1/detect", content=photo(), headers=right).status_code == 200


def test_the_log_says_what_happened_and_nothing_of_the_photo(shared, http, caplog):
    files = {"photo": ("my-secret-name.png", photo())}
    answer = http.post("/v1/detect", files=files, headers={"x-request-id": "abc-1"}, params={"version": 1})
    assert answer.headers["x-request-id"] == "abc-1"
    http.post("/v1/detect", content=photo(), headers={"x-request-id": "a\tb" * 40})

    def told():
        return [record for record in caplog.records if record.name == "detkit.serve"]

    wait_until(lambda: len(told()) == 2)
    records = told()
    lines = [_Formatter("json").format(record) for record in records]
    first, second = (json.loads(line) for line in lines)
    assert first["id"] == "abc-1"
    assert (first["route"], first["status"], first["photos"], first["objects"]) == ("/v1/detect", 200, 1, 3)
    assert "my-secret-name" not in lines[0]
    assert len(second["id"]) == 32
    assert "abc-1" in _Formatter("text").format(records[0])

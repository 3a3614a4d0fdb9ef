"""The Open Inference Protocol, with NVIDIA's client as the reference."""

import json
import re

import grpc
import httpx2
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from google.protobuf import json_format
from tritonclient.utils import InferenceServerException

from detkit.runtime.session import Session
from tests.serve.conftest import photo, save
from tests.serve.test_app import refused


@pytest.fixture(scope="module", params=["http", "grpc"])
def client(request, shared):
    """tritonclient's module and a client of it."""
    if request.param == "http":
        one = tritonclient.http.InferenceServerClient(shared.url.removeprefix("http://"), concurrency=4)
        yield tritonclient.http, one
    else:
        one = tritonclient.grpc.InferenceServerClient(shared.grpc)
        yield tritonclient.grpc, one
    one.close()


@pytest.fixture(scope="module")
def http(shared):
    with httpx2.Client(base_url=shared.url) as client:
        yield client


def fields(answer):
    """A message of either protocol as it is in JSON."""
    if isinstance(answer, (dict, list)):
        return answer
    return json_format.MessageToDict(answer, preserving_proto_field_name=True)


def test_health_and_metadata(client):
    _, one = client
    assert one.is_server_live()
    assert one.is_server_ready()
    assert one.is_model_ready("shelf")
    assert one.is_model_ready("shelf", "1")
    server = fields(one.get_server_metadata())
    assert server["name"] == "detkit"
    assert "binary_tensor_data" in server["extensions"]
    model = fields(one.get_model_metadata("shelf", "1"))
    assert model["versions"] == ["1", "2"]
    (given,) = model["inputs"]
    assert (given["name"], given["datatype"], [int(n) for n in given["shape"]]) == ("images", "UINT8", [-1, 3, 64, 96])
    assert [out["name"] for out in model["outputs"]] == ["boxes", "scores", "labels"]
    index = fields(one.get_model_repository_index())
    index = index["models"] if isinstance(index, dict) else index
    assert [(each["name"], each["version"], each["state"]) for each in index] == [
        ("shelf", "1", "READY"), ("shelf", "2", "READY"), ("whole", "1", "READY")
    ]  # fmt: skip


def test_what_is_not_there(client):
    _, one = client
    with pytest.raises(InferenceServerException, match="no model 'beer'"):
        one.get_model_metadata("beer")
    with pytest.raises(InferenceServerException, match="no version '7'"):
        one.get_model_metadata("shelf", "7")


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_inference_gives_what_a_session_gives(client, shared, binary, batch):
    module, one = client
    images = np.random.default_rng(batch).integers(0, 256, (batch, 3, 64, 96), np.uint8)
    given = module.InferInput("images", list(images.shape), "UINT8")
    wanted = [module.InferRequestedOutput(name) for name in ("labels", "scores", "boxes")]
    if module is tritonclient.http:  # gRPC's tensors are always bytes in this client
        given.set_data_from_numpy(images, binary_data=binary)
        wanted = [module.InferRequestedOutput(name, binary_data=binary) for name in ("labels", "scores", "boxes")]
    else:
        given.set_data_from_numpy(images)
    found = one.infer("shelf", [given], model_version="1", request_id="7", outputs=wanted)
    raw = Session(shared.models.find("shelf", "1").path, "cpu", threads=1).run(images)
    for name in ("boxes", "scores", "labels"):
        np.testing.assert_array_equal(found.as_numpy(name), getattr(raw, name))
        assert found.as_numpy(name).dtype == getattr(raw, name).dtype
    told = fields(found.get_response())
    assert (told["id"], told["model_version"]) == ("7", "1")


def test_all_outputs_where_none_is_named_and_only_those_that_are(client):
    module, one = client
    given = module.InferInput("images", [1, 3, 64, 96], "UINT8")
    given.set_data_from_numpy(np.zeros((1, 3, 64, 96), np.uint8))
    assert one.infer("shelf", [given]).as_numpy("boxes").shape == (1, 4, 4)
    only = one.infer("shelf", [given], outputs=[module.InferRequestedOutput("scores")])
    assert only.as_numpy("scores").shape == (1, 4)
    assert only.as_numpy("boxes") is None


def test_a_model_of_whole_photos_takes_any_size(client):
    module, one = client
    for height, width in ((5, 7), (40, 20)):
        given = module.InferInput("image", [height, width, 3], "UINT8")
        given.set_data_from_numpy(np.full((height, width, 3), 255, np.uint8))
        found = one.infer("whole", [given])
        np.testing.assert_array_equal(found.as_numpy("boxes"), [[0, 0, 0, 0], [0, 0, width / 2, height]])
        assert found.as_numpy("scores").tolist() == [0, 1]


@pytest.mark.parametrize(
    ("name", "shape", "datatype", "reason"),
    [
        ("pixels", [1, 3, 64, 96], "UINT8", "the input must be images, UINT8"),
        ("images", [1, 3, 64, 96], "FP32", "the input must be images, UINT8"),
        ("images", [1, 3, 96, 64], "UINT8", r"shape must be \[-1, 3, 64, 96\]"),
        ("images", [3, 64, 96], "UINT8", "shape must be"),
        ("images", [5, 3, 64, 96], "UINT8", "at most 4 images"),
    ],
)
def test_wrong_tensors_are_refused(client, name, shape, datatype, reason):
    module, one = client
    given = module.InferInput(name, shape, datatype)
    given.set_data_from_numpy(np.zeros(shape, np.uint8 if datatype == "UINT8" else np.float32))
    with pytest.raises(InferenceServerException, match=reason):
        one.infer("shelf", [given])


def test_a_wrong_output_is_refused(client):
    module, one = client
    given = module.InferInput("images", [1, 3, 64, 96], "UINT8")
    given.set_data_from_numpy(np.zeros((1, 3, 64, 96), np.uint8))
    with pytest.raises(InferenceServerException, match="no output 'masks'"):
        one.infer("shelf", [given], outputs=[module.InferRequestedOutput("masks")])


def test_a_token_is_asked_for_by_grpc_too(serve, tmp_path):
    one = serve(save(tmp_path / "m.onnx"), token="s3cret", grpc=True)
    with tritonclient.grpc.InferenceServerClient(one.grpc) as client:
        assert client.is_server_ready()
        with pytest.raises(InferenceServerException, match="token") as error:
            client.get_model_metadata("shelf")
        assert error.value.status() == f"StatusCode.{grpc.StatusCode.UNAUTHENTICATED.name}"
        assert client.get_model_metadata("shelf", headers={"authorization": "Bearer s3cret"}).name == "shelf"


def body(**changes):
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 3, 64, 96], "data": [0] * (3 * 64 * 96)} | changes
    return json.dumps({"inputs": [{name: value for name, value in tensor.items() if value is not None}]}).encode()


INFER = "/v2/models/shelf/infer"


def test_nested_numbers_are_taken_as_flat_ones_are(http):
    flat = http.post(INFER, content=body(data=[7] * 18432)).json()
    nested = http.post(INFER, content=body(data=np.full((1, 3, 64, 96), 7).tolist())).json()
    assert flat == nested
    assert flat["outputs"][1]["data"] == pytest.approx([0, 0.5 * 7 / 255, 0.6 * 7 / 255, 0.9 * 7 / 255])


@pytest.mark.parametrize(
    ("content", "length", "reason"),
    [
        (b"", None, "not a request|must be the length"),
        (b"\xff\xfe{}", None, "not a request"),
        (b"[]", None, "not a request"),
        (b"[" * 50_000, None, "not a request"),
        (b'{"inputs": []}', None, "not a request"),
        (body(shape=["a"]), None, "not a request"),
        (body(shape=[10**30, 3, 64, 96]), None, "shape must be|at most"),
        (body(data=[float("nan")] * 18432), None, "whole numbers from 0 to 255"),
        (body(data=[256] * 18432), None, "whole numbers from 0 to 255"),
        (body(data=[-1] * 18432), None, "whole numbers from 0 to 255"),
        (body(data=[10**30] * 18432), None, "whole numbers"),
        (body(data=["1"] * 18432), None, "whole numbers"),
        (body(data=[[1], [1, 2]]), None, "whole numbers, flat or nested evenly"),
        (body(data=[1]), None, "holds 1 values"),
        (body(data=None), None, "not a request"),
        (body(name="\ud800"), None, "the input must be images"),
        (body(data=None, parameters={"binary_data_size": 5}), None, "binary_data_size"),
        (body(data=None, parameters={"binary_data_size": 1}) + b"x", "-4", "must be the length"),
        (body(data=None, parameters={"binary_data_size": 1}) + b"x", "99999", "must be the length"),
        (body(data=None, parameters={"binary_data_size": True}) + b"x", None, "not a request"),
        (body() + b"xyz", str(len(body())), "bytes follow the JSON"),
        (body(), "abc", "not a request"),
    ],
)
def test_damaged_requests_are_one_line(http, content, length, reason):
    headers = {} if length is None else {"inference-header-content-length": length}
    answer = http.post(INFER, content=content, headers=headers)
    refused(answer, 400, "")
    assert re.search(reason, answer.json()["error"])


def test_json_and_photos_share_the_network(http):
    """What /v1/detect finds comes from the tensors that /infer gives."""
    found = http.post("/v1/detect", params={"version": 1}, content=photo()).json()["photos"][0]["detections"]
    raw = http.post("/v2/models/shelf/versions/1/infer", content=body(data=[255] * 18432)).json()
    assert sorted((one["score"] for one in found), reverse=True) == [0.9, 0.6, 0.5]
    assert sorted(raw["outputs"][1]["data"], reverse=True) == pytest.approx([0.9, 0.6, 0.5, 0])

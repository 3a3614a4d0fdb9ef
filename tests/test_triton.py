"""The repository for Triton Inference Server, read with NVIDIA's own definition of its configuration."""

import json

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from detkit import cli, triton
from detkit.errors import UserError
from tests.serve.conftest import CLASSES, save


def parsed(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())


def test_a_repository_of_a_canvas_file(tmp_path):
    model = save(tmp_path / "m.onnx")
    version = triton.write(model, tmp_path / "repository")
    assert version == tmp_path / "repository" / "shelf" / "1"
    assert (version / "model.onnx").read_bytes() == model.read_bytes()
    assert (version.parent / "labels.txt").read_text("utf-8").splitlines() == list(CLASSES)
    said = parsed(version.parent)
    assert (said.name, said.backend, said.max_batch_size) == ("shelf", "onnxruntime", 8)
    (given,) = said.input
    assert (given.name, given.data_type, list(given.dims)) == ("images", model_config_pb2.TYPE_UINT8, [3, 64, 96])
    assert [(one.name, list(one.dims)) for one in said.output] == [("boxes", [4, 4]), ("scores", [4]), ("labels", [4])]
    assert [one.data_type for one in said.output] == [
        model_config_pb2.TYPE_FP32, model_config_pb2.TYPE_FP32, model_config_pb2.TYPE_INT64
    ]  # fmt: skip
    assert [one.label_filename for one in said.output] == ["", "", "labels.txt"]
    assert said.dynamic_batching.max_queue_delay_microseconds == 5000
    told = {name: value.string_value for name, value in said.parameters.items()}
    assert json.loads(told["classes"]) == list(CLASSES)
    assert (told["score"], told["resize"], json.loads(told["fill"])) == ("0.4", "letterbox", [128, 0, 255])


def test_a_repository_of_an_image_file_has_no_batches(tmp_path):
    folder = triton.write(save(tmp_path / "m.onnx", image=True), tmp_path / "repository", "whole").parent
    said = parsed(folder)
    assert (said.name, said.max_batch_size, said.HasField("dynamic_batching")) == ("whole", 0, False)
    assert list(said.input[0].dims) == [-1, -1, 3]
    assert [list(one.dims) for one in said.output] == [[2, 4], [2], [2]]


def test_a_new_file_is_a_further_version_where_it_fits(tmp_path):
    repository = tmp_path / "repository"
    triton.write(save(tmp_path / "m.onnx"), repository)
    assert triton.write(save(tmp_path / "m.onnx", score=0.7), repository).name == "2"
    assert parsed(repository / "shelf").parameters["score"].string_value == "0.7"
    for change in ({"classes": ("beer", "żur", "牛奶")}, {"size": (32, 32)}):
        with pytest.raises(UserError, match="differs from what"):
            triton.write(save(tmp_path / "m.onnx", **change), repository)
    assert sorted(path.name for path in (repository / "shelf").iterdir()) == ["1", "2", "config.pbtxt", "labels.txt"]


def test_what_does_not_run_is_not_put_there(tmp_path):
    (tmp_path / "m.onnx").write_bytes(save(tmp_path / "good.onnx").read_bytes()[:-10])
    with pytest.raises(UserError):
        triton.write(tmp_path / "m.onnx", tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


def test_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(save(tmp_path / "m.onnx")), "--triton", str(tmp_path / "repository")])
    assert not stop.value.code
    assert "for Triton Inference Server" in capsys.readouterr().out
    assert (tmp_path / "repository" / "shelf" / "1" / "model.onnx").exists()

"""The programs beside a model: they find what Session finds, whatever the photo's size and the names."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.testing import assert_allclose
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from detkit import imaging, snippets
from detkit.errors import UserError
from detkit.manifest import KEY, Decision, Manifest
from detkit.runtime import decide
from detkit.runtime.session import Session
from detkit.types import Detections
from tests.runtime.conftest import image_model
from tests.test_manifest import manifest

CLASSES = ('say "hi"', "żur\\", "牛奶")
HW, CELL = (64, 96), 16
CELLS = HW[0] // CELL * (HW[1] // CELL)


def canvas_model(said: Manifest) -> onnx.ModelProto:
    """A detector with a box a cell and channel of the canvas, and the mean of its pixels / 255 as the score: so all
    pixels count."""
    y, x = np.divmod(np.arange(CELLS), HW[1] // CELL)
    boxes = np.tile(np.stack([x, y, x + 1, y + 1], 1) * CELL, (3, 1)).astype(np.float32)
    constants = {
        "box": boxes[None], "label": np.repeat(np.arange(3), CELLS)[None], "byte": np.float32(255),
        "flat": np.array([0, -1]), "zero": np.float32(0), "column": np.array([0, -1, 1]),
    }  # fmt: skip
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("AveragePool", ["pixels"], ["cells"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]),
        helper.make_node("Reshape", ["cells", "flat"], ["means"]),
        helper.make_node("Div", ["means", "byte"], ["scores"]),
        helper.make_node("Mul", ["scores", "zero"], ["nought"]),
        helper.make_node("Cast", ["nought"], ["nought64"], to=TensorProto.INT64),
        helper.make_node("Add", ["nought64", "label"], ["labels"]),
        helper.make_node("Reshape", ["nought", "column"], ["noughts"]),
        helper.make_node("Add", ["noughts", "box"], ["boxes"]),
    ]
    graph = helper.make_graph(
        nodes,
        "means",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 3, *HW])],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", 3 * CELLS, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3 * CELLS]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", 3 * CELLS]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {KEY: said.to_json()})
    return model


@pytest.fixture(params=["stretch", "letterbox", "image"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / 'my "shelf" é.onnx' if os.name == "posix" else tmp_path / "my shelf é.onnx"
    kind = request.param
    if kind == "image":
        onnx.save(image_model(manifest(input="image", classes=CLASSES, score=0.1)), path)
    else:
        # One with a calibration and thresholds, of which the last class reaches none.
        thresholds = Decision(calibration="temperature", temperature=2.0, thresholds=(0.4, 0.5, 1.0))
        decision = thresholds if kind == "letterbox" else None
        onnx.save(canvas_model(manifest(resize=kind, classes=CLASSES, score=0.4, decision=decision)), path)
    return path


def photos(folder: Path) -> list[Path]:
    """Wide, tall, tiny, turned and transparent ones, smaller and larger than the canvas."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (height, width, orientation) in enumerate([(50, 301, 1), (333, 90, 6), (64, 96, 1), (3, 5, 3)]):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8)).resize((width, height))
        exif = Image.Exif()
        exif[0x0112] = orientation
        paths.append(folder / f"{number}.png")
        if number == 1:
            coarse.putalpha(Image.linear_gradient("L").resize(coarse.size))
        coarse.save(paths[-1], exif=exif)
    return paths


def check(command: list[str | Path], model: Path, shown: list[Path]) -> None:
    """Run a program, and compare what it prints with what Session finds."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([*command, *shown], capture_output=True, encoding="utf-8", timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    session = Session(model, device="cpu")
    lowest = decide.lowest(session.manifest)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    total = 0
    for path in shown:
        (found,) = session.detect([imaging.decode(path)])
        kept = decide.are_shown(found, session.manifest)
        found = Detections(found.boxes[kept], found.scores[kept], found.labels[kept], found.hw)
        mine = [row for row in rows if row[0] == str(path)]
        total += len(mine)
        # The same, but for those at the threshold's edge: another decoder or rounding may differ by a level.
        expected = {
            (session.classes[label], *np.round(box, 1).tolist()): score
            for box, score, label in zip(found.boxes, found.scores, found.labels, strict=True)
        }
        said = {(row[1], *np.round(np.float32(row[3:]), 1).tolist()): float(row[2]) for row in mine}
        assert len(said) == len(mine)
        for key in expected.keys() ^ said.keys():
            assert abs({**expected, **said}[key] - lowest[session.classes.index(key[0])]) < 0.005
        both = sorted(expected.keys() & said.keys())
        assert both
        assert_allclose([said[key] for key in both], [expected[key] for key in both], atol=0.005)
    assert total == len(rows)


def test_a_program_a_language_with_nothing_left_to_fill_in(model: Path) -> None:
    written = snippets.write(model)
    assert [path.name for path in written] == [f"{model.stem}-detect.{suffix}" for suffix in ("py", "cpp", "cs", "mjs")]
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert not re.findall("@[A-Z]+@", text)
        assert json.dumps(model.name, ensure_ascii=False) in text
        assert all(json.dumps(name, ensure_ascii=False) in text for name in CLASSES)
        assert not text.isascii()
    ast.parse(written[0].read_text(encoding="utf-8"))
    assert snippets.write(model) == written  # over those of before


def test_the_python_program_finds_what_session_finds(model: Path, tmp_path: Path) -> None:
    (python, *_) = snippets.write(model)
    check([sys.executable, python], model, photos(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("node") and shutil.which("npm")), reason="needs Node.js and npm")
def test_the_javascript_program_finds_what_session_finds(model: Path, tmp_path: Path, node: Path) -> None:
    program = snippets.write(model)[-1]
    (tmp_path / "node_modules").symlink_to(node / "node_modules", target_is_directory=True)
    check([shutil.which("node") or "", program], model, photos(tmp_path))


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages that the programs name."""
    folder = tmp_path_factory.mktemp("node")
    environment = {**os.environ, "ONNXRUNTIME_NODE_INSTALL": "skip"}  # the GPU's part, from elsewhere
    done = subprocess.run(
        [shutil.which("npm") or "", "install", "--no-audit", "--no-fund", "onnxruntime-node", "sharp"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def test_programs_that_somebody_has_changed_are_known(model: Path) -> None:
    python, *others = snippets.write(model)
    others.pop().unlink()
    python.write_text("# mine\n", encoding="utf-8")
    assert snippets.present(model) == {python: False} | dict.fromkeys(others, True)
    assert snippets.write(model, others) == others
    assert python.read_text(encoding="utf-8") == "# mine\n"


def test_control_characters_are_octal_in_c_plus_plus() -> None:
    assert snippets._text('a\x01\n"', "cpp") == r'"a\001\n\""'
    assert snippets._text("a\x01", "cs") == r'"a\u0001"'


def test_a_foreign_file_gets_none(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save(image_model(None), path)
    with pytest.raises(UserError, match="no manifest"):
        snippets.write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["x.onnx"]


def test_torch_is_never_imported() -> None:
    code = "import sys, detkit.snippets; assert not {'torch', 'onnx', 'onnxruntime', 'jinja2'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

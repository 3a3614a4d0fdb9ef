import hashlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from rich.console import Console

from detkit.cli import main
from detkit.errors import UserError
from detkit.manifest import DIGEST, KEY, Golden, read, seal
from detkit.runtime import verify
from detkit.runtime.session import Session
from detkit.runtime.verify import TOLERANCES, compare, golden, run, scene
from detkit.types import Detections
from tests.runtime.conftest import Make, onnx_model
from tests.test_manifest import manifest


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32), np.array(labels, np.int64), (64, 96)
    )


EXPECTED = Golden(seed=1, size=(64, 96), boxes=((0, 0, 40, 40), (50, 10, 90, 60)), scores=(0.9, 0.5), labels=(1, 2))
BOXES = [[0, 0, 40, 40], [50, 10, 90, 60]]


@pytest.mark.parametrize(
    ("ours", "lost", "more"),
    [
        (found(BOXES, [0.9, 0.5], [1, 2]), 0, 0),
        (found(BOXES[::-1], [0.4995, 0.9005], [2, 1]), 0, 0),
        (found([*BOXES, [1, 1, 9, 9]], [0.9, 0.5, 0.4], [1, 2, 0]), 0, 0),  # below what was kept
        (found([*BOXES, [1, 1, 9, 9]], [0.9, 0.5, 0.6], [1, 2, 0]), 0, 1),
        (found(BOXES[:1], [0.9], [1]), 1, 0),
        (found(BOXES, [0.9, 0.5], [1, 1]), 1, 0),
        (found(BOXES, [0.9, 0.51], [1, 2]), 1, 1),
        (found([[0, 0, 40, 41.5], BOXES[1]], [0.9, 0.5], [1, 2]), 1, 1),
        (found([], [], []), 2, 0),
    ],
)
def test_compare(ours: Detections, lost: int, more: int) -> None:
    off = compare(ours, EXPECTED, TOLERANCES["fp32"])
    assert (off.lost, off.more) == (lost, more)


def test_compare_says_how_far_off() -> None:
    off = compare(found([[0.1, 0, 40, 40], BOXES[1]], [0.9, 0.5004], [1, 2]), EXPECTED, TOLERANCES["fp32"])
    assert off.box == pytest.approx(0.1, abs=1e-5)
    assert off.score == pytest.approx(4e-4, abs=1e-5)


def test_golden_holds_the_best_in_order() -> None:
    many = found([[0, 0, 1 + i, 9] for i in range(50)], [0.9 - i / 100 for i in range(50)], [1] * 50)
    one = golden(3, many, 0.5)
    assert len(one.scores) == verify.MOST
    assert one.scores[0] == pytest.approx(0.9)
    assert (one.seed, one.size) == (3, (64, 96))
    assert golden(3, many, 0.85).scores == pytest.approx((0.9, 0.89, 0.88, 0.87, 0.86, 0.85))


def test_scenes_are_the_same_bytes_everywhere() -> None:
    digest = hashlib.sha256(b"".join(scene(seed, (61, 97)).tobytes() for seed in range(5))).hexdigest()
    assert digest == "c56b45e4259b662563ec218c7e2f93f1dcbf609fac67c0a2a329dc4517d3473c"
    assert scene(0, (1, 1)).shape == (1, 1, 3)
    assert scene(0, (3, 500)).dtype == np.uint8
    assert (scene(0, (50, 50)) != scene(1, (50, 50))).any()


def model(make_model: Make, change: float = 0.0) -> Path:
    """A file with a golden photo; with `change`, one that finds less sure objects than it should."""
    first = make_model()
    (there,) = Session(first, "cpu").detect([scene(2, (64, 96))])
    one = golden(2, there, 0.0)
    assert len(one.scores) == 3
    one = one.model_copy(update={"scores": tuple(score + change for score in one.scores)})
    return make_model(f"golden{change}.onnx", golden=(one,))


def said(path: Path) -> tuple[bool, str]:
    text = io.StringIO()
    return run(path, "cpu", 0, Console(file=text, width=200)), text.getvalue()


def test_a_file_that_finds_what_it_should(make_model: Make) -> None:
    path = model(make_model)
    right, text = said(path.rename(path.with_name("[a] model.onnx")))
    assert right
    assert text.startswith("[a] model.onnx: ")
    assert "finds here, on cpu, what it found where it was exported" in text


def test_a_file_that_does_not(make_model: Make) -> None:
    right, text = said(model(make_model, 0.01))
    assert not right
    assert "does NOT find here" in text
    assert "differs" in text


def test_exit_codes(make_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"no model")
    for path, code in ((model(make_model), 0), (model(make_model, 0.01), 1), (make_model(), 2), (other, 2)):
        with pytest.raises(SystemExit) as end:
            main(["verify", str(path), "--device", "cpu"])
        assert end.value.code == code
    assert "no golden photos" in capsys.readouterr().err


def test_without_torch(make_model: Make) -> None:
    code = f"""
import sys
for name in ("torch", "torchvision", "onnx", "cv2", "lxml"):
    sys.modules[name] = None
from detkit.cli import main
main(["verify", {str(model(make_model))!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "finds here" in done.stdout


def sealed() -> bytes:
    return seal(onnx_model(manifest()).SerializeToString())


def test_a_sealed_file_is_one_that_onnx_reads() -> None:
    model = onnx.load_from_string(sealed())
    onnx.checker.check_model(model)
    assert [prop.key for prop in model.metadata_props] == [KEY, DIGEST]
    assert read(sealed(), "x") == manifest()
    assert read(onnx_model(manifest()).SerializeToString(), "x") == manifest()  # as older detkits wrote


def refused(content: bytes) -> str:
    with pytest.raises(UserError) as error:
        read(content, "x.onnx")
    message = str(error.value)
    assert message.startswith("x.onnx: ")
    assert "\n" not in message
    return message


def test_any_byte_that_changed_is_noticed() -> None:
    whole = sealed()
    named = whole.index(DIGEST.encode())  # where its own name is spoiled, all the rest is whole
    for at in (*range(0, named, 7), *range(named + len(DIGEST), len(whole), 7)):
        refused(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])


def test_a_file_that_was_cut_off_is_noticed() -> None:
    whole = sealed()
    end = whole.index(DIGEST.encode()) - 6  # without its digest alone it is a whole file, of an older detkit
    for length in range(0, len(whole), 11):
        if length != end:
            refused(whole[:length])


def test_foreign_and_newer_files_are_refused() -> None:
    assert "not one that 'detkit export' wrote" in refused(onnx_model(None).SerializeToString())
    assert "not an ONNX file" in refused(b"garbage" * 99)
    assert "not an ONNX file" in refused(b"")
    newer = onnx_model(None)
    # A file from the future may hold a graph that this ONNX Runtime would not even load.
    newer.graph.node[0].op_type = "Teleport"
    helper.set_model_props(newer, {KEY: '{"format": 99, "detkit": "9.9"}'})
    assert "exported by a newer detkit (9.9, manifest 99)" in refused(newer.SerializeToString())

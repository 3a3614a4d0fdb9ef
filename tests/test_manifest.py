import json

import pytest

from detkit.config import Select
from detkit.errors import UserError
from detkit.manifest import FORMAT, Manifest


def manifest(**changes: object) -> Manifest:
    fields = {
        "detkit": "0.1.0", "name": "shelf", "classes": ("milk", "żur", "牛奶"), "size": (64, 96), "resize": "letterbox",
        "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "fill": (128, 0, 255), "score": 0.4, "nms": Select(),
        "sha256": "0" * 64, "metrics": {"mAP": 0.5},
    }  # fmt: skip
    return Manifest.model_validate(fields | changes)


def test_round_trip() -> None:
    one = manifest(nms=Select(keep=7), metrics={"mAP": 0.5, "mAP50": None, "note": "x"})
    assert Manifest.from_json(one.to_json(), "x.onnx") == one


def test_a_figure_that_is_not_a_number_survives_as_none() -> None:
    text = manifest(metrics={"mAP": float("nan")}).to_json()
    assert Manifest.from_json(text, "x.onnx").metrics == {"mAP": None}


def test_newer_format_is_refused_whatever_else_it_holds() -> None:
    text = json.dumps({"format": FORMAT + 1, "detkit": "9.0", "shape": "round"})
    message = rf"^a/x\.onnx: exported by a newer detkit \(9\.0, manifest {FORMAT + 1}\); upgrade detkit$"
    with pytest.raises(UserError, match=message):
        Manifest.from_json(text, "a/x.onnx")


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[1]", "{}", b"\xff\xfe\x00", json.dumps({"format": "new"}), json.dumps({"format": 1, "x": 2})],
)
def test_junk_is_one_line_naming_the_source(text: str | bytes) -> None:
    with pytest.raises(UserError, match=r"^x\.onnx: its detkit manifest is damaged") as error:
        Manifest.from_json(text, "x.onnx")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"classes": ()}, {"size": (0, 5)}, {"fill": (0, 0, 256)}, {"score": 2}])
def test_impossible_values_are_refused(changes: dict[str, object]) -> None:
    tree = json.loads(manifest().to_json()) | changes
    with pytest.raises(UserError, match=next(iter(changes))):
        Manifest.from_json(json.dumps(tree), "x.onnx")


def test_what_older_detkits_wrote_is_read() -> None:
    tree = json.loads(manifest().to_json()) | {"format": 1}
    for new in ("input", "precision", "golden"):
        del tree[new]
    old = Manifest.from_json(json.dumps(tree), "x.onnx")
    assert (old.input, old.precision, old.golden) == ("canvas", "fp32", ())

"""Weights of torchvision's names: what is loaded, what is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import get_model
from torchvision.models.detection import ssd300_vgg16

from detkit import config
from detkit.errors import UserError
from detkit.nn import weights
from detkit.nn.detector import Detector

State = dict[str, Tensor]


def model(spec: str, backbone: str = "mobilenet_v2") -> config.Model:
    head = config.SSD(scales=(0.2, 0.4, 0.7, 0.9), ratios=((2.0,), (2.0,), (2.0,)))
    neck = config.PAN(channels=16)
    return config.Model(backbone=config.Backbone(name=backbone), neck=neck, head=head, weights=spec)


def detector(settings: config.Model, classes: int = 3) -> Detector:
    return Detector(settings, config.Input(size=(96, 96)), classes)


@pytest.fixture(scope="module")
def theirs() -> State:
    state: State = get_model("mobilenet_v2", weights=None).state_dict()
    rng = torch.Generator().manual_seed(0)
    return {
        key: torch.rand(value.shape, generator=rng) if value.is_floating_point() else value
        for key, value in state.items()
    }


def loaded(state: State, settings: config.Model) -> None:
    ours = detector(settings)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    report = weights.load(ours, settings)
    assert report is not None
    assert report.mismatched == ()
    assert {name.split(".")[0] for name in report.missing} == {"neck", "head"}
    assert {name.removeprefix("backbone.").split(".")[0] for name in report.unexpected} == {"classifier", "features"}
    floats = {key: value for key, value in ours.state_dict().items() if value.is_floating_point()}
    assert report.loaded == sum(key.startswith("backbone.") for key in floats)
    for key, value in floats.items():
        wanted = state[key.removeprefix("backbone.")].float() if key.startswith("backbone.") else before[key]
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted)


def test_pth(theirs: State, tmp_path: Path) -> None:
    torch.save(theirs, tmp_path / "plain.pth")
    torch.save({"model": theirs, "epoch": 3}, tmp_path / "wrapped.pt")
    loaded(theirs, model(str(tmp_path / "plain.pth")))
    loaded(theirs, model(str(tmp_path / "wrapped.pt")))


def test_half_precision_safetensors(theirs: State, tmp_path: Path) -> None:
    half = {key: value.half() if value.is_floating_point() else value for key, value in theirs.items()}
    save_file(half, tmp_path / "half.safetensors")
    loaded(half, model(str(tmp_path / "half.safetensors")))


def test_a_detector_of_ours_goes_in_whole(tmp_path: Path) -> None:
    source = detector(model("none")).state_dict()
    save_file(source, tmp_path / "ours.safetensors")
    settings = model(str(tmp_path / "ours.safetensors"))
    ours = detector(settings)
    report = weights.load(ours, settings)
    assert report is not None
    assert report.missing == report.mismatched == report.unexpected == ()
    assert all(torch.equal(value, source[key]) for key, value in ours.state_dict().items())


def test_none_loads_nothing() -> None:
    settings = model("none")
    assert weights.load(detector(settings), settings) is None


def reference_model(spec: str, classes: int) -> tuple[config.Model, Detector]:
    settings = config.load("ssd_vgg.yaml", [f"model.weights={spec}"]).model
    return settings, Detector(settings, config.Input(size=(300, 300)), classes)


def test_the_reference_detector(tmp_path: Path) -> None:
    state = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=4).state_dict()
    torch.save(state, tmp_path / "ssd.pth")
    settings, ours = reference_model(str(tmp_path / "ssd.pth"), classes=3)
    report = weights.load(ours, settings)
    assert report is not None
    assert report.missing == report.mismatched == report.unexpected == ()
    assert report.loaded == len(state) == len(ours.state_dict())
    got = ours.state_dict()
    assert torch.equal(got["neck.scale"], state["backbone.scale_weight"])
    assert torch.equal(got["backbone.features.28.weight"], state["backbone.extra.0.5.weight"])
    assert torch.equal(got["neck.extra.0.1.weight"], state["backbone.extra.0.7.1.weight"])
    assert torch.equal(got["head.offsets.5.bias"], state["head.regression_head.module_list.5.bias"])

    settings, other = reference_model(str(tmp_path / "ssd.pth"), classes=7)
    report = weights.load(other, settings)
    assert report is not None
    assert {name.rsplit(".", 2)[0] for name in report.mismatched} == {"head.scores"}
    assert len(report.mismatched) == 12
    assert "head.scores (12)" in str(report)
    assert "\n" not in str(report)


def refused(settings: config.Model, *words: str) -> None:
    ours = detector(settings)
    before = {key: value.clone() for key, value in ours.state_dict().items()}
    with pytest.raises(UserError) as error:
        weights.load(ours, settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in ours.state_dict().items())


def test_part_of_a_backbone_is_refused(theirs: State, tmp_path: Path) -> None:
    path = tmp_path / "part.pth"
    torch.save({key: value for key, value in theirs.items() if not key.startswith("features.3.")}, path)
    refused(model(str(path)), "part.pth", "backbone.features.3.conv.0.0.weight")


def test_another_backbones_weights_are_refused(theirs: State, tmp_path: Path) -> None:
    torch.save(theirs, tmp_path / "mobile.pth")
    refused(model(str(tmp_path / "mobile.pth"), "resnet18"), "resnet18", "backbone.conv1.weight")
    torch.save({**theirs, "features.0.0.weight": torch.zeros(7, 3, 3, 3)}, tmp_path / "shape.pth")
    refused(model(str(tmp_path / "shape.pth")), "another shape", "backbone.features.0.0.weight")


# Our own checkpoints of other classes

BEFORE, NOW = ("tin", "box", "jar", "bag"), ("bag", "cup", "tin", "pot", "box")
HEADS = {
    "multibox": ("ssd_mobilenet", ["model.head.loss=multibox"], (96, 96)),
    "aligned": ("ssd_mobilenet", [], (96, 96)),
    "ssd_extras": ("ssd_vgg", ["model.backbone.name=vgg11"], (300, 300)),
    "yolo": ("yolo_nano", ["model.backbone.width=0.25", "model.head.convs=2"], (96, 96)),
    "yolo_v1": (
        "yolo_v1_vgg",
        ["model.backbone.name=vgg11", "model.head={name: yolo_v1, grid: 3, channels: 16, hidden: 16}"],
        (96, 96),
    ),
    "faster_rcnn": ("faster_rcnn_mobilenet", ["model.head.width=32"], (96, 96)),
}


def trained(case: str, path: Path, before: tuple[str, ...] = BEFORE) -> tuple[config.Model, config.Input, Detector]:
    """A detector whose weights are far from those of a new one, saved as a checkpoint; and its settings."""
    name, sets, size = HEADS[case]
    small = ["model.backbone.width=0.35"] if "mobilenet" in name else []
    settings = config.load(name, ["model.weights=none", f"input.size={list(size)}", *small, *sets])
    source = Detector(settings.model, settings.input, len(before)).eval()
    rng = torch.Generator().manual_seed(3)
    for parameter in source.head.parameters():
        strength = 0.3 if case == "faster_rcnn" and parameter.ndim == 2 else 0.02
        parameter.data.add_(torch.randn(parameter.shape, generator=rng), alpha=strength)
    save_file(source.state_dict(), path, {"detkit": "0", "classes": json.dumps(before)})
    return settings.model.model_copy(update={"weights": str(path)}), settings.input, source


def class_outputs(outputs: Any) -> list[Tensor]:
    """What a head says of each class, with the classes on the second axis from the end, and of what is before them."""
    logits = outputs.classes if hasattr(outputs, "classes") else outputs.logits
    return [logits[..., None], *([outputs.offsets] if hasattr(outputs, "regions") else [])]


@pytest.mark.parametrize("case", HEADS)
@torch.no_grad()
def test_classes_of_the_same_name_are_kept_by_every_head(case: str, tmp_path: Path) -> None:
    model, canvas, source = trained(case, tmp_path / "old.safetensors")
    ours = Detector(model, canvas, len(NOW)).eval()
    fresh = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    report = weights.load(ours, model, NOW)
    assert report is not None
    assert report.missing == report.mismatched == report.unexpected == ()
    assert report.classes == weights.Classes(("bag", "tin", "box"), ("cup", "pot"), ("jar",))
    photo = torch.randint(0, 256, (2, 3, *canvas.size), dtype=torch.uint8)
    one, other = source(photo), ours(photo)
    for before, now in zip(class_outputs(one), class_outputs(other), strict=True):
        first = before.shape[-2] - len(BEFORE)  # 1 where there is a background
        assert first == now.shape[-2] - len(NOW)
        torch.testing.assert_close(now[..., :first, :], before[..., :first, :])
        for name in report.classes.kept:
            kept, wanted = now[..., first + NOW.index(name), :], before[..., first + BEFORE.index(name), :]
            torch.testing.assert_close(kept, wanted, rtol=1e-4, atol=1e-5)
            assert wanted.std() > 1e-3
    boxes, scores = source.head.decode(one)
    new_boxes, new_scores = ours.head.decode(other)
    to, origin = [NOW.index(name) for name in report.classes.kept], [BEFORE.index(name) for name in report.classes.kept]
    if boxes.shape[2] > 1:
        boxes, new_boxes = boxes[:, :, origin], new_boxes[:, :, to]
    torch.testing.assert_close(new_boxes, boxes, rtol=1e-4, atol=1e-2)
    if case not in (
        "multibox",
        "ssd_extras",
        "faster_rcnn",
    ):  # there, softmax shares the same logits among more classes
        torch.testing.assert_close(new_scores[..., to], scores[..., origin], rtol=1e-4, atol=1e-6)
    # New classes are as initialised.
    for layer, (leading, rows) in ours.head.class_layers().items():
        for kind in ("weight", "bias"):
            name = f"head.{layer}.{kind}"
            slots, drawn = (
                state[name].unflatten(0, (-1, leading + len(NOW), rows)) for state in (ours.state_dict(), fresh)
            )
            for new in (1, 3):
                assert torch.equal(slots[:, leading + new], drawn[:, leading + new])
            assert not torch.equal(slots[:, leading], drawn[:, leading])


@pytest.mark.parametrize("case", HEADS)
@torch.no_grad()
def test_the_scores_of_classes_in_another_order_are_the_same(case: str, tmp_path: Path) -> None:
    model, canvas, source = trained(case, tmp_path / "old.safetensors")
    now = BEFORE[::-1]
    ours = Detector(model, canvas, len(now)).eval().to(memory_format=torch.channels_last)
    report = weights.load(ours, model, now)
    assert report is not None
    assert report.classes == weights.Classes(now, (), ())
    photo = torch.randint(0, 256, (2, 3, *canvas.size), dtype=torch.uint8)
    (boxes, scores), (new_boxes, new_scores) = (each.head.decode(each(photo)) for each in (source, ours))
    assert scores.flatten(0, 1).std(0).min() > 1e-4
    torch.testing.assert_close(new_scores.flip(-1), scores, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(new_boxes.flip(2), boxes, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("case", HEADS)
def test_no_class_in_common_leaves_the_classes_as_initialised(case: str, tmp_path: Path) -> None:
    """As many as before, so that the shapes agree."""
    model, canvas, source = trained(case, tmp_path / "old.safetensors")
    ours = Detector(model, canvas, 4)
    fresh = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    report = weights.load(ours, model, ("a", "b", "c", "d"))
    assert report is not None
    assert report.classes == weights.Classes((), ("a", "b", "c", "d"), BEFORE)
    for layer, (leading, rows) in ours.head.class_layers().items():
        name = f"head.{layer}.weight"
        got, drawn, old = (
            state[name].unflatten(0, (-1, leading + 4, rows))
            for state in (ours.state_dict(), fresh, source.state_dict())
        )
        assert torch.equal(got[:, leading:], drawn[:, leading:])
        assert torch.equal(got[:, :leading], old[:, :leading])
        assert (name in report.mismatched) == (leading == 0)


def test_boxes_that_differ_are_as_initialised_though_the_shape_agrees(tmp_path: Path) -> None:
    """4 default boxes of 3 classes have as many outputs as 6 of 2."""
    model, canvas, _ = trained("aligned", tmp_path / "old.safetensors", ("tin", "box", "jar"))
    head = {"scales": [0.1, 0.4, 0.7, 0.9], "ratios": [[2, 3]] * 3, "loss": "aligned", "extra_square": True}
    four = model.model_copy(update={"head": config.SSD.model_validate(head | {"ratios": [[2]] * 3}), "weights": "none"})
    six = model.model_copy(update={"head": config.SSD.model_validate(head)})
    save_file(
        Detector(four, canvas, 3).state_dict(), tmp_path / "old.safetensors", {"classes": '["tin", "box", "jar"]'}
    )
    ours = Detector(six, canvas, 2)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items() if "head.scores" in name}
    report = weights.load(ours, six, ("tin", "box"))
    assert report is not None
    assert {*before} <= {*report.mismatched}
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in before.items())


def test_another_head_keeps_backbone_and_neck(tmp_path: Path) -> None:
    model, canvas, source = trained("aligned", tmp_path / "old.safetensors")
    other = model.model_copy(update={"head": config.YOLO(channels=16)})
    ours = Detector(other, canvas, 4)
    report = weights.load(ours, other, BEFORE)
    assert report is not None
    assert {name.split(".")[0] for name in report.missing} == {"head"}
    for name, tensor in ours.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(tensor, source.state_dict()[name])


def test_a_checkpoint_of_another_backbone_is_refused(tmp_path: Path) -> None:
    trained("aligned", tmp_path / "old.safetensors")
    refused(model(str(tmp_path / "old.safetensors"), "resnet18"), "not weights of the backbone resnet18")


@pytest.mark.parametrize("told", ["[", "3"])
def test_classes_that_are_damaged_are_refused(told: str, tmp_path: Path) -> None:
    settings = model(str(tmp_path / "old.safetensors"))
    save_file(detector(settings).state_dict(), tmp_path / "old.safetensors", {"classes": told})
    with pytest.raises(UserError, match=r"old\.safetensors: what it says of its classes"):
        weights.load(detector(settings), settings, ("a", "b", "c"))


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pwned"),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.0.weight": Malicious()}, "evil.pth")
    refused(model("evil.pth"), "evil.pth", "refused")
    assert not Path("pwned").exists()


@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_broken_and_absent_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    refused(model(str(path)), path.name, "no such file")
    path.write_bytes(b"not weights at all")
    refused(model(str(path)), path.name)


def test_a_file_of_something_else(tmp_path: Path) -> None:
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    refused(model(str(tmp_path / "list.pth")), "state dict")
    torch.save({"model": {"epoch": 3}}, tmp_path / "epoch.pth")
    refused(model(str(tmp_path / "epoch.pth")), "state dict")


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("imagenet", "MobileNet_V2_Weights.IMAGENET1K_V2"),
        ("torchvision", "SSD300_VGG16_Weights.COCO_V1"),
        ("MobileNet_V2_Weights.IMAGENET1K_V1", "MobileNet_V2_Weights.IMAGENET1K_V1"),
    ],
)
def test_an_unreachable_hub(spec: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", fail)
    monkeypatch.setattr("torch.hub.urlopen", fail)
    refused(model(spec), name, "Name or service not known", "https://download.pytorch.org/", "model.weights=none")


def test_a_download_is_loaded(theirs: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetch(url: str, **options: Any) -> State:
        asked.append(url)
        assert options["check_hash"]
        assert options["weights_only"]
        return theirs

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    loaded(theirs, model("imagenet"))
    assert asked == ["https://download.pytorch.org/models/mobilenet_v2-7ebf99e0.pth"]


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    refused(model("imagnet"), "did you mean 'imagenet'?")
    refused(model("MobileNet_V2_Weights.IMAGENET1K_V3"), "did you mean 'MobileNet_V2_Weights.IMAGENET1K_V")

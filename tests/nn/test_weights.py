"""Weights of torchvision's names: what is loaded, what is said, what is refused."""

from __future__ import annotations

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

"""Every backbone: the maps it promises, torchvision's and timm's names and numbers, a detector on it, freezing."""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, vgg
from torchvision.models.feature_extraction import create_feature_extractor

from detkit import config, export
from detkit.errors import UserError
from detkit.nn import backbones, weights
from detkit.nn.backbones.base import Backbone, whole
from detkit.nn.backbones.vgg import LAYERS
from detkit.nn.detector import Detector, Predictor, Trainable
from detkit.types import Batch, Targets

NAMES = [name for name in get_args(config.Backbone.model_fields["name"].annotation) if name != "timm"]
VGGS_AND_CO = [name for name in NAMES if name.startswith(("vgg", "resnet", "mobilenet_v2"))]
WITH_BN = [name for name in VGGS_AND_CO if "vgg" not in name or name.endswith("bn")]
LARGE = ("b1", "b2", "b3", "b4", "b5", "b6", "b7", "small", "base", "large", "senet154", "resnet101", "13", "19")
HEAVY = {name for name in NAMES if name.removesuffix("_bn").endswith(LARGE) and not name.startswith("mobilenet")}
# The last layer before each of the three maps, in torchvision's network.
NODES = {
    "alexnet": ("features.4", "features.11", "features.12"),
    "googlenet": ("inception3b", "inception4e", "inception5b"),
    "inception_v3": ("Mixed_5d", "Mixed_6e", "Mixed_7c"),
    "mobilenet_v2": ("features.6", "features.13", "features.17"),
    "mobilenet_v3_small": ("features.3", "features.8", "features.11"),
    "mobilenet_v3_large": ("features.6", "features.12", "features.15"),
    "efficientnet_b0": ("features.3", "features.5", "features.7"),
    "convnext_tiny": ("features.3", "features.5", "features.7"),
    **{name: ("layer2", "layer3", "layer4") for name in NAMES if name.startswith("resnet")},
    **dict.fromkeys((name for name in NAMES if name.startswith("vgg")), ()),
}
# timm's own test networks, of each kind that it gives features by; the last but one takes one canvas only.
TIMM = ("test_efficientnet", "test_byobnet", "test_mambaout", "cspnext_tiny", "pit_ti_224", "hrnet_w18_small")


def build(name: str, **settings: object) -> Backbone:
    if name in NAMES:
        return backbones.build(config.Backbone(name=name, **settings))
    return backbones.build(config.Backbone(name="timm", model=name, **settings))


def check_maps(backbone: Backbone, maps: tuple[Tensor, ...], strides: tuple[int, ...], hw: tuple[int, int]) -> None:
    assert backbone.strides == strides
    assert [feat.shape[1] for feat in maps] == list(backbone.channels)
    assert [tuple(feat.shape[2:]) for feat in maps] == [(-(-hw[0] // s), -(-hw[1] // s)) for s in strides]


@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32), (16,), (4,)], ids=str)
@pytest.mark.parametrize("name", ["alexnet", "googlenet", "vgg11", "resnet18", "mobilenet_v3_small", "csp", *TIMM[:2]])
def test_only_the_maps_asked_for(name: str, strides: tuple[int, ...]) -> None:
    with torch.device("meta"):
        backbone = build(name, strides=strides).train()
        maps = backbone(torch.zeros(2, 3, 64, 96))
        sum(feat.square().mean() for feat in maps).backward()
    check_maps(backbone, maps, strides, (64, 96))
    trained = [weight for weight in backbone.parameters() if weight.requires_grad]
    assert trained
    assert [weight.shape for weight in trained if weight.grad is None] == []


def test_the_table_in_the_docs_is_true() -> None:
    text = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): row for row in rows if len(row) == 4 and row[0].count("`") == 2}
    assert len(table) > 8
    for name, (_, _, channels, millions) in table.items():
        with torch.device("meta"):
            backbone = build(name, strides=(4, 8, 16, 32))
        assert channels == ", ".join(map(str, backbone.channels)), name
        weights_of_it = sum(weight.numel() for weight in backbone.parameters())
        assert millions == f"{weights_of_it / 1e6:.1f}", name


def model(name: str) -> config.Model:
    backbone = config.Backbone(name=name) if name in NAMES else config.Backbone(name="timm", model=name)
    head = config.SSD(scales=(0.2, 0.4, 0.7, 0.9), ratios=((2.0,), (2.0,), (2.0,)))
    return config.Model(backbone=backbone, neck=config.PAN(channels=8), head=head, select=config.Select(score=0.0))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in HEAVY)) for name in (*NAMES, *TIMM)]
)
def test_a_detector_on_it_learns_and_predicts(name: str) -> None:
    hw = {"pit_ti_224": (224, 224)}.get(name, (96, 96))
    detector = Detector(model(name), config.Input(size=hw), 3)
    images = torch.randint(0, 256, (2, 3, *hw), dtype=torch.uint8)
    boxes = torch.tensor([[[5.0, 5, 40, 40], [30, 20, 90, 60]]]).repeat(2, 1, 1)
    labels = torch.tensor([[0, 2], [1, -1]])
    batch = Batch(images, Targets(boxes, labels, labels == 99), (None, None), torch.arange(2))
    losses = Trainable(detector.train())(batch)
    sum(losses.sums[part] / losses.denoms[part].clamp(min=1) for part in losses.sums).backward()
    for key, parameter in detector.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, key
        assert parameter.grad is None or parameter.grad.isfinite().all(), key
    found, scores, _ = Predictor(detector, config.Select(score=0.0))(images)
    assert found.isfinite().all()
    assert (scores > 0).any()
    with torch.no_grad():
        check_maps(detector.backbone, detector.eval().backbone(torch.zeros(1, 3, *hw)), (8, 16, 32), hw)


def reference(name: str) -> tuple[nn.Module, list[str]]:
    """torchvision's network with random weights, and the names of the three maps inside it."""
    if not name.startswith("vgg"):
        options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
        return get_model(name, weights=None, **options).eval(), list(NODES[name])
    # VGG's own constructor would allocate a classifier of 120 million weights.
    depth, _, norm = name.partition("_")
    theirs = nn.Sequential(OrderedDict(features=vgg.make_layers(vgg.cfgs[LAYERS[depth]], batch_norm=norm == "bn")))
    pools = [i for i, layer in enumerate(theirs.features) if isinstance(layer, nn.MaxPool2d)]
    return theirs.eval(), [f"features.{i}" for i in (pools[3] - 1, pools[4] - 1, pools[4])]


@pytest.mark.parametrize("name", NODES)
def test_torchvision_state_dict_gives_torchvision_maps(name: str) -> None:
    theirs, nodes = reference(name)
    ours = build(name).eval()
    absent, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert absent == []
    served = ("", "classifier", "features.18", "features.16", "features.12", "features.8")
    assert {".".join(key.split(".")[:2]).removesuffix(".weight") for key in unexpected} <= {
        *served, "fc", "fc.bias", *(f"classifier.{i}" for i in range(7))
    }  # fmt: skip
    image = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        wanted = create_feature_extractor(theirs, nodes)(image).values()
        for ours_map, theirs_map in zip(ours(image), wanted, strict=True):
            lost = ours_map.shape[-1] - theirs_map.shape[-1]
            assert (lost > 0) <= (name in ("alexnet", "inception_v3"))
            inside = slice(lost // 2, lost // 2 + theirs_map.shape[-1])
            torch.testing.assert_close(ours_map[..., inside, inside], theirs_map)
            torch.testing.assert_close(ours_map.abs().sum(), theirs_map.abs().sum())


@pytest.mark.parametrize("name", ["vgg11", "vgg16_bn"])
def test_vgg_has_torchvisions_features(name: str) -> None:
    with torch.device("meta"):
        theirs = get_model(name, weights=None).features
    ours = build(name).features
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]


def test_vgg_maps_of_ssd300() -> None:
    shapes = [tuple(feat.shape[1:]) for feat in build("vgg16").eval()(torch.zeros(1, 3, 300, 300))]
    assert shapes == [(512, 38, 38), (512, 19, 19), (512, 9, 9)]


def test_whole_puts_zeros_where_cells_were_lost() -> None:
    feats = torch.ones(1, 2, 25, 26), torch.ones(1, 2, 14, 14), torch.ones(1, 2, 6, 5)
    maps = whole(feats, (220, 224), (8, 16, 32))
    assert [tuple(feat.shape[2:]) for feat in maps] == [(28, 28), (14, 14), (7, 7)]
    assert maps[0][0, 0].sum(0).tolist() == [0, *[25] * 26, 0]
    assert maps[0][0, 0].sum(1).tolist() == [0, *[26] * 25, 0, 0]
    assert maps[1] is feats[1]
    assert maps[2][0, 0].sum(1).tolist() == [*[5] * 6, 0]


def means(module: nn.Module) -> None:
    """Make every convolution and pool a mean of what it sees, and norms do nothing."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Conv2d):
            nn.init.constant_(layer.weight, 1 / layer.weight[0].numel())
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        for name, pool in list(layer.named_children()):
            if isinstance(pool, nn.MaxPool2d):
                setattr(layer, name, nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode))


@pytest.mark.parametrize("name", ["alexnet", "inception_v3", "inception_v4", "resnet18"])
def test_a_cell_lies_where_heads_believe_it_to_be(name: str) -> None:
    backbone = build(name).eval()
    means(backbone)
    ramp = (torch.arange(768.0) + 0.5).expand(1, 3, 96, 768)
    with torch.no_grad():
        both = zip(backbone(ramp), backbone(torch.ones_like(ramp)), backbone.strides, strict=True)
    for feat, share, stride in both:
        # The mean x of what a cell in the middle sees, which is far from the borders; the median channel, for some of
        # Inception's branches take a maximum in code.
        cells = feat.shape[3]
        seen = (feat / share)[0, :, feat.shape[2] // 2, cells // 2].median()
        assert abs(float(seen) - (cells // 2 + 0.5) * stride) <= stride / 2 + 1


@pytest.mark.parametrize("name", ["alexnet", "inception_v3", "inception_v4"])
def test_a_canvas_too_small_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} can't take a canvas of \[32, 64\] pixels.*input\.size") as error:
        build(name)(torch.zeros(1, 3, 32, 64))
    assert "\n" not in str(error.value)


def held(backbone: Backbone, stages: int) -> set[str]:
    layers = [layer for stage in backbone.stages[:stages] for layer in stage]
    inside = {id(tensor) for layer in layers for tensor in layer.state_dict(keep_vars=True).values()}
    return {key for key, tensor in backbone.state_dict(keep_vars=True).items() if id(tensor) in inside}


@pytest.mark.parametrize(
    "name", ["vgg11", "vgg11_bn", "resnet18", "mobilenet_v2", "googlenet", "efficientnet_b0", *TIMM[:4]]
)
def test_frozen_stages_stay_as_loaded(name: str) -> None:
    backbone = build(name, freeze=2)
    backbone.train()
    before = copy.deepcopy(backbone.state_dict())
    optimizer = torch.optim.SGD([weight for weight in backbone.parameters() if weight.requires_grad], lr=1.0)
    sum(feat.square().mean() for feat in backbone(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    changed = {key for key, value in backbone.state_dict().items() if not value.equal(before[key])}
    kept = held(backbone, 2)
    assert kept
    assert changed
    assert not kept & changed


def test_freezing_everything_leaves_nothing_to_train() -> None:
    for name in ("mobilenet_v2", "vgg11_bn", "alexnet", "convnext_tiny", "googlenet", "mobilenet_v1", "test_byobnet"):
        assert not any(weight.requires_grad for weight in build(name, freeze=5).parameters()), name


@pytest.mark.parametrize("name", [*WITH_BN, "googlenet", "test_efficientnet"])
def test_frozen_bn_survives_train(name: str) -> None:
    backbone = copy.deepcopy(build(name, frozen_bn=True))
    backbone.eval()
    backbone.train()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert backbone.training
    assert not any(norm.training or norm.weight.requires_grad or norm.bias.requires_grad for norm in norms)
    assert all(conv.weight.requires_grad for conv in backbone.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize("name", ["vgg11", "resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "csp"])
def test_stages_halve_the_resolution_and_leave_nothing_out(name: str) -> None:
    backbone = build(name).eval()
    inside = {id(weight) for stage in backbone.stages for layer in stage for weight in layer.parameters()}
    assert inside == {id(weight) for weight in backbone.parameters()}
    x, sizes = torch.zeros(1, 3, 64, 64), []
    for stage in backbone.stages:
        for layer in stage:
            x = layer(x)
        sizes.append(x.shape[-1])
    assert all(fine == 2 * coarse for fine, coarse in pairwise(sizes))


def test_an_exchanged_layer_is_the_one_that_runs() -> None:
    backbone = nn.SyncBatchNorm.convert_sync_batchnorm(build("vgg11_bn"))
    assert any(isinstance(layer, nn.SyncBatchNorm) for stage in backbone.stages for layer in stage)


def test_a_network_that_nobody_publishes_weights_of() -> None:
    settings = model("csp").model_copy(update={"weights": "imagenet"})
    with pytest.raises(UserError, match=r"model\.weights=imagenet: nobody publishes weights of csp"):
        weights.load(Detector(settings, config.Input(size=(64, 64)), 3), settings)


# ----- timm


@pytest.mark.parametrize(
    "name",
    [*TIMM[:3], "pit_ti_224", "resnet18", pytest.param("inception_resnet_v2", marks=pytest.mark.slow)],
)
def test_a_file_of_timms_gives_timms_maps_and_survives_a_copy(name: str, tmp_path: Path) -> None:
    path = tmp_path / ("theirs.pth" if name == "test_byobnet" else "theirs.safetensors")
    state = timm.create_model(name).state_dict()
    if path.suffix == ".pth":
        torch.save({"state_dict": state}, path)
    else:
        save_file(state, path)
    settings = model(name).model_copy(
        update={"weights": str(path), "backbone": config.Backbone(name="timm", model=name)}
    )
    detector = Detector(settings, config.Input(size=(96, 96)), 3).eval()
    report = weights.load(detector, settings)
    assert report is not None
    assert {key.split(".")[0] for key in report.missing} == {"neck", "head"}
    # The file as timm itself loads it.
    theirs = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    image = torch.randn(2, 3, *(detector.backbone.only or (96, 128)))
    with torch.inference_mode():
        wanted = theirs.eval()(image)[-3:]
        for backbone in (detector.backbone, copy.deepcopy(detector.backbone)):
            for ours, map_ in zip(backbone(image), wanted, strict=True):
                map_ = map_.permute(0, 3, 1, 2) if map_.shape[1] != ours.shape[1] else map_
                lost = [(have - has) // 2 for have, has in zip(ours.shape[2:], map_.shape[2:], strict=True)]
                inside = ours[:, :, lost[0] : lost[0] + map_.shape[2], lost[1] : lost[1] + map_.shape[3]]
                torch.testing.assert_close(inside, map_)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_byobnet").state_dict(), path)
    settings = model("test_efficientnet").model_copy(update={"weights": str(path)})
    with pytest.raises(UserError, match=r"not weights of the backbone"):
        weights.load(Detector(settings, config.Input(size=(96, 96)), 3), settings)


def test_imagenet_weights_come_from_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = timm.create_model("test_efficientnet", features_only=True)
    asked: list[dict[str, Any]] = []
    settings = model("test_efficientnet").model_copy(update={"weights": "imagenet"})
    detector = Detector(settings, config.Input(size=(64, 64)), 3)

    def create(name: str, **options: Any) -> nn.Module:
        asked.append({"name": name, **options})
        return theirs

    monkeypatch.setattr(timm, "create_model", create)
    report = weights.load(detector, settings)
    assert report is not None
    assert report.source == "timm's test_efficientnet"
    assert [(one["name"], one["pretrained"]) for one in asked] == [("test_efficientnet", True)]
    for key, value in theirs.state_dict().items():
        assert torch.equal(detector.backbone.state_dict()[f"net.{key}"], value)


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = model("test_efficientnet").model_copy(update={"weights": "imagenet"})
    detector = Detector(settings, config.Input(size=(64, 64)), 3)
    before = copy.deepcopy(detector.state_dict())

    def fail(*names: str, **options: Any) -> None:
        raise OSError("no way to the hub\nand so on")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match=r"test_efficientnet.*no way to the hub\).*timm/test_eff.*model\.weights=PATH"
    ) as e:
        weights.load(detector, settings)
    assert "\n" not in str(e.value)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


def test_weights_that_timm_does_not_have() -> None:
    settings = model("test_efficientnet").model_copy(update={"weights": "torchvision"})
    with pytest.raises(UserError, match=r"model\.weights=torchvision: with a backbone of timm .* imagenet"):
        weights.load(Detector(settings, config.Input(size=(64, 64)), 3), settings)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet81", ("model.backbone.model=resnet81", "did you mean 'resnet")),
        ("test_efficientnet.nosuch", ("model.backbone.model=test_efficientnet.nosuch", "nosuch")),
        ("test_vit", ("model.backbone.model=test_vit", "at strides 16, none at 8, 32")),
    ],
)
def test_a_model_that_timm_can_not_give(name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        build(name)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words)


def test_a_model_without_features_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*names: str, **options: Any) -> None:
        raise RuntimeError("features_only not implemented for it")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        UserError, match=r"model\.backbone\.model=test_vit: timm gives no feature maps of it: features_"
    ):
        build("test_vit")


def test_timm_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    present = importlib.import_module

    def absent(name: str) -> ModuleType:
        if name.startswith("timm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="timm")
        return present(name)

    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(UserError, match=r"^timm is not installed: run  pip install 'detkit\[timm\]'$"):
        build("senet154")


def test_a_network_for_one_canvas_says_so() -> None:
    with pytest.raises(UserError, match=r"pit_ti_224: takes only input\.size=\[224, 224\], not \[96, 96\]"):
        build("pit_ti_224")(torch.zeros(1, 3, 96, 96))


def test_layers_that_no_map_needs_are_not_trained() -> None:
    backbone = build("mobilenet_v1", strides=(8,))
    idle = [key for key, weight in backbone.named_parameters() if not weight.requires_grad]
    assert idle
    assert all(key.startswith(("net.blocks.3.", "net.blocks.4.")) for key in idle)


def test_stages_that_can_not_be_told_apart() -> None:
    with torch.device("meta"):
        build("twins_svt_small")
        with pytest.raises(UserError, match=r"model\.backbone\.freeze: the stages of twins_svt_small"):
            build("twins_svt_small", freeze=1)


@pytest.mark.parametrize("name", ["test_mambaout", "alexnet", pytest.param("cspnext_tiny", marks=pytest.mark.slow)])
def test_it_exports(name: str) -> None:
    detector = Detector(model(name), config.Input(size=(64, 96)), 3)
    photos = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    predictor = Predictor(detector, config.Select(score=0.0, keep=20))
    graph = export.graph(predictor, {"images": photos[:2]}).SerializeToString()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for count in (1, 3, 8):
        some = photos[torch.arange(count) % 3]
        boxes, scores, _ = (torch.from_numpy(np.asarray(part)) for part in session.run(None, {"images": some.numpy()}))
        wanted, certain, _ = predictor(some)
        torch.testing.assert_close(scores, certain, atol=1e-4, rtol=0)
        assert boxes.shape == wanted.shape


def test_settings_that_contradict_each_other() -> None:
    for settings, words in (
        ({"name": "timm"}, "needs model"),
        ({"name": "vgg16", "model": "resnet18"}, "leave model out"),
    ):
        with pytest.raises(ValueError, match=words):
            config.Backbone(**settings)

"""Norms, activations, initial weights and dropout by config: what changes, what stays, what loads, what exports."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime as ort
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model
from torchvision.ops import SqueezeExcitation

from detkit import config, export
from detkit.errors import UserError
from detkit.nn import layers, weights
from detkit.nn.detector import Detector, Predictor, Trainable
from detkit.types import Batch, Targets

HEAD = config.SSD(scales=(0.2, 0.4, 0.7, 0.9), ratios=((2.0,), (2.0,), (2.0,)), tower=1, loss="aligned")


def model(backbone: str = "mobilenet_v2", **changes: Any) -> config.Model:
    name = {"name": backbone} if "test" not in backbone else {"name": "timm", "model": backbone}
    settings = {
        "backbone": {**name, **changes.pop("backbone_settings", {})},
        "neck": config.PAN(channels=8),
        "head": HEAD,
    }
    return config.Model.model_validate({**settings, **changes})


def detector(settings: config.Model) -> Detector:
    torch.manual_seed(0)
    return Detector(settings, config.Input(size=(64, 64)), 3)


def images(count: int = 2) -> Tensor:
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)


def step(ours: Detector) -> None:
    """Gradients of one batch."""
    boxes = torch.tensor([[[5.0, 5, 40, 40], [30, 20, 60, 60]]]).repeat(2, 1, 1)
    labels = torch.tensor([[0, 2], [1, -1]])
    losses = Trainable(ours)(Batch(images(), Targets(boxes, labels, labels == 9), (None, None), torch.arange(2)))
    sum(losses.sums.values()).backward()


def norms(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...] = _BatchNorm) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, kind)]


def test_the_defaults_change_nothing() -> None:
    plain = detector(model())
    for settings in (model(norm="bn", dropout=0.0, activation=None, init=None), model(norm="frozen")):
        other = detector(settings)
        assert [type(layer) for layer in plain.modules()] == [type(layer) for layer in other.modules()]
        for (name, mine), (other_name, theirs) in zip(
            plain.state_dict().items(), other.state_dict().items(), strict=True
        ):
            assert name == other_name
            assert torch.equal(mine, theirs)
    assert all(layer.weight.requires_grad for layer in norms(other))  # nothing was loaded that could be kept


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "googlenet", "test_efficientnet"])
def test_group_norm(backbone: str) -> None:
    plain, ours = detector(model(backbone)), detector(model(backbone, norm="group")).train()
    assert not norms(ours)
    found = norms(ours, nn.GroupNorm)
    assert len(found) == len(norms(plain))
    assert all(norm.num_channels % norm.num_groups == 0 for norm in found)
    assert {norm.num_groups for norm in found} <= {4, 8, 16, 32}
    kept = {
        name for name in plain.state_dict() if not name.endswith(("running_mean", "running_var", "batches_tracked"))
    }
    assert set(ours.state_dict()) == kept
    step(ours)
    assert [name for name, weight in ours.named_parameters() if weight.grad is None] == []
    # No statistics: the batch's other images make no difference.
    some = images(3)
    torch.testing.assert_close(ours(some).logits[:1], ours(some[:1]).logits, rtol=1e-3, atol=1e-4)


def test_group_norm_is_torchs_on_the_same_place() -> None:
    module = nn.Sequential(nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24, eps=0.1), nn.ReLU())
    nn.init.normal_(module[1].weight)
    nn.init.normal_(module[1].bias)
    weight, bias = module[1].weight, module[1].bias
    layers.group_norms(module)
    x = torch.randn(2, 3, 5, 5)
    wanted = nn.functional.group_norm(module[0](x), 8, weight, bias, 0.1).relu()
    torch.testing.assert_close(module(x), wanted)
    assert module[1].weight is weight


@pytest.mark.parametrize("backbone", ["vgg11_bn", "test_efficientnet"])
def test_sync_bn_is_bn_on_one_device(backbone: str) -> None:
    plain, ours = detector(model(backbone)), detector(model(backbone, norm="sync_bn"))
    assert len(norms(ours, nn.SyncBatchNorm)) == len(norms(plain)) == len(norms(ours))
    assert list(ours.state_dict()) == list(plain.state_dict())
    some = images()
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(some).logits, plain.train(mode)(some).logits)


def test_frozen_norms_keep_what_was_loaded(tmp_path: Path) -> None:
    source = detector(model())
    for norm in norms(source):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.weight)
    save_file(source.state_dict(), tmp_path / "ours.safetensors")
    settings = model(norm="frozen", weights=str(tmp_path / "ours.safetensors"))
    ours = detector(settings)
    weights.load(ours, settings)
    ours = copy.deepcopy(ours)
    ours.eval()
    ours.train()
    assert ours.training
    assert not any(norm.training or norm.weight.requires_grad for norm in norms(ours))
    optimizer = torch.optim.SGD([weight for weight in ours.parameters() if weight.requires_grad], 0.1)
    step(ours)
    optimizer.step()
    of_norms = {
        f"{name}.{key}" for name, m in ours.named_modules() if isinstance(m, _BatchNorm) for key in m.state_dict()
    }
    changed = {key for key, value in ours.state_dict().items() if not torch.equal(value, source.state_dict()[key])}
    assert changed
    assert not changed & of_norms


def test_loaded_norms_keep_their_scale_whatever_they_become(tmp_path: Path) -> None:
    theirs = get_model("mobilenet_v2", weights=None).state_dict()
    theirs = {key: torch.rand_like(value) if value.is_floating_point() else value for key, value in theirs.items()}
    save_file(theirs, tmp_path / "theirs.safetensors")
    settings = model(norm="group", weights=str(tmp_path / "theirs.safetensors"))
    ours = detector(settings)
    report = weights.load(ours, settings)
    assert report is not None
    assert report.mismatched == ()
    assert {name.split(".")[0] for name in report.missing} == {"neck", "head"}
    assert torch.equal(ours.backbone.features[0][1].weight, theirs["features.0.1.weight"])
    assert "backbone.features.0.1.running_mean" in report.unexpected
    assert "not used: backbone" in str(report)


def test_statistics_that_are_not_there_are_missed(tmp_path: Path) -> None:
    save_file(detector(model(norm="group")).state_dict(), tmp_path / "group.safetensors")
    settings = model(weights=str(tmp_path / "group.safetensors"))
    with pytest.raises(UserError, match=r"absent.*running_mean"):
        weights.load(detector(settings), settings)


def test_held_layers_stay_held() -> None:
    kept = {"freeze": 2, "frozen_bn": True}
    ours = detector(model(norm="sync_bn", weights="imagenet", backbone_settings=kept)).train()
    assert not any(norm.training or norm.weight.requires_grad for norm in norms(ours.backbone))
    assert all(norm.training and norm.weight.requires_grad for norm in norms(ours.neck))
    ours = detector(model(norm="group", weights="imagenet", backbone_settings={"freeze": 2})).train()
    first = [layer for stage in ours.backbone.stages[:2] for layer in stage]
    assert not any(weight.requires_grad for layer in first for weight in layer.parameters())
    with pytest.raises(ValueError, match="frozen_bn keeps BatchNorm"):
        model(norm="group", backbone_settings={"frozen_bn": True})


@pytest.mark.parametrize("wanted", get_args(config.Activation))
def test_activations(wanted: config.Activation) -> None:
    plain, ours = detector(model(activation=None)), detector(model(activation=wanted)).train()
    kind = type(layers.ACTIVATIONS[wanted](False))
    old, new = (norms(one, layers.EXCHANGEABLE) for one in (plain, ours))
    assert len(old) == len(new) > 50
    assert {type(layer) for layer in new} == {kind}
    assert list(ours.state_dict()) == list(plain.state_dict())
    step(ours)
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in ours.parameters())


def test_every_activation_is_exchangeable_again() -> None:
    assert {type(make(False)) for make in layers.ACTIVATIONS.values()} == set(layers.EXCHANGEABLE)
    assert set(layers.ACTIVATIONS) == set(get_args(config.Activation))
    assert set(layers.INITS) == set(get_args(config.Init))


def test_gates_are_no_activations() -> None:
    ours = detector(model("efficientnet_b0", activation="relu"))
    gates = [layer for layer in ours.modules() if isinstance(layer, SqueezeExcitation)]
    assert gates
    assert {type(gate.scale_activation) for gate in gates} == {nn.Sigmoid}
    assert {type(gate.activation) for gate in gates} == {nn.ReLU}


def test_a_layer_used_twice_is_exchanged_in_both_places() -> None:
    relu = nn.ReLU(inplace=True)
    module = nn.Sequential(nn.Conv2d(1, 1, 1), relu, nn.Sequential(nn.Conv2d(1, 1, 1), relu))
    assert layers.exchange_activations(module, "silu") == 2
    assert [type(module[1]), type(module[2][1])] == [nn.SiLU, nn.SiLU]
    assert module[1].inplace


def test_own_layers_leaves_the_backbone_alone() -> None:
    own = {"own_layers": True}
    ours = detector(model(norm="group", activation="silu", backbone_settings=own))
    assert not norms(ours.backbone, (nn.GroupNorm, nn.SiLU))
    assert norms(ours.backbone, nn.ReLU6)
    assert not norms(nn.ModuleList([ours.neck, ours.head]), (nn.BatchNorm2d, nn.ReLU))


def test_an_activation_that_is_fixed_is_said() -> None:
    with pytest.raises(UserError, match=r"model\.activation=silu: that of googlenet is fixed; set .*own_layers"):
        detector(model("googlenet", activation="silu"))
    detector(model("googlenet", activation="silu", backbone_settings={"own_layers": True}))


@pytest.mark.parametrize("wanted", get_args(config.Init))
def test_initial_weights(wanted: config.Init) -> None:
    ours, plain = detector(model("resnet18", init=wanted)), detector(model("resnet18"))
    layer = ours.backbone.layer3[0].conv1.weight  # [256, 128, 3, 3]
    fan_in, fan_out, count = 128 * 9, 256 * 9, layer.numel()
    std = {
        "xavier_uniform": (2 / (fan_in + fan_out)) ** 0.5, "xavier_normal": (2 / (fan_in + fan_out)) ** 0.5,
        "kaiming_uniform": (2 / fan_in) ** 0.5, "kaiming_normal": (2 / fan_out) ** 0.5,
        "orthogonal": fan_in**-0.5, "normal": 0.01, "trunc_normal": 0.02,
    }[wanted]  # fmt: skip
    assert float(layer.detach().std()) == pytest.approx(std, rel=10 * count**-0.5 + 0.01)
    assert abs(float(layer.detach().mean())) < 5 * std * count**-0.5
    if wanted == "orthogonal":
        rows = layer.flatten(1)
        torch.testing.assert_close(rows @ rows.T, torch.eye(256), atol=1e-4, rtol=0)
    assert not torch.equal(ours.neck.laterals[0][0].weight, plain.neck.laterals[0][0].weight)
    assert torch.equal(ours.head.scores[0].bias, plain.head.scores[0].bias)  # the head's own: scores start at 0.01
    assert all(norm.weight.eq(1).all() for norm in norms(ours.neck))


def test_what_is_loaded_is_not_initialised(tmp_path: Path) -> None:
    theirs = get_model("mobilenet_v2", weights=None).state_dict()
    save_file(theirs, tmp_path / "theirs.safetensors")
    settings = model(init="normal", weights=str(tmp_path / "theirs.safetensors"))
    ours = detector(settings)
    weights.load(ours, settings)
    assert torch.equal(ours.backbone.features[0][0].weight, theirs["features.0.0.weight"])
    assert float(ours.neck.down[0][0].weight.detach().std()) == pytest.approx(0.01, rel=0.3)


def test_dropout_drops_channels_in_training_only() -> None:
    plain, ours = detector(model()), detector(model(dropout=0.5))
    some = images()
    assert torch.equal(plain.eval()(some).logits, ours.eval()(some).logits)
    seen: list[Tensor] = []
    ours.head.register_forward_pre_hook(lambda _, given: seen.extend(given[0]))
    ours.train()(some)
    share = torch.cat([feat.flatten(2).eq(0).all(2).flatten() for feat in seen]).float().mean()
    assert 0.25 < float(share) < 0.75


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "sync_bn", "frozen"])
def test_it_exports(norm: str) -> None:
    settings = model("csp", norm=norm, activation="hardswish", dropout=0.2, weights="imagenet")
    predictor, some = Predictor(detector(settings), config.Select(score=0.0, keep=20)), images(8)
    graph = export.graph(predictor, {"images": some[:2]}).SerializeToString()
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for count in (1, 3, 8):
        scores = session.run(["scores"], {"images": some[:count].numpy()})[0]
        np.testing.assert_allclose(scores, predictor(some[:count])[1].numpy(), atol=1e-4)

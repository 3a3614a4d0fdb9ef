"""The detector and its two wrappers: Trainable reaches every parameter, Predictor disturbs nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from detkit import config
from detkit.nn.detector import Detector, Predictor, Trainable
from detkit.types import Batch, Targets

HW = (64, 96)


def detector(settings: config.Config, *, loss: str = "aligned", weights: str = "none", **backbone: object) -> Detector:
    model = settings.model
    model = model.model_copy(
        update={
            "weights": weights,
            "head": model.head.model_copy(update={"loss": loss}),
            "backbone": model.backbone.model_copy(update=backbone),
        }
    )
    return Detector(model, settings.input, 3)


def images(count: int = 3, hw: tuple[int, int] = HW) -> Tensor:
    return torch.randint(0, 256, (count, 3, *hw), dtype=torch.uint8)


def batch(objects: bool = True, count: int = 3) -> Batch:
    boxes = torch.tensor([[5.0, 5, 40, 40], [30, 20, 90, 60]]).repeat(count, 1, 1)
    labels = torch.tensor([[0, 2]]).repeat(count, 1) if objects else torch.full((count, 2), -1)
    index = torch.arange(count)
    return Batch(images(count), Targets(boxes, labels, labels == 99), (None,) * count, index)


def sharpen(module: nn.Module) -> None:
    """Scores from 0 to 1 instead of nearly zero, so that there are detections; statistics that are no constants."""
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.1)
    for layer in module.head.scores:
        nn.init.normal_(layer.weight, std=0.3)
        nn.init.zeros_(layer.bias)


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_normalise(tiny_config: config.Config) -> None:
    canvas = config.Input(size=(64, 64), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    with torch.device("cpu"):
        module = Detector(tiny_config.model, canvas, 3)
    pixel = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    got = module.normalise(pixel).flatten()
    torch.testing.assert_close(got, torch.tensor([-0.1 / 0.5, (0.2 - 0.2) / 0.25, (1 - 0.3) / 1.0]), atol=1e-6, rtol=0)
    assert got.dtype == torch.float32


def test_the_state_dict_makes_the_same_detector(tiny_config: config.Config) -> None:
    one, other = detector(tiny_config).eval(), detector(tiny_config).eval()
    some = images()
    with torch.no_grad():
        assert not torch.equal(one(some).logits, other(some).logits)
        assert other.load_state_dict(one.state_dict()) == ([], [])
        for ours, theirs in zip(one(some), other(some), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("loss", ["multibox", "aligned"])
@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_every_parameter_is_reached(tiny_config: config.Config, loss: str, objects: bool, count: int) -> None:
    model = Trainable(detector(tiny_config, loss=loss).train())
    losses = model(batch(objects, count))
    torch.stack([losses.sums[name] / losses.denoms[name].clamp(min=1) for name in losses.sums]).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_predictor_leaves_the_detector_in_training_alone(tiny_config: config.Config) -> None:
    ours = detector(tiny_config).train()
    before = snapshot(ours)
    predictor = Predictor(ours, tiny_config.model.select)
    predictor.train()
    predictor(images())
    assert unchanged(ours, before)
    assert all(module.training for module in ours.modules())
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert not any(module.training for module in predictor.detector.modules())
    assert not any(parameter.requires_grad for parameter in predictor.parameters())


def test_training_leaves_the_predictor_alone(tiny_config: config.Config) -> None:
    ours = detector(tiny_config).train()
    sharpen(ours)
    predictor = Predictor(ours, tiny_config.model.select)
    before, some = snapshot(predictor), images()
    found = predictor(some)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    sum(Trainable(ours)(batch()).sums.values()).backward()
    optimizer.step()
    assert not unchanged(ours, {name.removeprefix("detector."): value for name, value in before.items()})
    assert unchanged(predictor, before)
    assert all(map(torch.equal, predictor(some), found))


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.9, 1.0])
def test_follow_is_a_moving_average(tiny_config: config.Config, decay: float) -> None:
    ours, other = detector(tiny_config), detector(tiny_config)
    sharpen(other)
    predictor = Predictor(ours, tiny_config.model.select)
    before, target = snapshot(predictor.detector), snapshot(other)
    predictor.follow(other, decay)
    assert unchanged(other, target)
    for name, value in predictor.detector.state_dict().items():
        if not value.is_floating_point():
            continue
        wanted = decay * before[name] + (1 - decay) * target[name]
        if decay == 0:
            assert torch.equal(value, target[name]), name
        else:
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_followed_weights_are_a_copy(tiny_config: config.Config) -> None:
    ours = detector(tiny_config)
    predictor = Predictor(ours, tiny_config.model.select)
    predictor.follow(ours, 0)
    before = snapshot(predictor)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    assert unchanged(predictor, before)


def test_a_frozen_backbone_stays_frozen_and_the_rest_learns(tiny_config: config.Config) -> None:
    ours = detector(tiny_config, weights="imagenet", freeze=5, frozen_bn=True).train()
    before = snapshot(ours)
    optimizer = torch.optim.SGD([parameter for parameter in ours.parameters() if parameter.requires_grad], 0.1)
    sum(Trainable(ours)(batch()).sums.values()).backward()
    optimizer.step()
    changed = {name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("backbone.") for name in changed)


def test_random_weights_are_never_frozen(tiny_config: config.Config) -> None:
    ours = detector(tiny_config, weights="none", freeze=5, frozen_bn=True).train()
    assert all(parameter.requires_grad for parameter in ours.parameters())
    assert all(module.training for module in ours.modules())


@pytest.mark.parametrize("loss", ["multibox", "aligned"])
@pytest.mark.parametrize("hw", [HW, (64, 64), (75, 50)])
def test_what_predictor_says(tiny_config: config.Config, loss: str, hw: tuple[int, int]) -> None:
    ours = detector(tiny_config, loss=loss)
    sharpen(ours)
    rule = config.Select(score=0.3, iou=0.3, keep=40)
    some = images(3, hw)
    boxes, scores, labels = Predictor(ours, rule)(some)
    K = scores.shape[1]
    assert K <= 40
    assert (boxes.shape, labels.shape) == ((3, K, 4), (3, K))
    assert (boxes.dtype, scores.dtype, labels.dtype) == (torch.float32, torch.float32, torch.int64)
    found = scores > 0
    assert found.any()
    assert (scores[:, 1:] <= scores[:, :-1]).all()  # best first, so that padding is last
    assert (scores[found] > 0.3).all()
    assert (scores <= 1).all()
    assert ((labels >= 0) & (labels < 3)).all()
    assert (boxes >= 0).all()
    assert (boxes <= torch.tensor([hw[1], hw[0], hw[1], hw[0]])).all()
    assert (boxes[found][:, 2:] > boxes[found][:, :2]).all()
    assert not boxes[~found].any()
    assert not labels[~found].any()


def test_an_image_is_seen_the_same_alone(tiny_config: config.Config) -> None:
    ours = detector(tiny_config)
    sharpen(ours)
    predictor, some = Predictor(ours, tiny_config.model.select), images(4)
    together = predictor(some)
    for i in range(4):
        alone = predictor(some[i : i + 1])
        torch.testing.assert_close(alone[1][0], together[1][i])
        torch.testing.assert_close(alone[0][0], together[0][i], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("loss", ["multibox", "aligned"])
def test_bfloat16_is_near_and_decodes_in_float32(tiny_config: config.Config, loss: str) -> None:
    ours = detector(tiny_config, loss=loss).eval()
    sharpen(ours)
    some = images()
    with torch.no_grad():
        outputs = ours(some)
        wanted = ours.head.decode(outputs)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = ours(some)
            got = ours.head.decode(outputs)
            found = Predictor(ours, tiny_config.model.select)(some)
    assert outputs.logits.dtype == torch.bfloat16  # autocast was at work
    assert got.boxes.dtype == got.scores.dtype == found[0].dtype == found[1].dtype == torch.float32
    sizes = outputs.priors[:, 2:] - outputs.priors[:, :2]
    off = (got.boxes - wanted.boxes).abs()[:, :, 0] / sizes.repeat(1, 2)
    assert off.max() < 0.05
    assert (got.scores - wanted.scores).abs().max() < 0.05
    # The decoding itself is exact: that of the same raw outputs in float32.
    exact = ours.head.decode(outputs._replace(logits=outputs.logits.float(), offsets=outputs.offsets.float()))
    assert torch.equal(got.boxes, exact.boxes)
    assert torch.equal(got.scores, exact.scores)


def test_bfloat16_losses_are_near(tiny_config: config.Config) -> None:
    ours = Trainable(detector(tiny_config, loss="multibox").eval())
    some = batch()
    full = ours(some)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(some)
    for name, value in full.sums.items():
        assert half.sums[name].dtype == torch.float32
        torch.testing.assert_close(half.sums[name], value, rtol=0.05, atol=0.05)


def test_a_copy_predicts_the_same(tiny_config: config.Config) -> None:
    predictor = Predictor(detector(tiny_config), config.Select(score=0.0))
    some = images()
    assert all(map(torch.equal, predictor(some), copy.deepcopy(predictor)(some)))

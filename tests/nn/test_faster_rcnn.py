"""Faster R-CNN against torchvision's fasterrcnn_resnet50_fpn and its _v2, of random weights; then what torchvision has
not: padded batches, ignored objects, RoI pooling on one map, ONNX with any batch."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models import WeightsEnum, vgg16
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, box_iou

from detkit import config, export, speed
from detkit.errors import UserError
from detkit.nn import matching, weights
from detkit.nn.anchors import grid_anchors
from detkit.nn.contract import Losses
from detkit.nn.detector import Detector, Predictor, Trainable
from detkit.nn.heads.faster_rcnn import FasterRCNNHead, Outputs, chances, draw
from detkit.nn.matching import match_regions, owners
from detkit.nn.roi import levels_of, pyramid_align
from detkit.types import Batch, Targets
from tests.nn.ground import Truth, targets, truth

CLASSES = 5
SIDE = 256
V2 = ["model.head.rpn_convs=2", "model.head.convs=4", "model.head.fcs=1", "model.neck.norm=batch"]
# Fewer than its own 1000 and 512, for both.
REGIONS, SAMPLES = 200, 64
RULE = config.Select(score=0.05, iou=0.5, candidates=100_000, keep=100)
HW = (96, 128)


class Pair(NamedTuple):
    """Both detectors with the same weights, and two images, uint8 and as torchvision normalises them."""

    theirs: FasterRCNN
    ours: Detector
    images: Tensor
    batch: ImageList


def loaded(theirs: nn.Module, more: list[str]) -> tuple[Detector, list[str]]:
    """Our detector with what `weights: torchvision` would download; whose names were asked for."""
    few = [f"input.size=[{SIDE}, {SIDE}]", f"model.head.proposals={REGIONS}", f"model.head.samples={SAMPLES}"]
    cfg = config.load("faster_rcnn_resnet", [*few, *more])
    assert cfg.model.weights == "torchvision"
    ours = Detector(cfg.model, cfg.input, CLASSES).eval()
    asked: list[str] = []

    def fetch(self: WeightsEnum, **_: object) -> dict[str, Tensor]:
        asked.append(str(self))
        return dict(theirs.state_dict())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WeightsEnum, "get_state_dict", fetch)
        report = weights.load(ours, cfg.model)
    assert report is not None
    assert report.missing == report.mismatched == ()
    assert all(name.endswith("num_batches_tracked") for name in report.unexpected)
    return ours, asked


def soft(count: int, hw: tuple[int, int]) -> Tensor:
    coarse = torch.rand(count, 3, 12, 12)
    images = nn.functional.interpolate(coarse, hw, mode="bicubic").clamp(0, 1)
    return (images * 255).byte()


def lively(theirs: FasterRCNN, images: Tensor) -> None:
    """No weight at a constant, statistics that fit, proposals of many shapes and scores from 0 to 1."""
    norms = [module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.1, 0.1)
    box = {"boxes": torch.tensor([[10.0, 10, 100, 100]]), "labels": torch.tensor([1])}
    with torch.no_grad():
        theirs.train()(list(images / 255), [box] * len(images))
    theirs.eval()
    predictor = theirs.roi_heads.box_predictor
    rpn = theirs.rpn.head
    spread = {rpn.cls_logits: 0.1, rpn.bbox_pred: 0.03, predictor.cls_score: 0.05, predictor.bbox_pred: 0.3}
    for layer, std in spread.items():
        nn.init.normal_(layer.weight, std=std)
        nn.init.normal_(layer.bias, std=0.1)


@pytest.fixture(scope="module", params=["v1", "v2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    torch.manual_seed(0)
    build = fasterrcnn_resnet50_fpn_v2 if request.param == "v2" else fasterrcnn_resnet50_fpn
    theirs = build(
        weights=None, weights_backbone=None, num_classes=1 + CLASSES, min_size=SIDE, max_size=SIDE,
        rpn_post_nms_top_n_test=REGIONS,
    )  # fmt: skip
    images = soft(2, (SIDE, SIDE))
    lively(theirs, images)
    ours, asked = loaded(theirs, V2 if request.param == "v2" else [])
    version = "_V2" if request.param == "v2" else ""
    assert asked == [f"FasterRCNN_ResNet50_FPN{version}_Weights.COCO_V1"]
    if request.param == "v1":
        # Those weights are taken to be of the time before epsilon: see below. These are not.
        for ours_norm, norm in zip(norms(ours.backbone), norms(theirs.backbone), strict=True):
            ours_norm.running_var.copy_(norm.running_var)
    return Pair(theirs, ours, images, theirs.transform(list(images / 255))[0])


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, (nn.BatchNorm2d, FrozenBatchNorm2d))]


# Against torchvision


@torch.no_grad()
def test_features_and_everything_of_the_rpn(pair: Pair) -> None:
    torch.testing.assert_close(pair.ours.normalise(pair.images), pair.batch.tensors, rtol=0, atol=1e-5)
    wanted = pair.theirs.backbone(pair.batch.tensors)
    feats = pair.ours.neck(pair.ours.backbone(pair.batch.tensors))
    assert list(wanted) == ["0", "1", "2", "3", "pool"]
    for ours, theirs in zip(feats, wanted.values(), strict=True):
        assert theirs.std() > 0.1  # there is something to compare
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)

    outputs = pair.ours.head(feats, (SIDE, SIDE))
    levels = zip(*pair.theirs.rpn.head(list(wanted.values())), strict=True)
    scores, deltas = zip(*((_flat(score, 1), _flat(delta, 4)) for score, delta in levels), strict=True)
    torch.testing.assert_close(outputs.objectness, torch.cat(scores, 1).squeeze(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.deltas, torch.cat(deltas, 1), rtol=0, atol=1e-4)
    anchors = pair.theirs.rpn.anchor_generator(pair.batch, list(wanted.values()))
    assert torch.equal(outputs.anchors, anchors[0])

    proposals, _ = pair.theirs.rpn(pair.batch, wanted)
    for ours, real, theirs in zip(outputs.regions, outputs.real, proposals, strict=True):
        assert real.sum() == len(theirs) == REGIONS
        # Of equal scores, either order is as good.
        nearest = (ours[:, None] - theirs).abs().amax(2)
        assert nearest.amin(0).max() < 1e-3
        assert nearest.amin(1).max() < 1e-3
        assert (nearest.diagonal() < 1e-3).float().mean() > 0.95


def _flat(level: Tensor, last: int) -> Tensor:
    return level.permute(0, 2, 3, 1).reshape(len(level), -1, last)


@torch.no_grad()
def test_detections(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    # torchvision's normalisation, since fifty random layers make 1e-4 of a difference of 1e-7.
    monkeypatch.setattr(pair.ours, "normalise", lambda _: pair.batch.tensors)
    predictor = Predictor(pair.ours, RULE)
    predictor.detector.normalise = pair.ours.normalise
    boxes, scores, labels = predictor(pair.images)
    for i, wanted in enumerate(pair.theirs(list(pair.images / 255))):
        count = len(wanted["scores"])
        assert count > 20
        assert (scores[i] > 0).sum() == count
        torch.testing.assert_close(scores[i, :count], wanted["scores"], rtol=0, atol=1e-4)
        # Where two scores are nearly equal either order will do, and of those nearly the last, either is kept.
        apart = (boxes[i, :count, None] - wanted["boxes"]).abs().amax(2)
        apart[
            (labels[i, :count, None] != wanted["labels"] - 1)
            | ~torch.isclose(scores[i, :count, None], wanted["scores"], rtol=0, atol=1e-4)
        ] = float("inf")
        sure = wanted["scores"] > wanted["scores"].min() + 1e-4 if count == RULE.keep else wanted["scores"] > 0
        assert sure.sum() > 20
        assert apart.amin(0)[sure].max() < 1e-3


@pytest.mark.parametrize("counts", [(3, 1), (0, 40)])
def test_the_four_losses_of_the_same_samples(
    pair: Pair, counts: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = truth(sum(counts), counts, SIDE, CLASSES)
    padded = targets(images)
    monkeypatch.setattr(pair.ours, "normalise", lambda _: pair.batch.tensors)
    outputs = pair.ours(pair.images, padded, torch.arange(2))
    losses = pair.ours.head.loss(outputs, padded)
    got = {name: total / losses.denoms[name] for name, total in losses.sums.items()}

    anchors, regions = outputs.anchor_samples, outputs.region_samples
    assert anchors is not None
    assert regions is not None

    def our_anchors(labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        # What was drawn as positive and negative is so for them, too.
        taken = torch.zeros(2, len(outputs.anchors), dtype=torch.bool).scatter(1, anchors.candidate, anchors.real)
        ours = torch.zeros_like(taken).scatter(1, anchors.candidate, anchors.positive)
        for label, take, positive in zip(labels, taken, ours, strict=True):
            assert torch.equal(label[take] == 1, positive[take])
            assert (label[take] >= 0).all()
        return list(ours), list(taken & ~ours)

    def our_regions(_: list[Tensor], what: Truth) -> tuple[list[Tensor], ...]:
        kept = [boxes[real] for boxes, real in zip(outputs.regions, regions.real, strict=True)]
        given = ([image["boxes"] for image in what], [image["labels"] for image in what])
        objects, labels = pair.theirs.roi_heads.assign_targets_to_proposals(kept, *given)
        for i, label in enumerate(labels):
            positive = regions.positive[i, regions.real[i]]
            assert torch.equal(label > 0, positive)
            assert torch.equal(regions.object[i, regions.real[i]][positive], objects[i][positive])
        matched = [
            image["boxes"][index] if len(image["boxes"]) else torch.zeros(len(index), 4)
            for image, index in zip(what, objects, strict=True)
        ]
        return kept, objects, labels, pair.theirs.roi_heads.box_coder.encode(matched, kept)

    monkeypatch.setattr(pair.theirs.rpn, "fg_bg_sampler", our_anchors)
    monkeypatch.setattr(pair.theirs.roi_heads, "select_training_samples", our_regions)
    pair.theirs.train()
    for norm in norms(pair.theirs):
        norm.eval()
    wanted = pair.theirs(list(pair.images / 255), images)
    pair.theirs.eval()

    assert regions.positive.any()
    names = {"objectness": "objectness", "rpn_box": "rpn_box_reg", "class": "classifier", "box": "box_reg"}
    for ours, name in names.items():
        assert wanted[f"loss_{name}"] > 0
        torch.testing.assert_close(got[ours], wanted[f"loss_{name}"], rtol=1e-4, atol=0)

    for module in (pair.ours, pair.theirs):
        module.zero_grad()
    torch.stack([*got.values()]).sum().backward()
    sum(wanted.values()).backward()
    for ours_layer, theirs_layer in (
        (pair.ours.head.rpn.convs[0][0], pair.theirs.rpn.head.conv[0][0]),
        (pair.ours.head.offsets, pair.theirs.roi_heads.box_predictor.bbox_pred),
        (pair.ours.neck.laterals[0][0], pair.theirs.backbone.fpn.inner_blocks[0][0]),
    ):
        scale = theirs_layer.weight.grad.abs().max()
        assert scale > 0
        assert (ours_layer.weight.grad - theirs_layer.weight.grad).abs().max() < 1e-3 * scale


def test_the_weights_of_before_epsilon_keep_their_features() -> None:
    """torchvision's COCO weights were trained with FrozenBatchNorm2d without epsilon, and some variances are tiny."""
    torch.manual_seed(0)
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=1 + CLASSES).eval()
    frozen(theirs.backbone.body)
    overwrite_eps(theirs, 0.0)
    for norm in norms(theirs.backbone):
        norm.running_var[::7] = 3e-6
        norm.weight[::7] = 1e-3
    ours, _ = loaded(theirs, [])
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = theirs.backbone(image)
        for got, feat in zip(ours.neck(ours.backbone(image)), wanted.values(), strict=True):
            assert feat.std() > 0.01
            assert (got - feat).abs().max() < 1e-4 * feat.abs().max()


def frozen(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            new = FrozenBatchNorm2d(child.num_features)
            setattr(module, name, new)
        frozen(child)


def test_state_dicts_of_before_version_013(tmp_path: object) -> None:
    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3).state_dict()
    old = {name.replace("conv.0.0.", "conv."): tensor for name, tensor in theirs.items()}
    for block in ("inner_blocks", "layer_blocks"):
        for i in range(4):
            old = {name.replace(f"{block}.{i}.0.", f"{block}.{i}."): tensor for name, tensor in old.items()}
    assert {"rpn.head.conv.weight", "backbone.fpn.inner_blocks.3.bias"} <= old.keys()
    path = f"{tmp_path}/old.pth"
    torch.save(old, path)
    cfg = config.load("faster_rcnn_resnet", [f"model.weights={path}"])
    ours = Detector(cfg.model, cfg.input, 7)
    report = weights.load(ours, cfg.model)
    assert report is not None
    assert report.missing == ()
    assert {name.rpartition(".")[0] for name in report.mismatched} == {"head.scores", "head.offsets"}
    assert torch.equal(ours.neck.smooth[3][0].weight, theirs["backbone.fpn.layer_blocks.3.0.weight"])
    assert torch.equal(ours.head.rpn.convs[0][0].bias, theirs["rpn.head.conv.0.0.bias"])
    # A file of another name holds its variances as they are.
    assert torch.equal(ours.backbone.bn1.running_var, theirs["backbone.body.bn1.running_var"])


def test_vgg_brings_its_classifier(tmp_path: object) -> None:
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in vgg16().state_dict().items()}
    path = f"{tmp_path}/vgg.pth"
    torch.save({name: torch.full((1,), 0.5).expand(shape) for name, shape in shapes.items()}, path)
    cfg = config.load("faster_rcnn_vgg", [f"model.weights={path}"])
    ours = Detector(cfg.model, cfg.input, 3)
    report = weights.load(ours, cfg.model)
    assert report is not None
    assert {name.rpartition(".")[0] for name in report.missing} == {
        "head.rpn.convs.0.0", "head.rpn.scores", "head.rpn.offsets", "head.scores", "head.offsets",
    }  # fmt: skip
    assert ours.head.box.fc2.weight.eq(0.5).all()
    narrow = cfg.model.model_copy(update={"head": cfg.model.head.model_copy(update={"width": 64})})
    report = weights.load(Detector(narrow, cfg.input, 3), narrow)
    assert report is not None
    assert report.mismatched == ()


# The pieces


@pytest.mark.parametrize("hw", [(320, 320), (224, 352), (800, 1344)])
def test_anchors_are_torchvisions(hw: tuple[int, int]) -> None:
    """Whose canvases are multiples of 32."""
    sizes, ratios = ((20.0, 37.0), (64.0, 80.0), (130.0, 200.0)), (0.5, 1.0, 3.0)
    grids = tuple(tuple(-(-side // stride) for side in hw) for stride in (8, 32, 64))
    feats = [torch.zeros(1, 1, *grid) for grid in grids]
    generator = AnchorGenerator(sizes, (ratios,) * 3)
    wanted = generator(ImageList(torch.zeros(1, 3, *hw), [hw]), feats)[0]
    got = grid_anchors(hw, grids, (8, 32, 64), sizes, ratios, 0.0, torch.device("cpu"))
    assert torch.equal(got, wanted)


def test_anchors_of_other_canvases_stay_on_their_cells() -> None:
    """torchvision's rule would put those of 300 pixels' 38 cells 7 pixels apart."""
    anchors = grid_anchors((300, 300), ((38, 38),), (8,), ((16.0,),), (1.0,), 0.5, torch.device("cpu"))
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    assert centres[0].tolist() == [4, 4]
    assert centres[-1].tolist() == [300, 300]


def edge_boxes(count: int, seed: int, side: float = 128) -> Tensor:
    """Boxes of all sizes, many of them at an edge, some of less than a pixel."""
    rng = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=rng) * side
    half = torch.rand(count, 2, generator=rng).pow(4) * side
    boxes = torch.cat([centre - half, centre + half], 1).clamp(0, side)
    return boxes[((boxes[:, 2:] - boxes[:, :2]) > 0.01).all(1)]


def test_pyramid_align_is_torchvisions() -> None:
    strides = (4, 8, 16, 32)
    feats = [torch.randn(2, 3, 128 // stride, 128 // stride, requires_grad=True) for stride in strides]
    boxes = torch.stack([edge_boxes(300, seed)[:240] for seed in (0, 1)])
    levels = levels_of(boxes, strides, 40)
    assert levels.unique().tolist() == [0, 1, 2, 3]
    got = pyramid_align(tuple(feats), boxes, levels, strides, 7, 2)
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=40)
    named = OrderedDict((str(i), feat) for i, feat in enumerate(feats))
    wanted = pool(named, list(boxes), [(128, 128)] * 2)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)

    weight = torch.randn_like(got)
    ours = torch.autograd.grad((got * weight).sum(), feats)
    for mine, theirs in zip(ours, torch.autograd.grad((wanted * weight).sum(), feats), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


def test_pyramid_align_is_a_well_formed_operator() -> None:
    feats = [torch.randn(2, 3, 8, 6), torch.randn(2, 3, 4, 3)]
    boxes = torch.tensor([[0.0, 0, 20, 30], [5, 5, 6, 6], [0, 0, 0, 0]]).repeat(2, 1, 1)
    given = (feats, boxes, torch.tensor([[0, 1, 0]] * 2), [4, 8], 3, 2)
    torch.library.opcheck(torch.ops.detkit.pyramid_align.default, given)
    with torch.no_grad():
        assert torch.equal(pyramid_align(*given), torch.ops.detkit.pyramid_align(*given))


def test_a_box_of_the_canonical_side_has_stride_16() -> None:
    sides = torch.tensor([56, 111.9, 112, 223.9, 224, 447.9, 448, 2000, 0])
    boxes = torch.stack([torch.zeros(9), torch.zeros(9), sides, sides], 1)
    assert levels_of(boxes, (4, 8, 16, 32), 224).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 6), st.integers(1, 200), st.sampled_from([(0.3003, 0.7003), (0.5003, 0.5003)]),
    st.booleans(), st.integers(0, 2**32),
)  # fmt: skip
def test_regions_are_matched_as_defined(
    B: int, objects: int, A: int, iou: tuple[float, float], best_too: bool, seed: int
) -> None:
    """One candidate at a time, by the definition; objects beyond `objects` are padding, the first may be ignored."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 20, (B, A + 8, 2), generator=rng).float()
    boxes = torch.cat([corner, corner + torch.randint(1, 20, corner.shape, generator=rng)], 2)
    boxes, given_boxes = boxes[:, :A], boxes[:, A:]
    labels = torch.where(torch.arange(8) < objects, 1, -1).repeat(B, 1)
    ignore = (torch.arange(8) < 1).repeat(B, 1) & (torch.rand(B, 1, generator=rng) < 0.5) & (labels >= 0)
    where = Targets(given_boxes, labels, ignore)
    positive, ignored = match_regions(boxes, where, *iou, best_too=best_too)
    owner = owners(boxes, where)
    for b in range(B):
        real = [g for g in range(objects) if not ignore[b, g]]
        table = box_iou(given_boxes[b], boxes[b])
        for a in range(A):
            best = max((float(table[g, a]) for g in real), default=-1.0)
            first = bool(best_too and any(table[g, a] == table[g].max() > 0 for g in real))
            cover = max((float(table[g, a]) for g in range(objects) if ignore[b, g]), default=-1.0)
            assert positive[b, a] == (best >= iou[1] or first)
            assert ignored[b, a] == (max(best, cover) >= iou[0] and not positive[b, a])
            assert not real or table[owner[b, a], a] == best


def test_matching_in_parts_is_matching_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    where = targets(truth(1, (60, 3), SIDE, CLASSES))
    anchors = edge_boxes(500, 0, SIDE)[None]
    whole = match_regions(anchors, where, 0.3, 0.7, best_too=True)
    monkeypatch.setitem(matching._PAIRS, "cpu", 2000)
    for part, other in zip(match_regions(anchors, where, 0.3, 0.7, best_too=True), whole, strict=True):
        assert torch.equal(part, other)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(1, 60), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32))
def test_samples_are_drawn_as_asked(B: int, A: int, count: int, share: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (B, A), generator=rng)
    positive, negative = kind == 1, kind == 0
    index, is_positive, taken = draw(positive, negative, count, share, torch.arange(B) + seed)
    for b in range(B):
        own = index[b, taken[b]]
        assert len(own.unique()) == len(own) <= count
        assert (positive | negative)[b, own].all()
        assert torch.equal(is_positive[b, taken[b]], positive[b, own])
        wanted = min(int(positive[b].sum()), int(count * share))
        assert is_positive[b].sum() == wanted
        assert len(own) == wanted + min(int(negative[b].sum()), count - wanted)
    assert not is_positive[~taken].any()


def test_every_candidate_is_drawn_as_often() -> None:
    negative = torch.ones(4000, 10, dtype=torch.bool)
    index, positive, taken = draw(~negative, negative, 3, 0.5, torch.arange(4000))
    times = torch.bincount(index.flatten(), minlength=10)
    assert taken.all()
    assert not positive.any()
    assert ((times - 1200).abs() < 150).all()


def test_chances_depend_on_an_images_key_alone() -> None:
    keys = torch.tensor([3, 5, 2**40 + 7, 0])
    whole = chances(keys, 500)
    assert torch.equal(chances(keys[1:3], 100), whole[1:3, :100])
    assert whole.min() >= 0
    assert whole.max() < 2**32
    many = chances(torch.arange(100), 1000).double() / 2**32
    assert (many.mean(0) - 0.5).abs().max() < 0.15
    assert (many.mean(1) - 0.5).abs().max() < 0.05
    assert many.corrcoef().fill_diagonal_(0).abs().max() < 0.2


# The head in a detector

TINY = {
    "faster_rcnn_mobilenet": ["model.backbone.width=0.35", "model.neck.channels=16"],
    "faster_rcnn_resnet": ["model.backbone.name=resnet18", "model.neck.channels=16", *V2],
    "faster_rcnn_vgg": ["model.backbone.name=vgg11"],
}
CONFIGS = pytest.mark.parametrize("name", TINY)


def tiny(name: str, *more: str, classes: int = CLASSES) -> Detector:
    size = f"input.size=[{HW[0]}, {HW[1]}]"
    cfg = config.load(name, ["model.weights=none", size, "model.head.width=24", *TINY[name], *more])
    return Detector(cfg.model, cfg.input, classes)


def batch(*boxes: list[list[float]], labels: int = 0, pad: int = 2) -> Batch:
    """A batch of noise with these objects in its images."""
    longest = max([pad, *(len(image) for image in boxes)])
    where = Targets(
        torch.zeros(len(boxes), longest, 4),
        torch.full((len(boxes), longest), -1),
        torch.zeros(len(boxes), longest, dtype=torch.bool),
    )
    for i, image in enumerate(boxes):
        if image:
            where.boxes[i, : len(image)] = torch.tensor(image)
            where.labels[i, : len(image)] = labels
    images = torch.randint(0, 256, (len(boxes), 3, *HW), dtype=torch.uint8)
    return Batch(images, where, (None,) * len(boxes), torch.arange(len(boxes)))


SOME = [[5.0, 5, 40, 40], [30, 20, 90, 60]]
CROWD = [[x, y, x + 5, y + 4] for y in range(0, 90, 4) for x in range(0, 120, 5)][:500]
BATCHES = {
    "some": (SOME, [], SOME[:1]),
    "one image": (SOME,),
    "empty": ([], []),
    "one empty image": ([],),
    "one pixel": ([[7.0, 7, 8, 8], [127, 95, 128, 96]],),
    "whole canvas": ([[0.0, 0, HW[1], HW[0]]],),
    "five hundred": (CROWD, SOME),
}


def total(losses: Losses) -> Tensor:
    return torch.stack([losses.sums[name] / losses.denoms[name].clamp(min=1) for name in losses.sums]).sum()


@CONFIGS
@pytest.mark.parametrize("objects", BATCHES)
def test_every_parameter_is_reached_whatever_the_objects(name: str, objects: str) -> None:
    # BatchNorm wants more than one value a channel: a single photo is trained with its statistics held.
    model = Trainable(tiny(name).train(len(BATCHES[objects]) > 1))
    losses = model(batch(*BATCHES[objects]), torch.arange(len(BATCHES[objects])))
    assert losses.sums.keys() == losses.denoms.keys() == {"objectness", "rpn_box", "class", "box"}
    for value in (*losses.sums.values(), *losses.denoms.values()):
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
    assert (losses.sums["box"] > 0) == (losses.sums["rpn_box"] > 0) == any(map(len, BATCHES[objects]))
    total(losses).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@CONFIGS
def test_regions_hold_the_ground_truth_and_no_padding(name: str) -> None:
    detector, some = tiny(name).eval(), batch(SOME, [])
    outputs = detector(some.images, some.targets, torch.arange(2))
    regions = outputs.region_samples
    assert regions is not None
    for box in SOME:
        assert (outputs.regions[0] == torch.tensor(box)).all(1).any()
    assert not regions.positive[1].any()
    sides = outputs.regions[..., 2:] - outputs.regions[..., :2]
    assert (sides[outputs.real] > 0).all()
    assert (box_iou(outputs.regions[0, regions.positive[0]], some.targets.boxes[0]).amax(1) >= 0.5).all()
    assert (box_iou(outputs.regions[0, regions.real[0] & ~regions.positive[0]], some.targets.boxes[0]) < 0.5).all()


def test_samples_come_from_the_keys_alone() -> None:
    detector, some = tiny("faster_rcnn_mobilenet").eval(), batch(SOME, SOME[:1])

    def outputs(seed: int) -> Outputs:
        return detector(some.images, some.targets, torch.arange(2) + seed)

    state = torch.get_rng_state()
    one, same, other = outputs(0), outputs(0), outputs(1)
    assert torch.equal(torch.get_rng_state(), state)
    for ours, theirs in zip(one.region_samples, same.region_samples, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(one.region_samples.candidate, other.region_samples.candidate)
    assert not torch.equal(one.anchor_samples.candidate, other.anchor_samples.candidate)


def test_ignored_objects_are_neither_positive_nor_negative() -> None:
    many = ("model.head.samples=1000", "model.head.rpn_samples=5000")
    detector, some = tiny("faster_rcnn_mobilenet", *many).eval(), batch(SOME)
    some.targets.ignore[0, 1] = True
    outputs = detector(some.images, some.targets)
    ignored = some.targets.boxes[:, 1]
    for samples, boxes, low in (
        (outputs.anchor_samples, outputs.anchors[outputs.anchor_samples.candidate[0]], 0.3),
        (outputs.region_samples, outputs.regions[0], 0.5),
    ):
        assert (samples.object[0] == 0).all()
        negative = samples.real[0] & ~samples.positive[0]
        assert negative.sum() > 50
        assert (box_iou(boxes[negative], ignored) < low).all()
    # Nor is it added to the proposals.
    assert not (outputs.regions[0, outputs.real[0]] == ignored).all(1).any()


@CONFIGS
def test_losses_of_a_batch_are_those_of_its_images(name: str) -> None:
    """Sums and denominators add up, whatever the padding."""
    detector = tiny(name, "model.head.samples=2000", "model.head.positives=1", "model.head.rpn_samples=5000").eval()
    whole = batch(SOME, [], SOME[:1], pad=8)
    together = Trainable(detector)(whole)

    def alone(i: int) -> Losses:
        where = Targets(*(part[i : i + 1, :2] for part in whole.targets))
        return Trainable(detector)(Batch(whole.images[i : i + 1], where, (None,), whole.index[:1]))

    each = [alone(i) for i in range(3)]
    for key, value in together.sums.items():
        torch.testing.assert_close(sum(losses.sums[key] for losses in each), value, rtol=1e-4, atol=1e-3)
        assert sum(losses.denoms[key] for losses in each) == together.denoms[key]


def sharpen(detector: Detector) -> None:
    """Statistics that fit noise, proposals of many shapes and scores from 0 to 1."""
    detector.train()
    with torch.no_grad():
        for _ in range(3):
            detector(batch(SOME, SOME, SOME).images)
    head = detector.head
    assert isinstance(head, FasterRCNNHead)
    for layer, std in ((head.rpn.scores, 0.3), (head.rpn.offsets, 0.05), (head.scores, 1.0), (head.offsets, 0.3)):
        nn.init.normal_(layer.weight, std=std)
    detector.eval()


@CONFIGS
def test_what_is_decoded(name: str) -> None:
    detector = tiny(name, "model.head.proposals=40").eval()
    sharpen(detector)
    outputs = detector(batch(SOME, SOME).images)
    assert outputs.anchor_samples is outputs.region_samples is None
    boxes, scores = detector.head.decode(outputs)
    assert boxes.shape == (2, 40, CLASSES, 4)
    assert scores.shape == (2, 40, CLASSES)
    assert boxes.dtype == scores.dtype == torch.float32
    assert (boxes[..., 2:] > boxes[..., :2])[outputs.real].all()
    assert (scores.sum(2) <= 1 + 1e-5).all()
    limit = torch.tensor([HW[1], HW[0], HW[1], HW[0]])
    assert ((outputs.regions >= 0) & (outputs.regions <= limit)).all()
    # A class has boxes of its own.
    assert not torch.equal(boxes[:, :, 0], boxes[:, :, 1])


def test_padding_is_never_found() -> None:
    """Where NMS leaves fewer regions than there is room for."""
    detector = tiny("faster_rcnn_mobilenet", "model.head.proposal_iou=0.01").eval()
    sharpen(detector)
    outputs = detector(batch(SOME, SOME).images)
    assert not outputs.real.all()
    decoded = detector.head.decode(outputs)
    assert not decoded.scores[~outputs.real].any()
    assert decoded.boxes.isfinite().all()
    assert outputs.logits.isfinite().all()


@CONFIGS
def test_bfloat16_is_near_and_decodes_in_float32(name: str) -> None:
    detector, some = tiny(name).eval(), batch(SOME, SOME[:1])
    sharpen(detector)
    wanted = Trainable(detector)(some, torch.arange(2))
    with torch.autocast("cpu", torch.bfloat16):
        got = Trainable(detector)(some, torch.arange(2))
        outputs = detector(some.images)
        decoded = detector.head.decode(outputs)
    assert outputs.objectness.dtype == outputs.logits.dtype == torch.bfloat16
    assert outputs.regions.dtype == decoded.boxes.dtype == decoded.scores.dtype == torch.float32
    for key, value in wanted.sums.items():
        assert got.sums[key].dtype == torch.float32
        # The other sums depend on which regions the RPN proposes.
        if key in ("objectness", "rpn_box"):
            torch.testing.assert_close(got.sums[key], value, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", [pytest.param("faster_rcnn_mobilenet", marks=pytest.mark.slow), "faster_rcnn_vgg"])
def test_onnx_finds_the_same_at_any_batch_size(name: str) -> None:
    detector = tiny(name, "model.head.proposals=60", "model.head.candidates=200")
    sharpen(detector)
    predictor = Predictor(detector, config.Select(score=0.1, keep=100))
    model = export.graph(predictor, {"images": torch.zeros(2, 3, *HW, dtype=torch.uint8)})
    kinds = {node.op_type for node in model.graph.node}
    # The runtime's own operators; torch's sum over a region's cells would become a loop over regions.
    assert "Loop" not in kinds
    assert kinds & {"RoiAlign", "MaxRoiPool"}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 3, 8):
        images = soft(count, HW)
        wanted = [part.numpy() for part in predictor(images)]
        boxes, scores, labels = session.run(None, {"images": images.numpy()})
        assert (wanted[1] > 0).sum() > 10 * count
        np.testing.assert_allclose(scores, wanted[1], atol=1e-4)
        np.testing.assert_allclose(boxes, wanted[0], atol=0.01)
        np.testing.assert_array_equal(labels, wanted[2])
    assert speed.onnx_flops(model) == speed.torch_flops(predictor, HW)


# What its user is told


def refused(name: str, *more: str) -> str:
    with pytest.raises(UserError) as error:
        tiny(name, *more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_does_not_fit_is_one_line() -> None:
    assert "4 levels of anchors for 5 feature maps" in refused("faster_rcnn_mobilenet", "model.neck.levels=5")
    plain = ["model.neck={name: none}", "model.head.anchor_sizes=[[24], [48], [96]]"]
    assert "as many channels each" in refused("faster_rcnn_mobilenet", *plain)
    assert "pool max is for one level" in refused("faster_rcnn_mobilenet", "model.head.pool=max")
    assert "as many sizes on each level" in refused("faster_rcnn_resnet", "model.head.anchor_sizes=[[1], [2, 3]]")
    assert "rpn_iou" in refused("faster_rcnn_resnet", "model.head.rpn_iou=[0.7, 0.3]")
    assert "goes with neck fpn or pan or none" in refused("faster_rcnn_resnet", "model.neck={name: ssd_extras}")


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError):
        config.FasterRCNN(samples=0)
    with pytest.raises(ValidationError, match="twice the one before"):
        config.Backbone(name="resnet18", strides=(8, 32))

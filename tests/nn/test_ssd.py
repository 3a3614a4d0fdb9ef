"""The proof that the architecture is SSD: torchvision's ssd300_vgg16, of random weights, against ours."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import SSD300_VGG16_Weights, ssd300_vgg16
from torchvision.models.detection.ssd import SSD
from torchvision.ops import box_iou

from detkit import config
from detkit.nn import backbones, heads, necks, weights
from detkit.nn.detector import Detector
from detkit.nn.heads.ssd import Outputs
from tests.nn.ground import targets, truth

CLASSES = 90
HW = (64, 96)


class Pair(NamedTuple):
    """Both detectors with the same weights, and what both say of the same images."""

    theirs: SSD
    ours: Detector
    images: Tensor
    reference: dict[str, Tensor]
    anchors: list[Tensor]
    outputs: Outputs


@pytest.fixture(scope="module")
def pair() -> Pair:
    torch.manual_seed(0)
    theirs = ssd300_vgg16(weights=None, weights_backbone=None, num_classes=1 + CLASSES).eval()
    # No weight is left at a constant, or an exchanged bias would not be seen.
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, -0.1, 0.1)
    nn.init.uniform_(theirs.backbone.scale_weight, 10, 30)
    settings = config.load("ssd_vgg", ["model.weights=torchvision"])
    ours = Detector(settings.model, settings.input, CLASSES).eval()
    with pytest.MonkeyPatch.context() as patch:
        # What would be downloaded.
        patch.setattr(SSD300_VGG16_Weights, "get_state_dict", lambda *_, **__: theirs.state_dict())
        report = weights.load(ours, settings.model)
    assert report is not None
    assert report.missing == report.mismatched == report.unexpected == ()

    coarse = torch.rand(2, 3, 12, 12)
    images = (nn.functional.interpolate(coarse, (300, 300), mode="bicubic").clamp(0, 1) * 255).byte()
    with torch.no_grad():
        batch, _ = theirs.transform(list(images.float() / 255))
        features = list(theirs.backbone(batch.tensors).values())
        reference = theirs.head(features)
        return Pair(theirs, ours, images, reference, theirs.anchor_generator(batch, features), ours(images))


def test_raw_outputs_and_priors(pair: Pair) -> None:
    logits, offsets = pair.reference["cls_logits"], pair.reference["bbox_regression"]
    assert logits.std() > 0.1  # there is something to compare
    assert logits.abs().max() < 1000
    assert logits[0].sub(logits[1]).abs().max() > 0.01
    torch.testing.assert_close(pair.outputs.logits, logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pair.outputs.offsets, offsets, rtol=1e-4, atol=1e-4)
    for anchors in pair.anchors:
        torch.testing.assert_close(pair.outputs.priors, anchors, rtol=0, atol=1e-4)


def test_decoded_boxes_and_scores(pair: Pair) -> None:
    decoded = pair.ours.head.decode(pair.outputs)
    assert decoded.boxes.shape == (2, 8732, 1, 4)
    assert decoded.scores.shape == (2, 8732, CLASSES)
    scores = pair.reference["cls_logits"].softmax(-1)[..., 1:]
    torch.testing.assert_close(decoded.scores, scores, rtol=0, atol=1e-4)
    for i, anchors in enumerate(pair.anchors):
        boxes = pair.theirs.box_coder.decode_single(pair.reference["bbox_regression"][i], anchors)
        # To 1e-4 of the box's side, or of a pixel where it is smaller: random offsets give sides of thousands.
        side = (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).clamp(min=1)
        assert ((decoded.boxes[i, :, 0] - boxes).abs() <= 1e-4 * side).all()


@pytest.mark.parametrize("counts", [(3, 1), (0, 5), (60, 0), (0, 0), (1, 200)])
def test_loss_and_its_gradients(pair: Pair, counts: tuple[int, int]) -> None:
    images = truth(sum(counts), counts, 300, CLASSES)
    reference = {name: value.clone().requires_grad_() for name, value in pair.reference.items()}
    matched = [
        pair.theirs.proposal_matcher(box_iou(image["boxes"], anchors))
        if len(image["boxes"])
        else torch.full((len(anchors),), -1)
        for image, anchors in zip(images, pair.anchors, strict=True)
    ]
    wanted = pair.theirs.compute_loss(images, reference, pair.anchors, matched)
    sum(wanted.values()).backward()

    logits, offsets = (reference[name].detach().requires_grad_() for name in ("cls_logits", "bbox_regression"))
    # A small object overlaps all default boxes of one size around it equally; which one it gets is decided by the last
    # bit of their coordinates, so here they are theirs.
    losses = pair.ours.head.loss(Outputs(logits, offsets, pair.anchors[0]), targets(images))
    got = {name: total / losses.denoms[name].clamp(min=1) for name, total in losses.sums.items()}
    sum(got.values()).backward()

    assert (wanted["classification"] > 0) == any(counts)
    torch.testing.assert_close(got["class"], wanted["classification"], rtol=1e-4, atol=0)
    torch.testing.assert_close(got["box"], wanted["bbox_regression"], rtol=1e-4, atol=0)
    for ours, name in ((logits, "cls_logits"), (offsets, "bbox_regression")):
        torch.testing.assert_close(ours.grad, reference[name].grad, rtol=1e-3, atol=1e-7)


def test_the_training_loss_from_image_to_number(pair: Pair) -> None:
    """Through their public door: transform, network, matching and loss in one."""
    images = truth(9, (4, 0), 300, CLASSES)
    with torch.no_grad():
        wanted = pair.theirs.train()(list(pair.images.float() / 255), images)
        pair.theirs.eval()
        losses = pair.ours.head.loss(pair.ours(pair.images), targets(images))
    for ours, name in (("class", "classification"), ("box", "bbox_regression")):
        torch.testing.assert_close(losses.sums[ours] / losses.denoms[ours], wanted[name], rtol=1e-4, atol=0)


# The head's other shape


def aligned(classes: int = 5, **options: object) -> heads.SSDHead:
    settings = config.load("ssd_mobilenet").model.model_copy(update={"neck": config.PAN(channels=16)})
    neck = necks.build(settings.neck, backbones.build(settings.backbone))
    return heads.build(settings.head.model_copy(update=options), neck, classes, HW)


def feats(batch: int = 2, hw: tuple[int, int] = HW) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, 16, hw[0] // s, hw[1] // s) for s in (8, 16, 32))


def test_the_aligned_head_starts_with_nearly_everything_background() -> None:
    head = aligned().eval()
    scores = head.decode(head(feats(), HW)).scores
    assert scores.mean().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("loss", ["multibox", "aligned"])
def test_a_candidates_numbers_come_from_its_own_cell(loss: str) -> None:
    """Order of level, row, column and shape is that of the priors."""
    head = aligned(loss=loss, tower=0, extra_square=True, ratios=((2.0,), (), ())).eval()
    for row, column in ((0, 0), (3, 7), (7, 11)):
        one = [torch.zeros_like(feat) for feat in feats(1)]
        base = head(tuple(one), HW)
        one[0][0, :, row, column] = 1
        out = head(tuple(one), HW)
        for got, before in ((out.logits, base.logits), (out.offsets, base.offsets)):
            changed = (got != before)[0].any(1)
            assert changed.any()
            centres = (out.priors[changed, :2] + out.priors[changed, 2:]) / 2
            # The cell and, through the 3x3 convolution, its neighbours; each shape of them.
            assert ((centres - torch.tensor([column * 8 + 4.0, row * 8 + 4.0])).abs() <= 8).all()
            neighbours = (min(row + 2, 8) - max(row - 1, 0)) * (min(column + 2, 12) - max(column - 1, 0))
            assert changed.sum() == 4 * neighbours


def test_classes_are_counted_without_background() -> None:
    for loss, logits in (("multibox", 6), ("aligned", 5)):
        head = aligned(5, loss=loss).eval()
        outputs = head(feats(), HW)
        assert outputs.logits.shape == (2, 8 * 12 + 4 * 6 + 2 * 3, logits)
        assert head.decode(outputs).scores.shape[2] == 5


def test_default_boxes_keep_their_pixels_on_a_smaller_canvas() -> None:
    """As the convolutions' receptive fields do: those of the smaller canvas are among those of the configured one."""
    head = aligned()
    whole = {tuple(box) for box in head(feats(), HW).priors.tolist()}
    part = [tuple(box) for box in head(feats(hw=(32, 64)), (32, 64)).priors.tolist()]
    assert len(part) == 4 * 8 + 2 * 4 + 1 * 2
    assert set(part) < whole

"""Faster R-CNN's head (Ren 2015): a region proposal network, then a class and a better box for each region."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_pool

from detkit.config import FasterRCNN, Select
from detkit.nn.anchors import grid_anchors
from detkit.nn.boxes import decode, encode
from detkit.nn.contract import ClassRows, Decoded, Feats, FeatureMaps, Head, Losses
from detkit.nn.matching import Match, match_regions, owners
from detkit.nn.necks import conv
from detkit.nn.roi import levels_of, pyramid_align, rois
from detkit.nn.select import select
from detkit.types import Targets

RPN_VARIANCES = (1.0, 1.0)


class Samples(NamedTuple):
    """Candidates that a loss looks at. candidate: int64 [B, N], which. object: int64 [B, N], of the padded ground truth
    (0 where not positive). positive: bool [B, N]. real: bool [B, N], False is padding."""

    candidate: Tensor
    object: Tensor
    positive: Tensor
    real: Tensor


class Outputs(NamedTuple):
    """objectness: float [B, A]. deltas: float [B, A, 4]. anchors: float32 [A, 4], pixels of the input canvas.
    regions: float32 [B, P, 4], pixels: the proposals or, given targets, samples of them and of the ground truth.
    logits: float [B, P, 1 + C], background first. offsets: float [B, P, 1 + C, 4].
    real: bool [B, P], False is padding. anchor_samples, region_samples: given targets; those of the anchors, and of the
    proposals followed by the ground truth."""

    objectness: Tensor
    deltas: Tensor
    anchors: Tensor
    regions: Tensor
    logits: Tensor
    offsets: Tensor
    real: Tensor
    anchor_samples: Samples | None
    region_samples: Samples | None


def _mix(x: Tensor) -> Tensor:
    """Integers of 32 bits (in int64) to others of 32 bits, one to one and as if by chance (lowbias32, Wellons 2018)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def chances(keys_B: Tensor, count: int) -> Tensor:
    """Random int64 [B, count], 0 to 2^32 - 1. A row depends on its key alone, and a number in it on its place: not on
    `count`, on the images beside it or on the device, so that a batch may be divided in any way."""
    places = torch.arange(count, device=keys_B.device)
    return _mix(_mix(keys_B & 0xFFFFFFFF)[:, None] ^ _mix(places + 0x9E3779B9))


@torch.no_grad()
def draw(positive: Tensor, negative: Tensor, count: int, share: float, keys_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """At most `count` candidates of each image, at most that share of them positive, by chance (see `chances`): their
    index [B, N], and which of them are positive and which are no padding, bool [B, N]. positive, negative:
    bool [B, A]."""
    chance = chances(keys_B, positive.shape[1])

    def first(among: Tensor, most: int) -> tuple[Tensor, Tensor]:
        values, index = chance.masked_fill(~among, -1).topk(min(most, among.shape[1]), 1)
        return index, values >= 0

    (positives, is_positive), (negatives, is_negative) = first(positive, int(count * share)), first(negative, count)
    room = count - is_positive.sum(1, keepdim=True)
    is_negative &= torch.arange(negatives.shape[1], device=room.device) < room
    taken = torch.cat([is_positive, is_negative], 1)
    order = taken.float().sort(dim=1, descending=True, stable=True).indices[:, :count]
    index = torch.cat([positives, negatives], 1).gather(1, order)
    taken = taken.gather(1, order)
    return index, taken & (order < positives.shape[1]), taken


def _flat(level: Tensor, last: int) -> Tensor:
    """[B, anchors * last, h, w] -> [B, h * w * anchors, last]."""
    return level.permute(0, 2, 3, 1).reshape(level.shape[0], -1, last)


class RPN(nn.Module):
    """Region proposal network: objectness and box deltas of each anchor, by the same convolutions on every level."""

    def __init__(self, channels: int, anchors: int, convs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(*(conv(channels, channels, 3, norm=False) for _ in range(convs)))
        self.scores = nn.Conv2d(channels, anchors, 1)
        self.offsets = nn.Conv2d(channels, anchors * 4, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, feats: Feats) -> tuple[list[Tensor], list[Tensor]]:
        """Maps -> objectness [B, A, 1] and deltas [B, A, 4] of each level."""
        hidden = [self.convs(feat) for feat in feats]
        return [_flat(self.scores(each), 1) for each in hidden], [_flat(self.offsets(each), 4) for each in hidden]


def _box_head(settings: FasterRCNN, channels: int) -> nn.Sequential:
    """A region's features [N, channels, size, size] -> [N, width]."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i in range(settings.convs):
        layers[f"conv{i + 1}"] = conv(channels, channels, 3)
        nn.init.kaiming_normal_(layers[f"conv{i + 1}"][0].weight, mode="fan_out", nonlinearity="relu")  # type: ignore[index]
    layers["flatten"] = nn.Flatten()
    width = channels * settings.pool_size**2
    for i in range(settings.fcs):
        layers[f"fc{i + 1}"] = nn.Linear(width, settings.width)
        layers[f"relu{i + 1}"] = nn.ReLU(inplace=True)
        layers[f"dropout{i + 1}"] = nn.Dropout(settings.dropout)
        width = settings.width
    return nn.Sequential(layers)


class FasterRCNNHead(Head):
    """See the module."""

    two_stage = True

    def __init__(self, settings: FasterRCNN, below: FeatureMaps, classes: int) -> None:
        super().__init__()
        cfg = self.settings = settings
        if len(cfg.anchor_sizes) != len(below.strides):
            raise ValueError(
                f"{len(cfg.anchor_sizes)} levels of anchors for {len(below.strides)} feature maps; "
                "change model.head.anchor_sizes or model.neck.levels"
            )
        if len(set(below.channels)) != 1:
            raise ValueError(f"its maps need as many channels each, not {list(below.channels)}; set model.neck to fpn")
        self.strides, self.classes = below.strides, classes
        channels = below.channels[0]
        anchors = len(cfg.anchor_ratios) * len(cfg.anchor_sizes[0])
        self.rpn = RPN(channels, anchors, cfg.rpn_convs)
        self.box = _box_head(cfg, channels)
        self.scores = nn.Linear(cfg.width, 1 + classes)
        # The background's box is never used, but torchvision's weights have one.
        self.offsets = nn.Linear(cfg.width, (1 + classes) * 4)
        common = {"score": 0.0, "iou": cfg.proposal_iou}
        self.rule = Select(candidates=cfg.candidates, keep=cfg.proposals, **common)
        self.training_rule = Select(candidates=cfg.train_candidates, keep=cfg.train_proposals, **common)
        version = "_V2" if cfg.convs else ""
        self.reference = f"FasterRCNN_ResNet50_FPN{version}_Weights.COCO_V1"

    def forward(
        self, feats: Feats, hw: tuple[int, int], targets: Targets | None = None, rng: Tensor | None = None
    ) -> Outputs:
        """Feature maps of a canvas `hw` -> Outputs. rng: int64 [B], what each image's samples are drawn by; default:
        torch's generator."""
        cfg = self.settings
        scores, offsets = self.rpn(feats)
        grids = tuple((int(feat.shape[-2]), int(feat.shape[-1])) for feat in feats)
        anchors = grid_anchors(
            hw, grids, self.strides, cfg.anchor_sizes, cfg.anchor_ratios, cfg.anchor_centre, feats[0].device
        )
        objectness, deltas = torch.cat(scores, 1), torch.cat(offsets, 1)
        rule = self.rule if targets is None else self.training_rule
        with torch.no_grad():
            boxes = decode(deltas.float(), anchors, RPN_VARIANCES)
            # Only their order counts. Of sure anchors, a sigmoid would leave no order in float32.
            candidates = Decoded(boxes[:, :, None], F.softplus(objectness.float()))
            regions, sure, _ = select(candidates, rule, hw, [level.shape[1] for level in scores])
        real = sure > 0
        samples: tuple[Samples, Samples] | tuple[None, None] = (None, None)
        if targets is not None:
            regions, real, samples = self._sample(anchors, regions, real, targets, rng)
        features = self.box(self._pool(feats, regions))
        B, P = regions.shape[:2]
        logits = self.scores(features).reshape(B, P, -1)
        return Outputs(
            objectness.squeeze(2), deltas, anchors, regions, logits, self.offsets(features).reshape(B, P, -1, 4), real,
            *samples,
        )  # fmt: skip

    def _sample(
        self, anchors_A4: Tensor, proposals_BP4: Tensor, real_BP: Tensor, targets: Targets, rng: Tensor | None
    ) -> tuple[Tensor, Tensor, tuple[Samples, Samples]]:
        """What the two losses look at: regions [B, N, 4], which of them are real [B, N], and both samples."""
        cfg = self.settings
        keys_B = torch.randint(1 << 32, (len(real_BP),), device=real_BP.device) if rng is None else rng
        positive, ignore = match_regions(anchors_A4[None], targets, *cfg.rpn_iou, best_too=True)
        index, positive, taken = draw(positive, ~(positive | ignore), cfg.rpn_samples, cfg.rpn_positives, keys_B)
        anchors = Samples(index, owners(anchors_A4[index], targets) * positive, positive, taken)

        objects_BG = (targets.labels >= 0) & ~targets.ignore
        boxes, real = torch.cat([proposals_BP4, targets.boxes], 1), torch.cat([real_BP, objects_BG], 1)
        positive, ignore = match_regions(boxes, targets, cfg.match_iou, cfg.match_iou)
        negative, keys_B = ~(positive | ignore) & real, _mix(keys_B & 0xFFFFFFFF)
        index, positive, taken = draw(positive & real, negative, cfg.samples, cfg.positives, keys_B)
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return boxes, taken, (anchors, Samples(index, owners(boxes, targets) * positive, positive, taken))

    def places(self, outputs: Outputs) -> Tensor:
        """The anchors."""
        return outputs.anchors

    def match(self, outputs: Outputs, targets: Targets) -> Match:
        """By overlap; the losses look at a sample of these."""
        positive, ignore = match_regions(outputs.anchors[None], targets, *self.settings.rpn_iou, best_too=True)
        some, owner = positive.any(0).nonzero().squeeze(1), torch.zeros_like(positive, dtype=torch.int64)
        owner[:, some] = owners(outputs.anchors[some].expand(len(positive), -1, -1), targets)
        return Match(owner * positive, positive, ignore, positive.float())

    def _pool(self, feats: Feats, regions_BP4: Tensor) -> Tensor:
        """Features of regions [B * P, C, size, size]."""
        cfg = self.settings
        feats, strides = feats[: cfg.pool_levels], self.strides[: cfg.pool_levels]
        if cfg.pool == "max":
            found: Tensor = roi_pool(feats[0].float(), rois(regions_BP4), cfg.pool_size, 1 / strides[0])
            return found
        levels = levels_of(regions_BP4, strides, cfg.pool_side)
        return pyramid_align(feats, regions_BP4, levels, strides, cfg.pool_size, cfg.pool_samples)

    def loss(self, outputs: Outputs, targets: Targets) -> Losses:
        """Binary cross-entropy of the anchors' samples and cross-entropy of the regions', each with smooth L1 on the
        offsets of positives; all over the number of samples. outputs: made with the same targets."""
        anchors, regions = outputs.anchor_samples, outputs.region_samples
        assert anchors is not None
        assert regions is not None
        objectness = outputs.objectness.float().gather(1, anchors.candidate)
        entropy = F.binary_cross_entropy_with_logits(objectness, anchors.positive.float(), reduction="none")
        deltas = outputs.deltas.gather(1, anchors.candidate[..., None].expand(-1, -1, 4))
        rpn_box = self._box_loss(deltas, outputs.anchors[anchors.candidate], anchors, targets, RPN_VARIANCES)

        labels = torch.where(regions.positive, targets.labels.gather(1, regions.object) + 1, 0)
        mistakes = F.cross_entropy(
            outputs.logits.float().transpose(1, 2), labels, reduction="none", label_smoothing=self.settings.smoothing
        )
        offsets = outputs.offsets.gather(2, labels[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        box = self._box_loss(offsets, outputs.regions, regions, targets, self.settings.variances)
        sums = {
            "objectness": (entropy * anchors.real).sum(),
            "rpn_box": rpn_box,
            "class": (mistakes * regions.real).sum(),
            "box": box,
        }
        first, second = anchors.real.sum().float(), regions.real.sum().float()
        return Losses(sums, {"objectness": first, "rpn_box": first, "class": second, "box": second})

    def _box_loss(
        self, offsets: Tensor, priors: Tensor, samples: Samples, targets: Targets, variances: tuple[float, float]
    ) -> Tensor:
        """Smooth L1 of the offsets [B, N, 4] of positives, as a sum."""
        positive = samples.positive[..., None]
        boxes = targets.boxes.gather(1, samples.object[..., None].expand(-1, -1, 4))
        # Padding has no size: its offsets aren't numbers, and are not wanted.
        wanted = torch.where(positive, encode(boxes, priors, variances), 0)
        error = F.smooth_l1_loss(offsets.float(), wanted, reduction="none", beta=self.settings.beta)
        return (error * positive).sum()

    def decode(self, outputs: Outputs) -> Decoded:
        """Outputs -> candidates, each class with boxes of its own, in pixels of the input canvas; not clipped to it."""
        scores = outputs.logits.float().softmax(-1)[..., 1:] * outputs.real[..., None]
        boxes = decode(outputs.offsets[:, :, 1:].float(), outputs.regions[:, :, None], self.settings.variances)
        return Decoded(boxes, scores)

    def class_layers(self) -> dict[str, ClassRows]:
        """Of the second look; before the classes, the background, which has a box too."""
        return {"scores": ClassRows(1), "offsets": ClassRows(1, 4)}

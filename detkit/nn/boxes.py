"""Box arithmetic on torch tensors: x1 y1 x2 y2 in pixels, 0-based half-open edges, float32."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A predicted side is at most this many times its prior's, so that exp() can't overflow (as in torchvision).
MAX_LOG_SIDE = math.log(1000 / 16)


def area(boxes: Tensor) -> Tensor:
    """Area of boxes [..., 4] -> [...]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    left_top = torch.maximum(a[..., :2], b[..., :2])
    right_bottom = torch.minimum(a[..., 2:], b[..., 2:])
    return (right_bottom - left_top).clamp(min=0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [..., 4], pair by pair with broadcasting -> [...]; 0 where both are empty."""
    overlap = _intersection(a, b)
    return overlap / (area(a) + area(b) - overlap).clamp(min=1e-9)


class Planes(NamedTuple):
    """Boxes as four contiguous tensors [...]: for all pairs of many boxes, arithmetic is several times as fast so."""

    x1: Tensor
    y1: Tensor
    x2: Tensor
    y2: Tensor

    @property
    def area(self) -> Tensor:
        """[...]."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)


def planes(boxes: Tensor) -> Planes:
    """Boxes [..., 4] as planes."""
    return Planes(*boxes.movedim(-1, 0).contiguous().unbind(0))


def plane_iou(a: Planes, b: Planes) -> Tensor:
    """`iou` of planes [...], with broadcasting -> [...]; without gradients."""
    overlap = torch.minimum(a.x2, b.x2).sub_(torch.maximum(a.x1, b.x1)).clamp_(min=0)
    overlap *= torch.minimum(a.y2, b.y2).sub_(torch.maximum(a.y1, b.y1)).clamp_(min=0)
    return overlap / (a.area + b.area).sub_(overlap).clamp_(min=1e-9)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi 2019) of boxes [..., 4], pair by pair with broadcasting -> [...] in (-1, 1]."""
    overlap = _intersection(a, b)
    union = (area(a) + area(b) - overlap).clamp(min=1e-9)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return overlap / union - (hull - union) / hull.clamp(min=1e-9)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU (Zheng 2020) of boxes [..., 4], pair by pair with broadcasting -> [...], at most 1: IoU, less
    the squared distance of the centres over the hull's diagonal, less a penalty for unlike aspect ratios."""
    (centre_a, size_a), (centre_b, size_b) = _centre_size(a), _centre_size(b)
    overlap = iou(a, b)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    apart = (centre_a - centre_b).square().sum(-1) / hull.square().sum(-1).clamp(min=1e-9)
    angle_a, angle_b = (torch.atan2(size[..., 0], size[..., 1]) for size in (size_a, size_b))
    aspect = 4 / math.pi**2 * (angle_a - angle_b).square()
    share = (aspect / (1 - overlap + aspect).clamp(min=1e-9)).detach()
    return overlap - apart - share * aspect


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + size / 2, size


def encode(boxes: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """Offsets [..., 4] that turn priors into boxes (SSD, R-CNN): centre shift over the prior's side and log of the
    ratio of sides, each over its variance."""
    centre, size = _centre_size(boxes)
    prior_centre, prior_size = _centre_size(priors)
    shift = (centre - prior_centre) / prior_size / variances[0]
    return torch.cat([shift, torch.log(size / prior_size) / variances[1]], -1)


def decode(offsets: Tensor, priors: Tensor, variances: tuple[float, float]) -> Tensor:
    """The inverse of `encode`: offsets and priors [..., 4] -> boxes [..., 4]."""
    prior_centre, prior_size = _centre_size(priors)
    centre = prior_centre + offsets[..., :2] * variances[0] * prior_size
    half = prior_size * torch.exp((offsets[..., 2:] * variances[1]).clamp(max=MAX_LOG_SIDE)) / 2
    return torch.cat([centre - half, centre + half], -1)

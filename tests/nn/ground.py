"""Random ground truth in torchvision's form, and the same in ours."""

from __future__ import annotations

import torch
from torch import Tensor

from detkit.types import Targets

Truth = list[dict[str, Tensor]]


def truth(seed: int, counts: tuple[int, ...], side: int, classes: int) -> Truth:
    """So many objects for each square image of that side in pixels; labels from 1, 0 being the background."""
    rng = torch.Generator().manual_seed(seed)
    images = []
    for count in counts:
        size = 2 + torch.rand(count, 2, generator=rng).square() * (side - 3)
        corner = torch.rand(count, 2, generator=rng) * (side - size)
        labels = torch.randint(1, 1 + classes, (count,), generator=rng)
        images.append({"boxes": torch.cat([corner, corner + size], 1), "labels": labels})
    return images


def targets(images: Truth) -> Targets:
    """Theirs, padded, with the background out of the labels."""
    longest = max(1, *(len(image["labels"]) for image in images))
    boxes, labels = torch.zeros(len(images), longest, 4), torch.full((len(images), longest), -1)
    for i, image in enumerate(images):
        boxes[i, : len(image["labels"])] = image["boxes"]
        labels[i, : len(image["labels"])] = image["labels"] - 1
    return Targets(boxes, labels, torch.zeros_like(labels, dtype=torch.bool))

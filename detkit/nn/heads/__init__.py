"""Detection heads. `build` is the one place that knows them all."""

from __future__ import annotations

from detkit.config import SSD
from detkit.nn.contract import FeatureMaps
from detkit.nn.heads.ssd import SSDHead


def build(settings: SSD, below: FeatureMaps, classes: int, canvas: tuple[int, int]) -> SSDHead:
    """The head for a neck that gives the maps of `below`. classes: C, without background.
    canvas: height and width of the configured input."""
    match settings:
        case SSD():
            return SSDHead(settings, below, classes, canvas)

"""A small network of detkit's own, for the CPU and the phone: wide 3x3 convolutions of CSP blocks (Wang 2020)."""

from __future__ import annotations

from torch import nn

from detkit.nn.backbones.base import Chain
from detkit.nn.necks import CSP, conv

WIDTHS, DEPTHS = (48, 96, 160, 256), (0, 2, 2, 1)


class CSPNet(Chain):
    """Four stages, at strides 4, 8, 16 and 32; maps: the last layer's of each.

    The stem goes to stride 4 at once. On the CPU a plain 3x3 convolution does ten times the arithmetic a second of a
    depthwise one, and BatchNorm at stride 2 alone would take as long as a third of this network.

    width: factor on the channels.
    """

    def __init__(self, name: str, strides: tuple[int, ...], width: float) -> None:
        super().__init__(name, strides)
        used = strides[-1].bit_length() - 2
        widths = [max(8, round(wide * width / 8) * 8) for wide in WIDTHS[:used]]
        self.stem = nn.Sequential(conv(3, widths[0], 7, 4), conv(widths[0], widths[0], 3))
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(widths[i - 1], widths[i], 3, 2), CSP(widths[i], widths[i], DEPTHS[i]))
            for i in range(1, used)
        )
        self.channels = tuple(widths[-len(strides) :])

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The stem, and a strided convolution with a CSP block for each further stage."""
        return [[self.stem], *([block] for block in self.blocks)]

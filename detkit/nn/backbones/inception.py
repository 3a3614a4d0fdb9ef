"""GoogLeNet (Szegedy 2015) and Inception v3 (Szegedy 2016)."""

from __future__ import annotations

from torch import nn
from torchvision.models import get_model

from detkit.nn.backbones.base import Shrinking

# The layers at strides 2, 4, 8, 16 and 32, and the channels of the last four.
STAGES = {
    "googlenet": (
        ("conv1",),
        ("maxpool1", "conv2", "conv3"),
        ("maxpool2", "inception3a", "inception3b"),
        ("maxpool3", *(f"inception4{part}" for part in "abcde")),
        ("maxpool4", "inception5a", "inception5b"),
    ),
    "inception_v3": (
        ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
        ("maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"),
        ("maxpool2", "Mixed_5b", "Mixed_5c", "Mixed_5d"),
        tuple(f"Mixed_6{part}" for part in "abcde"),
        ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
    ),
}
CHANNELS = {"googlenet": (192, 480, 832, 1024), "inception_v3": (192, 288, 768, 2048)}


class Inception(Shrinking):
    """Both without classifiers, the auxiliary ones included. Maps: the last layer's at each of strides 4, 8, 16 and 32.

    Inception v3's maps would lack up to three cells on a side, since many of its convolutions have no padding.
    """

    def __init__(self, name: str, strides: tuple[int, ...]) -> None:
        super().__init__(name, strides)
        # torchvision's own initialisation: a narrow normal, as in the papers.
        network = get_model(name, weights=None, aux_logits=False, init_weights=True)
        self.names = STAGES[name][: strides[-1].bit_length() - 1]
        for key in (key for stage in self.names for key in stage):
            self.add_module(key, network.get_submodule(key))
        self.channels = CHANNELS[name][: strides[-1].bit_length() - 2][-len(strides) :]

    @property
    def stages(self) -> list[list[nn.Module]]:
        """The layers at strides 2, 4, 8, 16, 32."""
        return [[self.get_submodule(key) for key in stage] for stage in self.names]

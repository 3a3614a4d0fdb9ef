"""The graph that takes a photo of any size: an exported one with resizing before it and the way back behind it."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import compose, parser

from detkit.manifest import Manifest
from detkit.runtime.session import IMAGE, INPUT, OUTPUTS

_HEAD = '<ir_version: 10, opset_import: ["" : 18]>'
# Pillow's BILINEAR to one level. By ONNX's default, exclude_outside=0, what lies outside the photo would count as the
# pixel at its edge: up to 19 levels off in the first and last row and column of a photo made smaller.
_RESIZE = 'Resize<mode="linear", antialias=1, exclude_outside=1, axes=[0, 1]>'


def _doubles(values: tuple[float, ...]) -> str:
    return f"Constant<value=double[{len(values)}] {{{', '.join(map(repr, map(float, values)))}}}>()"


def _integers(*values: int) -> str:
    return f"Constant<value_ints=[{', '.join(map(str, values))}]>()"


def _inner(manifest: Manifest) -> str:
    """ONNX for `size`, int64 [2], from `source`, float64 [2]: what geometry.plan calls `inner`, to the pixel."""
    if manifest.resize == "stretch":
        return f"size = {_integers(*manifest.size)}"
    return f"""
        canvas = {_doubles(manifest.size)}
        ratios = Div(canvas, source)
        ratio = ReduceMin<keepdims=0>(ratios)
        wanted = Mul(source, ratio)
        rounded = Round(wanted)
        one = {_doubles((1, 1))}
        least = Max(rounded, one)
        inner = Min(least, canvas)
        size = Cast<to=7>(inner)
    """


def _padded(manifest: Manifest) -> str:
    """ONNX for `whole`, uint8 [H, W, 3], from `resized`: the fill at the right and below."""
    if manifest.resize == "stretch":
        return "whole = Identity(resized)"
    height, width = manifest.size
    red, green, blue = manifest.fill
    return f"""
        sides = {_integers(height, width)}
        free = Sub(sides, size)
        none = {_integers(0, 0)}
        pads = Concat<axis=0>(none, free)
        both = {_integers(0, 1)}
        padded = Pad(resized, pads, , both)
        rows = Constant<value_ints=[{", ".join(map(str, range(height)))}]>()
        columns = Constant<value_ints=[{", ".join(map(str, range(width)))}]>()
        ih, iw = Split<num_outputs=2>(size)
        down = Less(rows, ih)
        right = Less(columns, iw)
        last = {_integers(1)}
        down2 = Unsqueeze(down, last)
        photo = And(down2, right)
        two = {_integers(2)}
        photo3 = Unsqueeze(photo, two)
        fill = Constant<value=uint8[3] {{{red}, {green}, {blue}}}>()
        whole = Where(photo3, padded, fill)
    """


def before(manifest: Manifest) -> onnx.ModelProto:
    """From `image`, uint8 [height, width, 3], to `images`, uint8 [1, 3, H, W], as imaging.to_canvas has it to one
    level; and float64 [4] each, in the order of a box: `scale`, pixels of the canvas a pixel of the photo, and
    `limits`, the photo's far corner twice."""
    height, width = manifest.size
    return parser.parse_model(f"""
    {_HEAD}
    before (uint8[height, width, 3] {IMAGE})
        => (uint8[1, 3, {height}, {width}] {INPUT}, double[4] scale, double[4] limits)
    {{
        shape = Shape<end=2>({IMAGE})
        source = Cast<to=11>(shape)
        {_inner(manifest)}
        resized = {_RESIZE}({IMAGE}, , , size)
        {_padded(manifest)}
        turned = Transpose<perm=[2, 0, 1]>(whole)
        first = {_integers(0)}
        {INPUT} = Unsqueeze(turned, first)
        exact = Cast<to=11>(size)
        scales = Div(exact, source)
        order = {_integers(1, 0, 1, 0)}
        scale = Gather(scales, order)
        limits = Gather(source, order)
    }}
    """)


def _behind(kept: int) -> onnx.ModelProto:
    """From the network's outputs for one image to those of the photo: what runtime.session.detections does."""
    boxes, scores, labels = OUTPUTS
    return parser.parse_model(f"""
    {_HEAD}
    behind (float[1, {kept}, 4] b, float[1, {kept}] s, int64[1, {kept}] l, double[4] scale, double[4] limits)
        => (float[found, 4] {boxes}, float[found] {scores}, int64[found] {labels})
    {{
        first = {_integers(0)}
        b1 = Squeeze(b, first)
        s1 = Squeeze(s, first)
        l1 = Squeeze(l, first)
        exact = Cast<to=11>(b1)
        mapped = Div(exact, scale)
        corner = {_doubles((0, 0, 0, 0))}
        low = Max(mapped, corner)
        clipped = Min(low, limits)
        all = Cast<to=1>(clipped)
        x1, y1, x2, y2 = Split<axis=1, num_outputs=4>(all)
        wide = Less(x1, x2)
        high = Less(y1, y2)
        area = And(wide, high)
        last = {_integers(1)}
        area1 = Squeeze(area, last)
        zero = Constant<value_float=0.0>()
        sure = Greater(s1, zero)
        kept = And(area1, sure)
        {boxes} = Compress<axis=0>(all, kept)
        {scores} = Compress<axis=0>(s1, kept)
        {labels} = Compress<axis=0>(l1, kept)
    }}
    """)


def wrap(network: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto:
    """The network, from `images` on the canvas to boxes on the canvas, as one from a photo to boxes in its pixels.

    In: `image`, uint8 [height, width, 3], RGB, upright, any size. Out: boxes float32 [N, 4], scores float32 [N] best
    first, labels int64 [N]. The network has opset 18, as `export.graph` gives it.
    """
    inner: Any = compose.add_prefix(network, "net/", rename_functions=False)
    kept = network.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    front, back = before(manifest), _behind(kept)
    model = compose.merge_models(
        front, inner, [(INPUT, f"net/{INPUT}")], outputs=[*(f"net/{name}" for name in OUTPUTS), "scale", "limits"]
    )
    ties = [(f"net/{name}", put) for name, put in zip(OUTPUTS, "bsl", strict=True)]
    back = compose.add_prefix(back, "end/", rename_inputs=False, rename_outputs=False)
    whole = compose.merge_models(model, back, [*ties, ("scale", "scale"), ("limits", "limits")])
    whole.graph.name = "detkit"
    del whole.opset_import[1:]  # merging lists the same one three times
    return whole

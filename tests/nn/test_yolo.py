"""Both YOLO heads: losses against numbers worked out plainly, assignment against a reference in plain Python, and what
must hold whatever the ground truth."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import box_iou, complete_box_iou_loss

from detkit import config, export, gate, speed
from detkit.errors import UserError
from detkit.nn import heads, matching
from detkit.nn.anchors import cells
from detkit.nn.boxes import ciou, iou
from detkit.nn.contract import Head, Losses
from detkit.nn.detector import Detector, Predictor, Trainable
from detkit.nn.heads import yolo, yolo_v1
from detkit.nn.heads.yolo import distribution_focal_loss
from detkit.nn.losses import align
from detkit.nn.matching import Match, match_aligned
from detkit.types import Batch, Targets
from tests.test_manifest import manifest

CLASSES = 3
CANVAS = (96, 96)
STRIDES = (8, 16, 32)
GRIDS = tuple((96 // stride, 96 // stride) for stride in STRIDES)
CELLS = cells(GRIDS, STRIDES, torch.device("cpu"))
BELOW = SimpleNamespace(channels=(6, 8, 10), strides=STRIDES)


def modern(**options: object) -> yolo.YOLOHead:
    head = heads.build(config.YOLO(channels=8, **options), BELOW, CLASSES, CANVAS)
    assert isinstance(head, yolo.YOLOHead)
    return head


def first(grid: int = 3, **options: object) -> yolo_v1.YOLOv1Head:
    settings = config.YOLOv1(grid=grid, **({"channels": 4, "hidden": 8, "dropout": 0} | options))
    below = BELOW if grid == 3 else SimpleNamespace(channels=(4,), strides=(96 // grid,))
    head = heads.build(settings, below, CLASSES, CANVAS)
    assert isinstance(head, yolo_v1.YOLOv1Head)
    return head


HEADS = pytest.mark.parametrize("make", [modern, first])


def feats(batch: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(batch, cin, *grid) for cin, grid in zip(BELOW.channels, GRIDS, strict=True))


def some_boxes(count: int, seed: int = 0, least: float = 1, most: float = 60) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    size = least + torch.rand(count, 2, generator=rng) * (most - least)
    corner = torch.rand(count, 2, generator=rng) * (96 - size)
    return torch.cat([corner, corner + size], 1)


def targets(*images: Tensor, ignore: tuple[tuple[int, ...], ...] = (), pad: int = 0) -> Targets:
    """Of boxes an image: labels 0, 1, 2, 0 and so on; padding has junk as boxes."""
    longest = max(1, *(len(boxes) for boxes in images)) + pad
    at = torch.tensor([0.0, 0, 96, 96]).repeat(len(images), longest, 1)
    labels = torch.full((len(images), longest), -1)
    ignored = torch.zeros(len(images), longest, dtype=torch.bool)
    for i, boxes in enumerate(images):
        at[i, : len(boxes)] = boxes
        labels[i, : len(boxes)] = torch.arange(len(boxes)) % CLASSES
    for i, which in enumerate(ignore):
        ignored[i, list(which)] = True
    return Targets(at, labels, ignored)


def total(losses: Losses) -> Tensor:
    return torch.stack([losses.sums[name] / losses.denoms[name].clamp(min=1) for name in losses.sums]).sum()


# What both promise

PIXEL = torch.tensor([[7.0, 7, 8, 8], [95, 95, 96, 96]])
TRUTHS = {
    "nothing": targets(some_boxes(0), some_boxes(0)),
    "one and none": targets(some_boxes(1, 1), some_boxes(0)),
    "one-pixel boxes": targets(PIXEL, PIXEL[:1]),
    "500 objects": targets(some_boxes(500, 2, most=15), some_boxes(3, 3)),
    "only ignored": targets(some_boxes(2, 4), some_boxes(1, 5), ignore=((0, 1), (0,))),
    "the whole canvas": targets(torch.tensor([[0.0, 0, 96, 96]]), some_boxes(2, 6)),
}


@HEADS
@pytest.mark.parametrize("which", TRUTHS)
def test_losses_are_finite_and_gradients_reach_every_parameter(make: type[Head], which: str) -> None:
    head, where = make().train(), TRUTHS[which]
    losses = head.loss(head(feats(), CANVAS), where)
    assert losses.sums.keys() == losses.denoms.keys()
    for part in (*losses.sums.values(), *losses.denoms.values()):
        assert part.shape == ()
        assert part.dtype == torch.float32
        assert part.isfinite()
    total(losses).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@HEADS
def test_losses_of_images_add_up(make: type[Head]) -> None:
    head, where = make().eval(), targets(some_boxes(4, 1), some_boxes(0), some_boxes(2, 2))
    maps = feats(3)
    together = head.loss(head(maps, CANVAS), where)
    apart = [
        head.loss(head(tuple(feat[i : i + 1] for feat in maps), CANVAS), Targets(*(part[i : i + 1] for part in where)))
        for i in range(3)
    ]
    for name, wanted in together.sums.items():
        torch.testing.assert_close(sum(losses.sums[name] for losses in apart), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sum(losses.denoms[name] for losses in apart), together.denoms[name])


@HEADS
def test_padding_costs_nothing(make: type[Head]) -> None:
    head = make().eval()
    outputs = head(feats(), CANVAS)
    boxes = (some_boxes(3, 1), some_boxes(5, 2))
    plain, padded = (head.loss(outputs, targets(*boxes, pad=pad)) for pad in (0, 11))
    for name in plain.sums:
        torch.testing.assert_close(plain.sums[name], padded.sums[name])


@HEADS
def test_decoded_boxes_and_scores_are_float32_and_scores_are_shares(make: type[Head]) -> None:
    head = make().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = head(feats(), CANVAS)
        decoded = head.decode(outputs)
    assert outputs[0].dtype == torch.bfloat16
    count = decoded.boxes.shape[1]
    assert decoded.boxes.shape == (2, count, 1, 4)
    assert decoded.scores.shape == (2, count, CLASSES)
    assert decoded.boxes.dtype == decoded.scores.dtype == torch.float32
    assert ((decoded.scores >= 0) & (decoded.scores <= 1)).all()
    assert (decoded.boxes[..., 2:] > decoded.boxes[..., :2]).all()


@HEADS
def test_descent_finds_the_objects(make: type[Head]) -> None:
    """Gradient descent on the raw outputs alone brings the loss down, and then they say where the objects are."""
    head, where = make().eval(), targets(torch.tensor([[4.0, 6, 40, 44], [50, 40, 90, 92]]))
    outputs = head(feats(1), CANVAS)
    raw = [part.detach().clone().requires_grad_() for part in outputs[:2]]
    optimizer = torch.optim.Adam(raw, 0.1)
    for _ in range(120):
        optimizer.zero_grad()
        total(head.loss(type(outputs)(*raw, *outputs[2:]), where)).backward()
        optimizer.step()
    decoded = head.decode(type(outputs)(*raw, *outputs[2:]))
    for box, label in zip(where.boxes[0], where.labels[0], strict=True):
        best = decoded.scores[0, :, label].argmax()
        assert iou(decoded.boxes[0, best, 0], box) > 0.85
        assert decoded.scores[0, best].argmax() == label


# The modern head: boxes and their losses


@given(st.integers(0, 10**6))
def test_complete_iou_is_torchvisions(seed: int) -> None:
    a, b = (some_boxes(20, seed + i) for i in range(2))
    torch.testing.assert_close(1 - ciou(a, b), complete_box_iou_loss(a, b), rtol=1e-4, atol=1e-5)
    first, second = (boxes.clone().requires_grad_() for boxes in (a, a))
    (1 - ciou(first, b)).sum().backward()
    complete_box_iou_loss(second, b).sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-4)


def test_complete_iou_by_the_formula() -> None:
    a, b = (0.0, 0.0, 40.0, 20.0), (10.0, 5.0, 30.0, 45.0)
    overlap = 20 * 15 / (800 + 800 - 300)
    apart = ((20 - 20) ** 2 + (10 - 25) ** 2) / (40**2 + 45**2)
    aspect = 4 / math.pi**2 * (math.atan(20 / 40) - math.atan(40 / 20)) ** 2
    wanted = overlap - apart - aspect**2 / (1 - overlap + aspect)
    assert ciou(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(wanted, rel=1e-5)


def test_distribution_focal_loss_by_the_formula() -> None:
    logits = torch.randn(50, 9)
    values = torch.cat([torch.rand(46) * 8, torch.tensor([0.0, 8.0, 3.0, 7.999])])
    found = distribution_focal_loss(logits, values)
    for row, value, got in zip(logits.double().numpy(), values.tolist(), found.tolist(), strict=True):
        likely = np.exp(row) / np.exp(row).sum()
        lower = min(int(value), 7)
        wanted = -((lower + 1 - value) * np.log(likely[lower]) + (value - lower) * np.log(likely[lower + 1]))
        assert got == pytest.approx(wanted, rel=1e-4)


boxes_in_reach = st.tuples(
    st.integers(0, len(CELLS) - 1), *(st.floats(0.0625, 14.875, width=32) for _ in range(4))
)  # a cell, and distances in strides


@given(st.lists(boxes_in_reach, min_size=1, max_size=8))
def test_a_box_written_as_distributions_is_read_back(chosen: list[tuple[int, float, float, float, float]]) -> None:
    head = modern()
    where = CELLS[[place for place, *_ in chosen]]
    sides = torch.tensor([sides for _, *sides in chosen]) * where[:, 2:]
    boxes = torch.cat([where[:, :2] - sides[:, :2], where[:, :2] + sides[:, 2:]], 1)
    distance = head._distances(boxes, where)
    lower = distance.floor().long().clamp(max=14)
    upper = (distance - lower)[..., None]
    likely = torch.zeros(*distance.shape, 16).scatter(-1, lower[..., None], 1 - upper)
    likely.scatter_(-1, lower[..., None] + 1, upper)
    torch.testing.assert_close(head._boxes(likely.clamp(min=1e-12).log(), where), boxes, rtol=1e-4, atol=1e-2)


def test_what_lies_beyond_the_bins_is_the_last_bin() -> None:
    head = modern(bins=4)
    where = torch.tensor([[50.0, 50.0, 8.0]])
    far = torch.tensor([[0.0, 60.0, 90.0, 96.0]])  # the cell's centre is above the box
    assert head._distances(far, where).tolist() == [[3, 0, 3, 3]]


def test_cells_are_ordered_as_the_outputs_are() -> None:
    """A cell's numbers come from its own place on the maps."""
    head = modern(convs=0).eval()
    base = head(tuple(torch.zeros_like(feat) for feat in feats(1)), CANVAS)
    for level, row, column in ((0, 0, 0), (0, 3, 7), (1, 2, 5), (2, 2, 0)):
        one = [torch.zeros_like(feat) for feat in feats(1)]
        one[level][0, :, row, column] = 1
        out = head(tuple(one), CANVAS)
        stride = STRIDES[level]
        changed = (out.logits != base.logits)[0].any(1)
        assert out.cells[changed].tolist() == [[(column + 0.5) * stride, (row + 0.5) * stride, stride]]
        assert torch.equal(changed, (out.sides != base.sides)[0].flatten(1).any(1))


def test_it_starts_with_background_and_boxes_of_a_levels_size() -> None:
    head = modern().eval()
    decoded = head.decode(head(feats(), CANVAS))
    assert decoded.scores.mean().item() == pytest.approx(0.01, rel=0.1)
    sides = (decoded.boxes[..., 2:] - decoded.boxes[..., :2])[:, :, 0] / CELLS[:, 2:]
    assert ((sides > 4) & (sides < 5.2)).all()


def test_box_and_side_losses_are_the_sums_of_their_formulas() -> None:
    head = modern(box_weight=3.0, dfl_weight=0.25, class_weight=2.0).eval()
    outputs = head(feats(), CANVAS)
    where = targets(some_boxes(3, 1), some_boxes(1, 2), pad=2)
    losses = head.loss(outputs, where)
    boxes = head.decode(outputs).boxes[:, :, 0]
    match = match_aligned(boxes, outputs.logits.sigmoid(), CELLS[:, :2], where, 10)
    box = dfl = entropy = 0.0
    for i, a in match.positive.nonzero().tolist():
        truth, quality = where.boxes[i, match.object[i, a]], match.quality[i, a]
        box += quality * complete_box_iou_loss(boxes[i, a], truth)
        (x, y, stride), (x1, y1, x2, y2) = CELLS[a], truth
        for logits, side in zip(outputs.sides[i, a], (x - x1, y - y1, x2 - x, y2 - y), strict=True):
            dfl += quality * distribution_focal_loss(logits, (side / stride).clamp(0, 15)) / 4
    wanted = torch.zeros_like(outputs.logits)
    for i, a in match.positive.nonzero().tolist():
        wanted[i, a, where.labels[i, match.object[i, a]]] = match.quality[i, a]
    scores = outputs.logits.sigmoid()
    plain = -(wanted * scores.log() + (1 - wanted) * (1 - scores).log())
    entropy = (plain * torch.where(wanted > 0, 1.0, 0.75 * scores**2)).sum()
    torch.testing.assert_close(losses.sums["box"], 3 * box, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.sums["dfl"], dfl / 4, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses.sums["class"], 2 * entropy, rtol=1e-4, atol=1e-5)
    for count in losses.denoms.values():
        torch.testing.assert_close(count, match.quality.sum())


def test_ignored_objects_are_neither_positive_nor_negative() -> None:
    """Gradients of the class logits are as without the ignored object, and nothing where it is found."""
    head = modern().eval()
    outputs = head(feats(1), CANVAS)
    boxes = torch.tensor([[60.0, 60, 90, 90], [2, 2, 50, 50]])
    grads = []
    for where in (targets(boxes, ignore=((1,),)), targets(boxes[:1])):
        logits = outputs.logits.detach().requires_grad_()
        losses = head.loss(outputs._replace(logits=logits), where)
        (grad,) = torch.autograd.grad(losses.sums["class"], logits)
        grads.append(grad[0].any(1))
    on_it = box_iou(boxes[1:], head.decode(outputs).boxes[0, :, 0])[0] > 0.5
    assert on_it.any()
    assert torch.equal(grads[0], grads[1] & ~on_it)


# Assignment


def plain_match(boxes: Tensor, scores: Tensor, where: Targets, top: int) -> Match:
    """Task-aligned assignment in loops over images, objects and candidates."""
    B, A = boxes.shape[:2]
    found = Match(
        torch.zeros(B, A, dtype=torch.int64),
        torch.zeros(B, A, dtype=torch.bool),
        torch.zeros(B, A, dtype=torch.bool),
        torch.zeros(B, A),
    )
    for i in range(B):
        claims: dict[int, list[tuple[float, int, float]]] = {}  # candidate: (IoU, object, alignment)
        for g, truth in enumerate(where.boxes[i]):
            overlaps = box_iou(truth[None], boxes[i])[0].tolist()
            if where.labels[i, g] < 0 or where.ignore[i, g]:
                if where.ignore[i, g]:
                    found.ignore[i] |= torch.tensor(overlaps) > 0.5
                continue
            x1, y1, x2, y2 = truth.tolist()
            ranked = []
            for a, (x, y, _) in enumerate(CELLS.tolist()):
                alignment = float(scores[i, a, where.labels[i, g]]) ** 0.5 * overlaps[a] ** 6
                apart = (x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2
                ranked.append((x1 < x < x2 and y1 < y < y2, alignment, -apart, a))
            inside = sorted((entry for entry in ranked if entry[0]), key=lambda entry: -entry[1])[:top]
            for _, alignment, _, a in inside or [max(ranked, key=lambda entry: entry[2])]:
                claims.setdefault(a, []).append((overlaps[a], -g, alignment))
        owned: dict[int, list[tuple[int, float, float]]] = {}  # object: (candidate, IoU, alignment)
        for a, claim in claims.items():
            overlap, g, alignment = max(claim)
            owned.setdefault(-g, []).append((a, overlap, alignment))
        for g, members in owned.items():
            best = max(overlap for _, overlap, _ in members)
            peak = max(max(alignment for _, _, alignment in members), 1e-30)
            for a, _, alignment in members:
                found.object[i, a], found.positive[i, a] = g, True
                found.quality[i, a] = alignment / peak * best
    found.ignore.logical_and_(~found.positive)
    return found


@pytest.mark.parametrize("pairs", [1 << 18, 400])
@pytest.mark.parametrize("seed", range(6))
def test_assignment_is_that_of_the_plain_reference(seed: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole and in chunks of a few objects."""
    monkeypatch.setattr(matching, "_PAIRS", {"cpu": pairs})
    images = (some_boxes(9, seed), some_boxes(0), some_boxes(3, seed + 50, most=6), some_boxes(6, seed + 99, least=30))
    where = targets(*images, ignore=((2, 5), (), (0,), (0,)), pad=1)
    rng = torch.Generator().manual_seed(seed)
    reach = 1 + 3 * torch.rand(4, len(CELLS), 4, generator=rng)
    sides = reach * CELLS[:, 2:]
    boxes = torch.cat([CELLS[:, :2] - sides[..., :2], CELLS[:, :2] + sides[..., 2:]], -1)
    where.boxes[3, 0] = boxes[3, -5]  # so that a candidate lies on what is ignored
    scores = torch.rand(4, len(CELLS), CLASSES, generator=rng)
    top = (1, 3, 10, 13)[seed % 4]
    found, wanted = match_aligned(boxes, scores, CELLS[:, :2], where, top), plain_match(boxes, scores, where, top)
    assert wanted.positive.any()
    assert wanted.ignore.any()
    assert torch.equal(found.positive, wanted.positive)
    assert torch.equal(found.object, wanted.object)
    assert torch.equal(found.ignore, wanted.ignore)
    torch.testing.assert_close(found.quality, wanted.quality, rtol=1e-3, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("count", [8, 512])
def test_matching_needs_no_more_memory_for_more_objects(count: int) -> None:
    """Pairs of objects and candidates are looked at in chunks: all at once, 512 objects would need 64 MB a tensor."""
    where = targets(*(some_boxes(count, seed) for seed in range(4)))
    grids = ((80, 80), (40, 40), (20, 20))
    at = cells(grids, (1, 2, 4), torch.device("cpu"))
    boxes = torch.cat([at[:, :2] - 3, at[:, :2] + 3], 1).expand(4, -1, 4)
    scores = torch.rand(4, len(at), CLASSES)
    with Largest() as largest:
        match_aligned(boxes, scores, at[:, :2], where, 10)
    assert largest.bytes <= 4 * max(matching._PAIRS["cpu"], boxes.shape[0] * len(at) * 4)


def test_no_gradient_goes_through_what_is_wanted() -> None:
    """Only through each candidate's own logits: boxes move what is wanted of scores, but do not learn from that."""
    head = modern().eval()
    outputs = head(feats(), CANVAS)
    boxes = head.decode(outputs).boxes[:, :, 0].detach().requires_grad_()
    found = align(outputs.logits, boxes, CELLS[:, :2], targets(some_boxes(3, 1), some_boxes(1, 2)), top=10)
    assert found.quality.any()
    assert not found.quality.requires_grad
    assert torch.autograd.grad(found.entropy, boxes, allow_unused=True) == (None,)


# The first YOLO


def plain_owners(where: Targets, i: int, grid: int, side: float) -> tuple[dict[int, int], set[int]]:
    """The object that each cell of image `i` answers for, and the cells that hold an ignored one."""
    owner: dict[int, int] = {}
    ignored = set()
    for g, (x1, y1, x2, y2) in enumerate(where.boxes[i].tolist()):
        place = int((y1 + y2) / 2 / side * grid) * grid + int((x1 + x2) / 2 / side * grid)
        if where.labels[i, g] >= 0 and where.ignore[i, g]:
            ignored.add(place)
        elif where.labels[i, g] >= 0 and (
            place not in owner or _size(where.boxes[i, g]) > _size(where.boxes[i, owner[place]])
        ):
            owner[place] = g
    return owner, ignored


def plain_v1_loss(raw: np.ndarray, classes: np.ndarray, where: Targets, grid: int, side: float) -> dict[str, float]:
    """The paper's equation 3, in loops over images, cells and boxes; lambda coord 5, lambda noobj 0.5."""
    sums = dict.fromkeys(("class", "box", "object", "empty"), 0.0)
    for i, n in np.ndindex(len(raw), grid**2):
        owner, ignored = plain_owners(where, i, grid, side)
        if n not in owner:
            sums["empty"] += 0.5 * (n not in ignored) * sum(sure**2 for *_, sure in raw[i, n])
            continue
        truth = where.boxes[i, owner[n]]
        x1, y1, x2, y2 = (truth / side).tolist()
        overlaps = []
        for x, y, w, h, _ in raw[i, n]:
            cx, cy = (n % grid + x) / grid * side, (n // grid + y) / grid * side
            half_w, half_h = max(w, 0) ** 2 * side / 2, max(h, 0) ** 2 * side / 2
            box = torch.tensor([[cx - half_w, cy - half_h, cx + half_w, cy + half_h]])
            overlaps.append(box_iou(box.float(), truth[None]).item())
        for c, value in enumerate(classes[i, n]):
            sums["class"] += (value - (c == where.labels[i, owner[n]].item())) ** 2
        for p, (x, y, w, h, sure) in enumerate(raw[i, n]):
            if p == int(np.argmax(overlaps)):
                off = (x - ((x1 + x2) / 2 * grid - n % grid)) ** 2 + (y - ((y1 + y2) / 2 * grid - n // grid)) ** 2
                off += (w - (x2 - x1) ** 0.5) ** 2 + (h - (y2 - y1) ** 0.5) ** 2
                sums["box"] += 5 * off
                sums["object"] += (sure - overlaps[p]) ** 2
            else:
                sums["empty"] += 0.5 * sure**2
    return sums


def _size(box: Tensor) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))


@pytest.mark.parametrize("seed", range(5))
def test_the_first_losss_numbers_are_those_of_the_papers_formula(seed: int) -> None:
    head = first()
    rng = torch.Generator().manual_seed(seed)
    outputs = yolo_v1.Outputs(
        torch.rand(3, 9, 2, 5, generator=rng) * 1.2 - 0.1, torch.rand(3, 9, CLASSES, generator=rng) * 1.2 - 0.1
    )
    where = targets(some_boxes(7, seed), some_boxes(0), some_boxes(5, seed + 9, most=20), ignore=((1, 4), (), (0,)))
    losses = head.loss(outputs, where)
    wanted = plain_v1_loss(outputs.boxes.double().numpy(), outputs.classes.double().numpy(), where, 3, 96.0)
    assert min(wanted.values()) > 0
    for name, value in wanted.items():
        assert losses.sums[name].item() == pytest.approx(value, rel=1e-4), name
        assert losses.denoms[name].item() == 3


def test_one_object_by_hand() -> None:
    """One cell, two boxes: the one that overlaps more answers, the other one and its confidence are empty."""
    head = first(1)
    boxes = torch.tensor([[[[0.5, 0.5, 0.5, 0.5, 0.8], [0.25, 0.5, 0.5, 1.0, 0.3]]]])  # 24x24, 24x96
    classes = torch.tensor([[[0.7, 0.4, 0.1]]])
    where = Targets(torch.tensor([[[36.0, 36, 60, 84]]]), torch.tensor([[1]]), torch.tensor([[False]]))
    losses = head.loss(yolo_v1.Outputs(boxes, classes), where)
    overlap = (24 * 24) / (24 * 48)  # the first box lies inside the object; the second meets it in 12 columns
    assert losses.sums["class"].item() == pytest.approx(0.7**2 + 0.6**2 + 0.1**2)
    assert losses.sums["object"].item() == pytest.approx((0.8 - overlap) ** 2)
    assert losses.sums["empty"].item() == pytest.approx(0.5 * 0.3**2)
    off = (0.5 - 60 / 96) ** 2 + (0.5 - 0.5) ** 2 + (0.5 - 0.25**0.5) ** 2 + (0.5 - 0.5**0.5) ** 2
    assert losses.sums["box"].item() == pytest.approx(5 * off)


@given(st.integers(0, 10**6), st.sampled_from([1, 3, 6]))
def test_a_box_in_a_grid_is_read_back(seed: int, grid: int) -> None:
    """What costs nothing decodes to the object itself, wherever it is."""
    head, box = first(grid), some_boxes(1, seed)
    centre, share = (box[0, :2] + box[0, 2:]) / 2 / 96 * grid, (box[0, 2:] - box[0, :2]) / 96
    column, row = centre.long().tolist()
    place = row * grid + column
    boxes, classes = torch.zeros(1, grid**2, 2, 5), torch.zeros(1, grid**2, CLASSES)
    boxes[0, place, 1] = torch.tensor([*(centre - centre.floor()), *share.sqrt(), 1.0])
    classes[0, place, 0] = 1
    outputs = yolo_v1.Outputs(boxes, classes)
    decoded = head.decode(outputs)
    best = decoded.scores[0, :, 0].argmax()
    assert decoded.scores.sum().item() == pytest.approx(1)
    torch.testing.assert_close(decoded.boxes[0, best, 0], box[0], rtol=1e-4, atol=1e-3)
    assert total(head.loss(outputs, targets(box))).item() == pytest.approx(0, abs=1e-4)


def test_boxes_of_a_cell_start_with_different_sizes() -> None:
    """Or the first would answer for everything, and the others never learn."""
    head = first(boxes=3).eval()
    decoded = head.decode(head(feats(1), CANVAS))
    sides = (decoded.boxes[0, :3, 0, 2:] - decoded.boxes[0, :3, 0, :2]) / 96
    assert (sides.mean(1).diff() > 0.15).all()


def test_objects_that_share_a_cell_are_counted_and_said() -> None:
    head = first()
    boxes = torch.tensor([[0.0, 0, 30, 30], [1, 1, 20, 20], [70, 70, 90, 90], [0, 0, 30, 30], [2, 2, 32, 32]])
    photo = torch.tensor([0, 0, 0, 1, 2])
    assert head.remark(boxes[2:], photo[2:]) is None
    said = head.remark(boxes, photo)
    assert said is not None
    assert "1 of 5 objects (20.0%) share a cell" in said
    assert modern().remark(boxes, photo) is None


def test_only_the_configured_canvas_is_accepted() -> None:
    head = first()
    with pytest.raises(UserError, match=r"canvas of 64x96: yolo_v1 accepts only its input\.size, 96x96.*progressive"):
        head(feats(1), (64, 96))


@pytest.mark.parametrize("size", [(96, 96), (224, 448), (300, 300)])
def test_a_canvas_that_no_grid_fits_is_one_line(size: tuple[int, int]) -> None:
    settings = config.load("yolo_v1_vgg.yaml", ["model.weights=none", f"input.size={list(size)}"])
    with torch.device("meta"), pytest.raises(UserError, match=r"7x7 cells needs a canvas of 224 or 448 or 896 pixels"):
        Detector(settings.model, settings.input, CLASSES)


def test_it_stands_on_the_backbone_alone() -> None:
    with pytest.raises(UserError, match=r"model: the head yolo_v1 goes with neck none"):
        config.load("yolo_v1_vgg.yaml", ["model.neck={name: pan}"])


# The shipped configs


def test_the_nano_has_at_most_2_4_million_parameters_for_25_classes() -> None:
    settings = config.load("yolo_nano.yaml")
    detector = Detector(settings.model, settings.input, 25)
    assert 2.0e6 < sum(parameter.numel() for parameter in detector.parameters()) <= 2.4e6
    assert settings.model.weights == "none"


TINY = {
    "yolo_nano": ["input.size=[64, 96]", "model.backbone.width=0.25", "model.neck.channels=16"],
    "yolo_resnet": ["input.size=[64, 96]", "model.backbone.name=resnet18", "model.neck.channels=16"],
    "yolo_v1_vgg": [
        "input.size=[96, 96]", "model.backbone.name=vgg11", "model.head.grid=3", "model.head.channels=16",
        "model.head.hidden=16",
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("objects", [True, False])
def test_every_parameter_of_a_detector_is_reached_by_every_batch(name: str, count: int, objects: bool) -> None:
    settings = config.load(name, [*TINY[name], "model.weights=none"])
    model = Trainable(Detector(settings.model, settings.input, CLASSES).train())
    images = torch.randint(0, 256, (count, 3, *settings.input.size), dtype=torch.uint8)
    where = targets(*(some_boxes(2 * objects, i) for i in range(count)))
    total(model(Batch(images, where, (None,) * count, torch.arange(count)))).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("name", ["yolo_nano", "yolo_v1_vgg"])
def test_onnx_finds_what_torch_finds(name: str) -> None:
    """In batches of 1, 3 and 8, from random weights whose scores differ from place to place."""
    settings = config.load(name, [*TINY[name], "model.weights=none", "model.select.keep=50"])
    detector = Detector(settings.model, settings.input, CLASSES).train()
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(4, 3, 4, 6, generator=rng) * 255
    photos = F.interpolate(coarse, settings.input.size, mode="bicubic").clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        for _ in range(5):
            detector(photos)  # BatchNorm's statistics
        if isinstance(detector.head, yolo.YOLOHead):
            for branch in detector.head.scores:
                branch[-1].weight.normal_(std=0.2, generator=rng)
                branch[-1].bias.fill_(-1)
        else:
            detector.head.predict.weight.normal_(std=0.2, generator=rng)
    predictor = Predictor(detector, settings.model.select)
    graph = export.graph(predictor.eval(), {"images": photos[:2]})
    said = manifest(size=settings.input.size, nms=settings.model.select)
    many = [gate.photo(photo.permute(1, 2, 0).contiguous().numpy(), said) for photo in photos]
    series = gate.Series("photos", len(many), many.__getitem__, gate.BATCHES)
    report = gate.gate({"x": gate.Subject(graph.SerializeToString(), said)}, predictor, [series])
    assert report.failures == []
    (result,) = report.checks
    assert result.detections > 50
    assert result.ties < result.detections / 20
    assert result.box < 0.01
    assert result.score < 1e-4
    assert speed.onnx_flops(graph) == speed.torch_flops(predictor, settings.input.size)

"""One run in several processes: real ones, over gloo on this machine."""

import functools
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console

from detkit import config, distributed, train
from detkit.data.batch import Part
from detkit.errors import UserError
from detkit.evaluate import detect, evaluate
from detkit.nn.contract import Losses
from detkit.nn.layers import batch_norms
from tests.test_train import SHELF, settings

SMALL = "model.backbone={name: mobilenet_v2, width: 0.35, strides: [8, 16, 32]}"
HEADS = {
    "ssd aligned": ("ssd_shelf", ["model.neck.channels=16"]),
    "ssd multibox": ("ssd_shelf", ["model.neck.channels=16", "model.head.loss=multibox"]),
    "yolo": ("yolo_nano", ["model.neck.channels=16", "model.head.channels=16", "augment.mosaic=0.3"]),
    "yolo_v1": (
        "yolo_v1_vgg",
        ["input.size=[96, 96]", "model.head.grid=3", "model.head.channels=16", "model.head.hidden=16"],
    ),
    # Every anchor becomes a proposal and every proposal a sample: what is dropped depends on the order of scores that
    # differ less than rounding does. Anchors are still sampled by chance.
    "faster_rcnn": (
        "faster_rcnn_mobilenet",
        ["input.size=[32, 64]", "model.neck.channels=16", "model.head.width=32", "model.head.rpn_samples=32"]
        + [f"model.head.{name}=2000" for name in ("train_candidates", "train_proposals", "samples")]
        + ["model.head.proposal_iou=1"],
    ),
}
STEPS = 20
QUIET = Console(quiet=True)


def tiny(head: str, folder: Path, *more: str) -> config.Config:
    """A run of that head, in which a batch may be divided in any way: nothing is drawn for a micro-batch as a whole."""
    name, own = HEADS[head]
    plain = [f"data.root={SHELF}", f"data.cache={folder / 'cache'}", f"runs={folder}", "input.size=[96, 128]", SMALL]
    plain += ["model.weights=none", "train.epochs=9", "train.batch_size=8", "train.workers=0", "train.progressive=[]"]
    plain += ["train.optimizer={name: sgd, lr: 0.01, weight_decay: 0.0005}", "train.schedule.warmup_steps=3"]
    plain += ["train.precision=fp32", "train.device=cpu", "train.loggers=[]"]
    still = ["model.head.dropout=0"] if head in ("yolo_v1", "faster_rcnn") else []
    return config.load(name, [*plain, *own, *still, *more])


def after_steps(cfg: config.Config, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """The weights after so many steps with BatchNorm's statistics held, and the loss of the last."""
    run = train.Run(cfg, QUIET)
    run.detector.frozen = True
    for norm in batch_norms(run.detector.train()):
        norm.requires_grad_(False)
    run.wrap()
    for step in range(steps):
        epoch, first = divmod(step, len(run.loader))
        batches = run.loader.epoch(epoch, start=first)
        losses = run.train_step(*(next(batches) for _ in range(cfg.train.accumulate)))
    return run.detector.state_dict() | {f"loss {name}": torch.tensor(value) for name, value in losses.items()}


@functools.cache
def by_one(head: str, folder: Path) -> dict[str, torch.Tensor]:
    """Those of one process that takes a batch as a whole."""
    return after_steps(tiny(head, folder))


def same(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        apart = (weight - others[name]).double().norm() / weight.double().norm().clamp(min=1e-3)
        # Rounding may assign a cell otherwise where two are as good as equal: the last step's loss shows that.
        assert apart < (1e-3 if name.startswith("loss ") else 1e-5), (name, float(apart))


def _work(rank: int, ranks: int, port: int, folder: Path) -> None:
    """One of the processes; what each finds is saved for the tests."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    with distributed.group(torch.device("cpu"), 100):
        for head in HEADS:
            torch.save(after_steps(tiny(head, folder)), folder / f"{head} {rank}.pt")
        both = tiny("faster_rcnn", folder, "train.accumulate=2")
        torch.save(after_steps(both), folder / f"both {rank}.pt")
        run = train.Run(tiny("ssd aligned", folder), QUIET)
        found = detect(run.predictor, run.val_loader, run.device, QUIET)
        figures = evaluate(run.predictor, run.val_loader, run.val_data, run.device, QUIET)
        boxes = [(torch.from_numpy(each.boxes), torch.from_numpy(each.scores)) for each in found]
        said = distributed.agree(15 * rank, float(rank))
        words = []
        for block in (lambda: distributed.agree(error="one.jpg" if rank else None), lambda: _joint(rank)):
            try:
                block()
            except UserError as error:
                words.append(str(error))
        others = {"figures": figures, "boxes": boxes, "said": list(said), "words": words}
        others["refused"] = _refused(folder)
        torch.save(others, folder / f"others {rank}.pt")


def _joint(rank: int) -> None:
    with distributed.joint():
        if rank == 1:
            raise UserError("no such folder")


def _refused(folder: Path) -> list[str]:
    found = []
    for more in ("train.batch_size=7", "train.accumulate=8", "model.norm=sync_bn"):
        with pytest.raises(UserError) as error:
            train.Run(tiny("ssd aligned", folder, more), QUIET)
        found.append(str(error.value))
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes found together."""
    folder = tmp_path_factory.mktemp("two")
    train.Run(tiny("ssd aligned", folder), QUIET)  # fills the cache
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_work, args=(rank, 2, port, folder)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
        assert worker.exitcode == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_batch_may_be_divided_over_processes_and_micro_batches(both: Path, head: str) -> None:
    """One process with 8 images, two with 4 each, and one with twice 4: the same weights after 20 steps of SGD."""
    whole = by_one(head, both)
    assert not torch.equal(next(iter(whole.values())), next(iter(after_steps(tiny(head, both), 1).values())))
    same(whole, after_steps(tiny(head, both, "train.accumulate=2")))
    for rank in range(2):
        same(whole, torch.load(both / f"{head} {rank}.pt"))


@pytest.mark.slow
def test_and_over_both(both: Path) -> None:
    same(by_one("faster_rcnn", both), torch.load(both / "both 0.pt"))


@pytest.mark.slow
def test_evaluation_by_several_is_that_by_one(both: Path) -> None:
    run = train.Run(tiny("ssd aligned", both), QUIET)
    found = detect(run.predictor, run.val_loader, run.device, QUIET)
    figures = evaluate(run.predictor, run.val_loader, run.val_data, run.device, QUIET)
    first, other = (torch.load(both / f"others {rank}.pt") for rank in range(2))
    assert len(found) == len(first["boxes"]) == len(run.val_data)
    assert other["boxes"] == []
    for one, (boxes, scores) in zip(found, first["boxes"], strict=True):
        assert len(one) > 20
        assert torch.allclose(torch.from_numpy(one.boxes), boxes, atol=1e-3)
        assert torch.allclose(torch.from_numpy(one.scores), scores, atol=1e-6)
    assert figures["mAP50"] > 0
    for theirs in (first["figures"], other["figures"]):
        assert {name: figures[name] for name in train.FIGURES} == pytest.approx(
            {name: theirs[name] for name in train.FIGURES}, abs=1e-6
        )


@pytest.mark.slow
def test_what_one_process_meets_all_know(both: Path) -> None:
    for rank in range(2):
        others = torch.load(both / f"others {rank}.pt")
        assert others["said"] == [15, 1.0]
        assert others["words"] == ["one.jpg", "no such folder"]
        odd, many, sync = others["refused"]
        assert "train.batch_size: 7 images can't be divided equally over 2 processes" in odd
        assert "16" not in many
        assert "accumulate" in many or "micro-batches" in many
        assert "model.norm=sync_bn" in sync


def test_parts_of_a_batch_are_equal_and_complete() -> None:
    def parts(count: int, ranks: int, pieces: int) -> list[list[list[int]]]:
        return [list(Part(rank, ranks, pieces).of(list(range(count)))) for rank in range(ranks)]

    assert parts(8, 2, 2) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    assert parts(8, 1, 1) == [[list(range(8))]]
    uneven = parts(5, 2, 2)
    assert sorted(key for rank in uneven for piece in rank for key in piece) == list(range(5))
    assert all(len(rank) == 2 for rank in uneven)
    assert parts(1, 2, 1) in ([[[0]], []], [[], [[0]]])


def test_parts_of_the_loss_with_one_denominator_go_together() -> None:
    first, second, total = torch.tensor(2.0), torch.tensor(2.0), torch.tensor(1.0)
    losses = Losses(dict.fromkeys("abc", total), {"a": first, "b": second, "c": first})
    assert train.by_denominator(losses) == [[0, 2], [1]]


def test_few_images_of_a_batch_norm_are_said(tmp_path: Path) -> None:
    halves = "train.accumulate=2"
    for more, said in (([halves], True), ([], False), ([halves, "model.norm=group"], False)):
        assert bool(train._few(train.Run(settings(tmp_path, *more), QUIET))) == said


@pytest.mark.parametrize(("rule", "rate"), [("none", 1), ("linear", 2), ("sqrt", 2**0.5)])
def test_the_rule_of_scaling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rule: str, rate: float) -> None:
    cfg = settings(tmp_path, f"train.scaling={rule}")
    assert distributed.scaled(cfg) == cfg
    monkeypatch.setenv("WORLD_SIZE", "2")
    scaled = distributed.scaled(cfg).train
    assert scaled.optimizer.lr == pytest.approx(cfg.train.optimizer.lr * rate)
    assert scaled.batch_size == (8 if rule == "none" else 16)
    assert config.load("ssd_shelf", ["train.scaling=none"]).train.scaling == scaled.scaling


def test_a_batch_that_can_not_be_divided_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size 8 is no multiple of accumulate, 3"):
        settings(tmp_path, "train.accumulate=3")
    with pytest.raises(UserError, match="photos are too few for 32 parts"):
        train.Run(settings(tmp_path, "train.accumulate=32", "train.batch_size=32"), QUIET)

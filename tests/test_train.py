"""Training, from the pieces to whole runs on shelf-mini."""

import csv
import io
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from rich.console import Console

from detkit import checkpoint, config, evaluate, imaging, train
from detkit.data import cache, synth
from detkit.data.batch import Loader
from detkit.data.dataset import EvalSet
from detkit.errors import Interrupted, UserError
from detkit.runtime import tiles
from detkit.types import CROWD, DIFFICULT

SHELF = Path(__file__).parent.parent / "datasets" / "shelf-mini"
TINY = [
    f"data.root={SHELF}",
    "input.size=[96, 128]",
    "model.backbone.width=0.35",
    "model.neck.channels=16",
    "train.epochs=2",
    "train.eval_every=2",
    "train.batch_size=8",
    "train.workers=0",
    "train.progressive=[]",
    "train.loggers=[]",
]


def settings(tmp_path, *more):
    own = [f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}"]
    return config.load("ssd_shelf.yaml", [*TINY, *own, *more])


@pytest.fixture
def console():
    return Console(quiet=True)


def test_a_run_leaves_its_config_figures_and_weights_and_never_shares_a_folder(tmp_path, console):
    cfg = settings(tmp_path)
    first, second = train.start(cfg, console), train.start(cfg, console)
    assert [first.name, second.name] == ["ssd_shelf-1", "ssd_shelf-2"]
    assert config.load(first / "config.yaml") == cfg
    with (first / "metrics.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert math.isnan(float(rows[0]["mAP"]))
    assert 0 <= float(rows[1]["mAP"]) <= 1
    trained = checkpoint.read(first / "best.safetensors")
    assert trained.epoch == 2
    assert trained.metrics["mAP"] == pytest.approx(float(rows[1]["mAP"]), abs=1e-6)
    assert len(trained.classes) == 16


def test_two_runs_with_one_seed_are_equal_whatever_the_workers(tmp_path, console):
    first = train.start(settings(tmp_path, "train.epochs=1"), console)
    second = train.start(settings(tmp_path, "train.epochs=1", "train.workers=2"), console)
    assert not multiprocessing.active_children()
    same_weights(first, second)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_so_they_are_with_a_cache_rare_classes_and_canvases_of_many_sizes(tmp_path, console, cache):
    more = ["train.epochs=1", "train.sampler=repeat-factor", "train.repeat_threshold=0.5", "augment.mosaic=0.3"]
    more += [f"train.cache={cache}", "train.multi_scale=[0.7, 1.3]", "augment.mixup=0.3", "augment.copy_paste=0.3"]
    first = train.start(settings(tmp_path, *more), console)
    second = train.start(settings(tmp_path, *more, "train.workers=2"), console)
    same_weights(first, second)
    assert len(list((tmp_path / "cache").glob("*.pixels"))) == (cache == "disk")


def same_weights(first, second):
    one, other = (checkpoint.read(run / "last.safetensors").weights for run in (first, second))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_to_the_same_weights(tmp_path, console, monkeypatch):
    whole = train.start(settings(tmp_path), console)
    step = train.Run.train_step
    count = 0

    def stopping(run, batch):
        nonlocal count
        count += 1
        if count == 2:
            train.signal.raise_signal(train.signal.SIGINT)
        return step(run, batch)

    monkeypatch.setattr(train.Run, "train_step", stopping)
    with pytest.raises(Interrupted, match="--resume") as stop:
        train.start(settings(tmp_path), console)
    assert stop.value.exit_code == 130
    stopped = tmp_path / "runs" / "ssd_shelf-2"
    assert checkpoint.read(checkpoint.find(stopped)).manifest().score == 0.3
    assert train.resume(stopped, console) == stopped
    same_weights(whole, stopped)
    with pytest.raises(UserError, match="finished"):
        train.resume(stopped, console)


def test_overfitting_learns_and_measures_a_few_photos_alone(tmp_path):
    console = Console(file=io.StringIO(), width=200)
    cfg = config.overfit(settings(tmp_path), 6)
    epochs = {"epochs": 2, "eval_every": 1, "until": 0.999}
    cfg = cfg.model_copy(update={"train": cfg.train.model_copy(update=epochs)})
    assert max(cfg.augment.model_dump(exclude={"expand_max"}).values()) == 0
    seen = set()
    step = train.Run.train_step

    def watched(run, batch):
        seen.update(run.train_data[int(i)].path for i in batch.index)
        assert run.val_data is run.train_data
        return step(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "train_step", watched)
        folder = train.start(cfg, console)
    assert folder.name == "ssd_shelf-overfit-1"
    assert len(seen) == 6
    said = console.file.getvalue()
    assert "6 photos of train" in said
    assert "not yet 0.999" in said


def test_a_run_ends_at_the_figure_it_is_to_reach(tmp_path, console):
    run = train.start(settings(tmp_path, "train.epochs=5", "train.eval_every=1", "train.until=1e-9"), console)
    rows = list(csv.DictReader((run / "metrics.csv").open(encoding="utf-8")))
    figures = [float(row["mAP50"]) for row in rows]
    assert len(rows) < 5
    assert figures[-1] >= 1e-9
    assert all(figure < 1e-9 for figure in figures[:-1])
    with pytest.raises(UserError, match="finished"):
        train.resume(run, console)


def test_emulated_precision_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    run = train.Run(settings(tmp_path, "train.precision=bf16", "train.device=cpu"), Console(quiet=True))
    for flags, said in (({"avx512_bf16": False}, True), ({"amx_bf16": True}, False), ({}, False)):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda flags=flags: flags, raising=False)
        assert bool(train._slow_precision(run)) == said


def test_the_loss_falls_on_photos_seen_again_and_again(tmp_path, console):
    more = ["train.schedule.warmup_steps=0", "train.batch_size=4", "train.epochs=10"]
    run = train.Run(settings(tmp_path, *more), console)
    batch = next(run.loader.epoch(0))
    losses = [sum(run.train_step(batch).values()) for _ in range(25)]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_what_the_head_has_to_say_of_the_photos_is_said(tmp_path):
    """Here: how many objects share a cell of the grid of the first YOLO."""
    tiny = [item for item in TINY if "width" not in item and "neck" not in item]
    more = ["input.size=[96, 96]", "model.backbone.name=vgg11", "model.head.grid=3", "model.head.hidden=8"]
    own = [f"runs={tmp_path / 'runs'}", f"data.cache={tmp_path / 'cache'}", "model.weights=none", "train.epochs=1"]
    said = io.StringIO()
    cfg = config.load("yolo_v1_vgg.yaml", [*tiny, *more, *own])
    train.start(cfg, Console(file=said, width=300))
    records = cache.load(cfg.data, "train")
    places = [
        (i, *((box[:2] + box[2:]) / 2 / record.hw[::-1] * 3).astype(int))
        for i, record in enumerate(records[j] for j in range(len(records)))
        for box in record.boxes[(record.flags & (DIFFICULT | CROWD)) == 0]
    ]
    shared = len(places) - len(set(places))
    assert f"{shared} of {len(places)} objects" in said.getvalue()
    assert shared > 100


def test_recalibrated_statistics_are_those_of_the_photos(tmp_path, console):
    run = train.Run(
        settings(tmp_path, "model.weights=imagenet", "model.backbone.freeze=5", "train.recalibrate_bn=2"), console
    )
    before = run.detector.backbone.features[0][0].weight.clone()
    run.recalibrate()
    norm = run.detector.backbone.features[0][1]
    images = torch.cat([batch.images for batch in run.loader.epoch(0)][:2])
    with torch.no_grad():
        out = run.detector.backbone.features[0][0](run.detector.normalise(images))
    assert torch.allclose(norm.running_mean, out.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert torch.equal(before, run.detector.backbone.features[0][0].weight)
    assert not norm.training
    assert norm.momentum == pytest.approx(0.1)


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UserError, match="device cuda"):
        checkpoint.pick_device("cuda")


def test_a_run_on_tiles_is_measured_as_it_is_to_be_used(tmp_path, console):
    """Evaluation, which joins batches of tiles, finds what `detkit predict` finds by its own tiles."""
    shelf = tmp_path / "shelf"
    synth.synthesise(shelf, train=8, val=3, size=(320, 240), seed=0, workers=1)
    cfg = settings(
        tmp_path, f"data.root={shelf}", "input.tiles={size: [120, 160], overlap: 50}", "train.eval_every=1",
        "train.cache=ram", "augment.mosaic=0.5", "model.select.score=0.001",
    )  # fmt: skip
    run = train.start(cfg, console)
    assert config.load(run / "config.yaml").input.tiles == config.Tiles(size=(120, 160), overlap=50)
    model = checkpoint.TorchSession(run / "best.safetensors", "cpu")
    looks = tiles.chosen(None, None, model.manifest, "best")
    assert looks == ((120, 160), 50)
    dataset = cache.load(cfg.data, "val")
    seen = tiles.Tiled(model, looks).detect([imaging.decode(dataset[i].path) for i in range(len(dataset))])
    trained = checkpoint.read(run / "best.safetensors")
    loader = Loader(EvalSet(dataset, cfg.input), 4, 0)
    found = evaluate.detect(trained.predictor(), loader, torch.device("cpu"), console)
    assert sum(map(len, seen)) > 20
    for one, other in zip(seen, found, strict=True):
        assert len(one) == len(other)
        assert abs(one.scores - other.scores).max() < 1e-4
        assert (abs(one.boxes - other.boxes) > 0.05).any(1).mean() < 0.01  # equal scores may come in another order


def test_room_for_boxes_follows_the_densest_photo(tmp_path):
    out = Console(file=io.StringIO(), width=300)
    few = ("train.epochs=1", "model.select.keep=30", "model.select.candidates=60")
    run = train.start(settings(tmp_path, *few), out)
    kept = config.load(run / "config.yaml").model.select
    trained = checkpoint.read(run / "last.safetensors")
    assert trained.photos is not None
    most = trained.photos.most
    assert most > 30
    assert (kept.keep, kept.candidates) == (2 * most, 10 * most)
    assert trained.manifest().nms == kept
    assert f"keep {2 * most} (was 30)" in out.file.getvalue()
    assert config.Select(keep=900).raised(most).keep == 900  # never less than set
    assert config.Select(keep=30, follow=False).raised(most).keep == 30

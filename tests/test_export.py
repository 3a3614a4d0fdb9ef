"""The ONNX files: what is in them, that they find what torch finds, and that one that doesn't is never written."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from detkit import checkpoint, config, export, gate, geometry, imagegraph, imaging, speed
from detkit.errors import UserError
from detkit.export import Plan
from detkit.gate import Series, Subject
from detkit.manifest import KEY, Manifest, read
from detkit.nn.contract import Decoded
from detkit.nn.detector import Detector
from detkit.nn.select import select
from detkit.runtime.session import Session
from detkit.runtime.verify import scene

CLASSES = ("tea", "rice", "soap")
CANVAS = config.Input(size=(64, 96), resize="letterbox")


def ssd(loss: str, levels: int) -> config.SSD:
    scales = tuple(np.linspace(0.2, 0.9, levels + 1).tolist())
    return config.SSD(scales=scales, ratios=((2.0,),) * levels, loss=loss)


MODELS = {
    "mobilenet, PAN": config.Model(
        backbone=config.Backbone(name="mobilenet_v2"), neck=config.PAN(channels=24), head=ssd("aligned", 3)
    ),
    "vgg, SSD's own": config.Model(
        backbone=config.Backbone(name="vgg11"), neck=config.SSDExtras(levels=4, reduced_fc=True),
        head=ssd("multibox", 4), select=config.Select(score=0.0, keep=50),
    ),
    "resnet, FPN": config.Model(
        backbone=config.Backbone(name="resnet18"), neck=config.FPN(channels=32, levels=4), head=ssd("multibox", 4)
    ),
}  # fmt: skip


def photos(count: int) -> Tensor:
    """Soft random images uint8 [count, 3, 64, 96]."""
    coarse = torch.rand(count, 3, 4, 6, generator=torch.Generator().manual_seed(1)) * 255
    return F.interpolate(coarse, CANVAS.size, mode="bicubic").clamp(0, 255).to(torch.uint8)


def trained(model: config.Model) -> Detector:
    """A detector with random weights, whose BatchNorm fits them, so that its scores differ from place to place."""
    torch.manual_seed(0)
    detector = Detector(model, CANVAS, len(CLASSES)).train()
    with torch.no_grad():
        for _ in range(5):
            detector(photos(4))
        for layer in detector.head.scores:
            layer.weight.mul_(4)
            layer.bias.fill_(-1)
    return detector


def manifest(rule: config.Select, **changes: Any) -> Manifest:
    return Manifest(
        detkit="0", name="x", classes=CLASSES, size=CANVAS.size, resize="letterbox", mean=CANVAS.mean, std=CANVAS.std,
        fill=imaging.fill(CANVAS.mean), nms=rule,
    ).model_copy(update=changes)  # fmt: skip


def data_set(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """Made-up photos of those heights and widths, one object each; all are both for training and validation."""
    (root / "ImageSets" / "Main").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    for split in ("train", "val"):
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i}\n" for i in range(len(sizes))))
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir()
    for i, (height, width) in enumerate(sizes):
        Image.fromarray(scene(i, (height, width))).save(root / "JPEGImages" / f"{i}.jpg")
        (root / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><size><width>{width}</width><height>{height}</height></size>"
            "<object><name>tea</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>60</xmax><ymax>80</ymax></bndbox>"
            "</object></annotation>"
        )
    return root


def trained_run(folder: Path, name: str, resize: str = "letterbox") -> Path:
    """A run of that model with random weights, and its data set. Returns its checkpoint."""
    data = data_set(folder / "data", [(150, 120), (100, 300), (64, 96), (90, 90)])
    canvas = CANVAS.model_copy(update={"resize": resize})
    settings = config.load("ssd_vgg.yaml", [f"data.root={data}"])
    settings = settings.model_copy(update={"model": MODELS[name], "input": canvas})
    file = folder / "runs" / "x-1" / "best.safetensors"
    checkpoint.write(file, trained(MODELS[name]).state_dict(), settings, CLASSES, 1, {"mAP": 0.5, "score": 0.3})
    return file


def exported(plan: Plan, file: Path, out: Path | None = None) -> tuple[list[Path], str]:
    """The files, and what was said."""
    said = io.StringIO()
    return export.run(str(file), out, None, Console(file=said, width=1000), plan), said.getvalue()


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_run(tmp_path_factory.mktemp("vgg"), "vgg, SSD's own")


@pytest.fixture(scope="module")
def both(vgg: Path) -> list[Path]:
    out = vgg.parent / "out"
    out.mkdir()
    (out / "shelf.refused.json").touch()  # of an earlier try
    files, _ = exported(Plan(("canvas", "image")), vgg, out / "shelf.onnx")
    return files


def test_each_file_is_whole_and_says_what_it_is(both: list[Path], vgg: Path) -> None:
    rule = MODELS["vgg, SSD's own"].select
    canvas, image = both
    assert [path.name for path in both] == ["shelf.onnx", "shelf-image.onnx"]
    batch, sized = ["batch", 3, *CANVAS.size], ["height", "width", 3]
    ends: dict[Path, tuple[Any, ...]] = {
        canvas: (("images", batch), ["batch", rule.keep, 4], ["batch", rule.keep]),
        image: (("image", sized), ["found", 4], ["found"]),
    }
    for path, ((name, shape), boxes, others) in ends.items():
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (10, [("", 18)])
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        assert [(put.name, put.type, put.shape) for put in session.get_inputs()] == [(name, "tensor(uint8)", shape)]
        assert [(put.name, put.type, put.shape) for put in session.get_outputs()] == [
            ("boxes", "tensor(float)", boxes),
            ("scores", "tensor(float)", others),
            ("labels", "tensor(int64)", others),
        ]
        for tensor in model.graph.initializer:
            tensor.ClearField("raw_data")
        text = model.SerializeToString()
        for trace in (
            b"site-packages",
            b"detkit/",
            b".py",
            b"File ",
            str(Path.cwd()).encode(),
            str(vgg.parent).encode(),
        ):
            assert trace not in text
        said = read(path.read_bytes(), "")
        assert said == Manifest.from_json({prop.key: prop.value for prop in model.metadata_props}[KEY], "")
        assert (said.input, said.precision, said.nms) == (Session(path, "cpu").kind, "fp32", rule)
        assert len(said.golden) == 3
        assert all(len(golden.scores) > 5 for golden in said.golden)


def test_the_files_have_the_flops_that_torch_counts(both: list[Path], vgg: Path) -> None:
    counted = speed.torch_flops(checkpoint.read(vgg).predictor(), CANVAS.size)
    assert [speed.onnx_flops(onnx.load(path)) for path in both] == [counted, counted]
    foreign = onnx.load(both[0])
    del foreign.graph.value_info[:]
    foreign.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    assert speed.onnx_flops(foreign) is None


def test_nothing_but_the_files_and_their_report_and_programs_is_written(both: list[Path]) -> None:
    names = {path.name for path in both[0].parent.iterdir()}
    programs = {f"{path.stem}-detect.{suffix}" for path in both for suffix in ("py", "cpp", "cs", "mjs")}
    assert names == {path.name for path in both} | programs | {"shelf.report.json"}
    report = json.loads((both[0].parent / "shelf.report.json").read_text())
    assert set(report["files"]) == {path.name for path in both}
    assert report["batches"] == [1, 3, 8]
    assert report["photos that differ"] == []
    assert "refused" not in report
    series = {check["series"] for check in report["checks"]}
    assert series >= {"validation photos", "blank", "1 x 1", "8000 x 6000"}
    assert sum(check["detections"] for check in report["checks"]) > 1000
    assert max(check["box"] for check in report["checks"] if "8000" not in check["series"]) < 0.05
    assert max(check["score"] for check in report["checks"]) < 1e-4


@pytest.mark.parametrize("resize", ["letterbox", "stretch"])
def test_the_image_file_finds_in_photos_what_the_runtime_finds(resize: str, tmp_path: Path, both: list[Path]) -> None:
    """Its canvas is Pillow's to one level; from there on, all is equal."""
    said = Session(both[0], "cpu").manifest.model_copy(update={"resize": resize})
    network = onnx.load(both[0])
    for kind, model in (("canvas", network), ("image", imagegraph.wrap(network, said))):
        own = said.model_copy(update={"input": kind})
        (tmp_path / f"{kind}.onnx").write_bytes(export._written(model, own))
    canvas, image = (Session(tmp_path / f"{kind}.onnx", "cpu") for kind in ("canvas", "image"))
    before = ort.InferenceSession(imagegraph.before(said).SerializeToString(), providers=["CPUExecutionProvider"])
    for hw in [(1, 1), CANVAS.size, (480, 640), (7, 1000), (1000, 3), (63, 97), (65, 95), (33, 48), (1200, 1600)]:
        photo = scene(5, hw) if max(hw) < 1600 else scene(5, (300, 400)).repeat(4, 0).repeat(4, 1)
        plan = geometry.plan(hw, CANVAS.size, resize)  # type: ignore[arg-type]
        seen, scale, limits = before.run(None, {"image": photo})
        there = imaging.to_canvas(photo, plan, said.fill).transpose(2, 0, 1)
        assert np.abs(seen[0].astype(int) - there).max() <= 1, hw
        assert scale.tolist() == plan._scale().tolist()
        assert limits.tolist() == [hw[1], hw[0]] * 2
        (found,) = image.detect([photo])
        boxes, scores, labels = canvas.run(seen)
        kept = (scores[0] > 0) & (
            np.diff(plan.to_source(boxes[0]).astype(np.float32)[:, [0, 2, 1, 3]])[:, ::2] > 0
        ).all(1)
        assert len(found) == kept.sum() > 0
        assert_allclose(found.boxes, plan.to_source(boxes[0][kept]), rtol=1e-6)
        assert found.scores.tolist() == scores[0][kept].tolist()
        assert found.labels.tolist() == labels[0][kept].tolist()


@given(size=st.tuples(st.integers(1, 700), st.integers(1, 700)))
def test_the_graph_fits_photos_to_the_pixel_as_geometry_does(size: tuple[int, int], fitting: Any) -> None:
    seen, scale, _ = fitting.run(None, {"image": np.full((*size, 3), 9, np.uint8)})
    plan = geometry.plan(size, CANVAS.size, "letterbox")
    assert scale.tolist() == plan._scale().tolist()
    height, width = plan.inner
    inside = np.zeros(CANVAS.size, bool)
    inside[:height, :width] = True
    fill = np.array(imaging.fill(CANVAS.mean))[:, None, None]
    assert (seen[0] == np.where(inside, 9, fill)).all()


@pytest.fixture(scope="module")
def fitting() -> Any:
    model = imagegraph.before(manifest(config.Select())).SerializeToString()
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"])


def test_run_exports_a_checkpoint_that_finds_the_same_in_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = trained_run(tmp_path, "resnet, FPN")
    data = tmp_path / "data"
    said = io.StringIO()
    monkeypatch.chdir(tmp_path)
    (path,) = export.run(None, None, None, Console(file=said, width=1000))
    assert path.resolve() == file.with_suffix(".onnx")
    assert "agree on" in said.getvalue()
    images = [imaging.decode(photo) for photo in sorted((data / "JPEGImages").iterdir())]
    wanted = checkpoint.TorchSession(file, "cpu").detect(images)
    for ours, theirs in zip(Session(path, "cpu").detect(images), wanted, strict=True):
        assert len(ours) == len(theirs) > 0
        assert_allclose(ours.scores, theirs.scores, atol=1e-4)
        # Equal scores may stand in another order.
        same = (geometry.iou(ours.boxes, theirs.boxes) > 0.999) & (ours.labels[:, None] == theirs.labels)
        assert (same & (np.abs(ours.scores[:, None] - theirs.scores) < 1e-4)).any(1).all()

    with pytest.raises(UserError, match=r"name a file that ends in \.onnx"):
        export.run(None, tmp_path / "model", None, Console(file=said))
    data.with_suffix(".onnx").mkdir()
    with pytest.raises(UserError, match=r"data\.onnx: can't be written \(Is a directory\)"):
        export.run(None, data.with_suffix(".onnx"), None, Console(file=said))
    with pytest.raises(UserError, match="is exported already: name a run"):
        export.run(str(path), None, None, Console(file=said))
    (data / "ImageSets" / "Main" / "val.txt").write_text("")
    with pytest.raises(UserError, match="val"):
        export.run(None, None, None, Console(file=said))


def test_batches_of_all_sizes_go_through_one_session(both: list[Path]) -> None:
    session = Session(both[0], "cpu")
    images = photos(8).numpy()
    whole = session.run(images)
    for size in (1, 3, 8, 5):
        for ours, theirs in zip(session.run(images[:size]), whole, strict=True):
            assert_allclose(ours, theirs[:size], atol=1e-3)


class Pixels(nn.Module):
    """A predictor without weights: a box a patch of 8 pixels, as sure of 'tea' as it is bright."""

    def __init__(self, rule: config.Select, shift: float = 0, gain: float = 1, noise: float = 0) -> None:
        super().__init__()
        self.rule, self.shift, self.gain, self.noise = rule, shift, gain, noise

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bright = F.avg_pool2d(images.float().mean(1, keepdim=True) / 255, 8).flatten(1) * self.gain
        bright = bright + self.noise * torch.arange(bright.shape[1]).remainder(7)
        y, x = torch.meshgrid(torch.arange(8) * 8.0, torch.arange(12) * 8.0, indexing="ij")
        boxes = torch.stack((x - 8, y - 8, x + 16, y + 16), -1).view(1, -1, 1, 4) + self.shift
        scores = torch.stack((bright, 1 - bright), -1)
        return select(Decoded(boxes.expand(len(images), -1, -1, -1), scores), self.rule, CANVAS.size)


RULE = config.Select(score=0.3, iou=0.4)


def content(module: nn.Module) -> bytes:
    return export.graph(module.eval(), {"images": photos(2)}).SerializeToString()


@pytest.fixture(scope="module")
def honest() -> bytes:
    return content(Pixels(RULE))


def compared(model: bytes, predictor: Pixels, images: Tensor, *, odd: bool = False, **changes: Any) -> gate.Report:
    said = manifest(RULE, **changes)
    if said.input == "image":
        model = imagegraph.wrap(onnx.load_from_string(model), said).SerializeToString()
    many = [gate.photo(image.permute(1, 2, 0).contiguous().numpy(), said) for image in images]
    series = [Series("photos", len(many), many.__getitem__, gate.BATCHES), *(gate.odd(said) if odd else [])]
    return gate.gate({"x.onnx": Subject(model, said)}, predictor, series)  # type: ignore[arg-type]


@pytest.mark.parametrize("takes", ["canvas", "image"])
def test_the_gate_compares_all_detections(takes: str, honest: bytes) -> None:
    report = compared(honest, Pixels(RULE), photos(2), odd=True, input=takes)
    assert report.failures == []
    assert sum(check.detections for check in report.checks) > 500
    assert report.checks[-1].detections > 20
    assert sum(check.ties for check in report.checks) == 0


@pytest.mark.parametrize("takes", ["canvas", "image"])
@pytest.mark.parametrize(
    "wrong",
    [
        Pixels(RULE, shift=0.5),
        Pixels(RULE, gain=0.99),
        Pixels(RULE.model_copy(update={"iou": 0.9})),
        Pixels(RULE.model_copy(update={"iou": 0.1})),
        Pixels(RULE.model_copy(update={"score": 0.5})),
    ],
)
def test_the_gate_refuses_what_differs(wrong: Pixels, takes: str, honest: bytes) -> None:
    report = compared(honest, wrong, photos(2), input=takes)
    assert any("differ" in line for line in report.failures)


def test_the_gate_refuses_another_shape(honest: bytes) -> None:
    report = compared(honest, Pixels(RULE.model_copy(update={"keep": 100})), photos(2))
    assert "not float32 [100, 4]" in report.failures[0]


def test_the_gate_refuses_another_way_to_resize(honest: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without exclude_outside the edges of a photo made smaller differ."""
    monkeypatch.setattr(imagegraph, "_RESIZE", imagegraph._RESIZE.replace("exclude_outside=1, ", ""))
    noise = torch.randint(0, 256, (1, 3, 300, 400), dtype=torch.uint8)
    report = compared(honest, Pixels(RULE), noise, input="image")
    assert "is resized otherwise" in report.failures[0]


def test_the_gate_accepts_another_choice_among_equals(honest: bytes) -> None:
    flat = torch.full((1, 3, *CANVAS.size), 200, dtype=torch.uint8)
    report = compared(honest, Pixels(RULE, noise=1e-6), flat)
    assert report.failures == []
    assert report.checks[0].ties > 0


def test_every_batch_size_is_tried_and_every_photo() -> None:
    for count in (1, 4, 12, 13, 50):
        chunks = list(Series("x", count, lambda i: i, gate.BATCHES).chunks())  # type: ignore[arg-type,return-value]
        assert [len(chunk) for chunk in chunks[:3]] == [1, 3, 8]
        assert {i for chunk in chunks for i in chunk} == set(range(count))


def test_nothing_is_written_where_the_file_is_wrong(vgg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = export.graph

    def wrong(*arguments: Any) -> onnx.ModelProto:
        model = real(*arguments)
        first = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("head.scores.0.weight"))
        first.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(first) * 0.9, first.name))
        return model

    monkeypatch.setattr(export, "graph", wrong)
    out = vgg.parent / "wrong" / "model.onnx"
    with pytest.raises(UserError, match=r"model\.onnx: not written.*model\.refused\.json") as error:
        exported(Plan(), vgg, out)
    assert "\n" not in str(error.value)
    assert [path.name for path in out.parent.iterdir()] == ["model.refused.json"]
    report = json.loads((out.parent / "model.refused.json").read_text())
    assert report["refused"] in str(error.value)
    assert report["files"] == {}
    (first,) = (check for check in report["checks"] if check["series"] == "validation photos")
    assert first["wrong"] > 0
    assert report["photos that differ"]
    assert {*report["photos that differ"]} <= {f"{i}.jpg" for i in range(4)}
    assert str(vgg.parent) not in json.dumps(report)


def test_another_data_set_must_have_the_same_classes(vgg: Path, tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", [(64, 96)])
    (data / "classes.txt").write_text("tea\nrice\n")
    with pytest.raises(UserError, match="soap"):
        export.run(str(vgg), None, data, Console(file=io.StringIO()))


def test_names() -> None:
    source = Path("runs/x-1/best.safetensors")
    assert export._named(source, None, "fp32") == Path("runs/x-1/best.onnx")
    assert export._named(source, None, "int8") == Path("runs/x-1/best-int8.onnx")
    assert export._named(source, Path("a/b-image.onnx"), "int8") == Path("a/b.onnx")
    assert export._path(Path("a/b.onnx"), "image") == Path("a/b-image.onnx")


def test_a_file_without_golden_photos_is_not_to_be_verified(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").touch()
    said = io.StringIO()
    export._say(tmp_path / "x.onnx", manifest(RULE), Console(file=said, width=1000))
    assert "fp32, takes batches on the canvas, uint8 [B, 3, 64, 96]; finds nothing in made-up photos" in said.getvalue()


def test_exporting_is_silent(
    honest: bytes, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    caplog.clear()
    content(Pixels(RULE))
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""

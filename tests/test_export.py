"""The ONNX file: what is in it, that it finds what torch finds, and that one that doesn't is never written."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from detkit import checkpoint, config, export, imaging
from detkit.errors import UserError
from detkit.manifest import KEY, Manifest
from detkit.nn.contract import Decoded
from detkit.nn.detector import Detector, Predictor
from detkit.nn.select import select
from detkit.runtime.session import Session

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


def manifest(rule: config.Select) -> Manifest:
    return Manifest(
        detkit="0", name="x", classes=CLASSES, size=CANVAS.size, resize="letterbox", mean=CANVAS.mean, std=CANVAS.std,
        fill=imaging.fill(CANVAS.mean), nms=rule,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mobilenet, PAN", "vgg, SSD's own"])
def test_onnx_finds_what_torch_finds(name: str, tmp_path: Path) -> None:
    rule = MODELS[name].select
    path = tmp_path / "new" / "model.onnx"
    result = export.export(Predictor(trained(MODELS[name]), rule), manifest(rule), path, photos(3))
    assert result.detections > 20
    assert result.ties < result.detections / 20
    assert result.box < 0.01
    assert result.score < 1e-4
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]

    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, [(o.domain, o.version) for o in model.opset_import]) == (10, [("", 18)])
    assert Manifest.from_json({prop.key: prop.value for prop in model.metadata_props}[KEY], "") == manifest(rule)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [(put.name, put.type, put.shape) for put in session.get_inputs()] == [
        ("images", "tensor(uint8)", ["batch", 3, *CANVAS.size])
    ]
    assert [(put.name, put.type, put.shape) for put in session.get_outputs()] == [
        ("boxes", "tensor(float)", ["batch", rule.keep, 4]),
        ("scores", "tensor(float)", ["batch", rule.keep]),
        ("labels", "tensor(int64)", ["batch", rule.keep]),
    ]
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
    text = model.SerializeToString()
    for trace in (b"site-packages", b"detkit/", b".py", b"File ", str(Path.cwd()).encode()):
        assert trace not in text


def test_run_exports_a_checkpoint_that_finds_the_same_in_photos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS["resnet, FPN"]
    data = tmp_path / "data"
    (data / "ImageSets" / "Main").mkdir(parents=True)
    (data / "ImageSets" / "Main" / "val.txt").write_text("0\n1\n2\n")
    (data / "classes.txt").write_text("\n".join(CLASSES))
    for folder in ("JPEGImages", "Annotations"):
        (data / folder).mkdir()
    for i, photo in enumerate(photos(3)):
        Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((120, 150)).save(data / "JPEGImages" / f"{i}.jpg")
        (data / "Annotations" / f"{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><size><width>120</width><height>150</height></size>"
            "<object><name>tea</name><bndbox><xmin>9</xmin><ymin>9</ymin><xmax>60</xmax><ymax>80</ymax></bndbox>"
            "</object></annotation>"
        )
    settings = config.load("ssd_vgg.yaml", [f"data.root={data}"]).model_copy(update={"model": model, "input": CANVAS})
    file = tmp_path / "runs" / "x-1" / "best.safetensors"
    figures = {"mAP": 0.5, "score": 0.3}
    checkpoint.write(file, trained(model).state_dict(), settings, CLASSES, 1, figures)

    said = io.StringIO()
    monkeypatch.chdir(tmp_path)
    path = export.run(None, None, None, Console(file=said, width=1000))
    assert path.resolve() == file.with_suffix(".onnx")
    assert "agree on" in said.getvalue()
    images = [imaging.decode(photo) for photo in sorted((data / "JPEGImages").iterdir())]
    wanted = checkpoint.TorchSession(file, "cpu").detect(images)
    for ours, theirs in zip(Session(path, "cpu").detect(images), wanted, strict=True):
        assert len(ours) == len(theirs) > 0
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)
        np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.01)
        assert ours.labels.tolist() == theirs.labels.tolist()

    with pytest.raises(UserError, match=r"name a file that ends in \.onnx"):
        export.run(None, tmp_path / "model", None, Console(file=said))
    (data / "ImageSets" / "Main" / "val.txt").write_text("")
    with pytest.raises(UserError, match="val"):
        export.run(None, None, None, Console(file=said))


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


def test_check_compares_all_detections(honest: bytes) -> None:
    result = export.check(honest, Pixels(RULE), photos(2))  # type: ignore[arg-type]
    assert result.detections > 100
    assert result.ties == 0


@pytest.mark.parametrize(
    "wrong",
    [
        Pixels(RULE, shift=0.5),
        Pixels(RULE, gain=0.99),
        Pixels(RULE.model_copy(update={"iou": 0.9})),
        Pixels(RULE.model_copy(update={"iou": 0.1})),
        Pixels(RULE.model_copy(update={"score": 0.5})),
        Pixels(RULE.model_copy(update={"keep": 100})),
    ],
)
def test_check_refuses_what_differs(wrong: Pixels, honest: bytes) -> None:
    with pytest.raises(ValueError, match=r"differ|not torch"):
        export.check(honest, wrong, photos(2))  # type: ignore[arg-type]


def test_check_accepts_another_choice_among_equals(honest: bytes) -> None:
    flat = torch.full((1, 3, *CANVAS.size), 200, dtype=torch.uint8)
    result = export.check(honest, Pixels(RULE, noise=1e-6), flat)  # type: ignore[arg-type]
    assert result.ties > 0


def test_nothing_is_written_where_the_file_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = export.graph(Pixels(RULE, shift=2).eval(), {"images": photos(2)})
    monkeypatch.setattr(export, "graph", lambda *_: wrong)
    with pytest.raises(UserError, match=r"model\.onnx: not written") as error:
        export.export(Pixels(RULE), manifest(RULE), tmp_path / "model.onnx", photos(2))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_exporting_is_silent(
    honest: bytes, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    caplog.clear()
    content(Pixels(RULE))
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""

"""The command line, as a user meets it."""

import contextlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from detkit import __version__, cli, config
from detkit.errors import UserError
from tests.test_train import SHELF, TINY

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(capsys):
    """Run a command line in this process -> (exit code, stdout, stderr)."""

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return call


def one_line(result, *fragments):
    code, _, err = result
    assert code == 2, result
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    for fragment in fragments:
        assert fragment in lines[0]


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0
    for verb in ("train", "eval", "predict", "export", "config", "data", "demo"):
        assert verb in out
    assert run("--version")[1].strip() == f"detkit {__version__}"


def test_help_and_import_load_neither_torch_nor_onnxruntime():
    script = (
        "import sys, detkit, detkit.cli\n"
        "try: detkit.cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'onnxruntime', 'lxml', 'albumentations', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_config_prints_what_load_reads_back(run, tmp_path):
    code, out, _ = run("config", "ssd_vgg.yaml", "--set", "train.epochs=5", "data.root=PATH")
    assert code == 0
    (tmp_path / "again.yaml").write_text(out, encoding="utf-8")
    again = config.load(tmp_path / "again.yaml")
    assert again == config.load("ssd_vgg.yaml", ["train.epochs=5", "data.root=PATH"])


def test_config_schema_is_json(run):
    assert "properties" in json.loads(run("config", "--schema")[1])


def test_typos_are_answered_with_the_nearest_name(run):
    one_line(run("train", "--config", "ssd_vg.yaml"), "ssd_vg.yaml", "'ssd_vgg.yaml'")
    one_line(run("train", "--config", "ssd_vgg.yaml", "--set", "trian.epochs=5"), "'train.epochs'")


def test_debug_shows_the_traceback(run):
    with pytest.raises(UserError, match=r"ssd_vg\.yaml"):
        cli.main(["train", "--config", "ssd_vg.yaml", "--debug"])


def test_train_wants_a_config(run):
    one_line(run("train"), "--config")


def voc(folder, photos=3):
    """A small VOC copy of shelf-mini's first photos."""
    names = (SHELF / "ImageSets" / "Main" / "train.txt").read_text().split()[:photos]
    for part, suffix in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
        (folder / part).mkdir(parents=True)
        for name in names:
            shutil.copy(SHELF / part / f"{name}{suffix}", folder / part)
    shutil.copy(SHELF / "classes.txt", folder)
    return folder, names


def missing(folder, names):
    shutil.rmtree(folder)
    return str(folder)


def empty(folder, names):
    shutil.rmtree(folder)
    folder.mkdir()
    return str(folder)


def not_xml(folder, names):
    (folder / "Annotations" / f"{names[1]}.xml").write_text("these are my notes")
    return f"{names[1]}.xml"


def truncated(folder, names):
    photo = folder / "JPEGImages" / f"{names[1]}.jpg"
    photo.write_bytes(photo.read_bytes()[:3000])
    return f"{names[1]}.jpg"


def unknown_class(folder, names):
    xml = folder / "Annotations" / f"{names[1]}.xml"
    tree = ET.parse(xml)
    tree.find("object/name").text = "mystery"
    tree.write(xml)
    return f"{names[1]}.xml"


@pytest.mark.parametrize("spoil", [missing, empty, not_xml, truncated, unknown_class])
def test_bad_data_is_one_line_that_names_the_file(run, tmp_path, spoil):
    folder, names = voc(tmp_path / "photos")
    named = spoil(folder, names)
    sets = [item for item in TINY if not item.startswith("data.root")]
    result = run("train", "-c", "ssd_shelf", "--set", f"data.root={folder}", f"runs={tmp_path / 'runs'}", *sets)
    one_line(result, named)
    assert not (tmp_path / "runs").exists()


def test_a_box_outside_the_image_is_clipped_and_listed(run, tmp_path):
    folder, names = voc(tmp_path / "photos")
    for name in names:
        xml = folder / "Annotations" / f"{name}.xml"
        tree = ET.parse(xml)
        tree.find("object/bndbox/xmax").text = "9999"
        tree.write(xml)
    sets = [item for item in TINY if not item.startswith(("data.root", "train.epochs", "train.batch"))]
    more = ["data.val_share=0.5", "train.epochs=1", "train.eval_every=1", "train.batch_size=1"]
    code, out, _ = run(
        "train", "-c", "ssd_shelf", "--set", f"data.root={folder}", f"runs={tmp_path / 'runs'}", *sets, *more
    )
    assert code == 0
    assert "outside" in out
    rows = (tmp_path / "runs" / "ssd_shelf-1" / "findings.jsonl").read_text(encoding="utf-8").splitlines()
    found = [finding for row in rows if (finding := json.loads(row))["kind"] != "coordinates"]
    assert {Path(finding["file"]).stem for finding in found} == set(names)


def test_unreachable_weights_are_one_line(run, tmp_path, monkeypatch):
    from urllib.error import URLError

    import torch.hub

    def fail(*_args, **_kwargs):
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    sets = [f"data.root={SHELF}", f"data.cache={tmp_path}", f"runs={tmp_path / 'runs'}"]
    result = run("train", "-c", "ssd_vgg.yaml", "--set", *sets)
    one_line(result, "VGG16_Weights.IMAGENET1K_FEATURES", "model.weights=none")
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two epochs on shelf-mini; it is not sure of anything yet, so low scores count."""
    folder = tmp_path_factory.mktemp("trained")
    sets = [*TINY, f"runs={folder / 'runs'}", f"data.cache={folder / 'cache'}", "model.select.score=0.001"]
    cli_ok("train", "-c", "ssd_shelf.yaml", "--set", *sets)
    return folder / "runs" / "ssd_shelf-1"


@pytest.fixture(scope="module")
def exported(trained):
    """Its ONNX file."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli_ok("export", trained)
    assert "agree" in out.getvalue()
    return trained / "best.onnx"


def cli_ok(*words):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    assert not stop.value.code


def test_export_and_predict_agree_with_the_checkpoint(trained, exported, tmp_path, run):
    model = exported
    photos = sorted((SHELF / "JPEGImages").iterdir())[:3]
    names = (SHELF / "classes.txt").read_text(encoding="utf-8").split()
    results = {}
    for name, source in (("torch", trained), ("onnx", model)):
        code, _, err = run("predict", *photos, "--model", source, "--out", tmp_path / name, "--score", "0")
        assert code == 0, err
        files = sorted((tmp_path / name).glob("*.json"))
        assert [file.stem for file in files] == [photo.stem for photo in photos]
        results[name] = [json.loads(file.read_text(encoding="utf-8"))["detections"] for file in files]
    for ours, theirs in zip(results["torch"], results["onnx"], strict=True):
        assert len(ours) == len(theirs) > 10
        one, other = (
            np.array([(*d["box"], d["score"], names.index(d["label"])) for d in side]) for side in (ours, theirs)
        )
        nearest = np.abs(one[:, None] - other[None]).max(-1).min(1)  # another class is at least 1 away
        # All scores are nearly equal in so young a detector: rounding may let NMS keep another of two boxes.
        assert (nearest < 0.05).mean() > 0.97


@pytest.mark.slow
def test_merging_after_the_network(trained, tmp_path, run):
    photo = next((SHELF / "JPEGImages").iterdir())
    without = tmp_path / "raw.onnx"
    code, out, err = run("export", trained, "--nms", "none", "--out", without)
    assert code == 0, err
    assert "agree" in out
    found = {}
    for source in (trained, without):
        for nms in ("none", "hard", "soft", "weighted"):
            folder = tmp_path / f"{source.stem} {nms}"
            code, _, err = run("predict", photo, "-m", source, "--nms", nms, "--out", folder, "--score", "0")
            assert code == 0, err
            file = folder / f"{photo.stem}.json"
            found[source, nms] = json.loads(file.read_text(encoding="utf-8"))["detections"]
        assert len(found[source, "none"]) > len(found[source, "hard"]) > 10
        assert 200 >= len(found[source, "soft"]) > 10
        assert 200 >= len(found[source, "weighted"]) > 0
    # NMS in numpy, after the network, is the one inside it.
    assert len(found[without, "hard"]) == pytest.approx(len(found[trained, "hard"]), abs=3)
    figures = {}
    for nms in ("hard", "soft", "weighted"):
        code, _, err = run("eval", trained, "--no-speed", "--nms", nms, "--json", tmp_path / f"{nms}.json")
        assert code == 0, err
        figures[nms] = json.loads((tmp_path / f"{nms}.json").read_text(encoding="utf-8"))["mAP50"]
    assert len(set(figures.values())) > 1


def test_soft_nms_on_a_file_with_nms_is_one_line(trained, tmp_path, run):
    if not (trained / "best.onnx").exists():
        run("export", trained)
    result = run("predict", SHELF / "JPEGImages", "-m", trained / "best.onnx", "--nms", "soft", "--out", tmp_path / "x")
    one_line(result, "best.onnx: has NMS inside", "detkit export --nms none")


def test_predict_writes_voc_xml_and_pictures_in_the_photo_s_size(trained, tmp_path, run):
    photo = tmp_path / "a photo.png"
    Image.new("RGB", (333, 222), "white").save(photo)
    code, _, err = run("predict", photo, "--model", trained, "--out", tmp_path / "out", "--format", "voc")
    assert code == 0, err
    root = ET.parse(tmp_path / "out" / "a photo.xml").getroot()
    assert root.findtext("size/width") == "333"
    picture = next(path for path in (tmp_path / "out").iterdir() if path.suffix != ".xml")
    assert Image.open(picture).size == (333, 222)


def test_eval_repeats_the_figures_of_training(trained, tmp_path, run):
    code, out, err = run("eval", trained, "--json", tmp_path / "figures.json")
    assert code == 0, err
    assert "mAP" in out or "AP50" in out
    from detkit import checkpoint

    expected = checkpoint.read(trained / "best.safetensors").metrics
    got = json.loads((tmp_path / "figures.json").read_text())
    assert {name: got[name] for name in expected} == expected


def test_a_class_agnostic_eval_counts_what_is_found_under_a_wrong_name(trained, tmp_path, run):
    figures = []
    for words in ((), ("--class-agnostic",)):
        code, out, err = run("eval", trained, "--no-speed", "--json", tmp_path / "figures.json", *words)
        assert code == 0, err
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    assert "any class" in out
    assert figures[1]["AR"] > 2 * figures[0]["AR"]  # trained for two epochs, it finds more than it knows


def test_eval_on_other_classes_is_one_line(trained, tmp_path, run):
    folder, _ = voc(tmp_path / "photos")
    (folder / "classes.txt").write_text("\n".join(reversed((folder / "classes.txt").read_text().split())))
    one_line(run("eval", trained, "--data", folder, "--split", "train"), "classes")


def test_predict_without_any_run_says_how_to_get_one(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(run("predict", SHELF / "JPEGImages"), "detkit train")


def test_tools_predict_is_detkit_predict():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "predict.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--model" in done.stdout


def test_tools_predict_takes_a_run_and_an_onnx_file(trained, exported, tmp_path):
    photo = SHELF / "JPEGImages" / "shelf_00000.jpg"
    for number, source in enumerate((trained, exported)):
        tool = [sys.executable, ROOT / "tools" / "predict.py", photo, "--model", source, "--threads", "1"]
        done = subprocess.run([*tool, "--out", str(number)], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / str(number) / "shelf_00000.json").exists()


def test_a_video_is_looked_at_by_itself(trained, run, tmp_path):
    one_line(run("predict", "a.mp4", "b.jpg", "--model", trained), "a.mp4", "by itself")
    one_line(run("predict", "a.mp4", "--format", "voc", "--model", trained), "a.mp4", "JSON lines")
    one_line(run("predict", tmp_path / "a.mp4", "--model", trained), "can't be opened as a video")


def test_a_device_for_onnx_files_is_none_for_a_run(trained, run):
    one_line(run("predict", "x.jpg", "--model", trained, "--device", "openvino"), "openvino", "detkit export")


@pytest.mark.parametrize("name", ["coco", "yolo", "labelme", "cvat", "openimages", "csv"])
def test_any_format_is_trained_on_as_it_is(trained, run, tmp_path, name):
    data = tmp_path / "data"
    cli_ok("data", "convert", SHELF, data, "--to", name)
    sets = [*TINY, "train.epochs=1", f"data.root={data}", f"data.format={name}", f"runs={tmp_path}"]
    code, out, err = run("train", "-c", "ssd_shelf.yaml", "--set", *sets)
    assert code == 0, err
    assert "train: 24 photos, 629 objects, 16 classes" in out
    figures = []
    for root, how in ((data, name), (SHELF, "voc")):
        code, _, err = run(
            "eval", trained, "--no-speed", "--data", root, "--format", how, "--json", tmp_path / "figures.json"
        )
        assert code == 0, err
        figures.append(json.loads((tmp_path / "figures.json").read_text()))
    for figure in ("mAP", "mAP50", "VOC_AP50", "AR"):
        assert figures[0][figure] == pytest.approx(figures[1][figure])


def test_splits_are_made_of_formats_that_have_none(run, tmp_path):
    cli_ok("data", "convert", SHELF, tmp_path / "coco", "--to", "coco")
    one_line(run("data", "split", tmp_path / "coco", "--format", "coco"), "splits of their own (train, val)", "VOC")
    cli_ok("data", "convert", SHELF, tmp_path / "labelme", "--to", "labelme")
    shutil.rmtree(tmp_path / "labelme" / "ImageSets")
    code, out, err = run("data", "split", tmp_path / "labelme", "--format", "labelme", "--test", 0)
    assert code == 0, err
    assert "0-based" not in out
    listed = (tmp_path / "labelme" / "ImageSets" / "Main" / "val.txt").read_text().split()
    words = ("--format", "labelme", "--split", "val", "-o", tmp_path / "sheet.png")
    code, out, err = run("data", "show", tmp_path / "labelme", *words)
    assert code == 0, err
    assert f"val: {len(listed)} photos" in out


def test_synth_makes_a_data_set_that_trains(run, tmp_path):
    code, _, err = run("data", "synth", "--out", tmp_path / "s", "--train", 2, "--val", 1, "--size", 320, 240)
    assert code == 0, err
    one_line(run("data", "synth", "--out", tmp_path / "s"), str(tmp_path / "s"))

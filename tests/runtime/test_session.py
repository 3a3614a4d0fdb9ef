import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from onnx import TensorProto, helper
from PIL import Image

from detkit import imaging
from detkit.errors import UserError
from detkit.manifest import KEY
from detkit.runtime import session as module
from detkit.runtime.session import Session, detect_with
from tests.runtime.conftest import BOXES, LABELS, SCORES, Make, image_model, onnx_model
from tests.test_manifest import manifest


def photo(height: int, width: int, red: int = 255) -> NDArray[np.uint8]:
    return np.full((height, width, 3), red, np.uint8)


def test_stretch_maps_back_to_each_photo_best_first(make_model: Make) -> None:
    session = Session(make_model(resize="stretch"), device="cpu")
    sizes = [(64, 96), (128, 96), (1, 7)]
    found = session.detect([photo(*hw) for hw in sizes])
    for (height, width), one in zip(sizes, found, strict=True):
        scale = np.array([width / 96, height / 64] * 2)
        assert one.hw == (height, width)
        assert_allclose(one.boxes, BOXES[[3, 2, 1]] * scale, rtol=1e-6)
        assert_allclose(one.scores, [0.9, 0.6, 0.5])
        assert one.labels.tolist() == [2, 0, 1]
        assert (one.boxes.dtype, one.scores.dtype, one.labels.dtype) == (np.float32, np.float32, np.int64)


def test_letterbox_maps_back_and_drops_what_lies_in_the_padding(make_model: Make) -> None:
    session = Session(make_model(resize="letterbox"), device="cpu")
    (found,) = session.detect([photo(200, 400)])  # 48 x 96 of the canvas; the box from row 50 on is in the padding
    assert_allclose(found.boxes, np.array([[48, 12, 96, 48], [0, 0, 48, 24]]) * (400 / 96), rtol=1e-6)
    assert found.labels.tolist() == [2, 1]


def test_the_graph_sees_the_photo_then_the_fill() -> None:
    seen = []

    def run(images: NDArray[np.uint8]) -> module.Raw:
        seen.append(images)
        return module.Raw(*(np.repeat(part[None], len(images), 0) for part in (BOXES, SCORES, LABELS)))

    image = photo(48, 96)
    image[..., 1] = 7
    assert len(detect_with(run, manifest(), [image, photo(64, 96, 3)])) == 2
    (images,) = seen
    assert images.shape == (2, 3, 64, 96)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert images[0, :, 0, 0].tolist() == [255, 7, 255]
    assert images[0, :, 63, 0].tolist() == [128, 0, 255]
    assert (images[1] == 3).all()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_any_batch_size_gives_each_photo_its_own(make_model: Make, count: int) -> None:
    reds = [255, 0, 51][:count]
    found = Session(make_model(), device="cpu").detect([photo(64, 96, red) for red in reds])
    assert [round(float(one.scores.max(initial=0)), 5) for one in found] == [0.9, 0.0, 0.18][:count]


@pytest.mark.parametrize("image", [photo(4, 4)[..., :1], photo(4, 4)[0], photo(4, 4).astype(np.float32), photo(0, 4)])
def test_what_is_no_image_is_refused(make_model: Make, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="an image must be uint8"):
        Session(make_model(), device="cpu").detect([image])


def test_a_file_that_takes_photos_of_any_size_needs_no_canvas(tmp_path: Path) -> None:
    path = tmp_path / "image.onnx"
    onnx.save(image_model(manifest()), path)
    session = Session(path, device="cpu")
    assert session.kind == "image"
    photos = [photo(5, 8, 51), photo(300, 200)[::2], photo(3, 3, 0)]
    found = session.detect(photos)
    assert [one.hw for one in found] == [(5, 8), (150, 200), (3, 3)]
    assert_allclose(np.concatenate([one.boxes for one in found]), [[0, 0, 4, 5], [0, 0, 100, 150]])
    assert_allclose(np.concatenate([one.scores for one in found]), [0.2, 1])
    assert [one.labels.tolist() for one in found] == [[2], [2], []]
    assert [part.shape for part in session.run(photos[0])] == [(1, 2, 4), (1, 2), (1, 2)]
    with pytest.raises(ValueError, match="an image must be uint8"):
        session.detect([photo(4, 4)[0]])


@pytest.mark.parametrize("kind", ["stretch", "letterbox", "image"])
def test_a_photo_read_onto_the_canvas_is_found_in_as_its_pixels_are(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(image_model(manifest()) if kind == "image" else onnx_model(manifest(resize=kind)), path)
    session = Session(path, device="cpu")
    noise = Image.fromarray(np.random.default_rng(0).integers(1, 256, (150, 210, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    noise.save(tmp_path / "large.jpg", exif=turned)
    noise.crop((0, 0, 96, 64)).save(tmp_path / "exact.png")
    noise.convert("P").crop((0, 0, 31, 50)).save(tmp_path / "small.gif")
    for name in ("large.jpg", "exact.png", "small.gif"):
        pixels, read = imaging.decode(tmp_path / name), session.read((tmp_path / name).read_bytes())
        if isinstance(read, module.Canvas):
            assert_array_equal(read.image, module.onto_canvas(pixels, session.manifest).image)
        else:
            assert_array_equal(read, pixels)
        found, expected = session.detect([session.read(tmp_path / name), pixels])
        assert found.hw == expected.hw == pixels.shape[:2]
        assert_array_equal(found.boxes, expected.boxes)
        assert_array_equal(found.scores, expected.scores)
        assert len(found)
    with pytest.raises(UserError, match="megapixels"):
        session.read(tmp_path / "large.jpg", max_pixels=1000)
    with pytest.raises(ValueError, match="pixels, not a canvas" if kind == "image" else "broadcast"):
        session.detect([module.onto_canvas(np.zeros((9, 9, 3), np.uint8), manifest(size=(32, 32)))])


def test_a_canvas_file_says_so(make_model: Make) -> None:
    assert Session(make_model(), device="cpu").kind == "canvas"


def test_threads_share_a_session(make_model: Make) -> None:
    session = Session(make_model(), device="cpu", threads=1)
    reds = [255, 51, 102, 204] * 25
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda red: session.detect([photo(64 + red, 96 + 2 * red, red)])[0], reds))
    assert_allclose([one.scores[0] for one in found], [0.9 * red / 255 for red in reds], rtol=1e-5)
    assert [one.hw for one in found] == [(64 + red, 96 + 2 * red) for red in reds]


def test_many_threads_find_what_one_finds(make_model: Make) -> None:
    session = Session(make_model(), device="cpu", threads=2)
    rng = np.random.default_rng(0)
    batches = [
        [rng.integers(0, 256, (*rng.integers(1, 200, 2), 3), np.uint8) for _ in range(rng.integers(1, 5))]
        for _ in range(40)
    ]
    alone = [session.detect(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(session.detect, batches * 5))
    for expected, found in zip(alone * 5, together, strict=True):
        for one, other in zip(expected, found, strict=True):
            assert one.hw == other.hw
            for part in ("boxes", "scores", "labels"):
                assert_array_equal(getattr(one, part), getattr(other, part))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own account of memory")
@pytest.mark.parametrize("kind", ["canvas", "image"])
def test_memory_stays_flat_over_ten_thousand_calls(make_model: Make, tmp_path: Path, kind: str) -> None:
    path = make_model()
    if kind == "image":
        onnx.save(image_model(manifest()), path)
    code = f"""
import numpy as np
from pathlib import Path
from detkit.runtime.session import Session

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

session = Session({str(path)!r}, device="cpu", threads=1)
rng = np.random.default_rng(0)
pixels = rng.integers(0, 256, (256, 256, 3), np.uint8)
for call in range(10_001):
    sizes = rng.integers(1, 256, (rng.integers(1, 5), 2))
    session.detect([pixels[:h, :w] for h, w in sizes])
    if call == 500:
        before = resident()
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 4  # MiB


def test_it_says_what_it_is(make_model: Make) -> None:
    path = make_model()
    session = Session(str(path), device="cpu")
    assert session.classes == ("milk", "żur", "牛奶")
    assert session.manifest == manifest()
    assert (session.path, session.device) == (path, "cpu")


def test_auto_is_the_cpu_where_there_is_no_driver(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_has_nvidia", lambda: False)
    assert Session(make_model()).device == "cpu"
    assert capfd.readouterr() == ("", "")


def test_cuda_that_can_not_be_had_is_an_error(make_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_nvidia", lambda: False)
    with pytest.raises(UserError, match=r"^device 'cuda': no GPU with an NVIDIA driver is here; .* --device cpu$"):
        Session(make_model(), device="cuda")


@pytest.mark.skipif(module._has_nvidia(), reason="needs a machine without an NVIDIA GPU")
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_provider_that_fails_in_silence_is_an_error_too(
    make_model: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], device: str
) -> None:
    monkeypatch.setattr(module, "_has_nvidia", lambda: True)  # so ONNX Runtime is asked, and gives a CPU session
    path = make_model()
    with pytest.raises(
        UserError, match=rf"^device '{device}': .*; run  pip install 'detkit\[gpu\]'.*, or use"
    ) as error:
        Session(path, device=device)
    assert "\n" not in str(error.value)
    session = Session(path)
    assert session.device == "cpu"
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(module, "_unloadable", lambda device: "")
    with pytest.raises(UserError, match="no such ONNX file"):  # the file comes before the device
        Session(path.with_name("none.onnx"), device=device)
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="not an ONNX file"):
        Session(path, device=device)


@pytest.mark.parametrize("device", ["openvino", "openvino-bf16", "coreml", "directml"])
def test_a_device_that_this_onnx_runtime_lacks_says_what_brings_it(make_model: Make, device: str) -> None:
    if module._PROVIDERS[device][0] in ort.get_available_providers():
        assert Session(make_model(), device=device).device == device
        return
    with pytest.raises(UserError, match=rf"^device '{device}': .* is built without it; .* --device cpu$"):
        Session(make_model(), device=device)


def test_openvino_is_told_how_exactly_to_compute_and_by_how_many_threads() -> None:
    (_, plain), _ = module._chain("openvino", Path("m.onnx"), 3)
    (provider, coarse), cpu = module._chain("openvino-bf16", Path("m.onnx"), 0)
    assert (provider, cpu) == ("OpenVINOExecutionProvider", "CPUExecutionProvider")
    assert plain == {"num_of_threads": "3"}
    assert json.loads(coarse.pop("load_config")) == {"CPU": {"INFERENCE_PRECISION_HINT": "bf16"}}
    assert not coarse


def test_onnx_runtime_may_not_go_over_to_the_cpu_by_itself(make_model: Make) -> None:
    assert Session(make_model(), device="cpu")._session._enable_fallback is False


def test_the_way_to_the_gpu_gives_the_same(make_model: Make) -> None:
    session = Session(make_model(), device="cpu")
    rng = np.random.default_rng(0)
    for count in (2, 2, 3):
        images = rng.integers(0, 256, (count, 3, 64, 96), np.uint8)
        for ours, theirs in zip(session._on_gpu(images, "cpu"), session.run(images), strict=True):
            assert_array_equal(ours, theirs)


def test_an_unknown_device_is_an_error(make_model: Make) -> None:
    with pytest.raises(UserError, match="device 'tpu'"):
        Session(make_model(), device="tpu")


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        Session(path, device="cpu")
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_missing_truncated_and_garbage_files_are_refused(make_model: Make, tmp_path: Path) -> None:
    whole = make_model().read_bytes()
    assert "no such ONNX file" in refused(tmp_path / "none.onnx")
    assert "cannot be read" in refused(tmp_path)
    bad = tmp_path / "bad.onnx"
    contents = [b"", b"garbage" * 99, bytes(1000), *(whole[: len(whole) * i // 7] for i in range(1, 7))]
    for content in contents:
        bad.write_bytes(content)
        refused(bad)


def test_foreign_and_newer_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    onnx.save(onnx_model(None), path)
    assert "has no manifest" in refused(path)
    model = onnx_model(None)
    helper.set_model_props(model, {KEY: json.dumps({"format": 99, "detkit": "9.9"})})
    onnx.save(model, path)
    assert "newer detkit" in refused(path)
    helper.set_model_props(model, {KEY: "{"})
    onnx.save(model, path)
    assert "manifest is damaged" in refused(path)


def test_a_graph_of_another_canvas_than_its_manifest_is_refused(make_model: Make) -> None:
    path = make_model()
    onnx.save(onnx_model(manifest(), (64, 64)), path)
    assert r"not images tensor(uint8) [0, 3, 64, 64]" in refused(path)


def test_another_graph_with_a_manifest_is_refused(tmp_path: Path) -> None:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
    graph = helper.make_graph([helper.make_node("Neg", ["a"], ["b"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {KEY: manifest().to_json()})
    path = tmp_path / "x.onnx"
    onnx.save(model, path)
    assert "expected input images" in refused(path)


def test_torch_is_never_imported(make_model: Make, tmp_path: Path) -> None:
    code = f"""
import sys
import numpy as np
from pathlib import Path
from PIL import Image
import detkit.runtime.session
from detkit.runtime import predict
found = detkit.Session({str(make_model())!r}, device="cpu")
assert len(found.detect([np.full((50, 80, 3), 255, np.uint8)])[0])
Image.new("RGB", (80, 50), "white").save({str(tmp_path / "p.png")!r})
assert predict.predict(found, [{str(tmp_path / "p.png")!r}], Path({str(tmp_path / "out")!r})) == 0
heavy = {{"torch", "torchvision", "cv2", "albumentations", "lxml", "onnx", "pycocotools"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

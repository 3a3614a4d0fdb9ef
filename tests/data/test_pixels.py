import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detkit import imaging
from detkit.config import Data
from detkit.data import cache, pixels
from detkit.data.labels import DataSet
from detkit.data.pixels import Files, Pixels
from detkit.errors import UserError
from tests.data.photos import make_voc, marked_image, save_image, seen


def nothing(done: int, total: int) -> None:
    pass


def test_the_resize_is_pillows_antialiased_bilinear_to_one_level() -> None:
    image = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    for hw in ((32, 48), (90, 20), (200, 100), (1, 1)):
        expected = np.asarray(Image.fromarray(image).resize(hw[::-1], Image.Resampling.BILINEAR))
        resized = pixels.resize(image, hw)
        assert resized.shape == expected.shape
        assert np.abs(resized.astype(int) - expected).max() <= 1
    # As does a part of an image, which does not lie in one piece in memory.
    part = pixels.resize(image[10:70, 5:45], (30, 30))
    expected = np.asarray(Image.fromarray(image[10:70, 5:45]).resize((30, 30), Image.Resampling.BILINEAR))
    assert np.abs(part.astype(int) - expected).max() <= 1


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from([1, 2, 4, 8]),
    st.tuples(*4 * [st.floats(0, 1)]),
)
def test_a_cut_shows_its_window_widened_to_whole_pixels(
    hw: tuple[int, int], step: int, shares: tuple[float, float, float, float]
) -> None:
    photo = Pixels(np.zeros((*hw, 3), np.uint8), (0.0, 0.0, float(hw[1] * step), float(hw[0] * step)))
    xs, ys = sorted(shares[:2]), sorted(shares[2:])
    window = (xs[0] * hw[1] * step, ys[0] * hw[0] * step, xs[1] * hw[1] * step, ys[1] * hw[0] * step)
    image, shown = photo.cut(window, (7, 5))
    assert image.shape == (7, 5, 3)
    for axis in (0, 1):
        low, high, least, most = shown[axis], shown[axis + 2], window[axis], window[axis + 2]
        assert low % step == high % step == 0
        assert low <= least + 1e-3
        assert high >= most - 1e-3
        assert least - low < 2 * step
        assert high - most < 2 * step
        assert low < high <= hw[1 - axis] * step


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("step", "reduction"), [(1.0, 1), (3.0, 2), (5.0, 4), (100.0, 8)])
def test_coordinates_are_right_at_a_reduced_scale_whatever_exif_says(
    tmp_path: Path, orientation: int, step: float, reduction: int
) -> None:
    path = tmp_path / "x.jpg"
    # Sides that no reduction divides: the last pixels span more than the photo has.
    stored = marked_image((205, 331), [(64, 48, 200, 120)], [0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, quality=95, subsampling=0, exif=exif)
    full = imaging.decode(path)
    hw = full.shape[:2]
    found = pixels.decode(str(path), hw, step)
    sides = np.array(stored.shape[:2] if orientation < 5 else stored.shape[1::-1])
    assert found.image.shape[:2] == tuple(-(-sides // reduction))
    if reduction == 1:
        assert (found.image == full).all()
        assert found.extent == (0, 0, hw[1], hw[0])
    box = np.array(seen(found.image, 0)) * reduction + np.tile(found.extent[:2], 2)
    truth = np.array(seen(full, 0))
    assert np.abs(box - truth).max() <= reduction / 2


def test_a_photo_is_never_reduced_below_what_is_needed(tmp_path: Path) -> None:
    path = str(save_image(tmp_path / "x.jpg", (240, 320)))
    for step, side in ((0.5, 240), (2.49, 240), (2.5, 120), (4.99, 120), (5.0, 60), (10.0, 30), (50.0, 30)):
        assert pixels.decode(path, (240, 320), step).image.shape[0] == side


@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        ("png", "RGB", {}), ("png", "RGBA", {}), ("webp", "RGB", {}), ("jpg", "L", {}), ("jpg", "CMYK", {}),
        ("jpg", "RGB", {"progressive": True}), ("jpg", "RGB", {"subsampling": 1}),
    ],
)  # fmt: skip
def test_any_image_is_what_imaging_makes_of_it(
    tmp_path: Path, suffix: str, mode: str, options: dict[str, object]
) -> None:
    path = save_image(tmp_path / "rgb.png", (50, 70))
    other = tmp_path / f"x.{suffix}"
    with Image.open(path) as image:
        image.convert(mode).save(other, **options)  # type: ignore[arg-type]
    assert (pixels.decode(str(other), (50, 70), 1.0).image == imaging.decode(other)).all()


def test_bytes_behind_the_end_and_marks_before_it_do_no_harm(tmp_path: Path) -> None:
    path = save_image(tmp_path / "x.jpg", (64, 64))
    content = path.read_bytes()
    path.write_bytes(content[:2] + b"\xff\xe1\x00\x06\xff\xd9ab" + b"\xff" + content[2:] + b"made by a camera" * 50)
    assert pixels.decode(str(path), (64, 64), 3.0).image.shape == (32, 32, 3)


def test_a_damaged_missing_or_changed_photo_is_one_line(tmp_path: Path) -> None:
    path = save_image(tmp_path / "x.jpg", (64, 64))
    content = path.read_bytes()
    with pytest.raises(UserError, match=r"x\.jpg.*65x64") as caught:
        pixels.decode(str(path), (64, 65), 1.0)
    assert "\n" not in str(caught.value)
    for damage in (content[: len(content) * 2 // 3], content[:30], b"", b"\xff\xd8\xff\xff\xff"):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"x\.jpg"):
            pixels.decode(str(path), (64, 64), 3.0)
    path.unlink()
    with pytest.raises(UserError, match="no such image"):
        pixels.decode(str(path), (64, 64), 3.0)


@pytest.fixture
def photos(tmp_path: Path) -> DataSet:
    return cache.load(Data(root=make_voc(tmp_path / "set", train=6)), "train")


def test_a_cache_gives_the_photos_at_the_canvas_resolution(photos: DataSet, tmp_path: Path) -> None:
    files = Files(photos, reduced=False)
    told: list[tuple[int, int]] = []
    for canvas, size in (((24, 16), (24, 16)), ((24, 200), (24, 64)), ((500, 500), (48, 64))):
        kept = pixels.in_memory(files, canvas, "stretch", 2, lambda done, total: told.append((done, total)))
        mapped = pixels.on_disk(files, canvas, "stretch", [tmp_path / "c" / f"{canvas}.pixels"], 2, nothing)
        for index in range(6):
            one, other = kept(index, 1.0), mapped(index, 1.0)
            assert one.image.shape[:2] == size
            assert one.extent == other.extent == (0, 0, 64, 48)
            assert (one.image == other.image).all()
            expected = np.array(imaging.decode(photos[index].path))
            assert (one.image == pixels.resize(expected, size)).all()
    assert told == [(6, 6)] * 3
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_a_cache_of_reduced_photos_knows_what_they_span(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "set", train=1, hw=(101, 203))
    photos = cache.load(Data(root=root), "train")
    kept = pixels.in_memory(Files(photos, reduced=True), (10, 20), "stretch", 1, nothing)
    assert kept(0, 1.0).extent == (0, 0, 208, 104)
    mapped = [
        pixels.on_disk(Files(photos, True), (10, 20), "stretch", [tmp_path / "a.pixels"], 1, nothing) for _ in "12"
    ]
    assert mapped[0](0, 1.0).extent == mapped[1](0, 1.0).extent == (0, 0, 208, 104)


def test_the_file_is_used_again_until_a_photo_changes(
    photos: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, decoded = Files(photos, reduced=True), []
    decode = pixels.decode
    monkeypatch.setattr(pixels, "decode", lambda path, *more: decoded.append(path) or decode(path, *more))

    def load() -> pixels.Decoded:
        decoded.clear()
        return pixels.on_disk(files, (24, 32), "stretch", [tmp_path / "c" / "a.pixels"], 1, nothing)

    load()
    assert len(decoded) == 6
    before = load()(2, 1.0).image.copy()
    assert not decoded
    save_image(Path(photos[2].path), (48, 64), seed=99)
    assert (load()(2, 1.0).image != before).any()
    assert len(decoded) == 6
    only = list((tmp_path / "c").iterdir())
    assert len(only) == 1
    only[0].write_bytes(only[0].read_bytes()[:-1])
    load()
    assert len(decoded) == 6


def test_another_process_maps_the_file_and_copies_nothing(photos: DataSet, tmp_path: Path) -> None:
    mapped = pixels.on_disk(Files(photos, True), (48, 64), "stretch", [tmp_path / "c" / "a.pixels"], 1, nothing)
    image = mapped(3, 1.0).image
    sent = pickle.dumps(mapped)
    assert len(sent) < image.nbytes
    assert (pickle.loads(sent)(3, 1.0).image == image).all()


def test_a_photo_that_has_gone_bad_leaves_no_file(photos: DataSet, tmp_path: Path) -> None:
    Path(photos[4].path).write_bytes(b"\xff\xd8\xff")
    for where in (
        lambda: pixels.on_disk(Files(photos, True), (48, 64), "stretch", [tmp_path / "c" / "a.pixels"], 2, nothing),
        lambda: pixels.in_memory(Files(photos, True), (48, 64), "stretch", 2, nothing),
    ):
        with pytest.raises(UserError, match=r"p4\.jpg"):
            where()
    assert list((tmp_path / "c").iterdir()) == []


def test_a_cache_that_is_too_large_is_refused(photos: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pixels._memory() > 2**20
    monkeypatch.setattr(pixels, "_memory", lambda: 6 * 48 * 64 * 3)
    with pytest.raises(UserError, match=r"train\.cache: ram needs"):
        pixels.in_memory(Files(photos, True), (48, 64), "stretch", 1, nothing)
    monkeypatch.setattr(pixels.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"train\.cache: disk needs"):
        pixels.on_disk(Files(photos, True), (48, 64), "stretch", [tmp_path / "c" / "a.pixels"], 1, nothing)


def test_a_folder_that_cannot_be_written_is_passed_over(photos: DataSet, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked, free = tmp_path / "file" / "c", tmp_path / "c"
    pixels.on_disk(Files(photos, True), (48, 64), "stretch", [blocked / "a.pixels", free / "a.pixels"], 1, nothing)
    assert len(list(free.iterdir())) == 1
    with pytest.raises(UserError, match=r"data\.cache"):
        pixels.on_disk(Files(photos, True), (48, 64), "stretch", [blocked / "a.pixels"], 1, nothing)

"""A camera that moves along a shelf: each product is one, however many frames show it."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from detkit.errors import Interrupted, UserError
from detkit.runtime import video
from detkit.types import Detections
from tests.runtime.test_tiles import shelf
from tests.test_manifest import manifest

HW = (160, 240)
STEP = 6  # pixels that the camera moves a frame
FRAMES = 50


class Shelf:
    """A long shelf, seen through a window that moves along it; and an oracle who knows what each window shows. The
    window says where it is by the grey of a stripe of 12 blocks at its top, which no codec blurs away."""

    classes = ("milk", "żur", "牛奶")

    def __init__(self, miss: float = 0.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.length = HW[1] + STEP * (FRAMES - 1)
        self.boxes = shelf(rng, (HW[0] - 20, self.length), 40, 46) + np.float32([0, 20, 0, 20])
        self.labels = rng.integers(0, 2, len(self.boxes))
        self.image = np.full((HW[0], self.length, 3), 200, np.uint8)
        for (x1, y1, x2, y2), colour in zip(
            self.boxes.astype(int).tolist(), rng.integers(0, 255, (40, 3)), strict=True
        ):
            self.image[y1:y2, x1:x2] = colour
        self.manifest, self.miss, self.rng = manifest(classes=self.classes), miss, rng
        self.calls = 0

    def frame(self, number: int) -> NDArray[np.uint8]:
        view = self.image[:, STEP * number : STEP * number + HW[1]].copy()
        for bit in range(12):
            view[:16, 20 * bit : 20 * bit + 20] = 255 * (number >> bit & 1)
        return view

    def film(self, path: Path, rate: int = 25) -> Path:
        with av.open(str(path), "w") as file:
            stream = file.add_stream("mpeg4", rate=rate)
            stream.height, stream.width, stream.pix_fmt, stream.bit_rate = *HW, "yuv420p", 4_000_000
            for number in range(FRAMES):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(self.frame(number), format="rgb24")))
            file.mux(stream.encode(None))
        return path

    def seen(self, number: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        offset = np.float32([STEP * number, 0, STEP * number, 0])
        boxes = np.clip(self.boxes - offset, 0, np.float32([HW[1], HW[0]] * 2))
        return boxes, boxes[:, 2] - boxes[:, 0] >= 8

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        self.calls += 1
        found = []
        for image in images:
            number = sum((image[4:12, 20 * bit + 6 : 20 * bit + 14].mean() > 127) << bit for bit in range(12))
            boxes, there = self.seen(number)
            there &= self.rng.random(len(there)) >= self.miss
            scores = np.full(there.sum(), 0.9, np.float32)
            found.append(Detections(boxes[there], scores, self.labels[there], HW))
        return found

    def expected(self) -> list[int]:
        frames = sum(self.seen(number)[1].astype(int) for number in range(FRAMES))
        return np.bincount(self.labels[frames >= video.FRAMES], minlength=3).tolist()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.mark.parametrize("miss", [0.0, 0.15])
def test_each_product_is_counted_once(tmp_path: Path, miss: float) -> None:
    oracle = Shelf(miss)
    assert min(oracle.expected()[:2]) >= 12
    counts = video.predict(oracle, str(oracle.film(tmp_path / "a.mp4")), tmp_path / "out", console=quiet())
    off = np.abs([counts[label] for label in range(3)] - np.array(oracle.expected()))
    assert off.max() <= (miss > 0)  # of one that is in the picture for a few frames only, these can all be missed
    assert oracle.calls < FRAMES  # in batches


def test_a_full_list_is_said(tmp_path: Path) -> None:
    oracle, console = Shelf(), quiet()
    most = max(oracle.seen(number)[1].sum() for number in range(FRAMES))
    rule = oracle.manifest.nms.model_copy(update={"keep": int(most)})
    oracle.manifest = oracle.manifest.model_copy(update={"nms": rule})
    video.predict(oracle, str(oracle.film(tmp_path / "a.mp4")), tmp_path / "out", pictures=False, console=console)
    assert isinstance(console.file, io.StringIO)
    assert f"times the network's list, of {most}, was full" in console.file.getvalue()


def test_what_is_written(tmp_path: Path) -> None:
    oracle, console = Shelf(), quiet()
    film, out = oracle.film(tmp_path / "a.mp4"), tmp_path / "out"
    video.predict(oracle, str(film), out, console=console)
    assert sorted(path.name for path in out.iterdir()) == ["a.jsonl", "a.mp4", "counts.csv"]
    rows = [json.loads(line) for line in (out / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["frame"] for row in rows] == list(range(FRAMES))
    assert [row["time"] for row in rows] == pytest.approx([number / 25 for number in range(FRAMES)], abs=1e-3)
    assert (rows[0]["image"], rows[0]["height"], rows[0]["width"]) == (str(film), *HW)
    assert {one["label"] for row in rows for one in row["detections"]} == {"milk", "żur"}
    for row in rows:
        numbers = [one["track"] for one in row["detections"]]
        assert len(set(numbers)) == len(numbers)
    milk, soup, _ = oracle.expected()
    assert (out / "counts.csv").read_text(
        encoding="utf-8"
    ) == f"label,count\nmilk,{milk}\nżur,{soup}\ntotal,{milk + soup}\n"
    assert f"{milk + soup} different objects in {FRAMES} frames" in console.file.getvalue()
    with av.open(str(out / "a.mp4")) as file:
        pictures = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    assert len(pictures) == FRAMES
    assert [time - pictures[0][0] for time, _ in pictures] == pytest.approx([row["time"] for row in rows], abs=2e-3)
    number = FRAMES // 2
    changed = np.abs(pictures[number][1].astype(int) - oracle.frame(number)).max(2) > 60
    assert 0.02 < changed.mean() < 0.5  # boxes and tags, on the picture as it was


def test_odd_sides_and_no_pictures(tmp_path: Path) -> None:
    writer = video.Writer(tmp_path / "odd.mp4", Fraction(10))
    for number in range(3):
        image = np.full((33, 51, 3), 80 * number, np.uint8)
        writer.add(video.Frame(image, number / 10, number, Fraction(1, 10)), image)
    writer.close()
    frames = list(video.Reader(str(tmp_path / "odd.mp4")))
    assert [frame.image.shape for frame in frames] == [(34, 52, 3)] * 3
    assert [round(frame.time, 3) for frame in frames] == [0, 0.1, 0.2]
    oracle = Shelf()
    video.predict(oracle, str(oracle.film(tmp_path / "a.mp4")), tmp_path / "out", pictures=False, console=quiet())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.jsonl", "counts.csv"]


def test_a_video_is_turned_as_it_is_to_be_seen(tmp_path: Path) -> None:
    upright = np.zeros((64, 48, 3), np.uint8)
    upright[:20, :20] = 255
    with av.open(str(tmp_path / "phone.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.set_display_rotation(-90)  # what a phone writes that was held upright: turn by 90 degrees, clockwise
        lying = np.ascontiguousarray(np.rot90(upright))
        for _ in range(2):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(lying, format="rgb24")))
        file.mux(stream.encode(None))
    for frame in video.Reader(str(tmp_path / "phone.mp4")):
        assert np.abs(frame.image.astype(int) - upright).mean() < 10


def test_ctrl_c_leaves_whole_files(tmp_path: Path) -> None:
    class Ended(Shelf):
        def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().detect(images)

    oracle = Ended()
    with pytest.raises(Interrupted, match="stopped after 24 frames") as stop:
        video.predict(oracle, str(oracle.film(tmp_path / "a.mp4")), tmp_path / "out", console=quiet())
    assert stop.value.exit_code == 130
    assert len((tmp_path / "out" / "a.jsonl").read_text().splitlines()) == 24
    with av.open(str(tmp_path / "out" / "a.mp4")) as file:
        assert sum(1 for _ in file.decode(video=0)) == 24
    assert (tmp_path / "out" / "counts.csv").is_file()


def test_what_is_no_video_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 99)
    with av.open(str(tmp_path / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        file.mux(stream.encode(sound))
        file.mux(stream.encode(None))
    for name, words in (("junk.mp4", "can't be opened"), ("none.mp4", "can't be opened"), ("sound.mp4", "no picture")):
        with pytest.raises(UserError, match=words) as error:
            video.predict(Shelf(), str(tmp_path / name), tmp_path / "out", console=quiet())
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="camera:99"):
        video.Reader("camera:99")
    assert not (tmp_path / "out").exists()


def test_what_counts_as_a_video(tmp_path: Path) -> None:
    assert all(map(video.is_video, ("a.MP4", "x/b.mov", "rtsp://camera/1", "camera:0")))
    assert not any(map(video.is_video, ("a.jpg", "folder", "*.png", "0")))


def test_two_classes_in_one_place_are_two_things() -> None:
    tracks = video.Tracks([0.4, 0.4])
    box = np.array([[10, 10, 60, 60]] * 2, np.float32)
    for number in range(6):
        found = Detections(box, np.array([0.9, 0.8], np.float32), np.array([0, 1]), (100, 100))
        seen = tracks.update(found, number / 30)
        assert len(set(seen.numbers.tolist())) == 2
    assert tracks.counts(6) == {0: 1, 1: 1}


def test_the_unsure_are_followed_but_begin_nothing() -> None:
    tracks = video.Tracks([0.4, 0.4])
    for number, score in enumerate((0.3, 0.3, 0.9, 0.9, 0.3, 0.3, 0.9)):
        found = Detections(
            np.array([[10, 10, 60, 60]], np.float32), np.array([score], np.float32), np.array([0]), (99, 99)
        )
        assert len(tracks.update(found, number / 30).numbers) == (number >= 2)
    assert tracks.counts(7) == {0: 1}


def test_tags_name_the_tracks() -> None:
    blank = np.full((200, 300, 3), 255, np.uint8)
    found = Detections(
        np.array([[50, 60, 200, 180]], np.float32), np.array([0.9], np.float32), np.array([0]), (200, 300)
    )
    pictures = [video.render.draw(blank, found, ("milk",), scores=False, tracks=[number]) for number in (1, 12)]
    assert (pictures[0] != pictures[1]).any()
    assert Image.fromarray(pictures[0]).size == (300, 200)

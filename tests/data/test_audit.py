import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from detkit import cli, imaging
from detkit.config import Data
from detkit.data import audit, fix, scan, voc
from detkit.data.audit import Audit
from detkit.data.findings import KINDS, Finding, level
from detkit.errors import UserError
from detkit.formats import voc_xml
from detkit.geometry import iou
from detkit.types import DIFFICULT
from tests.data import mess
from tests.data.convert.sets import put
from tests.data.photos import BOX, CAN, make_voc, save_image, save_xml

# Said when a data set is written in another format, not when it is read: tests/data/convert.
ONLY_WRITTEN = {"flag not held", "unlabelled not listed", "photo renamed", "in no split"}


class Messy(NamedTuple):
    root: Path
    expected: list[mess.Expected]
    audits: dict[str, Audit]  # by data.unlabelled


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> Messy:
    root = tmp_path_factory.mktemp("audit") / "mess"
    expected = mess.make(root)
    before = contents(root)
    audits = {how: run(root, unlabelled=how) for how in ("error", "skip", "negative")}
    assert contents(root) == before
    return Messy(root, expected, audits)


def run(root: Path, **settings: object) -> Audit:
    return audit.run(Data(root=root, **settings), workers=1)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def of(found: Audit, kind: str) -> list[Finding]:
    return [finding for finding in found.findings if finding.kind == kind]


# --- every kind of finding


@pytest.mark.parametrize("kind", [*KINDS])
def test_every_kind_has_a_fixture_in_which_it_is_found(kind: str, messy: Messy, tmp_path: Path) -> None:
    if kind in ONLY_WRITTEN:
        return
    if kind in OTHER_FORMATS:
        name, make, file, what, action = OTHER_FORMATS[kind]
        make(tmp_path)
        found = of(run(tmp_path, format=name), kind)
        assert [finding for finding in found if finding.file == file and what in finding.what], found
        assert all(action in finding.action for finding in found)
        return
    cases = [case for case in messy.expected if case.kind == kind]
    assert cases, f"tests/data/mess.py has no fixture for '{kind}'"
    for case in cases:
        found = of(messy.audits[case.unlabelled], kind)
        right = [finding for finding in found if finding.file == case.file and case.what in finding.what]
        assert len(right) == 1, (case, found)
        assert case.action in right[0].action
        if case.at:
            lines = (messy.root / case.file).read_text(encoding="latin-1").splitlines()
            assert lines[right[0].line - 1].strip().startswith(case.at)
        else:
            assert right[0].line == 0
    # And nothing else is found: a kind that has one fixture is found once.
    if kind not in ("rare class",):
        assert len(of(messy.audits[cases[0].unlabelled], kind)) == len(cases)


COCO = {
    "images": [
        {"id": 1, "file_name": "a.jpg", "width": 64, "height": 48},
        {"id": 2, "file_name": "b.jpg", "width": 64, "height": 48},
        {"id": 3, "file_name": "b.jpg", "width": 64, "height": 48},
    ],
    "categories": [{"id": 1, "name": "can"}, {"id": 2, "name": "can"}, {"id": 3, "name": "box"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 20, 30], "segmentation": [[2, 3, 22, 3, 22, 33]],
         "iscrowd": 0, "area": 600, "keypoints": [1, 2, 2], "num_keypoints": 1},
        {"id": 2, "image_id": 1, "category_id": 2, "segmentation": [[30, 3, 50, 3, 50, 33]], "iscrowd": 0},
        {"id": 3, "image_id": 2, "category_id": 1, "bbox": [2, 3, 20, 30]},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [30, 3, 20, 30]},
    ],
}  # fmt: skip

CVAT = """<annotations><version>1.1</version>
<image id="0" name="a.jpg" width="64" height="48">
<box label="can" xtl="10" ytl="10" xbr="30" ybr="20" rotation="30" occluded="0"/>
<points label="can" points="5,5" occluded="0"/>
</image></annotations>"""


def make_coco(root: Path) -> None:
    for index, name in enumerate(("a.jpg", "b.jpg")):
        save_image(root / name, seed=index)
    put(root / "instances.json", COCO)


def make_cvat(root: Path) -> None:
    save_image(root / "a.jpg")
    put(root / "annotations.xml", CVAT)


def make_open_images(root: Path) -> None:
    save_image(root / "train" / "a.jpg")
    save_image(root / "train" / "new.jpg", seed=1)
    put(root / "class-descriptions-boxable.csv", "/m/1,Can\n")
    head = (
        "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    )
    rows = "".join(f"{name},x,/m/1,1,0.1,0.5,0.1,0.5,0,0,0,0,0\n" for name in ("a", "gone"))
    put(root / "train-annotations-bbox.csv", f"{head}\n{rows}")


OTHER_FORMATS: dict[str, tuple[str, Callable[[Path], None], str, str, str]] = {
    "polygon": ("coco", make_coco, "instances.json", "only a", "the box round it"),
    "class listed twice": ("coco", make_coco, "instances.json", "'can'", "one class"),
    "unused category": ("coco", make_coco, "instances.json", "box", "kept"),
    "mask not read": ("coco", make_coco, "instances.json", "2 objects have a mask", "bbox"),
    "not read": ("coco", make_coco, "instances.json", "keypoints", "left out"),
    "photo annotated twice": ("coco", make_coco, "instances.json", "b.jpg", "put together"),
    "rotated box": ("cvat", make_cvat, "annotations.xml", "30", "the box round it"),
    "no box": ("cvat", make_cvat, "annotations.xml", "<points>", "left out"),
    "photo not listed": ("openimages", make_open_images, "train/new.jpg", "no annotation file", "not used"),
    "photo absent": ("openimages", make_open_images, "train-annotations-bbox.csv", "1 photos", "left out"),
}


def test_what_is_sound_is_not_named(messy: Messy) -> None:
    unusual = {finding.file for finding in messy.audits["error"].findings}
    assert not unusual & {"Annotations/windows.xml", "Annotations/sound05.xml", "Annotations/held1.xml"}
    assert not unusual & {"JPEGImages/windows.jpg", "JPEGImages/sound05.jpg", "JPEGImages/held1.jpg"}


def test_a_sound_data_set_has_nothing_to_mend(tmp_path: Path) -> None:
    found = run(make_voc(tmp_path, train=25))
    assert {finding.kind for finding in found.findings} == {"decimals", "coordinates"}
    assert not found.bad()
    assert audit.verdict(found) == "Training takes this data set."


def test_the_gravest_come_first(messy: Messy) -> None:
    levels = [level(finding) for finding in messy.audits["error"].findings]
    assert levels == sorted(levels, key=["error", "change", "note"].index)


def test_what_training_finds_is_found(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    save_xml(root / "Annotations" / "p1.xml", [("can", (-5, 0, 20, 20)), BOX])
    trained = scan.scan(Data(root=root), "train").findings
    assert set(trained) <= set(run(root).findings)


# --- one by one


@given(st.lists(st.tuples(st.integers(0, 3), *[st.integers(0, 12)] * 4), max_size=14))
def test_same_boxes_are_those_whose_iou_says_so(rows: list[tuple[int, ...]]) -> None:
    photo = np.array([row[0] for row in rows], np.int64)
    boxes = np.array([[x, y, x + w + 1, y + h + 1] for _, x, y, w, h in rows], np.float64).reshape(-1, 4)
    overlap = iou(boxes, boxes)
    right = [(i, j) for j in range(len(rows)) for i in range(j) if photo[i] == photo[j] and overlap[i, j] >= audit.SAME]
    assert audit.same_boxes(photo, boxes) == right


@pytest.mark.parametrize(
    ("rare", "frequent", "alike"),
    [
        ("lemonede", "lemonade", True),
        ("lemonad", "lemonade", True),
        ("lemoonade", "lemonade", True),
        ("lmeonade", "lemonade", True),
        ("limonada", "lemonade", False),
        ("can", "cans", False),  # too short to be a slip of the pen
        ("milk 1l", "milk 2l", False),
    ],
)
def test_names_one_letter_apart(rare: str, frequent: str, alike: bool) -> None:
    counts = Counter({rare: 2, frequent: 100})
    assert audit.similar_names([frequent, rare], counts) == ([(rare, frequent)] if alike else [])
    assert audit.similar_names([frequent, rare], Counter({rare: 50, frequent: 100})) == []


def test_the_listed_spelling_wins_else_the_most_frequent(tmp_path: Path) -> None:
    root = make_voc(tmp_path)
    for index, name in enumerate(("Can", "Can", "CAN ", "ca-n", "box", "box")):
        save_xml(root / "Annotations" / f"p{index}.xml", [(name, CAN[1])])
    assert audit.spellings(run(root).survey) == dict.fromkeys(("CAN", "Can", "ca-n"), "Can")
    (root / "classes.txt").write_text("ca-n\nbox\n")
    assert set(audit.spellings(run(root).survey).values()) == {"ca-n"}


def test_tiny_is_meant_on_the_training_canvas(tmp_path: Path) -> None:
    root = make_voc(tmp_path, hw=(48, 64))
    save_xml(root / "Annotations" / "p0.xml", [("can", (0, 0, 6, 40))])  # 6 of 64 pixels

    def tiny(size: tuple[int, int], rule: str) -> list[str]:
        found = audit.run(Data(root=root), size, rule, workers=1)  # type: ignore[arg-type]
        return [finding.file for finding in of(found, "tiny box")]

    assert tiny((96, 96), "stretch") == []  # 9 px
    assert tiny((96, 72), "stretch") == ["Annotations/p0.xml"]  # 6.75 px
    assert tiny((48, 640), "stretch") == []
    assert tiny((48, 640), "letterbox") == ["Annotations/p0.xml"]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_cut_off_jpeg_is_found_though_it_is_read_at_an_eighth(
    tmp_path: Path, progressive: bool, share: float
) -> None:
    content = save_image(tmp_path / "a.jpg", (1200, 1600), progressive=progressive).read_bytes()
    whole = imaging.inspect(content, 128)
    assert whole.image.shape == (150, 200, 3)
    full = Image.fromarray(imaging.decode(content)).resize((200, 150), Image.Resampling.BOX)
    assert np.abs(np.asarray(full).astype(int) - whole.image).mean() < 2
    with pytest.raises(UserError, match="cut-off"):
        imaging.inspect(content[: int(len(content) * share)], 128)


def test_sixteen_bits_are_found_in_colour_too(tmp_path: Path) -> None:
    # A PNG of 16-bit RGB, which Pillow reads but does not write.
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + bytes(range(6)) * 4 for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert imaging.inspect(content, 128).pixels == "16-bit"


def test_processes_find_what_one_finds(messy: Messy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_ALONE", 0)
    monkeypatch.setattr(audit, "_CHUNK", 16)
    ticks: list[tuple[int, int]] = []
    found = audit.run(Data(root=messy.root), workers=2, progress=lambda *tick: ticks.append(tick))
    assert found.findings == messy.audits["error"].findings
    assert ticks[-1][0] == ticks[-1][1]


def test_no_data_set_at_all_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images here"):
        run(tmp_path)


# --- reports


def test_the_command_line(messy: Messy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*words: str) -> int:
        with pytest.raises(SystemExit) as caught:
            cli.main(["data", "audit", *words])
        return int(caught.value.code or 0)

    files = ("--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html"), "--workers", "1")
    assert call(str(messy.root), *files) == 0
    out = capsys.readouterr().out
    for kind in KINDS:
        row = re.search(rf"^{KINDS[kind].level} +{kind} +(\d+) ", out, re.MULTILINE)
        assert int(row[1] if row else 0) == len(of(messy.audits["error"], kind))
    assert "Training refuses this data set" in out
    assert call(str(messy.root), "--workers", "1", "--strict") == 1
    report = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert [entry["kind"] for entry in report["findings"]] == [f.kind for f in messy.audits["error"].findings]
    assert report["kinds"]["box inverted"] == {"level": "change", "count": 1, "advice": KINDS["box inverted"].advice}
    assert (report["photos"], report["splits"]["val"], report["classes"]["biscuit"]) == (68, 5, 1)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    for kind in report["kinds"]:
        assert f'id="{kind.replace(" ", "-")}"' in text
        assert KINDS[kind].advice.replace("'", "&#39;") in text
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", text)
    assert call(str(messy.root / "nowhere")) == 2


def test_a_config_gives_canvas_and_data_settings(messy: Messy, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", "audit", str(messy.root), "--config", "ssd_shelf.yaml", "--unlabelled", "skip"])
    out = capsys.readouterr().out
    assert "on a canvas of 320x240" in out
    assert " image skipped " in out


def test_the_page_stays_small_and_escapes_names(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "set", train=30)
    hostile = '<script>alert("x")</script>'
    for index in range(30):
        objects = [("can", (1.0 * k, 2, 1.0 * k, 30)) for k in range(10)]
        save_xml(root / "Annotations" / f"p{index}.xml", [*objects, (hostile, CAN[1])])
    found = run(root)
    assert len(of(found, "box without area")) == 300
    audit.write_html(tmp_path / "a.html", found)
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    section = text.partition('id="box-without-area"')[2].partition("</section>")[0]
    assert section.count("<img") == 12
    assert section.count("<tr>") == 1 + 200
    assert "100 more" in section


# --- fix


@pytest.fixture(scope="module")
def mended(messy: Messy) -> tuple[Path, list[Finding]]:
    out = messy.root.parent / "mended"
    before = contents(messy.root)
    changes = fix.fix(messy.audits["error"], out)
    assert contents(messy.root) == before
    return out, changes


def objects(root: Path) -> int:
    """<object>s in all the XML that can be parsed."""
    count = 0
    for path in root.rglob("*.xml"):
        try:
            count += len(voc.tree(path.read_bytes()).findall("object"))
        except voc.BadFileError:
            continue
    return count


def test_the_mended_copy_passes(mended: tuple[Path, list[Finding]]) -> None:
    found = run(mended[0])
    assert [finding for finding in found.findings if level(finding) != "note" or finding.kind in audit.LEAKS] == []
    assert not found.bad()
    for kind in ("size missing", "filename differs", "wrong extension", "duplicate box", "class names alike"):
        assert of(found, kind) == []
    again = fix.fix(found, mended[0].with_name("again"))
    assert again == []
    first, second = contents(mended[0]), contents(mended[0].with_name("again"))
    del first[fix.LOG], second[fix.LOG]
    assert first == second


def test_training_takes_the_mended_copy_as_it_is(mended: tuple[Path, list[Finding]]) -> None:
    for split in ("train", "val"):
        told = scan.scan(Data(root=mended[0]), split).findings
        assert {finding.kind for finding in told} == {"coordinates"}


def test_no_object_is_lost_without_a_line(messy: Messy, mended: tuple[Path, list[Finding]]) -> None:
    out, changes = mended
    lost = [
        change
        for change in changes
        if change.action in ("left out", "dropped") and (change.box is not None or change.kind == "object unreadable")
    ]
    assert objects(messy.root) - objects(out) == len(lost) == 15
    written = [json.loads(line) for line in (out / fix.LOG).read_text(encoding="utf-8").splitlines()]
    assert [entry["what"] for entry in written] == [change.what for change in changes]


def test_an_annotation_of_a_name_that_is_taken_is_left_out_object_by_object(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "set")
    save_xml(root / "Annotations" / "p0.XML", [CAN, BOX, ("can", (30, 2, 50, 40))])
    if len(list((root / "Annotations").iterdir())) == 6:
        pytest.skip("the file system does not tell p0.xml from p0.XML")
    changes = fix.fix(run(root), tmp_path / "out")
    assert {(change.kind, change.action) for change in changes} == {("same name twice", "left out")}
    assert len([change for change in changes if change.box]) + objects(tmp_path / "out") == 3 + 12


def test_what_is_sound_is_copied_byte_for_byte(messy: Messy, mended: tuple[Path, list[Finding]]) -> None:
    before, after = contents(messy.root), contents(mended[0])
    for name in ("sound05", "windows", "held1", "grey", "tiny_box"):
        assert after[f"Annotations/{name}.xml"] == before[f"Annotations/{name}.xml"]
    for name, content in after.items():
        if name.startswith("JPEGImages/"):
            assert content == before["JPEGImages/lying.jpg" if name == "JPEGImages/lying.png" else name]


def test_what_is_mended(mended: tuple[Path, list[Finding]]) -> None:
    out, _ = mended

    def read(stem: str) -> dict[str, NDArray[np.float64]]:
        found = voc.read(out / "Annotations" / f"{stem}.xml")
        return dict(zip(found.names, found.boxes.tolist(), strict=True))

    height, _ = mess.HW
    assert read("box_inverted")["can"] == [65, 30, 85, 100]
    assert read("box_partly_outside")["can"] == [0, 60, 40, height]
    assert read("sideways")["can"] == [height - 90, 10, height - 20, 60]
    assert read("shrunk")["can"] == [5, 10, 30, 45]
    assert voc.read(out / "Annotations" / "box_without_area.xml").names == ("can", "lemonade")
    assert voc.read(out / "Annotations" / "sizeless.xml").hw == mess.HW
    assert voc.read(out / "Annotations" / "sideways.xml").hw == mess.HW[::-1]
    assert voc.read(out / "Annotations" / "slip.xml").flags.tolist() == [DIFFICULT, 0]
    assert voc.read(out / "Annotations" / "lying.xml").filename == "lying.png"
    assert voc.read(out / "Annotations" / "shout.xml").names == ("can", "lemonade", "can")
    assert (out / "classes.txt").read_text().split() == ["can", "lemonade", "biscuit", "lemonede", "gadget"]
    assert not (out / "JPEGImages" / "again.jpg").exists()
    train = (out / "ImageSets" / "Main" / "train.txt").read_text().split()
    assert "sound02" not in train
    assert train.count("sound03") == 1
    assert not {"again", "cut", "rotten", "bare", "lonely", "broken", "ghost"} & set(train)


def test_what_detkit_does_not_know_stays(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "set")
    extra = "<attributes><attribute><name>brand</name></attribute></attributes><pose>Left</pose>"
    text = voc_xml("p0.jpg", (48, 64), np.array([[-4, 2, 30, 40]]), ["can"])
    text = text.replace("<pose>Unspecified</pose>", extra).replace("<annotation>", "<annotation><owner>Ann</owner>")
    (root / "Annotations" / "p0.xml").write_text(text)
    fix.fix(run(root), tmp_path / "out")
    mended = (tmp_path / "out" / "Annotations" / "p0.xml").read_text()
    assert mended == text.replace("<xmin>-4<", "<xmin>0<")


def test_a_photo_without_annotation_becomes_a_negative(messy: Messy) -> None:
    out = messy.root.parent / "negative"
    fix.fix(messy.audits["negative"], out)
    assert voc.read(out / "Annotations" / "bare.xml").names == ()
    assert (out / "JPEGImages" / "bare.jpg").exists()


def test_corners_keep_their_convention(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "set", train=3)
    for path in (root / "Annotations").iterdir():
        text = voc_xml("x.jpg", (48, 64), np.array([[1, 1, 30, 40], [2, 3, 99, 20]]), ["can", "box"])
        path.write_text(text.replace("Unknown", "The VOC2007 Database").replace("x.jpg", f"{path.stem}.jpg"))
    before = scan.scan(Data(root=root), "train")
    assert before.boxes[:2].tolist() == [[0, 0, 30, 40], [1, 2, 64, 20]]
    fix.fix(run(root), tmp_path / "out")
    after = scan.scan(Data(root=tmp_path / "out"), "train")
    assert after.boxes.tolist() == before.boxes.tolist()
    assert "<xmin>2</xmin>" in (tmp_path / "out" / "Annotations" / "p0.xml").read_text()


def test_another_format_becomes_voc(tmp_path: Path) -> None:
    root = tmp_path / "set"
    make_coco(root)
    fix.fix(run(root, format="coco"), tmp_path / "out")
    mended = run(tmp_path / "out")
    assert not [finding for finding in mended.findings if level(finding) != "note"]
    source = run(root, format="coco")
    assert len(mended.survey.labels.names) == len(source.survey.labels.names) == 4
    assert (tmp_path / "out" / "classes.txt").read_text().split() == ["can", "box"]


def test_folders_and_hash_splits_are_kept(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for index in range(8):
        save_image(root / f"shop {index % 2}" / f"p{index}.jpg", seed=index)
        save_xml(root / f"shop {index % 2}" / f"p{index}.xml", [CAN])
    fix.fix(run(root, val_share=0.5), tmp_path / "out")
    assert (tmp_path / "out" / "Annotations" / "shop 1" / "p3.xml").exists()
    for split in ("train", "val"):
        one, other = scan.scan(Data(root=root, val_share=0.5), split), scan.scan(Data(root=tmp_path / "out"), split)
        assert [f"JPEGImages/{one.name(i)}" for i in range(len(one))] == [other.name(i) for i in range(len(other))]


def test_the_copy_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_voc(tmp_path / "set")
    found = run(root)

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fix.fix(found, tmp_path / "out", stop)
    assert [*tmp_path.iterdir()] == [root]
    (root / "JPEGImages" / "p3.jpg").unlink()
    with pytest.raises(UserError, match=r"p3\.jpg"):
        fix.fix(found, tmp_path / "out")
    assert [*tmp_path.iterdir()] == [root]


def test_nothing_is_written_over_or_into_the_source(tmp_path: Path) -> None:
    root = make_voc(tmp_path / "set")
    found = run(root)
    put(tmp_path / "full" / "mine.txt", "mine")
    with pytest.raises(UserError, match="not empty"):
        fix.fix(found, tmp_path / "full")
    with pytest.raises(UserError, match="inside the data set"):
        fix.fix(found, root / "mended")
    (tmp_path / "empty").mkdir()
    fix.fix(found, tmp_path / "empty")
    assert (tmp_path / "empty" / fix.LOG).exists()

"""Whatever the files hold: no crash, and each object is either read or told of."""

from pathlib import Path
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detkit import geometry
from detkit.config import Data
from detkit.data import scan, voc
from detkit.data.findings import KINDS
from detkit.errors import UserError
from tests.data.photos import save_image, save_xml

pytestmark = pytest.mark.slow
MANY = settings(max_examples=10_000, suppress_health_check=list(HealthCheck), deadline=None)

TAGS = ["object", "name", "bndbox", "xmin", "ymin", "xmax", "ymax", "difficult", "diffcult", "truncated", "occluded"]
TAGS += ["size", "width", "height", "filename", "source", "database", "part", "pose", "Object", "NAME", "xmim", "&"]
VALUES = ["0", "1", "12", "3.5", "-4", "1e9", "nan", "inf", "12,5", "", " 7 ", "can", "Unspecified", "𝟙", "1_0"]
TEXT = st.one_of(
    st.sampled_from(VALUES),
    st.text(max_size=5).map(escape),
    st.floats().map(str),
)


@st.composite
def element(draw: st.DrawFn, depth: int = 0) -> str:
    tag = draw(st.sampled_from(TAGS))
    inside = draw(TEXT)
    if depth < 3:
        inside += "".join(draw(st.lists(element(depth + 1), max_size=4)))
    return f"<{tag}>{inside}</{tag}>"


@st.composite
def annotation(draw: st.DrawFn) -> str:
    objects = []
    for _ in range(draw(st.integers(0, 3))):
        corners = [f"<{tag}>{draw(TEXT)}</{tag}>" for tag in ("xmin", "ymin", "xmax", "ymax")]
        parts = [f"<name>{draw(TEXT)}</name>", f"<bndbox>{''.join(draw(st.permutations(corners)))}</bndbox>"]
        parts += draw(st.lists(element(1), max_size=2))
        kept = draw(st.permutations(parts))[: draw(st.integers(0, len(parts)))]
        objects.append(f"<object>{''.join(kept)}</object>")
    parts = draw(st.permutations([*objects, *draw(st.lists(element(), max_size=3))]))
    return f"<annotation>{''.join(parts)}</annotation>"


@MANY
@given(annotation() | element())
def test_each_object_is_read_or_told_of(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes(text.encode("utf-8", "replace"))
    labels, _ = voc.parse(tmp_path, ["a.xml"])
    remarks = [remark for remark in labels.remarks if KINDS[remark.kind].level == "error"]
    assert np.isfinite(labels.boxes).all()
    assert "" not in labels.vocabulary or not len(labels.names)
    try:
        root = ET.fromstring(path.read_bytes())
    except ET.ParseError:
        assert remarks
        return
    objects = root.findall("object") if root.tag == "annotation" else []
    untold = len(objects) - len(labels.names)
    whole_file = any(remark.kind == "annotation unreadable" for remark in remarks)
    assert whole_file or (untold <= len(remarks) and bool(untold) == bool(remarks))
    if not remarks:
        assert len(voc.read(path).names) == len(objects)
    else:
        with pytest.raises(UserError):
            voc.read(path)


@MANY
@given(st.data())
def test_damaged_bytes_never_crash_the_parser(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a.xml"
    if not path.exists():
        save_xml(path, [("can", (1, 2, 3, 4)), ("käse", (5.5, 6, 7, 8))])
        (tmp_path / "whole").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        content[start:end] = data.draw(st.binary(max_size=12))
    path.write_bytes(content)
    labels, _ = voc.parse(tmp_path, ["a.xml"])
    assert len(labels) == 1
    if not any(KINDS[remark.kind].level == "error" for remark in labels.remarks):
        assert len(voc.read(path).names) == len(labels.names)
        return
    with pytest.raises(UserError) as caught:
        voc.read(path)
    assert "\n" not in str(caught.value)


CORNER = st.one_of(st.integers(-20, 90), st.floats(-20, 90), st.floats(-1e6, 1e6))


@settings(MANY, max_examples=2_000)
@given(st.lists(st.tuples(CORNER, CORNER, CORNER, CORNER), min_size=1, max_size=5))
def test_no_box_is_changed_or_lost_unsaid(tmp_path: Path, boxes: list[tuple[float, float, float, float]]) -> None:
    if not (tmp_path / "a.png").exists():
        save_image(tmp_path / "a.png")
    save_xml(tmp_path / "a.xml", [("can", box) for box in boxes])
    dataset = scan.scan(Data(root=tmp_path, convention="edges"), "all")
    dropped = [finding for finding in dataset.findings if finding.action == "dropped"]
    changed = [finding for finding in dataset.findings if finding.box and finding.action != "dropped"]
    assert len(dataset[0].labels) + len(dropped) == len(boxes)
    kept = {tuple(box) for box in dataset[0].boxes.tolist()}
    told = {finding.box for finding in (*dropped, *changed)}
    for box in boxes:
        x1, y1, x2, y2 = box
        assert box in kept or box in told or (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)) in told


SIDE = st.integers(1, 5000)
SHARES = st.lists(st.floats(0, 1), min_size=4, max_size=4)


@MANY
@given(
    SIDE, SIDE, SIDE, SIDE, st.sampled_from(["stretch", "letterbox"]), st.lists(st.floats(0, 1), min_size=4, max_size=4)
)
def test_the_way_to_the_canvas_and_back(
    height: int, width: int, canvas_height: int, canvas_width: int, rule: geometry.Rule, shares: list[float]
) -> None:
    plan = geometry.plan((height, width), (canvas_height, canvas_width), rule)
    assert 1 <= plan.inner[0] <= canvas_height
    assert 1 <= plan.inner[1] <= canvas_width
    x, y = sorted(shares[::2]), sorted(shares[1::2])
    box = np.array([[x[0] * width, y[0] * height, x[1] * width, y[1] * height]])
    there = plan.to_canvas(box)
    assert (there >= 0).all()
    assert (there <= np.tile(plan.inner[::-1], 2) * (1 + 1e-12)).all()
    assert np.allclose(plan.to_source(there), box, atol=1e-9 * max(height, width))


@MANY
@given(SIDE, SIDE, st.integers(1, 8), SHARES)
def test_an_exif_turn_and_back(height: int, width: int, orientation: int, shares: list[float]) -> None:
    x, y = sorted(shares[::2]), sorted(shares[1::2])
    box = np.array([[x[0] * width, y[0] * height, x[1] * width, y[1] * height]])
    turned = geometry.turned(box, (height, width), orientation)
    upright = (width, height) if orientation >= 5 else (height, width)
    assert (turned[:, 2:] >= turned[:, :2]).all()
    assert (turned >= 0).all()
    assert (turned <= np.tile(upright[::-1], 2)).all()
    back = {6: 8, 8: 6}.get(orientation, orientation)
    assert np.allclose(geometry.turned(turned, upright, back), box, atol=1e-9 * max(height, width))

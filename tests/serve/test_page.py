"""The page, in a real browser."""

import csv
import io
import json
import shutil
import sys
import zipfile
from xml.etree import ElementTree as ET

import pytest
from playwright.sync_api import expect, sync_playwright

from detkit.manifest import Decision
from tests.serve.conftest import photo, save, serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Debian's Chromium")]
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as play:
        options = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    other = save(folder / "b.onnx", score=0.8)
    chosen = save(folder / "c.onnx", decision=Decision(thresholds=(0.4, 0.4, 0.95)))
    with serving(save(folder / "a.onnx"), f"other={other}", f"chosen={chosen}", queue=8) as one:
        yield one


@pytest.fixture
def page(browser, server):
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(20_000)
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: faults.append(request.url) if not local(request.url, server) else None)
    page.goto(server.url)
    expect(page.locator("#model option")).to_have_count(3)
    yield page
    assert not faults, faults
    page.close()


def local(url, server):
    return url.startswith((server.url, "blob:", "data:"))


def upload(page, *files):
    page.set_input_files("#files", [{"name": n, "mimeType": "image/png", "buffer": b} for n, b in files])
    expect(page.locator("#status")).to_have_text("")


def slide(page, score):
    page.locator("#score").evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')); }", str(score))


def test_upload_slider_filter_and_counts(page):
    upload(page, ("shelf.png", photo()))
    boxes = page.locator(".box")
    expect(boxes).to_have_count(3)
    expect(page.locator(".box span").last).to_have_text("牛奶90")  # the best, on top
    expect(page.locator("#value")).to_have_text("0.40")  # the model's
    expect(page.locator("#table caption")).to_have_text("shelf.png: 3 found")
    expect(page.locator("#table tbody tr").first).to_contain_text("牛奶")
    slide(page, 0.55)
    expect(boxes).to_have_count(2)
    page.get_by_role("checkbox", name="milk").uncheck()
    expect(boxes).to_have_count(1)
    expect(page.locator("#photos .count")).to_have_text("1")
    page.get_by_role("button", name="None").click()
    expect(boxes).to_have_count(0)
    page.get_by_role("button", name="All").click()
    slide(page, 0.05)
    expect(boxes).to_have_count(3)
    assert page.locator("#classes b").all_inner_texts() == ["1", "1", "1"]


def test_boxes_lie_where_they_were_found(page):
    upload(page, ("wide.png", photo(size=(192, 128))))
    image, box = page.locator("#image").bounding_box(), page.locator(".box").last.bounding_box()
    scale = image["width"] / 192
    found = [box["x"] - image["x"], box["y"] - image["y"], box["width"], box["height"]]
    assert found == pytest.approx([96 * scale, 24 * scale, 96 * scale, 72 * scale], abs=1)


def test_another_model_looks_again(page):
    upload(page, ("a.png", photo()))
    page.get_by_label("Model").select_option(index=1)
    expect(page.locator("#value")).to_have_text("0.80")
    expect(page.locator(".box")).to_have_count(1)


def test_a_late_answer_of_the_model_before_is_not_shown(page):
    held = []
    page.route("**/v1/detect?model=shelf*", lambda route: held.append(route))
    page.set_input_files("#files", [{"name": "a.png", "mimeType": "image/png", "buffer": photo()}])
    page.get_by_label("Model").select_option(index=1)
    expect(page.locator(".box")).to_have_count(1)
    with page.expect_response("**/v1/detect?model=shelf*"):
        held[0].fulfill(json={"photos": [{"detections": [], "width": 96, "height": 64}]})
    page.wait_for_timeout(200)
    expect(page.locator(".box")).to_have_count(1)


def test_each_class_has_the_threshold_that_the_model_keeps_until_the_slider_moves(page):
    upload(page, ("a.png", photo()))
    page.get_by_label("Model").select_option(index=2)
    expect(page.locator("#value")).to_have_text("each class its own")
    expect(page.locator(".box")).to_have_count(2)
    with page.expect_download() as download:
        page.get_by_role("button", name="VOC XML").click()
    assert download.value.path().read_text(encoding="utf-8").count("<object>") == 2
    slide(page, 0.4)
    expect(page.locator("#value")).to_have_text("0.40")
    expect(page.locator(".box")).to_have_count(3)


def test_downloads(page):
    upload(page, ('a,"1".png', photo()), ("b.png", photo(200)))
    slide(page, 0.5)

    def content(name):
        with page.expect_download() as download:
            page.get_by_role("button", name=name, exact=True).click()
        return download.value.suggested_filename, download.value.path().read_bytes()

    name, text = content("JSON")
    assert name == "detections.json"
    told = json.loads(text)
    assert [one["image"] for one in told["photos"]] == ['a,"1".png', "b.png"]
    assert [len(one["detections"]) for one in told["photos"]] == [3, 1]
    assert told["photos"][0]["detections"][0] == {"label": "牛奶", "score": 0.9, "box": [48, 12, 96, 48]}

    name, text = content("CSV")
    rows = list(csv.DictReader(io.StringIO(text.decode("utf-8-sig"))))
    assert [(row["image"], row["label"]) for row in rows] == [
        ('a,"1".png', "牛奶"), ('a,"1".png', "milk"), ('a,"1".png', "żur"), ("b.png", "牛奶")
    ]  # fmt: skip
    assert rows[0]["x2"] == "96"

    page.get_by_role("checkbox", name="milk").uncheck()
    name, packed = content("VOC XML")
    assert name == "annotations.zip"
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        trees = [ET.fromstring(archive.read(each)) for each in archive.namelist()]
    assert [[one.findtext("name") for one in tree.iter("object")] for tree in trees] == [["牛奶", "żur"], ["牛奶"]]


def test_annotations_of_more_photos_than_a_request_may_have(page):
    upload(page, *(("żur.png", photo()) for _ in range(33)))
    with page.expect_download() as download:
        page.get_by_role("button", name="VOC XML").click()
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["żur.xml", *(f"żur-{n}.xml" for n in range(2, 34))]
        assert {len(list(ET.fromstring(archive.read(name)).iter("object"))) for name in archive.namelist()} == {3}


def test_one_photo_s_annotation_is_one_file(page):
    upload(page, ("one.png", photo()))
    with page.expect_download() as download:
        page.get_by_role("button", name="VOC XML").click()
    assert download.value.suggested_filename == "one.xml"
    assert ET.parse(download.value.path()).findtext("filename") == "one.png"


def test_a_text_file_renamed_jpg_is_told_and_the_others_go_on(page):
    upload(page, ("notes.jpg", b"milk, eggs"), ("good.png", photo()))
    expect(page.get_by_role("alert")).to_have_text("notes.jpg: not an image that can be read")
    expect(page.locator(".box")).to_have_count(0)
    page.get_by_role("button", name="good.png").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator(".box")).to_have_count(3)


def test_the_keyboard_is_enough(page):
    page.keyboard.press("Tab")  # the model
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
    chooser.value.set_files([{"name": f"{n}.png", "mimeType": "image/png", "buffer": photo()} for n in (1, 2)])
    expect(page.locator("#photos .count")).to_have_count(2)
    for _ in range(3):  # the camera, the first photo, the second
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#table caption")).to_contain_text("2.png")
    page.keyboard.press("Tab")  # the slider
    page.keyboard.press("End")
    expect(page.locator(".box")).to_have_count(0)
    page.keyboard.press("Home")
    expect(page.locator(".box")).to_have_count(3)
    for _ in range(3):  # All, None, the first class
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator(".box")).to_have_count(2)
    assert page.evaluate("document.activeElement.type") == "checkbox"  # it is still where it was


def test_the_camera(page):
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take the photo").click()
    expect(page.locator("#table caption")).to_contain_text("camera-1.jpg")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_more_photos_than_the_queue_holds(page):
    upload(page, *((f"{n}.png", photo()) for n in range(20)))
    expect(page.locator("#photos .count")).to_have_count(20)


def test_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    upload(page, ("a.png", photo()))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    top = {name: page.locator(name).bounding_box()["y"] for name in ("#stage", "#score", "#table")}
    assert top["#stage"] < top["#score"] < top["#table"]  # however long the table is
    for button in page.get_by_role("button").all():
        assert button.bounding_box()["height"] >= 40


def test_light_and_dark_have_contrast(page):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colours = page.evaluate(
            "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name].match(/\\d+/g).map(Number))"
        )
        text, ground = (sum(colour[:3]) for colour in colours)
        assert (text < ground) == (scheme == "light")
        assert abs(text - ground) > 500


def test_a_token_is_asked_for(browser, tmp_path):
    with serving(save(tmp_path / "m.onnx"), token="s3cret") as one:
        page = browser.new_page()
        page.goto(one.url)
        expect(page.get_by_role("alert")).to_contain_text("a token is needed")
        page.get_by_label("Token").fill("s3cret")
        page.keyboard.press("Enter")
        expect(page.locator("#model option")).to_have_count(1)
        upload(page, ("a.png", photo()))
        expect(page.locator(".box")).to_have_count(3)
        page.close()

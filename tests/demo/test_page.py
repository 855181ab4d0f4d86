"""The page, as a user meets it: the real program, in a real browser and under many requests at once."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from browsing import WIDTHS, faint_texts, problems_of, tab_stops
from demo_run import save_run
from PIL import Image
from processes import environment

from umae.demo.models import load_model
from umae.demo.views import enlarged

pytest.importorskip("gradio")
pytestmark = pytest.mark.slow
TABS = ("Reconstruct", "Attention", "Neighbours", "Map")


def photographs(folder: Path) -> Path:
    numbers = np.random.default_rng(0)
    for i in range(24):
        file = folder / "abc"[i % 3] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = 80 * (i % 3) + numbers.integers(0, 60, (40, 48, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two runs, a folder of images, and images for upload."""
    top = tmp_path_factory.mktemp("demo")
    for name, changes in {"run_a": {}, "run_b": {"patch_size": 8, "norm_pix_loss": False}}.items():
        save_run(top / name, size=32, image_size=32, **changes)
    photographs(top / "images")
    good = top / "good"
    good.mkdir()
    colours = Image.effect_mandelbrot((60, 50), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    colours.save(good / "photo.jpg")
    colours.convert("CMYK").save(good / "cmyk.jpg")
    Image.fromarray((np.arange(3000, dtype=np.uint16) * 20).reshape(50, 60)).save(good / "sixteen.png")
    colours.save(good / "animated.gif", save_all=True, append_images=[colours.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    colours.save(good / "rotated.jpg", exif=exif)
    broken = top / "broken"
    broken.mkdir()
    (broken / "text.png").write_text("not an image")
    (broken / "cut.jpg").write_bytes((good / "photo.jpg").read_bytes()[:-300])
    (broken / "<img src=x onerror=alert(1)>.png").write_bytes(b"")
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    (broken / "huge.png").write_bytes(huge.getvalue())
    return top


class Page:
    def __init__(self, process: subprocess.Popen, url: str):
        self.process, self.url = process, url

    def memory(self) -> int:
        """Bytes of the server's process."""
        return psutil.Process(self.process.pid).memory_info().rss


@pytest.fixture(scope="module")
def page(files):
    """The program, showing two runs and a folder."""
    words = ["-m", "umae", "demo", "run_a", "run_b", "--images", "images"]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=files,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    assert "shows the page" in line, process.stderr.read()
    yield Page(process, line.split()[0].rstrip("/"))
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in error, error
    assert list(Path(os.environ["TMPDIR"]).glob("umae-demo-*")) == [], "uploads are removed"


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_models_without_a_decoder_or_of_other_channels_have_a_page(tmp_path, channels):
    from umae.data.decoding import Reading
    from umae.data.inputs import evaluation_processor
    from umae.demo.page import build

    run = save_run(tmp_path / "run", num_channels=channels)
    processor = evaluation_processor((16, 16), Reading(channels), (0.5,) * channels, (0.5,) * channels)
    processor.save_pretrained(run)
    whole = load_model(str(run))
    whole.encoder.save_pretrained(tmp_path / "encoder")
    processor.save_pretrained(tmp_path / "encoder")
    page = build([whole, load_model(str(tmp_path / "encoder"))])
    text = json.dumps(page.get_config_file(), default=str)
    assert "These weights have no decoder" in text and "No folder of images was given" in text
    assert (f"It sees {channels} channel" in text) == (channels != 3)


def status_of(url: str) -> int:
    try:
        return urllib.request.urlopen(url, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def test_only_this_machine_reaches_the_page_and_no_file_of_it_is_served(page, files):
    assert status_of(page.url) == 200
    (served,) = {
        connection.laddr.ip
        for connection in psutil.Process(page.process.pid).net_connections()
        if connection.status == "LISTEN"
    }
    assert served == "127.0.0.1"
    inside = [files / "run_a" / "config.json", files / "images" / "a" / "0.png", "run_a/config.json"]
    for path in ("/etc/passwd", "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", *inside):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            assert status_of(f"{page.url}/{route}{path}") in (403, 404), (route, path)
    with urllib.request.urlopen(f"{page.url}/config", timeout=30) as answer:
        config = json.load(answer)
    assert config["analytics_enabled"] is False
    assert str(files) not in json.dumps(config)


@pytest.fixture
def scheme() -> str:
    return "light"


@pytest.fixture(params=WIDTHS.values(), ids=WIDTHS)
def tab(browser, page, scheme, request):
    """The page in the browser; at the end it has had no errors and has asked no other machine."""
    tab = browser.new_page(viewport={"width": request.param, "height": 900}, color_scheme=scheme)
    problems = problems_of(tab, page.url, "data:", "blob:")
    tab.goto(page.url)
    tab.locator(".clickable img").first.wait_for(timeout=60_000)
    yield tab
    for name in TABS:
        tab.get_by_role("tab", name=name).click()
        assert tab.evaluate("document.documentElement.scrollWidth") == request.param, f"{name} fits the screen"
    tab.close()
    assert problems == []


def shown(tab, label: str, number: int = 0) -> np.ndarray:
    """The pixels of an image on the page, by its label."""
    image = tab.locator(f'img[alt="{label}"]').nth(number)
    image.wait_for(state="attached", timeout=30_000)
    with urllib.request.urlopen(image.get_attribute("src"), timeout=30) as answer:
        return np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB")).astype(int)


def until(condition, seconds: float = 30):
    """Wait until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


SEES = "What it sees (click patches)"


def test_patches_can_be_hidden_at_random_and_by_clicks(tab):
    before = [shown(tab, SEES, number) for number in (0, 1)]
    tab.get_by_label("number input for Share of hidden patches").fill("0")
    tab.keyboard.press("Tab")
    original = shown(tab, "Original")
    until(lambda: (shown(tab, SEES) == original).all())
    assert (before[0] != original).any()
    # A click on the last patch of the second run, whose patches are twice as large, hides one of the first run's, too
    image = tab.locator(f'img[alt="{SEES}"]').nth(1)
    image.scroll_into_view_if_needed()
    box = image.bounding_box()
    image.click(position={"x": box["width"] - 3, "y": box["height"] - 3})
    until(lambda: (shown(tab, SEES) != original).any())
    side = len(original)
    for number, patches in enumerate((8, 4)):
        changed = (shown(tab, SEES, number) != shown(tab, "Original", number)).any(axis=2)
        assert changed[-side // patches :, -side // patches :].mean() > 0.9
        assert not changed[: -side // patches].any() and not changed[:, : -side // patches].any()
    # All hidden by the slider but one; hiding that one, too, is refused
    tab.get_by_label("number input for Share of hidden patches").fill("1")
    tab.keyboard.press("Tab")
    until(lambda: (shown(tab, SEES) != original).any(axis=2).mean() > 0.9)


def test_every_tab_answers_for_an_example_and_for_an_upload(tab, files):
    tab.get_by_role("tab", name="Attention").click()
    label = "run_a: attention of the class token to every patch"
    first = shown(tab, label)
    tab.get_by_label("2", exact=True).check()
    until(lambda: (shown(tab, label).shape != first.shape) or (shown(tab, label) != first).any())

    tab.get_by_role("tab", name="Map").click()
    assert tab.locator("td", has_text=re.compile("^effective rank$")).count() == 1
    map_label = "run_b: every image of the folder, coloured by label"
    by_class_token = shown(tab, map_label)
    tab.get_by_role("radio", name="mean of the patches").locator("visible=true").check()
    until(lambda: (shown(tab, map_label) != by_class_token).any())

    tab.get_by_role("tab", name="Neighbours").click()
    captions = tab.locator(".found .caption-label")
    until(lambda: captions.count() == 4 * 8)
    assert re.fullmatch(r"[abc], -?\d\.\d\d", captions.first.inner_text())
    clicked = shown(tab, "Click a patch")
    image = tab.locator('img[alt="Click a patch"]')
    image.scroll_into_view_if_needed()
    image.click(position={"x": 5, "y": 5})
    until(lambda: (shown(tab, "Click a patch") != clicked).any())
    changed = (shown(tab, "Click a patch") != clicked).any(axis=2)
    assert changed[: len(changed) // 4, : len(changed) // 4].any(), "the frame is in the corner that was clicked"

    tab.get_by_role("tab", name="Reconstruct").click()
    before = shown(tab, "Original")
    tab.get_by_label("Thumbnail 5 of 12").click()
    until(lambda: (shown(tab, "Original") != before).any())
    model = load_model(str(files / "run_a"))
    for file in sorted((files / "good").iterdir()):
        expected = np.asarray(enlarged(model.pixels(model.read(file, file.name))))
        tab.locator("input[type=file]").set_input_files(file)
        until(lambda expected=expected: (shown(tab, "Original") == expected).all())
        until(lambda: tab.get_by_text("Drop File Here").count() == 1)
    before = shown(tab, "Original")
    for file in sorted((files / "broken").iterdir()):
        tab.locator("input[type=file]").set_input_files(file)
        toast = tab.get_by_text("expected a whole image").first
        toast.wait_for(timeout=30_000)
        text = toast.inner_text()
        assert text.startswith(("text.png: ", "cut.jpg: ", "huge.png: ", "img src")) and "Traceback" not in text
        tab.locator(".toast-close").first.click()
        until(lambda: tab.get_by_text("Drop File Here").count() == 1)
    assert (shown(tab, "Original") == before).all(), "the page still shows the image before"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_is_legible_and_the_focus_visible(tab, scheme):
    assert (tab.locator(".dark").count() > 0) == (scheme == "dark")
    for name in TABS:
        tab.get_by_role("tab", name=name).click()
        tab.locator("[role=tabpanel] img").locator("visible=true").first.wait_for()
        assert faint_texts(tab) == {}, name
        stops = tab_stops(tab)
        assert len(stops) > 18 and [stop for stop in stops if not stop["visible"]] == [], name


def test_the_keyboard_alone_works_the_page(tab):
    def open_tab(name: str):
        tab_stops(tab, until=name)
        tab.keyboard.press("Enter")
        until(lambda: tab.get_by_role("tab", name=name).get_attribute("aria-selected") == "true")

    before = shown(tab, "Original")
    tab_stops(tab, until="Thumbnail 5 of 12")
    tab.keyboard.press("Enter")
    until(lambda: (shown(tab, "Original") != before).any())

    original = shown(tab, "Original")
    tab_stops(tab, until="range slider for Share of hidden patches")
    for key, fewer in (("Home", True), ("End", False)):
        tab.keyboard.press(key)
        until(lambda fewer=fewer: (shown(tab, SEES) == original).all() == fewer)
    tab_stops(tab, until="Seed of the random patches")
    random = shown(tab, SEES)
    tab.keyboard.press("ArrowUp")
    until(lambda: (shown(tab, SEES) != random).any())

    open_tab("Attention")
    label = "run_a: attention of the class token to every patch"
    mean = shown(tab, label)
    tab_stops(tab, until="2")
    tab.keyboard.press("Space")
    until(lambda: shown(tab, label).shape != mean.shape or (shown(tab, label) != mean).any())

    open_tab("Map")
    figure = tab.get_by_role("img", name="run_a: every image of the folder, coloured by label")
    figure.wait_for()
    small = figure.bounding_box()
    tab_stops(tab, until="Fullscreen")
    tab.keyboard.press("Enter")
    until(lambda: figure.bounding_box()["width"] >= small["width"] + 50)
    tab.keyboard.press("Escape")
    until(lambda: figure.bounding_box()["width"] == small["width"])


def test_of_two_hundred_requests_eight_at_a_time_none_is_lost(page, files):
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    uploads = [*sorted((files / "good").iterdir()), *sorted((files / "broken").glob("[!<]*"))]
    clients = [Client(page.url, verbose=False, download_files=False) for _ in range(8)]

    def ask(number: int) -> tuple[bool, bool]:
        client, file = clients[number % 8], uploads[number % len(uploads)]
        try:
            client.predict(handle_file(str(file)), api_name="/from_file")
            (*images,) = client.predict(0.5, number, api_name="/hide_random")
            return file.parent.name == "good", len(images) == 8
        except AppError as error:
            return file.parent.name == "broken", "expected a whole image" in str(error)

    def ask_eight(first: int) -> list[tuple[bool, bool]]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(ask, range(first, first + 8)))

    answers = ask_eight(0)
    before = page.memory()
    for first in range(8, 200, 8):
        answers += ask_eight(first)
    assert answers == [(True, True)] * 200
    assert status_of(page.url) == 200
    assert page.memory() - before < 200e6

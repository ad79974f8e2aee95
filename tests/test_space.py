"""The Gradio app of examples/space, in a real browser."""

import io
import os
import runpy
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import pipeline

from mt_adapters import VtaModel
from programs import EXAMPLES, start_program

SPACE = EXAMPLES / "space"
# Names of this machine; None is the address that a server listens on.
LOCAL = {"127.0.0.1", "localhost", "0.0.0.0", "::1", "None"}
CHROMIUM_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
# Runs the app and notes each host that it looks up or connects to.
LAUNCHER = """
import runpy, sys

def note(event, arguments):
    if event in ("socket.getaddrinfo", "socket.connect"):
        address = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        with open({hosts!r}, "a") as file:
            print(address[0] if isinstance(address, tuple) else address, file=file)

sys.addaudithook(note)
runpy.run_path({app!r}, run_name="__main__")
"""

pytestmark = [pytest.mark.slow, pytest.mark.browser]


class Space:
    """A running app and what it did."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.hosts_file, self.log, launcher = folder / "hosts", folder / "log", folder / "launcher.py"
        launcher.write_text(LAUNCHER.format(hosts=str(self.hosts_file), app=str(SPACE / "app.py")))
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = str(sock.getsockname()[1])
        self.address = f"http://127.0.0.1:{port}/"
        self.process = start_program(
            str(launcher), log=self.log, MODEL_ID=str(model), GRADIO_SERVER_NAME="127.0.0.1", GRADIO_SERVER_PORT=port
        )

    def wait(self) -> None:
        deadline = time.monotonic() + 120
        while self.process.is_alive() and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.address, timeout=5).close()
                return
            except OSError:
                time.sleep(0.2)
        pytest.fail(f"the app did not start: {self.log.read_text()}")


@pytest.fixture(scope="module")
def space(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Space]:
    app = Space(trained, tmp_path_factory.mktemp("space"))
    try:
        app.wait()
        yield app
    finally:
        app.process.terminate()
        app.process.join()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(space: Space, browser: Any) -> Iterator[Any]:
    """The app's page; afterwards it must have logged no error and asked no other machine for anything."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    requests: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(space.address)
    page.get_by_role("button", name="Predict").wait_for()
    yield page
    page.close()
    assert requests
    assert [url for url in requests if not url.startswith((space.address, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture(scope="module")
def app() -> dict[str, Any]:
    return runpy.run_path(str(SPACE / "app.py"))


def predict(page: Any, num_maps: int) -> list[Image.Image]:
    """Clicks, waits until that many maps and their captions are there, and returns the maps."""
    page.get_by_role("button", name="Predict").click()
    page.wait_for_function(
        """count => {
            const maps = [...document.querySelectorAll('.map img')];
            const captions = document.querySelectorAll('.caption b');
            return captions.length === count && maps.length === count &&
                maps.every(map => map.checkVisibility() && map.naturalWidth > 0);
        }""",
        arg=num_maps,
    )
    maps = page.locator(".map img").all()
    pictures = [Image.open(io.BytesIO(page.request.get(map_.get_attribute("src")).body())) for map_ in maps]
    assert [picture.size for picture in pictures] == [
        tuple(map_.evaluate("map => [map.naturalWidth, map.naturalHeight]")) for map_ in maps
    ]
    return pictures


def captions(page: Any) -> dict[str, str]:
    shown = page.locator(".caption:has(b)").all_inner_texts()
    return {text.split()[0]: " ".join(text.split()[1:]) for text in shown}


def choose(page: Any, tasks: set[str]) -> None:
    for box in page.get_by_role("checkbox").all():
        box.set_checked(box.get_attribute("name") in tasks)


def take_screenshot(page: Any, file: Path) -> None:
    page.screenshot(path=file, full_page=True)
    if folder := os.environ.get("MT_ADAPTERS_SCREENSHOTS"):
        shutil.copy(file, folder)


def test_a_picture_gives_the_maps_of_the_chosen_tasks_and_no_others(page: Any, trained: Path, tmp_path: Path) -> None:
    # Larger than the app lets through, and not square.
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((1200, 800))
    picture.save(tmp_path / "photo.png")
    picture.thumbnail((1024, 1024))
    expected = pipeline("multitask-dense-prediction", model=str(trained))(picture)
    page.locator("#photo input[type=file]").set_input_files(tmp_path / "photo.png")
    page.locator("#photo img").wait_for()

    for tasks in (["depth", "edges"], ["semseg", "depth", "normals", "edges"], ["semseg"]):
        choose(page, set(tasks))
        shown = predict(page, len(tasks))
        assert list(captions(page)) == tasks
        for task, map_ in zip(tasks, shown, strict=True):
            assert map_.size == (1024, 683)
            np.testing.assert_array_equal(map_, expected[task]["picture"])
        take_screenshot(page, tmp_path / f"space_{len(tasks)}.png")
        if "depth" in tasks:
            metres = expected["depth"]["map"]
            assert captions(page)["depth"] == f"{metres.min():.1f} m {metres.max():.1f} m"

    names = VtaModel.from_pretrained(trained).config.id2label
    ids, counts = np.unique(expected["semseg"]["map"], return_counts=True)
    assert captions(page)["semseg"].startswith(f"{names[ids[counts.argmax()]]} {counts.max() / counts.sum():.0%}")


def test_a_click_on_an_example_is_enough(page: Any) -> None:
    page.locator(".gallery-item").first.click()
    page.locator("#photo img").wait_for()
    assert [map_.size for map_ in predict(page, 4)] == [(128, 128)] * 4


def test_the_affinity_matrix_shows_the_models_numbers_and_fits(page: Any, trained: Path) -> None:
    model = VtaModel.from_pretrained(trained)
    table = page.get_by_role("table", name="task affinities")
    assert table.is_visible()
    shown = [row.locator("th, td").all_inner_texts() for row in table.locator("tr").all()]
    numbers = [[f"{value:.2f}" for value in row] for row in model.affinity.tolist()]
    assert shown == [
        ["", *model.task_names],
        *([name, *row] for name, row in zip(model.task_names, numbers, strict=True)),
    ]
    for width in (1280, 420):
        page.set_viewport_size({"width": width, "height": 900})
        for element in ("document.documentElement", "document.querySelector('.affinity')"):
            assert page.evaluate(f"{element}.scrollWidth <= {element}.clientWidth"), f"{element} is cut off"


def test_what_is_missing_is_said(page: Any) -> None:
    button = page.get_by_role("button", name="Predict")
    button.click()
    page.get_by_text("No picture: upload one or click on an example.").wait_for()
    page.locator(".gallery-item").first.click()
    page.locator("#photo img").wait_for()
    choose(page, set())
    button.click()
    page.get_by_text("No task: choose at least one.").wait_for()
    assert page.locator(".map img").count() == 0


def test_the_app_asks_no_other_machine_for_anything(page: Any, space: Space) -> None:
    hosts = set(space.hosts_file.read_text().split())
    assert hosts
    assert hosts <= LOCAL


def test_names_from_a_models_repository_are_no_html(app: dict[str, Any], trained: Path) -> None:
    model = VtaModel.from_pretrained(trained)
    model.config.id2label = {0: "<img src=x>"}
    shown = app["caption"](model, "semseg", np.array([[0] * 600 + [5] * 399 + [7]]))
    assert "<img" not in shown
    assert "class 7" not in shown, "too small to see"
    assert "&lt;img src=x&gt; 60%" in shown
    assert "class 5 40%" in shown


def test_the_spaces_card_names_the_app_and_the_gradio_that_is_tested() -> None:
    import gradio

    _, header, text = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(header)
    assert settings["sdk"] == "gradio"
    assert settings["sdk_version"].split(".")[:2] == gradio.__version__.split(".")[:2]
    assert settings["license"] == "apache-2.0"
    assert (SPACE / settings["app_file"]).is_file()
    assert len(settings["short_description"]) <= 60
    assert "MODEL_ID" in text

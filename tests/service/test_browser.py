"""The page in Chromium: what a user sees is what Python computes."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from browser import chromium
from services import WORDS, encoded, running, scene, toy_model

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def address():
    with running(page=True, max_bytes=1_000_000, max_classes=300) as address:
        yield address


@pytest.fixture
def page(browser, address):
    """The page of a new user. Errors in its scripts and requests to other hosts fail the test."""
    page, wrong = browser.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: "Security Policy" in message.text and wrong.append(message.text))
    page.on("request", lambda request: request.url.startswith((address, "blob:")) or wrong.append(request.url))
    opened(page, address)
    yield page
    assert wrong == []
    page.close()


def opened(page, address: str):
    page.goto(address)
    # The settings have arrived.
    page.locator("#about:not(:empty)").wait_for()
    page.locator("summary").click()
    return page


def choose(page, content: bytes, name: str = "scene.png") -> None:
    page.set_input_files("#file", {"name": name, "mimeType": "image/png", "buffer": content})


def ended(page) -> None:
    page.locator('#go[aria-busy="false"]').wait_for()


def press(page) -> None:
    page.click("#go")
    ended(page)


def shown_labels(page, figure: str = "single") -> np.ndarray:
    """The label map that the user downloads."""
    with page.expect_download() as download:
        page.click(f"#{figure} button:has-text('Label map')")
    with Image.open(io.BytesIO(Path(download.value.path()).read_bytes())) as image:
        return np.asarray(image)


def expected(pixels: np.ndarray, words: str = WORDS, **options) -> np.ndarray:
    return toy_model()._predictor(pixels, words, **options).labels


def test_a_scene_is_segmented_as_in_python(page):
    pixels = scene(0, 90, 130)
    choose(page, encoded(pixels))
    page.fill("#words", WORDS.replace(";", "\n"))
    press(page)
    labels, found = shown_labels(page), toy_model()._predictor(pixels, WORDS)
    assert labels.shape == (90, 130) and np.array_equal(labels, found.labels)
    names = page.locator("#legend .name").all_text_contents()
    assert names == sorted(found.areas, key=lambda name: -found.areas[name])
    assert page.locator("#single figcaption span").text_content().split()[1] == "s"
    assert page.locator("#pca img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [130, 90]
    assert page.locator("#size").text_content() == "130 x 90 pixels" and page.locator("#window").is_hidden()
    assert page.locator("#error").is_hidden()


def test_class_and_score_under_the_pointer(page):
    pixels = scene(1, 90, 130)
    choose(page, encoded(pixels))
    page.fill("#words", WORDS)
    press(page)
    result = toy_model()._predictor(pixels, WORDS, scores=True)
    canvas = page.locator("#single canvas")
    box = canvas.bounding_box()
    for y, x in ((10, 20), (45, 100), (80, 64)):
        place = {"x": (x + 0.5) * box["width"] / 130, "y": (y + 0.5) * box["height"] / 90}
        canvas.hover(position=place)
        label = result.labels[y, x]
        score = result.scores[label, y // result.patch_size, x // result.patch_size]
        name, text = page.locator("#tip").text_content().split(": score ")
        assert name == result.names[label] and float(text) == pytest.approx(score, abs=0.01)
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()
    # The same with the keyboard, from there on: two pixels of 130 are a step.
    canvas.focus()
    page.keyboard.press("ArrowLeft")
    label = result.labels[80, 62]
    assert page.locator("#status").text_content().startswith(f"{result.names[label]}: score ")


def test_opacity_and_single_classes_change_the_picture(page):
    pixels = scene(2, 64, 64)
    choose(page, encoded(pixels))
    page.fill("#words", WORDS)
    press(page)

    def picture() -> np.ndarray:
        with page.expect_download() as download:
            page.click("#single button:has-text('Overlay')")
        with Image.open(download.value.path()) as image:
            return np.asarray(image.convert("RGB")).astype(int)

    page.locator("#opacity").fill("0")
    assert np.abs(picture() - pixels).max() <= 1
    page.locator("#opacity").fill("1")
    full = picture()
    page.locator("#legend button").first.click()
    only, labels = picture(), expected(pixels)
    first = page.locator("#legend .name").first.text_content()
    number = toy_model()._predictor(pixels, WORDS).names.index(first)
    # Away from the outlines.
    inside = np.zeros(labels.shape, dtype=bool)
    inside[:-1, :-1] = (labels[:-1, :-1] == labels[1:, :-1]) & (labels[:-1, :-1] == labels[:-1, 1:])
    assert np.array_equal(only[inside & (labels == number)], full[inside & (labels == number)])
    assert np.abs(only - pixels)[inside & (labels != number)].max() <= 1


def test_sliding_window_refinement_and_thresholds(page):
    pixels = scene(3, 80, 100)
    choose(page, encoded(pixels))
    page.select_option("#vocabulary", "voc21")
    page.select_option("#refine", "lposs+")
    page.locator("#prob").fill("0.1")
    page.locator("#area").fill("0.05")
    page.check("#sliding")
    press(page)
    options = {"refine": "lposs+", "prob_threshold": 0.1, "area_threshold": 0.05}
    assert (shown_labels(page) == expected(pixels, "voc21", **options)).mean() >= 0.99
    sliding = expected(pixels, "voc21", inference="sliding_window", **options)
    assert (shown_labels(page, "window") == sliding).mean() >= 0.99
    assert "times as long" in page.locator("#window figcaption span").text_content()
    assert page.locator("#own").is_hidden()


def test_large_photos_are_made_smaller_and_many_classes_keep_their_numbers(page):
    words = "; ".join(f"thing {number}" for number in range(258))
    choose(page, encoded(scene(4, 40, 600)))
    page.fill("#words", words)
    page.select_option("#side", "512")
    press(page)
    labels = shown_labels(page)
    assert labels.shape == (34, 512) and labels.max() < 258
    page.select_option("#side", "")
    press(page)
    assert np.array_equal(shown_labels(page), expected(scene(4, 40, 600), words)) and labels.dtype != np.uint8


def test_wrong_and_huge_files_are_explained_and_the_next_one_works(page):
    page.fill("#words", WORDS)
    page.click("#go")
    assert page.locator("#error").text_content() == "Choose a photo first."
    choose(page, b"no image", "text.png")
    press(page)
    assert "cannot be read" in page.locator("#error").text_content()
    assert page.locator("#preview").is_hidden()
    choose(page, encoded(np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)), "noise.png")
    press(page)
    assert page.locator("#error").text_content() == "The file has 1.4 MB; the service takes at most 0.95 MB."
    choose(page, encoded(scene(5)))
    page.fill("#words", "x" * 200)
    press(page)
    assert "at most 100 characters" in page.locator("#error").text_content()
    page.fill("#words", "")
    page.click("#go")
    assert "Name at least one class" in page.locator("#error").text_content()
    page.fill("#words", WORDS)
    press(page)
    assert page.locator("#error").is_hidden() and np.array_equal(shown_labels(page), expected(scene(5)))


def test_two_users_at_once(browser, address):
    users = [(scene(6), "star; sand; snow"), (scene(7, 64, 150), "ring; water; brick; grass")]
    contexts = [browser.new_context() for _ in users]
    pages = [opened(context.new_page(), address) for context in contexts]
    for page, (pixels, words) in zip(pages, users):
        choose(page, encoded(pixels))
        page.fill("#words", words)
    for page in pages:
        page.click("#go")
    for page, (pixels, words) in zip(pages, users):
        ended(page)
        assert np.array_equal(shown_labels(page), expected(pixels, words))
    for context in contexts:
        context.close()


def test_names_are_text_and_the_phone_needs_no_sideways_scrolling(page):
    page.set_viewport_size(PHONE)
    choose(page, encoded(scene(8)), "<img src=x onerror=alert(1)>.png")
    page.fill("#words", "<b>star</b> " + "w" * 80 + "; <img src=x onerror=alert(1)>; snow")
    press(page)
    assert page.locator("#legend b, #legend img, #file-name img").count() == 0
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_every_control_has_a_label_and_can_be_reached_by_keyboard(page):
    names = "() => [...document.querySelectorAll('input, select, textarea')].filter(one => !one.labels.length).length"
    assert page.evaluate(names) == 0
    page.locator("body").press("Tab")
    reached = []
    for _ in range(12):
        reached.append(page.evaluate("() => document.activeElement.id"))
        page.keyboard.press("Tab")
    assert {"file", "vocabulary", "words", "refine", "sliding", "go"} <= {*reached}

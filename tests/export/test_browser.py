"""The page that runs the model in the browser, in a real Chromium."""

import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from open_clip.tokenizer import basic_clean, whitespace_clean
from PIL import Image

from browser import chromium, served
from reference import ROOT
from spar_d2.export.browser.packages import RUNTIME, copy_package
from spar_d2.export.browser.words import clip_tokenizer, tokenizer_json
from spar_d2.predict import segment
from spar_d2.text import Vocabulary
from spar_d2.toy.scenes import SCENE_CLASSES, training_scene

TINY = [str(ROOT / f"configs/toy/tiny_clip.{suffix}") for suffix in ("json", "safetensors")]
WORDS = "; ".join(SCENE_CLASSES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The exported page of the tiny CLIP; needs npm and its registry."""
    pytest.importorskip("onnxruntime", reason="needs the extra [export]")
    output = tmp_path_factory.mktemp("page") / "page"
    words = ["--encoder", TINY[0], "--pretrained", TINY[1], "--vocabulary", WORDS, "--templates", "simple", "--words"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["spar-d2 export", "browser", *words, "--output", str(output)])
        try:
            assert import_module("spar_d2.cli.export").main() == 0
        except SystemExit:
            pytest.skip("needs npm and its registry")
    return output


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


def photo(path: Path, size: tuple[int, int]) -> str:
    Image.fromarray(training_scene(1, 5).image).resize(size).save(path)
    return str(path)


def found(page) -> np.ndarray:
    result = page.evaluate("segmented()")
    return np.array(result["labels"]).reshape(result["height"], result["width"])


def show(page, path: str, message: str) -> None:
    """Choose a photo, and wait for a message on the page."""
    page.set_input_files("#file", path)
    page.wait_for_selector(f'#status:has-text("{message}")', timeout=60000)


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_labels_photos_as_python_does(folder, browser, tmp_path):
    # Without the text tower.
    fixed = [file for file in folder.iterdir() if file.name not in ("text.onnx", "tokenizer.json.gz")]
    assert sum(file.stat().st_size for file in fixed) < 20e6
    with served(folder) as address:
        page, hosts = browser.new_page(), set()
        page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#file:enabled", state="attached", timeout=60000)
        for size in [(64, 64), (121, 77), (8, 200)]:
            path = photo(tmp_path / f"{size[0]}.png", size)
            show(page, path, f"{size[0]}×{size[1]} pixels in")
            expected = segment(path, WORDS, *TINY, templates="simple").labels
            assert (found(page) == expected).mean() >= 0.99
        # Fewer classes, without running the model again.
        page.click("#none")
        page.wait_for_selector('#status:has-text("at least one class")')
        for name in ("snow", "sand"):
            page.check(f"#classes label:has-text('{name}') input")
        page.wait_for_selector('#status:has-text("2 classes")')
        assert {SCENE_CLASSES[k] for k in np.unique(found(page))} <= {"snow", "sand"}
        with page.expect_download() as download:
            page.click("#save-labels")
        saved = np.asarray(Image.open(download.value.path()).convert("L"))
        assert (saved == found(page)).all()
        # Other classes, by the text tower in the browser.
        words = "snow, ice, SNOW; a &ldquo brick\u2019s wall, snow\nTRIANGLE; sand, \ufb01eld"
        page.fill("#names", words)
        page.click("#words button")
        page.wait_for_selector('#classes:has-text("wall")')
        page.wait_for_selector('#status:has-text("pixels in")')
        assert (found(page) == segment(path, words, *TINY, templates="simple").labels).mean() >= 0.99
        # A photo that is too large is made smaller.
        show(page, photo(tmp_path / "wide.png", (2000, 1000)), "resized from 2000×1000")
        assert len(found(page)) < 1000
        assert hosts == {address.split("/")[2]} and not problems


@pytest.mark.browser
@pytest.mark.slow
def test_typed_classes_are_read_as_in_python(folder, browser):
    typed = [
        "grass, meadow; Meadow, sand\n GRASS , snow;; ,\nsnow, snow",
        "Stra\u00dfe; STRASSE, \u1e9e; caf\u00e9, cafe\u0301; \u0131; i, \u0130",
        "\u03a3\u0391\u03a3, \u03c3\u03b1\u03c2",
        "\u00a0tall\u2003grass ,tall  grass;\x1c\ufeffsand\u3000",
        "rock &amp roll; \ufb01eld\u2019s &quot, \u201cwet\u201d\uff0c \uff33ky; &lt b; \x07bell; &#65 &#x42; &amp,amp",
        "<img src=x onerror=alert(1)>; __proto__, constructor",
    ]
    with served(folder) as address:
        page = browser.new_page()
        page.goto(address)
        read = "async ([address, typed]) => typed.map((await import(`${address}names.js`)).readClasses)"
        found = page.evaluate(read, [address, typed])
    for classes, text in zip(found, typed):
        expected = Vocabulary(Vocabulary.split(text))
        assert [one["name"] for one in classes] == expected.names
        assert [tuple(one["synonyms"]) for one in classes] == list(expected.classes)
        cleaned = [[whitespace_clean(basic_clean(name)) for name in names] for names in expected.classes]
        assert [one["texts"] for one in classes] == cleaned


# The page waits for the tasks that a test holds.
HOLD = """
const post = Worker.prototype.postMessage, held = [];
Worker.prototype.postMessage = function (message, transfer) {
  const send = () => post.call(this, message, transfer);
  message.task === window.holds ? held.push(send) : send();
};
window.release = () => (window.holds = "", held.splice(0).forEach((send) => send()));
"""


@pytest.mark.browser
@pytest.mark.slow
def test_clicks_while_the_model_works(folder, browser, tmp_path):
    first, second = photo(tmp_path / "first.png", (64, 64)), photo(tmp_path / "second.png", (56, 72))
    with served(folder) as address:
        page, problems = browser.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.add_init_script(HOLD)
        page.goto(address)
        page.wait_for_selector("#file:enabled", state="attached", timeout=60000)

        def box(name: str):
            return page.locator(f"#classes label:has-text('{name}') input")

        def labels(path: str, *dropped: str, words: str = WORDS) -> np.ndarray:
            kept = [number for number, name in enumerate(words.split("; ")) if name not in dropped]
            left = "; ".join(words.split("; ")[number] for number in kept)
            return np.array(kept)[segment(path, left, *TINY, templates="simple").labels]

        # A class of the first photo.
        page.evaluate("holds = 'segment'")
        show(page, first, "Segmenting")
        box("snow").uncheck()
        page.evaluate("release()")
        page.wait_for_selector(f'#status:has-text("64×64 pixels, {len(SCENE_CLASSES) - 1} classes")')
        assert (found(page) == labels(first, "snow")).mean() >= 0.99
        # While a second one is segmented, there is nothing to save.
        page.evaluate("holds = 'segment'")
        show(page, second, "Segmenting")
        assert page.is_disabled("#save-labels") and page.is_disabled("#save-picture") and page.is_hidden("#canvas")
        box("sand").uncheck()
        page.evaluate("release()")
        page.wait_for_selector(f'#status:has-text("56×72 pixels, {len(SCENE_CLASSES) - 2} classes")')
        assert (found(page) == labels(second, "snow", "sand")).mean() >= 0.99
        # While names are read.
        page.evaluate("holds = 'name'")
        page.fill("#names", "snow; brick")
        page.click("#words button")
        box("snow").check()
        page.evaluate("release()")
        page.wait_for_selector('#status:has-text("56×72 pixels, 2 classes")')
        assert (found(page) == labels(second, words="snow; brick")).mean() >= 0.99
        with page.expect_download() as download:
            page.click("#save-labels")
        assert download.value.suggested_filename == "second_labels.png"
        # Nothing of the second photo is left beside the name of a file that cannot be read.
        (tmp_path / "notes.png").write_text("no image")
        show(page, str(tmp_path / "notes.png"), "is not an image")
        page.select_option("#side", "256")
        assert page.evaluate("segmented()") is None and page.is_disabled("#save-labels") and page.is_hidden("#canvas")
        # A transparent photo, as in Python.
        with Image.open(first) as image:
            image.putalpha(Image.linear_gradient("L").resize((64, 64)))
            image.save(first)
        page.select_option("#side", "0")
        show(page, first, "64×64 pixels in")
        assert (found(page) == labels(first, words="snow; brick")).mean() >= 0.99
        assert not problems


@pytest.mark.browser
@pytest.mark.slow
def test_files_that_are_no_photos_are_a_sentence(folder, browser, tmp_path):
    (tmp_path / "notes.png").write_text("no image")
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(101_000_000)
    with served(folder) as address:
        page = browser.new_page()
        page.goto(address)
        page.wait_for_selector("#file:enabled", state="attached", timeout=60000)
        show(page, str(tmp_path / "notes.png"), "notes.png is not an image that this browser can read.")
        show(page, str(tmp_path / "huge.png"), "huge.png has more than 100 MB; choose a smaller photo.")
        show(page, photo(tmp_path / "good.png", (64, 64)), "64×64 pixels in")


def test_only_folders_of_the_export_are_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    words = ["--encoder", TINY[0], "--pretrained", TINY[1], "--vocabulary", "cat", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["spar-d2 export", "browser", *words])
    with pytest.raises(SystemExit):
        import_module("spar_d2.cli.export").main()
    assert "--output must be a new or empty folder" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


def test_npm_packages_from_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="run npm install onnxruntime-web@"):
        copy_package(RUNTIME, tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_tokenizer_of_the_page_is_that_of_open_clip():
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    tokenizer = clip_tokenizer(TINY[0])
    converted = tokenizers.Tokenizer.from_str(tokenizer_json(tokenizer))
    for text in (
        "a photo of a cat.",
        "It's the  Café au lait – 42nd; naïve",
        "fire-fighter/truck",
        "日本語 x_y",
        "don't!?",
    ):
        assert converted.encode(text, add_special_tokens=False).ids == tokenizer.encode(text), text


def test_free_words_need_the_tokenizer_of_clip():
    with pytest.raises(ValueError, match="leave out --words"):
        clip_tokenizer("ViT-B-16-SigLIP")

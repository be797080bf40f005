"""Requests that the service refuses, each with a sentence, and serves the next one."""

import http.client
import io
import re
import struct
import sys
import time
import zlib
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from services import WORDS, encoded, running, scene, toy_model

GOOD = {"image": ("a.png", encoded(scene(0, 32, 48)))}


@pytest.fixture(scope="module")
def address():
    limits = {"max_bytes": 200_000, "max_pixels": 10_000, "max_windows": 4}
    with running(page=True, **limits) as address:
        yield address


@pytest.fixture
def client(address):
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client
        # Whatever was refused, the next request is served.
        assert client.post("/segment", files=GOOD, data={"words": WORDS}).status_code == 200
        assert client.get("/health").json()["waiting"] == 0


def refused(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    (sentence,) = response.json().values()
    assert "Traceback" not in sentence and "/work" not in sentence and sentence.strip()
    return sentence


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


WRONG_WORDS = {
    "none": ("", "words must name at least one class"),
    "only separators": (" ; , ;\n", "words must name at least one class"),
    "long name": ("cat; " + "x" * 101, "class name must have at most 100 characters, got 'xxxxxxxxxxxxxxxxxxxx'"),
    "many classes": (";".join(map(str, range(257))), "words must have at most 256 classes, got 257"),
    "many synonyms of one class": (
        ",".join(map(str, range(513))),
        "at most 512 class names and synonyms in all, got 513",
    ),
    "many characters": (",".join(f"word {number}" for number in range(3000)), "words must have at most 20,000"),
    "1,000 of 10,000 characters": (";".join(["x" * 10_000] * 1000)[:150_000], "The form cannot be read"),
}


@pytest.mark.parametrize("case", WRONG_WORDS)
def test_wrong_words(client, case):
    words, message = WRONG_WORDS[case]
    start = time.perf_counter()
    response = client.post("/segment", files=GOOD, data={"words": words})
    assert message in refused(response, 422)
    assert time.perf_counter() - start < 2


def test_a_thousand_classes_of_ten_thousand_characters_are_refused_quickly():
    with running() as address:
        start = time.perf_counter()
        response = httpx.post(f"{address}/segment", files=GOOD, data={"words": ";".join(["x" * 10_000] * 1000)})
        assert "80,000 bytes" in refused(response, 422)
        assert time.perf_counter() - start < 5


WRONG_FIELDS = [
    ({"prob_threshold": "1.5"}, "prob_threshold must be in 0..1, got 1.5"),
    ({"prob_threshold": "nan"}, "prob_threshold must be a number, got 'nan'"),
    ({"area_threshold": "much"}, "area_threshold must be a number, got 'much'"),
    ({"logit_scale": "0"}, "logit_scale must be above 0"),
    ({"logit_scale": "1e999"}, "logit_scale must be a number"),
    ({"refine": "blur"}, "refine .* lposs"),
    ({"refine": "anyup"}, "anyup is not available"),
    ({"inference": "tiles"}, "inference must be one of single_pass, sliding_window; got 'tiles'"),
    ({"inference": "sliding_window", "stride": "0"}, "stride must be in 1..64"),
    ({"inference": "sliding_window", "stride": "nan"}, "stride must be a number"),
    ({"inference": "sliding_window", "stride": "30.7"}, "stride must be an integer, got 30.7"),
    ({"words": [WORDS, "cat"]}, "the field 'words' more than once"),
    ({"format": "gif"}, "format must be one of json, png, overlay"),
    ({"scores": "maybe"}, "scores must be true or false"),
    ({"treshold": "1"}, "unknown field 'treshold'; known fields: words"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS, ids=lambda value: str(value)[:40])
def test_wrong_fields(client, fields, message):
    response = client.post("/segment", files=GOOD, data={"words": WORDS, **fields})
    assert re.search(message, refused(response, 422))


def test_a_sliding_window_of_too_many_windows(client):
    files = {"image": encoded(scene(1, 90, 100))}
    response = client.post("/segment", files=files, data={"words": WORDS, "inference": "sliding_window", "stride": "1"})
    assert "windows, at most 4 are allowed" in refused(response, 422)


def test_words_are_never_the_path_of_a_file(client, tmp_path):
    (tmp_path / "secret.txt").write_text("password\nkey\n")
    (tmp_path / "secret.yaml").write_text("classes: [{name: password, words: key}]")
    for path in (
        tmp_path / "secret.txt",
        tmp_path / "secret.yaml",
        "./setup.py",
        "voc21.txt",
        "configs/toy/distill.yaml",
    ):
        if len(str(path)) > 100:
            path = str(path)[-100:]
        response = client.post("/segment", files=GOOD, data={"words": str(path)})
        assert response.status_code == 200 and response.json()["vocabulary"] == [[str(path)]]


@pytest.mark.parametrize(
    "content", [b"", b"no image", encoded(scene(0, 32, 48))[:500], b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_files_that_are_no_images(client, content):
    response = client.post("/segment", files={"image": ("a.png", content)}, data={"words": WORDS})
    assert "cannot be read" in refused(response, 415)


@pytest.mark.parametrize("size", [(101, 100), (30_000, 30_000)])
def test_too_many_pixels_are_refused_from_the_header(client, size):
    response = client.post("/segment", files={"image": png_header(*size)}, data={"words": WORDS})
    assert "at most 10,000 are allowed" in refused(response, 413)
    response = client.post("/features", files={"image": png_header(*size)})
    assert "at most 10,000 are allowed" in refused(response, 413)


def test_a_real_decompression_bomb_is_refused_at_once(client):
    file = io.BytesIO()
    Image.fromarray(np.zeros((8000, 8000), dtype=np.uint8)).save(file, "PNG", compress_level=9)
    start = time.perf_counter()
    response = client.post("/segment", files={"image": file.getvalue()}, data={"words": WORDS})
    assert "8000 x 8000 pixels" in refused(response, 413)
    assert len(file.getvalue()) < 200_000 and time.perf_counter() - start < 1


def test_forms_without_or_with_several_images(client):
    for arguments in (
        {"files": {"picture": b"x"}},
        {"files": [("image", b"x"), ("image", b"y")]},
        {"files": {"words": (None, "a")}, "data": {"image": "a.png"}},
    ):
        assert "one file" in refused(client.post("/segment", **arguments), 422)


@pytest.mark.parametrize(
    "headers", [{}, {"content-type": "application/json"}, {"content-type": "application/x-www-form-urlencoded"}]
)
def test_other_content_types(client, headers):
    response = client.post("/segment", content=b"image=1", headers=headers)
    assert "multipart/form-data" in refused(response, 415)


@pytest.mark.parametrize(
    "content", [b"", b"--x", b"garbage" * 100, b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--"]
)
def test_broken_forms(client, content):
    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert "form" in refused(client.post("/segment", content=content, headers=headers), 422)
    headers = {"content-type": "multipart/form-data"}
    assert "form" in refused(client.post("/segment", content=content, headers=headers), 422)


def test_a_large_request_is_refused_by_its_length(client):
    response = client.post("/segment", files={"image": b"x" * 300_000}, data={"words": WORDS})
    assert "at most 200,000 bytes" in refused(response, 413)


@pytest.mark.parametrize(
    "path", ["../app.py", "%2e%2e/app.py", "..%2fapp.py", "....//app.py", "/etc/passwd", "index.html", ""]
)
def test_static_files_are_a_fixed_list(client, address, path):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=30)
    # httpx would resolve "..".
    connection.request("GET", f"/static/{path}")
    response = connection.getresponse()
    assert response.status == 404 and b"error" in response.read()
    connection.close()


def test_unknown_paths_and_methods(client):
    assert "POST /segment" in refused(client.get("/nothing"), 404)
    assert "POST /segment" in refused(client.get("/segment"), 405)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "localhost@evil.example:80"])
def test_other_host_names_are_refused(client, host):
    assert "not to" in refused(client.get("/health", headers={"host": host}), 403)
    assert "not to" in refused(client.post("/segment", files=GOOD, headers={"host": host}), 403)


def test_names_of_this_machine_are_hosts(client, address):
    port = urlsplit(address).port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "localhost"):
        assert client.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "", "http://127.0.0.1:1", "http://localhost"])
def test_requests_of_other_websites_are_refused(client, origin):
    response = client.post("/segment", files=GOOD, data={"words": WORDS}, headers={"origin": origin})
    assert "other websites" in refused(response, 403)


@pytest.mark.parametrize("host", ["seg.example", "127.0.0.1"])
def test_the_name_of_a_proxy_is_allowed(host):
    """Proxies may keep the header Host, or replace it by the address of the service."""
    with running(hosts=("127.0.0.1", "seg.example")) as address:
        for origin, status in (
            ("https://seg.example", 422),
            ("https://evil.example", 403),
            ("http://127.0.0.1:1", 403),
        ):
            response = httpx.post(f"{address}/segment", files=GOOD, headers={"host": host, "origin": origin})
            # The words are missing.
            refused(response, status)


def test_without_a_list_all_hosts_are_allowed_but_not_other_origins():
    with running(hosts=None) as address:
        assert httpx.get(f"{address}/health", headers={"host": "any.example"}).status_code == 200
        for origin, status in (("https://any.example", 422), ("https://evil.example", 403), ("null", 403)):
            headers = {"host": "any.example", "origin": origin}
            refused(httpx.post(f"{address}/segment", files=GOOD, headers=headers), status)


def test_requests_of_the_page_are_served(client, address):
    response = client.post("/segment", files=GOOD, data={"words": WORDS}, headers={"origin": address})
    assert response.status_code == 200


def test_responses_have_security_headers(client):
    for response in (client.get("/"), client.get("/health"), client.get("/nothing"), client.post("/segment")):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in response.headers


def test_an_internal_error_has_a_sentence_and_no_traceback(monkeypatch, client):
    def fail(task, images):
        raise KeyError("secret")

    model = toy_model()
    with monkeypatch.context() as patch:
        patch.setattr(model, "run", fail)
        with running(model) as address:
            response = httpx.post(f"{address}/segment", files=GOOD, data={"words": WORDS})
    assert "secret" not in refused(response, 500)


def test_overlays_need_detectron2(monkeypatch, client):
    # As if the import failed.
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "spar_d2.visualization.overlay", None)
        response = client.post("/segment", files=GOOD, data={"words": WORDS, "format": "overlay"})
    assert "use format=json or png" in refused(response, 501)


def test_too_little_memory_is_a_sentence(monkeypatch, client):
    def fail(task, images):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(toy_model(), "run", fail)
        with running() as address:
            response = httpx.post(f"{address}/segment", files=GOOD, data={"words": WORDS})
    assert "smaller image" in refused(response, 413)

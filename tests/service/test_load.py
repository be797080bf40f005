"""Several clients, slow clients and clients that leave."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from services import ENCODER, PRETRAINED, WORDS, encoded, running, scene, toy_model, unpack
from spar_d2.predict import segment

HEAD = "POST /segment HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\n"
PART = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


def post(address: str, pixels: np.ndarray, words: str = WORDS, **fields) -> httpx.Response:
    files = {"image": encoded(pixels)}
    return httpx.post(f"{address}/segment", files=files, data={"words": words, **fields}, timeout=60)


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=20)


def answer(connection: socket.socket) -> str:
    """Everything that the service sends until it closes the connection."""
    content = b""
    while part := connection.recv(1 << 16):
        content += part
    return content.decode()


class Gate:
    """Holds the model back until ``go`` is set."""

    def __init__(self, monkeypatch) -> None:
        self.go, self.batches = threading.Event(), []
        model, run = toy_model(), toy_model().run

        def held(task, images):
            self.batches.append(len(images))
            assert self.go.wait(30)
            return run(task, images)

        monkeypatch.setattr(model, "run", held)

    def waiting(self, address: str, count: int) -> None:
        """Wait until the service has this number of requests."""
        deadline = time.monotonic() + 20
        while httpx.get(f"{address}/health").json()["waiting"] != count:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.slow
def test_concurrent_requests_get_their_own_labels():
    sizes = [(48, 64), (64, 48), (70, 101), (96, 96)]
    words = [WORDS, "star; snow", "ring; moon; water", "brick; sand; heart; cross", "voc21"]
    cases = [(scene(number, *sizes[number % 4]), words[number % 5]) for number in range(20)]
    with running() as address, ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(lambda case: post(address, *case), cases))
    for (pixels, vocabulary), response in zip(cases, responses):
        assert response.status_code == 200, response.text
        expected = segment(pixels, vocabulary, ENCODER, PRETRAINED, templates="simple", device="cpu")
        assert np.array_equal(unpack(response.json()["labels"]), expected.labels)


def test_waiting_requests_of_one_size_are_one_batch(monkeypatch):
    gate = Gate(monkeypatch)
    with running() as address, ThreadPoolExecutor(5) as pool:
        first = pool.submit(post, address, scene(0, 32, 32))
        gate.waiting(address, 1)
        others = [pool.submit(post, address, scene(number)) for number in range(4)]
        gate.waiting(address, 5)
        # Decoded, too.
        time.sleep(0.3)
        gate.go.set()
        records = [future.result().json() for future in others]
        assert first.result().json()["images"] == 1
    assert gate.batches == [1, 4] and [record["images"] for record in records] == [4] * 4
    for number, record in enumerate(records):
        expected = segment(scene(number), WORDS, ENCODER, PRETRAINED, templates="simple", device="cpu")
        # Rounding may differ from that of a single image.
        assert (unpack(record["labels"]) == expected.labels).mean() > 0.999


def test_a_full_service_says_when_to_try_again(monkeypatch):
    gate = Gate(monkeypatch)
    with running(max_waiting=2) as address, ThreadPoolExecutor(2) as pool:
        served = [pool.submit(post, address, scene(number)) for number in range(2)]
        gate.waiting(address, 2)
        response = post(address, scene(2))
        assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
        assert "busy with 2 other requests" in response.json()["error"]
        gate.go.set()
        assert [future.result().status_code for future in served] == [200, 200]
        assert post(address, scene(2)).status_code == 200


def test_clients_that_leave_free_their_places(monkeypatch):
    gate = Gate(monkeypatch)
    with running() as address:
        first, second = (connect(address) for _ in range(2))
        content = (
            PART + encoded(scene()) + b'\r\n--x\r\nContent-Disposition: form-data; name="words"\r\n\r\na;b\r\n--x--\r\n'
        )
        for connection in (first, second):
            connection.sendall(f"{HEAD}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        gate.waiting(address, 2)
        for connection in (first, second):
            connection.close()
        gate.waiting(address, 0)
        gate.go.set()
        assert post(address, scene(1)).status_code == 200
        # The one that had begun, perhaps with the other, and that of the last request: nobody waits for the other.
        assert len(gate.batches) <= 3


def test_slow_clients_are_told_and_do_not_stop_others():
    with running(body_seconds=0.5, max_waiting=1) as address:
        slow = [connect(address) for _ in range(3)]
        for connection in slow:
            connection.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n".encode() + PART)
        assert post(address, scene()).status_code == 200
        start = time.monotonic()
        for connection in slow:
            text = answer(connection)
            assert text.startswith("HTTP/1.1 408") and "not received within 0.5 seconds" in text
            connection.close()
        assert time.monotonic() - start < 3
        assert httpx.get(f"{address}/health").json()["waiting"] == 0


def test_slow_heads_are_cut_off():
    with running(head_seconds=0.5) as address, connect(address) as silent, connect(address) as slow:
        start = time.monotonic()
        with connect(address) as kept:
            # A whole request stops the time, and the next one of the connection starts it again.
            kept.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert kept.recv(1 << 16).startswith(b"HTTP/1.1 200")
            kept.sendall(b"GET /health HTTP/1.1\r\n")
            slow.sendall(b"GET /health HTTP/1.1\r\n")
            time.sleep(0.2)
            slow.sendall(b"X: a\r\n")
            assert answer(silent) == answer(slow) == answer(kept) == ""
        assert time.monotonic() - start < 3
        assert post(address, scene()).status_code == 200


def test_uploads_are_limited_too():
    with running(body_seconds=20, max_waiting=1) as address:
        slow = [connect(address) for _ in range(4)]
        for connection in slow:
            connection.sendall(f"{HEAD}Content-Length: 1000\r\n\r\n".encode() + PART)
        deadline = time.monotonic() + 10
        while (response := post(address, scene())).status_code != 503:
            assert time.monotonic() < deadline
        assert "busy" in response.json()["error"]
        for connection in slow:
            connection.close()
        while post(address, scene()).status_code != 200:
            assert time.monotonic() < deadline


@pytest.mark.parametrize("head", ["Transfer-Encoding: chunked\r\n\r\n", "Content-Length: 100000000\r\n\r\n"])
def test_large_bodies_are_refused_before_they_end(head):
    """The client sends without end, and the length is not known before, or wrong."""

    def framed(content: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(content), content) if "chunked" in head else content

    with running(max_bytes=20_000) as address, connect(address) as connection:
        connection.settimeout(0.1)
        connection.sendall((HEAD + head).encode() + framed(PART))
        sent, text = 0, b""
        while b"}" not in text and sent < 50_000_000:
            sent += connection.send(framed(b"x" * 4096))
            with contextlib.suppress(TimeoutError):
                text += connection.recv(1 << 16) if sent > 40_000 else b""
        assert text.startswith(b"HTTP/1.1 413") and b"at most 20,000 bytes" in text
        assert sent < 1_000_000
        assert httpx.get(f"{address}/health").status_code == 200


@pytest.mark.processes
@pytest.mark.slow
def test_the_command_serves_says_its_address_and_stops(tmp_path):
    options = ["--encoder", ENCODER, "--pretrained", PRETRAINED, "--templates", "simple", "--device", "cpu"]
    command = [sys.executable, "-W", "ignore", "-m", "spar_d2.cli", "web", *options, "--port", "0", "--host", "0.0.0.0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            found = re.search(r"http://0\.0\.0\.0:(\d+)", process.stdout.readline())
            address = f"http://127.0.0.1:{found[1]}"
            assert "<!doctype html>" in httpx.get(address).text
            with ThreadPoolExecutor(8) as pool:
                assert {r.status_code for r in pool.map(lambda n: post(address, scene(n)), range(24))} == {200}
        finally:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "neither passwords nor encryption" in errors and "Traceback" not in errors

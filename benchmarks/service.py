"""Requests to `spar-d2 serve` in a process of its own, by numbers of clients at once."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from benchmarks.measure import process_bytes
from benchmarks.tables import NO_PEAK, Table, number
from spar_d2.toy.scenes import draw_scene

TOY = Path(__file__).resolve().parents[1] / "configs" / "toy"
_MIB = 1 << 20
_WORDS = ("circle, disk; star; grass; water; sand; brick; snow", "ring; moon; sky", "heart; cross; sand; grass")
_BOUNDARY = "spar-d2-benchmark"
_MOST_CLIENTS = 64


@dataclass(frozen=True)
class Load:
    """Measurement of a number of clients, each of which sends its next request after the response.

    Attributes:
        clients: number of clients.
        requests, errors: number of requests, and of those without a segmentation.
        seconds: time of all requests.
        latencies: seconds of each request, sorted.
        before, after: memory of the service in bytes; None if it cannot be measured.
    """

    clients: int
    requests: int
    errors: int
    seconds: float
    latencies: Sequence[float]
    before: int | None
    after: int | None


TABLE = Table(
    {
        "clients": lambda m: str(m.clients),
        "requests": lambda m: str(m.requests),
        "errors": lambda m: str(m.errors),
        "requests/s": lambda m: number(m.requests / m.seconds),
        "median ms": lambda m: number(1e3 * statistics.median(m.latencies)),
        "95th percentile ms": lambda m: number(1e3 * m.latencies[int(0.95 * len(m.latencies))]),
        "memory before MiB": lambda m: number(m.before, _MIB),
        "memory after MiB": lambda m: number(m.after, _MIB),
    },
    always=["clients run on the same machine; images are PNGs of several sizes, words are of three vocabularies."],
    sometimes={NO_PEAK.replace("peak", "memory"): lambda m: m.before is None},
    left=0,
)


def add_command(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command "service" to the benchmarks."""
    command = commands.add_parser(
        "service",
        help="requests to spar-d2 serve",
        description="Requests per second, latency and memory of spar-d2 serve, by numbers of clients, as a table.",
    )
    add = command.add_argument
    add("--encoder", default=str(TOY / "tiny_clip.json"), metavar="NAME", help="model (default: the toy CLIP)")
    add("--pretrained", default=str(TOY / "tiny_clip.safetensors"), metavar="TAG_OR_FILE", help="its weights")
    add("--clients", type=int, nargs="+", default=[1, 10, 50], metavar="N", help="(default: %(default)s)")
    add("--requests", type=int, default=1000, metavar="N", help="requests of each row (default: %(default)s)")
    add("--long-side", type=int, default=320, metavar="N", help="long side in pixels (default: %(default)s)")
    add("--output", type=Path, metavar="FILE.md", help="also write the table to this file")
    return command


def measure_service(
    encoder: str, pretrained: str, device: str, clients: Sequence[int], requests: int, long_side: int
) -> Iterator[Load]:
    """Start a service, and send requests to it.

    Args:
        encoder, pretrained, device: model of the service.
        clients: numbers of clients.
        requests: number of requests for each number of clients.
        long_side: long side of the images in pixels.

    Raises:
        ValueError: there are too many clients.
        RuntimeError: the service does not start.
    """
    if max(clients) > _MOST_CLIENTS:
        raise ValueError(f"--clients must be at most {_MOST_CLIENTS}, got {max(clients)}")
    bodies = _bodies(long_side)
    with _service(encoder, pretrained, device) as (process, address):
        # New words and first calls are no part of the measurement.
        _send(address, bodies, len(bodies), 1)
        for count in clients:
            before = process_bytes(process)
            start = time.perf_counter()
            answers = _send(address, bodies, requests, count)
            seconds = time.perf_counter() - start
            errors = sum(status != 200 for status, _ in answers)
            times = sorted(latency for _, latency in answers)
            yield Load(count, requests, errors, seconds, times, before, process_bytes(process))


@contextlib.contextmanager
def _service(encoder: str, pretrained: str, device: str) -> Iterator[tuple[int, str]]:
    options = ["--encoder", encoder, "--pretrained", pretrained, "--device", device, "--port", "0"]
    command = [sys.executable, "-W", "ignore", "-m", "spar_d2.cli", "serve", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise RuntimeError("the service did not start; see its message above")
            yield process.pid, urlsplit(found[0]).netloc
        finally:
            process.terminate()


def _bodies(long_side: int) -> list[bytes]:
    """Return forms with images of four sizes and three vocabularies."""
    bodies = []
    for index in range(12):
        height, width = (int(long_side * side) for side in ((0.6, 1), (1, 1), (1, 0.75), (0.5, 0.5))[index % 4])
        scene = draw_scene(np.random.default_rng(index), height, width, (3, 8), (9, 40), (2, 4))
        file = io.BytesIO()
        Image.fromarray(scene.image).save(file, "PNG")
        parts = (("words", "", _WORDS[index % 3].encode()), ("image", '; filename="a.png"', file.getvalue()))
        head = f"--{_BOUNDARY}\r\nContent-Disposition: form-data; name="
        bodies.append(
            b"".join(f'{head}"{name}"{more}\r\n\r\n'.encode() + content + b"\r\n" for name, more, content in parts)
            + f"--{_BOUNDARY}--\r\n".encode()
        )
    return bodies


def _send(address: str, bodies: Sequence[bytes], requests: int, clients: int) -> list[tuple[int, float]]:
    """Send requests, and return the status (0 for a broken connection) and seconds of each."""
    local = threading.local()

    def send(index: int) -> tuple[int, float]:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection(address, timeout=300)
        start = time.perf_counter()
        try:
            headers = {"Content-Type": f"multipart/form-data; boundary={_BOUNDARY}"}
            local.connection.request("POST", "/segment", bodies[index % len(bodies)], headers)
            response = local.connection.getresponse()
            response.read()
            status = response.status
        except (OSError, http.client.HTTPException):
            local.connection.close()
            status = 0
        return status, time.perf_counter() - start

    with ThreadPoolExecutor(clients) as pool:
        return list(pool.map(send, range(requests)))

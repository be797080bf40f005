"""The service with the toy model on a free port of this machine, and forms for it."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import socket
import threading
import time
import zlib
from collections.abc import Collection, Iterator

import numpy as np
import uvicorn
from PIL import Image

from reference import ROOT
from spar_d2.predict import Predictor
from spar_d2.service.app import Settings, create_app
from spar_d2.service.guard import LOOPBACK
from spar_d2.service.limits import Limits
from spar_d2.service.model import Model
from spar_d2.service.server import server_config
from spar_d2.text import Vocabulary
from spar_d2.toy.scenes import draw_scene

ENCODER, PRETRAINED = (str(ROOT / "configs" / "toy" / f"tiny_clip.{kind}") for kind in ("json", "safetensors"))
WORDS = "circle, disk; star; grass; water; sand; brick; snow"


@functools.cache
def toy_model() -> Model:
    return Model(Predictor(ENCODER, PRETRAINED, templates="simple", device="cpu"), ENCODER, PRETRAINED)


@contextlib.contextmanager
def running(
    model: Model | None = None,
    page: bool = False,
    vocabulary: Vocabulary | None = None,
    hosts: Collection[str] | None = LOOPBACK,
    **limits: float,
) -> Iterator[str]:
    """Run the application in a thread of this process, and yield its address."""
    settings = Settings("tiny_clip", "cpu", vocabulary)
    app = create_app(model or toy_model(), settings, Limits(**limits), page, hosts)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        options = {"log_level": "critical", "timeout_graceful_shutdown": 5}
        server = uvicorn.Server(server_config(app, Limits(**limits), **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def scene(seed: int = 0, height: int = 96, width: int = 128) -> np.ndarray:
    return draw_scene(np.random.default_rng(seed), height, width, (3, 6), (9, 30), (2, 3)).image


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def unpack(packed: dict) -> np.ndarray:
    """As a client reads a map of a JSON response."""
    content = zlib.decompress(base64.b64decode(packed["zlib_base64"]))
    return np.frombuffer(content, np.dtype(packed["dtype"]).newbyteorder("<")).reshape(packed["shape"])

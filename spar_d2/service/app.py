"""The application: segmentation of one image per request, and the page."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from spar_d2 import __version__
from spar_d2.results import Segmentation
from spar_d2.service.batching import Batcher
from spar_d2.service.form import FIELDS, Form, read_form, read_format, read_pixels, read_task
from spar_d2.service.guard import Guard, refused
from spar_d2.service.limits import Limits, Places, Refusal
from spar_d2.service.model import Answer, Model, Task
from spar_d2.service.outputs import as_label_map, as_png, as_record, draw_features, draw_overlay
from spar_d2.text import Vocabulary

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_PROPERTIES = {
    "image": {"type": "string", "format": "binary", "description": "image file"},
    **{name: {"type": "string", "description": text} for name, text in FIELDS.items()},
}


@dataclass(frozen=True)
class Settings:
    """What the service tells about itself.

    Attributes:
        encoder: name of the encoder.
        device: device of the encoder.
        vocabulary: classes of requests without words; None if words are required.
    """

    encoder: str
    device: str
    vocabulary: Vocabulary | None = None


def create_app(
    model: Model, settings: Settings, limits: Limits, page: bool = False, hosts: Collection[str] | None = None
) -> FastAPI:
    """Create the application.

    Args:
        model: loaded model.
        settings: what the service tells about itself.
        limits: limits of requests.
        page: whether the page is served at "/".
        hosts: allowed names in the header Host; None allows all.
    """
    service = _Service(model, settings, limits)
    app = FastAPI(title="spar_d2", version=__version__, docs_url=None, redoc_url=None, lifespan=service.lifespan)
    app.add_middleware(Guard, limits=limits, hosts=hosts)
    for error, handler in _HANDLERS.items():
        app.add_exception_handler(error, handler)
    app.get("/health")(service.health)
    app.get("/settings")(service.settings)
    app.post("/segment", openapi_extra=_form_of(*_PROPERTIES))(service.segment)
    app.post("/features", openapi_extra=_form_of("image"))(service.features)
    if page:
        for path, response in _page():
            app.add_route(path, lambda request, response=response: Response(**response))
    return app


class _Service:
    def __init__(self, model: Model, settings: Settings, limits: Limits) -> None:
        self._model, self._settings, self._limits = model, settings, limits
        self._uploads, self._waiting = Places(limits.max_uploads), Places(limits.max_waiting)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._batcher = Batcher(self._model.run)
        yield
        await run_in_threadpool(self._batcher.close)

    def health(self) -> dict:
        """Whether the service works, and how busy it is."""
        about = {"encoder": self._settings.encoder, "device": self._settings.device}
        return {"status": "ok", "version": __version__, **about, "waiting": self._waiting.taken}

    def settings(self) -> dict:
        """Vocabularies, options and limits."""
        default = self._settings.vocabulary
        return {
            "encoder": self._settings.encoder,
            "device": self._settings.device,
            "words": default.names if default else [],
            "vocabularies": {name: len(Vocabulary.load(name)) for name in Vocabulary.built_in()},
            "anyup": self._model.anyup,
            "limits": asdict(self._limits),
        }

    async def segment(self, request: Request) -> Response:
        """Segment an image into the classes of a vocabulary."""
        form = await self._form(request)
        with _client_errors():
            kind, task = read_format(form), read_task(form, self._limits, self._settings.vocabulary)
            self._model.check(task)
        with self._waiting.take():
            pixels = await self._read(form)
            self._check_windows(task, pixels)
            answer = await self._answer(request, task, pixels)
            return await run_in_threadpool(_respond, kind, answer, task.vocabulary)

    async def features(self, request: Request) -> Response:
        """Draw the features of an image as colors, by their first three principal components."""
        form = await self._form(request)
        with self._waiting.take():
            pixels = await self._read(form)
            answer = await self._answer(request, None, pixels)
            assert isinstance(answer.result, torch.Tensor)
            drawn = await run_in_threadpool(draw_features, answer.result, self._model.patch_size, pixels.shape)
            return Response(await run_in_threadpool(as_png, drawn), media_type="image/png")

    async def _form(self, request: Request) -> Form:
        self._waiting.check()
        with self._uploads.take():
            return await read_form(request, self._limits)

    async def _read(self, form: Form) -> np.ndarray:
        pixels = await run_in_threadpool(read_pixels, form.image, self._limits.max_pixels)
        count, most, side = self._model.patches(pixels.shape[:2]), self._limits.max_patches, self._model.patch_size
        if count > most:
            raise Refusal(
                413,
                f"The image has {count:,} patches of {side} x {side} pixels; at most {most:,} are allowed. "
                "Make it smaller.",
            )
        return pixels

    def _check_windows(self, task: Task, pixels: np.ndarray) -> None:
        if task.options.inference != "single_pass":
            count = self._model.windows((pixels.shape[0], pixels.shape[1]), task.options.stride)
            if count > self._limits.max_windows:
                raise Refusal(
                    422,
                    f"inference: the image has {count:,} windows, at most {self._limits.max_windows:,} are allowed; "
                    "use a smaller image or a larger stride",
                )

    async def _answer(self, request: Request, task: Task | None, pixels: np.ndarray) -> Answer:
        future = asyncio.wrap_future(self._batcher.submit(task, pixels))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((future, gone), return_when=asyncio.FIRST_COMPLETED)
            if not future.done():
                raise ClientDisconnect
            with _client_errors():
                return future.result()
        except RuntimeError as error:
            # PyTorch has no exception class for CPU memory: "DefaultCPUAllocator: can't allocate memory".
            if isinstance(error, torch.cuda.OutOfMemoryError) or "allocate memory" in str(error):
                raise Refusal(413, "The image needs more memory than there is; use a smaller image.") from error
            raise
        finally:
            gone.cancel()
            future.cancel()


@contextlib.contextmanager
def _client_errors() -> Iterator[None]:
    """Context manager that refuses a request for ``ValueError``, whose message is a sentence for users."""
    try:
        yield
    except ValueError as error:
        raise Refusal(422, str(error)) from error


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _respond(kind: str, answer: Answer, vocabulary: Vocabulary) -> Response:
    assert isinstance(answer.result, Segmentation)
    if kind == "json":
        return JSONResponse(as_record(answer, answer.result, vocabulary))
    pixels = as_label_map(answer.result) if kind == "png" else draw_overlay(answer.result)
    return Response(as_png(pixels), media_type="image/png")


def _form_of(*names: str) -> dict:
    schema = {"type": "object", "properties": {name: _PROPERTIES[name] for name in names}, "required": ["image"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def _page() -> list[tuple[str, dict[str, Any]]]:
    """Return paths and responses of the page. Its files are a fixed list, so that no path can leave their folder."""
    responses = []
    for file in (resources.files("spar_d2.service") / "page").iterdir():
        kind = _TYPES[file.name.rpartition(".")[2]]
        path = "/" if file.name == "index.html" else f"/static/{file.name}"
        # Otherwise, browsers would keep the files of an earlier version.
        headers = {"Cache-Control": "no-cache"}
        responses.append((path, {"content": file.read_bytes(), "media_type": kind, "headers": headers}))
    return responses


def _on_http_error(request: Request, error: Any) -> Response:
    paths = "POST /segment, POST /features, GET /health, GET /settings, GET /openapi.json"
    sentences = {
        404: f"There is nothing here; the service has {paths}.",
        405: f"Wrong method; the service has {paths}.",
    }
    sentence = sentences.get(error.status_code, f"{error.detail}")
    return JSONResponse({"error": sentence}, error.status_code, error.headers)


def _on_unknown_error(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after the response, and the server logs it.
    return refused(Refusal(500, "The service failed at this request; its log has the reason."))


_HANDLERS: dict[Any, Any] = {
    Refusal: lambda request, error: refused(error),
    ClientDisconnect: lambda request, error: Response(status_code=400),
    HTTPException: _on_http_error,
    Exception: _on_unknown_error,
}

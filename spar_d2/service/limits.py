"""Limits of the service, and errors for requests that exceed them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

# Slow uploads must not take the places of requests that wait for the model.
_UPLOADS_PER_PLACE = 4
_RETRY_SECONDS = 2


class Refusal(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status.
        headers: additional headers of the response.
    """

    def __init__(self, status: int, sentence: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


@dataclass(frozen=True)
class Limits:
    """Limits of requests.

    Attributes:
        max_bytes: size of a request.
        max_pixels: pixels of an image.
        max_patches: patches of an image, whose attention takes most of the time: 2048x2048 pixels in patches of 16x16.
        max_waiting: requests that wait for the model or use it.
        max_classes: classes of a vocabulary.
        max_words: class names and synonyms of a vocabulary, each of which takes time in the text tower.
        max_name: characters of a class name or synonym.
        max_text: characters of all class names and synonyms.
        max_windows: windows of an image in a sliding window.
        head_seconds: time in which the head of a request must be received.
        body_seconds: time in which the rest of a request must be received.

    Raises:
        ValueError: a limit is not positive.
    """

    max_bytes: int = 20 * 2**20
    max_pixels: int = 2**22
    max_patches: int = 2**14
    max_waiting: int = 64
    max_classes: int = 256
    max_words: int = 512
    max_name: int = 100
    max_text: int = 20_000
    max_windows: int = 1000
    head_seconds: float = 10.0
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} (--{name.replace('_', '-')}) must be above 0, got {value}")

    @property
    def max_uploads(self) -> int:
        """Requests that are received at the same time."""
        return _UPLOADS_PER_PLACE * self.max_waiting


class Places:
    """A number of places for requests. All requests are handled by one event loop, so that there is no lock.

    Attributes:
        taken: number of places that are taken.
    """

    def __init__(self, count: int) -> None:
        self._count, self.taken = count, 0

    def check(self) -> None:
        """Raise :class:`Refusal` if all places are taken."""
        if self.taken >= self._count:
            sentence = f"The service is busy with {self.taken} other requests. Try again in {_RETRY_SECONDS} seconds."
            raise Refusal(503, sentence, {"Retry-After": str(_RETRY_SECONDS)})

    @contextlib.contextmanager
    def take(self) -> Iterator[None]:
        """Context manager that takes a place. Raises :class:`Refusal` if there is none."""
        self.check()
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

"""Numbers of training steps that are computed on a device, and read many steps at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Steps between readings on a GPU: as many as between the lines that Detectron2 writes.
PERIOD = 20


class Readings:
    """Keeps numbers of steps where they were computed; reading them one by one would make the CPU wait for a GPU."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, float], dict[str, torch.Tensor]]] = []

    def add(self, iteration: int, known: Mapping[str, float], computed: Mapping[str, torch.Tensor]) -> None:
        """Keep the numbers of a step: those that are known, and those of one element each on a device."""
        self._steps.append((iteration, dict(known), {name: value.detach() for name, value in computed.items()}))

    def are_due(self, iteration: int, steps: int) -> bool:
        """Whether to read after an iteration of a training of so many steps: the same in all processes."""
        on_gpu = any(value.is_cuda for _, _, computed in self._steps for value in computed.values())
        return not on_gpu or (iteration + 1) % PERIOD == 0 or iteration + 1 >= steps

    def take(self) -> list[tuple[int, dict[str, float]]]:
        """Iteration and numbers of every step since the last reading, by one copy from the device."""
        steps, self._steps = self._steps, []
        values = [value.double() for _, _, computed in steps for value in computed.values()]
        read = iter(torch.stack(values).tolist() if values else ())
        return [
            (iteration, {**known, **{name: next(read) for name in computed}}) for iteration, known, computed in steps
        ]

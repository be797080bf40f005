"""Buffer for metrics of training steps, which copies them from the device for many steps at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

# Number of steps between copies from a GPU, equal to Detectron2's logging period.
PERIOD = 20


class Readings:
    """Buffers metrics on the device, because copying them in every step would synchronize with the GPU."""

    def __init__(self) -> None:
        self._steps: list[tuple[int, dict[str, float], dict[str, torch.Tensor]]] = []

    def add(self, iteration: int, known: Mapping[str, float], computed: Mapping[str, torch.Tensor]) -> None:
        """Add the metrics of a step.

        Args:
            iteration: iteration of the step.
            known: metrics on the CPU.
            computed: metrics as tensors of one element on the device.
        """
        self._steps.append((iteration, dict(known), {name: value.detach() for name, value in computed.items()}))

    def are_due(self, iteration: int, steps: int) -> bool:
        """Return whether to read the metrics after an iteration; the result is the same in all processes.

        Args:
            iteration: current iteration.
            steps: number of training steps in total.
        """
        on_gpu = any(value.is_cuda for _, _, computed in self._steps for value in computed.values())
        return not on_gpu or (iteration + 1) % PERIOD == 0 or iteration + 1 >= steps

    def take(self) -> list[tuple[int, dict[str, float]]]:
        """Return iteration and metrics of each step since the last call, with one copy from the device."""
        steps, self._steps = self._steps, []
        tensors = [value.double() for _, _, computed in steps for value in computed.values()]
        values = iter(torch.stack(tensors).tolist() if tensors else ())
        return [
            (iteration, {**known, **{name: next(values) for name in computed}}) for iteration, known, computed in steps
        ]

    def write(self, device: torch.device) -> None:
        """Write the metrics of all steps since the last call to the event storage, summed over all processes.

        Args:
            device: device on which processes communicate.
        """
        steps = self.take()
        # float64, because float32 represents integers exactly only up to 16 million windows.
        names = ("cosine", "images", "windows", "encoded")
        sums = torch.tensor([[numbers[name] for name in names] for _, numbers in steps], dtype=torch.float64)
        if comm.get_world_size() > 1:
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        storage = get_event_storage()
        for (iteration, numbers), (cosine, images, windows, encoded) in zip(steps, sums.tolist()):
            seconds = numbers["seconds"]
            values = {
                "distill/cosine": cosine / images,
                "distill/images_per_second": images / seconds,
                "distill/windows_per_second": windows / seconds,
            }
            storage.put_scalars(cur_iter=iteration, **values)
            storage.put_scalar("distill/windows_encoded", encoded, smoothing_hint=False, cur_iter=iteration)

"""Visualization of teacher and student features during training."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.visualization import draw_panels, shared_pca_colors

logger = logging.getLogger(__name__)


class FeaturePictures(HookBase):
    """Periodically draws an image with its teacher and student features, as colors of one shared PCA projection.

    The image is the same throughout a run, so that visualizations are comparable. The teacher encodes it once. The
    visualizations are also written to TensorBoard.

    Args:
        model: student, without a DistributedDataParallel wrapper.
        target: function from an encoder input (3, H, W) to its target (1, D, h, w), or None if it is not known yet.
        load: function that returns the image as a dataset dict with "image" (3, H, W) uint8 and "file_name".
        period: number of iterations between visualizations; one is also drawn after the last iteration.
        folder: output folder; files are named "iter_0000999.png".
        channels: channel order of the image, "RGB" or "BGR".
    """

    def __init__(
        self,
        model: OpenVocabularySegmentor,
        target: Callable[[torch.Tensor], torch.Tensor | None],
        load: Callable[[], dict],
        period: int,
        folder: str | os.PathLike,
        channels: str,
    ) -> None:
        self.model, self.target, self.load = model, target, load
        self.period, self.folder, self.channels = period, folder, channels
        self._image: torch.Tensor | None = None
        self._target: torch.Tensor | None = None

    def after_step(self) -> None:
        number = self.trainer.iter + 1
        if comm.is_main_process() and (number % self.period == 0 or number == self.trainer.max_iter):
            try:
                self._draw()
            except OSError as error:
                logger.error("Failed to write the feature visualization to %s: %s", self.folder, error)

    @torch.no_grad()
    def _draw(self) -> None:
        loaded = self._image = self.load()["image"] if self._image is None else self._image
        x = self.model.encoder_input(loaded)
        target = self._target = self.target(x[0]) if self._target is None else self._target
        if target is None:
            return
        features = self.model.backbone.encoder(x)[0]
        colors = [part.numpy() for part in shared_pca_colors([target[0].cpu(), features.cpu()])]
        image = loaded.numpy().transpose(1, 2, 0)
        row = [image[..., ::-1] if self.channels == "BGR" else image, *colors]
        path = os.path.join(self.folder, f"iter_{self.trainer.iter:07d}.png")
        draw_panels([row], ["image", "teacher", f"student after {self.trainer.iter + 1} steps"], path)
        # (h, 2 w, 3) -> (3, h, 2 w)
        side_by_side = np.concatenate(colors, axis=1).transpose(2, 0, 1)
        self.trainer.storage.put_image("distill/teacher_student", side_by_side)

"""The benchmarks and training splits as Detectron2 data sets."""

from __future__ import annotations

import functools
import logging
import os

from spar_d2.data.datasets.catalog import LABELED_SETS
from spar_d2.data.preparation import MissingArchive, find_preparation, prepared_pairs, survey
from spar_d2.data.preparation.common import IGNORED

logger = logging.getLogger(__name__)


def register_benchmarks() -> None:
    """Register the benchmarks and training splits of :data:`~spar_d2.data.datasets.catalog.LABELED_SETS`.

    Files are not accessed before a data set is loaded. Names that are already registered are skipped with a warning.
    """
    # Imported here because importing detectron2 calls this function, possibly while this module is being imported.
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, data in LABELED_SETS.items():
        if name in DatasetCatalog:
            logger.warning("The data set %r is already registered and is not replaced.", name)
            continue
        DatasetCatalog.register(name, functools.partial(load_labeled, name))
        try:
            MetadataCatalog.get(name).set(
                stuff_classes=list(data.classes),
                stuff_colors=data.colors(),
                evaluator_type="sem_seg",
                ignore_label=IGNORED,
                vocabulary=data.vocabulary or name,
            )
        except AssertionError as error:
            logger.warning("The metadata of %r are already set and are not replaced: %s", name, error)


def load_labeled(name: str, root: str | os.PathLike | None = None) -> list[dict]:
    """Load the dataset dicts of a benchmark or training split, in Detectron2's format for semantic segmentation.

    Image sizes are omitted, because reading them would mean opening every image. Detectron2's mapper adds them.

    Args:
        name: name of the data set.
        root: root folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".

    Returns:
        Dataset dicts with file_name, sem_seg_file_name and image_id, for each image with converted labels.

    Raises:
        FileNotFoundError: there are no such images; the message says what to do.
        ValueError: the data set is unknown.
    """
    try:
        pairs = prepared_pairs(name, root)
    except MissingArchive:
        pairs = []
    if not pairs:
        raise FileNotFoundError(missing(name, root))
    preparation = find_preparation(name)
    if len(pairs) < preparation.expected:
        shown = f"{len(pairs)} of {preparation.expected} {preparation.part} images"
        logger.warning("%s: only %s are available and prepared.", name, shown)
    return [{"file_name": str(image), "sem_seg_file_name": str(label), "image_id": key} for key, image, label in pairs]


def found(name: str, root: str | os.PathLike | None = None) -> tuple[int, int]:
    """Return the number of images with converted labels on disk, and the expected number."""
    state = survey(name, root)
    return state.prepared, state.expected


def missing(name: str, root: str | os.PathLike | None = None) -> str:
    """Return instructions to complete a data set; "" if it is complete."""
    state = survey(name, root)
    if state.prepared >= state.expected:
        return ""
    shown = f"{name}: {state.prepared} of {state.expected} {state.part} images are prepared"
    first = f"{state.reason}; then run" if state.reason else "run"
    return f"{shown}; {first} spar-d2 prepare {name} (docs/datasets.md)"

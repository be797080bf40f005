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
    """Register :data:`~spar_d2.data.datasets.catalog.LABELED_SETS`, the benchmarks and the training splits of some.

    Nothing is looked for on disk before one is asked for. Where a name is taken, the data set that has it stays, with a
    warning.
    """
    # Here, as importing it is what calls this function, when this module may be half-way through its own imports.
    from detectron2.data import DatasetCatalog, MetadataCatalog

    for name, data in LABELED_SETS.items():
        if name in DatasetCatalog:
            logger.warning("The data set %r is registered already; that one stays, not ours.", name)
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
            logger.warning("The metadata of %r were set already and stay: %s", name, error)


def load_labeled(name: str, root: str | os.PathLike | None = None) -> list[dict]:
    """Dataset dicts of a benchmark or training split in Detectron2's form for semantic segmentation.

    Sizes are left out, as they would mean opening every image; Detectron2 adds them when it reads one.

    Args:
        name: of the data set.
        root: the folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".

    Returns:
        For each image with a prepared label file_name, sem_seg_file_name, image_id.

    Raises:
        FileNotFoundError: there is none; says what to do.
        ValueError: no such data set.
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
        logger.warning("%s: only %s are there and prepared.", name, shown)
    return [{"file_name": str(image), "sem_seg_file_name": str(label), "image_id": key} for key, image, label in pairs]


def found(name: str, root: str | os.PathLike | None = None) -> tuple[int, int]:
    """How many images of a data set are on disk with prepared labels, and how many there should be."""
    state = survey(name, root)
    return state.prepared, state.expected


def missing(name: str, root: str | os.PathLike | None = None) -> str:
    """What to do to have a data set complete and prepared; "" where nothing is to be done."""
    state = survey(name, root)
    if state.prepared >= state.expected:
        return ""
    shown = f"{name}: {state.prepared} of {state.expected} {state.part} images are prepared"
    first = f"{state.reason}; then run" if state.reason else "run"
    return f"{shown}; {first} tools/prepare_datasets.py {name} (docs/datasets.md)"

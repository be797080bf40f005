"""Converts labels of a data set and writes them for Detectron2."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from spar_d2.data.preparation.common import Labels, Preparation
from spar_d2.data.preparation.registry import find_preparation
from spar_d2.utils.environment import datasets_root
from spar_d2.utils.images import DAMAGE, open_image
from spar_d2.utils.io import atomic_write, remove_leftovers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Result of :func:`prepare`.

    Attributes:
        name: name of the data set.
        images: number of images with converted labels.
        written: number of label files written; the others already existed.
        folder: folder of the label files.
    """

    name: str
    images: int
    written: int
    folder: Path


@dataclass(frozen=True)
class _Task:
    """An image with its official label files, and the converted label file, which is kept if it exists."""

    name: str
    image: Path
    sources: tuple[Path, ...]
    target: Path
    labels: Labels


def prepare(
    name: str, root: str | os.PathLike | None = None, partial: bool = False, workers: int | None = None
) -> Summary:
    """Convert the labels of a data set.

    Existing labels are kept, so that the conversion can be interrupted and resumed. If there is an index file, it is
    written last, and removed before labels are added.

    Args:
        name: name of the data set.
        root: root folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".
        partial: accept an incomplete set of images.
        workers: number of threads; default: number of CPUs.

    Raises:
        MissingArchive: official files are missing; the message says what to download.
        RuntimeError: a required package is not installed.
        ValueError: an argument has an invalid value; or images or labels are missing, corrupt, of different size, or
            their values do not belong to the data set.
    """
    preparation, folder = find_preparation(name), datasets_root(root)
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    index = preparation.index(folder)
    remove_leftovers(preparation.folder(folder) if index is None else index.parent)
    images = preparation.images(folder)
    remaining = {key: path for key, path in images.items() if not _is_ready(path, preparation.prepared(folder, key))}
    finished = index is None or index.is_file()
    # The official labels may have been deleted after the conversion.
    labels = preparation.labels(folder) if remaining or not images or not finished else None
    tasks, missing = _find_tasks(preparation, folder, labels, remaining)
    if index is not None and (tasks or not finished):
        # An index file covers all images, so all official labels are read again.
        remaining = images
        tasks, missing = _find_tasks(preparation, folder, labels, remaining)
    ready = len(images) - len(remaining)
    _check_count(preparation, ready + len(tasks), missing, folder, partial)
    written = sum(not task.target.is_file() for task in tasks)
    if index is not None and tasks:
        index.unlink(missing_ok=True)
    entries = _write_all(name, tasks, workers, ready)
    if tasks:
        preparation.finish(folder, entries)
    return Summary(name, ready + len(tasks), written, preparation.folder(folder))


def _is_ready(image: Path, target: Path) -> bool:
    return image.is_file() and target.is_file()


def _find_tasks(
    preparation: Preparation, root: Path, labels: Labels | None, images: dict[str, Path]
) -> tuple[list[_Task], list[Path]]:
    """Return the tasks of images with all files, and the missing files of the others. ``labels`` may be None."""
    tasks, missing = [], []
    if labels is None:
        return tasks, missing
    for key, image in images.items():
        task = _Task(key, image, labels.files(key), preparation.prepared(root, key), labels)
        lacking = [path for path in (image, *task.sources) if not path.is_file()]
        missing += lacking
        if not lacking:
            tasks.append(task)
    return tasks, missing


def _check_count(preparation: Preparation, found: int, missing: list[Path], root: Path, partial: bool) -> None:
    """Raise ``ValueError`` if images or labels are missing, unless an incomplete set is accepted."""
    whole = f"{preparation.name} has {preparation.expected} {preparation.part} images"
    if found > preparation.expected:
        logger.warning("%s, but %d were found: scores will not be comparable.", whole, found)
    if found >= preparation.expected or (partial and found):
        return
    shown = f"; first missing files: {', '.join(map(str, missing[:3]))}" if missing else ""
    hint = "; --partial prepares the available ones" if found else ""
    raise ValueError(f"{whole}, but {found} with labels were found in {root}{shown}{hint}")


def _write_all(name: str, tasks: list[_Task], workers: int, ready: int) -> dict[str, Any]:
    """Run all tasks in threads: decoding and encoding take nearly all of the time and release the GIL.

    Returns:
        Entries that :meth:`Labels.convert` returned, by image name, in the order of ``tasks``.
    """
    total = ready + len(tasks)
    with (
        tqdm(total=total, initial=ready, desc=f"preparing {name}", unit="label", disable=None) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        futures = {task.name: pool.submit(_write, task, task.labels) for task in tasks}
        try:
            for future in as_completed(futures.values()):
                future.result()
                bar.update()
        except BaseException:
            # After Ctrl-C, too, only the files in progress are completed.
            pool.shutdown(cancel_futures=True)
            raise
    return {key: future.result() for key, future in futures.items()}


def _write(task: _Task, labels: Labels) -> Any:
    prepared, entry = labels.convert(task.name)
    try:
        with open_image(task.image) as header:
            size = header.size[::-1]
    except DAMAGE as error:
        raise ValueError(f"the image {task.image} cannot be read: {error}") from error
    if prepared.shape[:2] != size:
        sizes = f"{_format_size(prepared.shape)} and {_format_size(size)} pixels"
        raise ValueError(f"the label file {task.sources[0]} and its image {task.image} differ in size: {sizes}")
    if not task.target.is_file():
        with atomic_write(task.target) as temporary:
            Image.fromarray(prepared).save(temporary)
    return entry


def _format_size(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"

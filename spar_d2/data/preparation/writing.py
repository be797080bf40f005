"""Writing prepared labels: what Detectron2 reads, one class or segment per pixel."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from spar_d2.data.preparation.common import Labels, Preparation, datasets_root
from spar_d2.data.preparation.registry import find_preparation
from spar_d2.utils.images import DAMAGE, open_image
from spar_d2.utils.io import atomic_write, remove_leftovers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What :func:`prepare` did.

    Attributes:
        name: of the data set.
        images: those that have prepared labels now.
        written: label files written; all others were there.
        folder: where they are.
    """

    name: str
    images: int
    written: int
    folder: Path


@dataclass(frozen=True)
class _Task:
    """An image, its official label files and what reads them, and the prepared one to write, kept where it is there."""

    name: str
    image: Path
    sources: tuple[Path, ...]
    target: Path
    labels: Labels


def prepare(
    name: str, root: str | os.PathLike | None = None, partial: bool = False, workers: int | None = None
) -> Summary:
    """Write the prepared labels of a data set.

    Labels that are there are kept, so that it can be stopped and called again. An index that goes with them is written
    last, and removed before labels are added to those it knows.

    Args:
        name: of the data set.
        root: the folder of all data sets; default: ``$DETECTRON2_DATASETS``, or "datasets".
        partial: be content with a part of the images.
        workers: threads; default: one for each CPU.

    Raises:
        MissingArchive: official files are not there; says what to fetch.
        RuntimeError: they need a package that is not installed.
        ValueError: an argument that is not allowed; images or labels are missing, damaged, of different size, or have
            other values than the data set.
    """
    preparation, folder = find_preparation(name), datasets_root(root)
    workers = os.cpu_count() or 1 if workers is None else workers
    if workers < 1:
        raise ValueError(f"--workers must be at least 1, got {workers}")
    index = preparation.index(folder)
    remove_leftovers(preparation.folder(folder) if index is None else index.parent)
    images = preparation.images(folder)
    left = {key: path for key, path in images.items() if not _is_ready(path, preparation.prepared(folder, key))}
    finished = index is None or index.is_file()
    # Official labels may be gone once all are prepared.
    labels = preparation.labels(folder) if left or not images or not finished else None
    tasks, missing = _find_tasks(preparation, folder, labels, left)
    if index is not None and (tasks or not finished):
        # An index tells of all images, so all official labels are read again.
        left = images
        tasks, missing = _find_tasks(preparation, folder, labels, left)
    ready = len(images) - len(left)
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
    """What can be done of these images, and the files that the others lack; ``labels`` are there if images are."""
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
    """Raise ``ValueError`` where images or labels are missing, unless a part of them is enough."""
    whole = f"{preparation.name} has {preparation.expected} {preparation.part} images"
    if found > preparation.expected:
        logger.warning("%s, here are %d: scores will not compare.", whole, found)
    if found >= preparation.expected or (partial and found):
        return
    shown = f"; missing first: {', '.join(map(str, missing[:3]))}" if missing else ""
    hint = "; --partial prepares those that are there" if found else ""
    raise ValueError(f"{whole}, with labels there are {found} in {root}{shown}{hint}")


def _write_all(name: str, tasks: list[_Task], workers: int, ready: int) -> dict[str, Any]:
    """Do all tasks in threads: nearly all of the time goes into decoding and encoding, which run side by side there.

    Returns:
        By the images' names, in the order of ``tasks``, what the labels tell of them.
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
            # After ctrl-C too, only the files that are being written are finished.
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
        sizes = f"{_shown(prepared.shape)} and {_shown(size)} pixels"
        raise ValueError(f"the label file {task.sources[0]} and its image {task.image} differ in size: {sizes}")
    if not task.target.is_file():
        with atomic_write(task.target) as temporary:
            Image.fromarray(prepared).save(temporary)
    return entry


def _shown(size: tuple[int, ...]) -> str:
    return f"{size[1]}x{size[0]}"

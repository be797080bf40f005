"""Pascal Context, with a background class (context60) and without (context59).

Three label formats are supported: 59 classes, MATLAB files of 459 classes, and their conversion by other projects.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from spar_d2.data.datasets import class_names
from spar_d2.data.preparation.common import (
    IGNORED,
    ArchiveSpec,
    ClassLabels,
    Labels,
    MissingArchive,
    Preparation,
    label_table,
    names_in_list,
)

_VOC = ArchiveSpec(
    ("VOCdevkit/VOC2010", "VOC2010"), "VOCtrainval_03-May-2010.tar", "host.robots.ox.ac.uk/pascal/VOC/voc2010"
)
_LISTS = ("ImageSets/SegmentationContext/val.txt", "ImageSets/Main/val.txt")
# Folders that may contain the labels.
_FOLDERS = ("VOCdevkit/VOC2010", "VOC2010", "pascal_context", ".")
# Synonyms in the official lists.
_ALIASES = {"diningtable": "table"}
# Largest label in the lists of all classes and of the 59 classes; 0 stands for other classes.
_ALL, _COMMON = 459, 59
_ALPHABETICAL = dict(enumerate(class_names.CONTEXT, 1))


class ContextPreparation(Preparation):
    """Labels of 59 classes, and 0 for all others. Without a background class, 0 is ignored and 1 becomes 0.

    Args:
        name: name of the data set.
        background: whether the background is a class.
    """

    def __init__(self, name: str, background: bool) -> None:
        super().__init__(name)
        self.background = background

    def images(self, root: Path) -> dict[str, Path]:
        try:
            names = names_in_list(_VOC.find(root, _LISTS[0]))
        except MissingArchive:
            names = names_in_list(_VOC.find(root, _LISTS[1]))
        folder = _VOC.find(root, "JPEGImages")
        return {name: folder / f"{name}.jpg" for name in names}

    def labels(self, root: Path) -> Labels:
        """Return the labels in the first of the three formats that exists.

        Raises:
            MissingArchive: there are no labels.
            ValueError: the list of classes is incomplete.
        """
        for folder in _FOLDERS:
            for find in (self._as_59, self._as_459, self._as_converted):
                if (labels := find(root / folder)) is not None:
                    return labels
        raise MissingArchive(
            f"there are no labels of Pascal Context in {root}: download 59_context_labels.tar.gz and 59_labels.txt, or "
            "trainval.tar.gz and labels.txt, from cs.stanford.edu/~roozbeh/pascal-context and unpack them in "
            f"{root / 'pascal_context'}",
            "59_context_labels.tar.gz",
        )

    def _as_59(self, folder: Path) -> Labels | None:
        images = folder / "59_context_labels"
        if not images.is_dir():
            return None
        names = next((path for path in (folder / "59_labels.txt", images / "59_labels.txt") if path.is_file()), None)
        numbers = _numbers(names, _COMMON) if names else _ALPHABETICAL
        return ClassLabels(lambda name: images / f"{name}.png", self._table(numbers, _COMMON))

    def _as_459(self, folder: Path) -> Labels | None:
        files = folder / "trainval"
        if next(files.glob("*.mat"), None) is None:
            return None
        names = next((path for path in (folder / "labels.txt", files / "labels.txt") if path.is_file()), None)
        if names is None:
            raise MissingArchive(
                f"{folder / 'labels.txt'} does not exist: download it from cs.stanford.edu/~roozbeh/pascal-context "
                f"and put it in {folder}",
                "labels.txt",
            )
        return ClassLabels(lambda name: files / f"{name}.mat", self._table(_numbers(names, _ALL), _ALL), _read_mat)

    def _as_converted(self, folder: Path) -> Labels | None:
        images = folder / "SegmentationClassContext"
        if not images.is_dir():
            return None
        return ClassLabels(lambda name: images / f"{name}.png", self._table(_ALPHABETICAL, _COMMON))

    def _table(self, names: dict[int, str], last: int) -> np.ndarray:
        """Create the table from official labels 0 to ``last`` to classes, given the official labels of class names."""
        first, others = (1, 0) if self.background else (0, IGNORED)
        classes = {name: k for k, name in enumerate(class_names.CONTEXT, first)}
        labels = {number: classes[names[number]] if number in names else others for number in range(last + 1)}
        # 255 means ignored in 8-bit images, but is a normal class in the list of 459.
        if last < IGNORED:
            labels[IGNORED] = IGNORED
        return label_table(labels, max(labels) + 1)


def _numbers(path: Path, last: int) -> dict[int, str]:
    """Read the names of the 59 classes by official label, from a list with lines such as "397: table".

    Raises:
        ValueError: a line has another format, a label is larger than ``last``, or a class is missing.
    """
    names = {}
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(\d+)\s*:(.*)", line)
        if match is None or int(match[1]) > last:
            raise ValueError(f'every line of {path} must be like "397: table", with labels up to {last}, got {line!r}')
        name = "".join(match[2].split()).lower()
        name = _ALIASES.get(name, name)
        if name in class_names.CONTEXT:
            names[int(match[1])] = name
    missing = [name for name in class_names.CONTEXT if name not in names.values()]
    if missing:
        raise ValueError(f"{path} lacks the classes {', '.join(missing[:5])}")
    return names


def _read_mat(path: Path) -> np.ndarray:
    """Read the labels of a MATLAB file.

    Raises:
        RuntimeError: scipy is not installed.
        ValueError: the file cannot be read, or has other content.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise RuntimeError(
            "reading the MATLAB label files of Pascal Context requires scipy: pip install scipy"
        ) from error
    try:
        values = loadmat(path)["LabelMap"]
    except Exception as error:  # corrupt files raise many kinds of errors
        raise ValueError(f"the label file {path} cannot be read: {error}") from error
    if values.ndim != 2 or values.dtype.kind not in "ui":
        raise ValueError(f"the label file {path} must hold integers (H, W), got {values.dtype} {values.shape}")
    return values

"""Sets config keys that follow from others: files of a model folder, numbers of classes, and steps from epochs."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from fvcore.common.config import BASE_KEY

from spar_d2.data.build import MASK_TRANSFORMER
from spar_d2.data.datasets.dataset_file import DatasetFile
from spar_d2.data.datasets.file_registration import head_classes
from spar_d2.data.datasets.scenes import register_photos
from spar_d2.encoders import EncoderSpec
from spar_d2.modeling.mask_transformer.settings import CLASSIFIERS, TASKS
from spar_d2.modeling.open_vocabulary import OpenVocabularySegmentor
from spar_d2.utils.yaml_files import read_yaml

logger = logging.getLogger(__name__)

_EPOCHS, _MAX_ITER = "SPAR.DATA.EPOCHS", "SOLVER.MAX_ITER"
_HEAD, _TASK = "MODEL.SEM_SEG_HEAD", "MODEL.MASK_TRANSFORMER.TASK"
_NOT_GIVEN = 1_000


class Origin(NamedTuple):
    """Where a key is set: 0 on the command line, 1 in the config file, 2 in its bases, and so on."""

    level: int
    place: str


GivenKeys = Mapping[str, Origin]


def given_keys(config_file: str, overrides: list) -> dict[str, Origin]:
    """Return where each explicitly set key is set, the most specific place.

    Args:
        config_file: YAML config, which was read without errors.
        overrides: alternating keys and values.
    """
    given = {str(key): Origin(0, "the command line") for key in overrides[::2]}
    files, level = [config_file], 1
    while files:
        bases = []
        for file in files:
            content = read_yaml(file)
            names = content.pop(BASE_KEY, [])
            names = [names] if isinstance(names, str) else names
            bases += [os.path.join(os.path.dirname(file), os.path.expanduser(name)) for name in names]
            for key in _leaves(content):
                given.setdefault(key, Origin(level, file))
        files, level = bases, level + 1
    return given


def _leaves(node: Mapping, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def value_at(cfg: CfgNode, key: str) -> object:
    """Return the value of a dotted key, or None if it does not exist."""
    node = cfg
    for part in key.split("."):
        node = node.get(part) if isinstance(node, CfgNode) else None
    return node


def settle_encoder(cfg: CfgNode, given: GivenKeys) -> None:
    """Replace a model folder by the files in it, so that cache keys change with them.

    Weights and read-out that a less specific config sets are those of another encoder, and are replaced.
    """
    spar, level = cfg.MODEL.SPAR, given["MODEL.SPAR.ENCODER"].level
    for name in ("PRETRAINED", "READOUT"):
        if (origin := given.get(f"MODEL.SPAR.{name}")) and origin.level > level:
            spar[name] = ""
    spec = EncoderSpec(spar.ENCODER, spar.PRETRAINED, readout=spar.READOUT)
    spar.ENCODER, spar.PRETRAINED, spar.READOUT = spec.name, spec.pretrained, spec.readout


def settle_classes(cfg: CfgNode, given: GivenKeys) -> None:
    """Set the numbers of classes of the model's heads from the data-set files, or check them where they are given.

    The task of a MaskTransformer is set in the same way. If its classes are words, only the training data count.

    Raises:
        ValueError: a given number differs, or data sets differ; the message names the key.
    """
    if cfg.MODEL.META_ARCHITECTURE == OpenVocabularySegmentor.__name__:
        return
    first: dict[str, str] = {}
    for name, file, counts in head_classes([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]):
        for key, (value, reason) in _needed(cfg, name, file, counts).items():
            got = value_at(cfg, key)
            if key not in given and key not in first:
                cfg.merge_from_list([key, str(value)])
                logger.info("%s: set to %s for %s of %s", key, value, name, file.path)
            elif got != value:
                place = f"{got} in {given[key].place}" if key in given else f"{got} for {first[key]!r}"
                raise ValueError(f"{key} must be {value}, {reason} ({file.path}), got {place}; remove or correct it")
            first.setdefault(key, name)


def _needed(cfg: CfgNode, name: str, file: DatasetFile, counts: Mapping[str, int]) -> dict[str, tuple[object, str]]:
    """Return the values of the keys that follow from a data set, and the reasons.

    Raises:
        ValueError: the model cannot learn the data set.
    """
    kind, node, result = cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.MASK_TRANSFORMER, {}
    if kind == MASK_TRANSFORMER:
        task, labels = (TASKS[0], "panoptic labels") if file.panoptic else (TASKS[1], "label maps")
        result[_TASK] = (task, f"the task for the {labels} of {name!r}")
        # Classes that are words may be others in tests.
        if node.CLASSIFIER == CLASSIFIERS[1] and name not in cfg.DATASETS.TRAIN:
            return result
    if not file.panoptic:
        result[f"{_HEAD}.NUM_CLASSES"] = (counts["classes"], f"the number of classes of {name!r}")
        result[f"{_HEAD}.IGNORE_VALUE"] = (file.ignore_label, f"the label of ignored pixels of {name!r}")
        return result
    if not counts["things"] and kind != MASK_TRANSFORMER:
        raise ValueError(
            f"{name!r} ({file.path}) has no thing classes (isthing 1), but {kind} needs at least one; use "
            f"{MASK_TRANSFORMER}, or label maps and a linear probe, for stuff"
        )
    result["MODEL.ROI_HEADS.NUM_CLASSES"] = (counts["things"], f"the number of thing classes of {name!r}")
    reason = f"the number of stuff classes, plus one for all things, of {name!r}"
    result[f"{_HEAD}.NUM_CLASSES"] = (counts["stuff"] + 1, reason)
    return result


def settle_steps(cfg: CfgNode, given: GivenKeys) -> None:
    """Set ``SOLVER.MAX_ITER`` and the schedule from ``SPAR.DATA.EPOCHS``, unless ``MAX_ITER`` is more specific.

    Raises:
        ValueError: the number of epochs is invalid, or both keys are given in the same place and disagree.
        FileNotFoundError: a data set does not exist.
    """
    epochs, solver = cfg.SPAR.DATA.EPOCHS, cfg.SOLVER
    if epochs < 0:
        raise ValueError(f"{_EPOCHS} must be 0 (off) or more, got {epochs}")
    nowhere = Origin(_NOT_GIVEN, "")
    epochs_at, steps_at = given.get(_EPOCHS, nowhere), given.get(_MAX_ITER, nowhere)
    if steps_at.level < epochs_at.level:
        logger.info("%s %d of %s replaces %s", _MAX_ITER, solver.MAX_ITER, steps_at.place, _EPOCHS)
        cfg.SPAR.DATA.EPOCHS = 0
        return
    images, batch = count_images(cfg), solver.IMS_PER_BATCH
    steps = math.ceil(epochs * images / max(1, batch))
    shown = f"{epochs} epochs of {images} images with {batch} per step are {steps} steps"
    if steps_at.level == epochs_at.level:
        if solver.MAX_ITER != steps:
            both = f"{_EPOCHS} and {_MAX_ITER} are both set in {epochs_at.place} and disagree"
            raise ValueError(f"{both}: {shown}, but {_MAX_ITER} is {solver.MAX_ITER}; remove one of them")
        return
    scale = steps / solver.MAX_ITER
    # Milestones were written for the MAX_ITER that is replaced, unless they are as specific as EPOCHS.
    if given.get("SOLVER.STEPS", nowhere).level > epochs_at.level:
        scaled = {round(step * scale) for step in solver.STEPS if step < solver.MAX_ITER}
        solver.STEPS = tuple(sorted(scaled - {0}))
    if given.get("SOLVER.WARMUP_ITERS", nowhere).level > epochs_at.level:
        solver.WARMUP_ITERS = round(solver.WARMUP_ITERS * min(1.0, scale))
    solver.MAX_ITER = steps
    logger.info("%s: %s", _EPOCHS, shown)


def count_images(cfg: CfgNode) -> int:
    """Count the training images of ``SPAR.DATA.IMAGES`` or ``DATASETS.TRAIN``.

    Raises:
        ValueError, FileNotFoundError: there are no images.
    """
    names = [register_photos(cfg.SPAR.DATA.IMAGES)] if cfg.SPAR.DATA.IMAGES else list(cfg.DATASETS.TRAIN)
    if not names:
        raise ValueError(f"{_EPOCHS} needs training images: set SPAR.DATA.IMAGES or DATASETS.TRAIN")
    return sum(len(DatasetCatalog.get(name)) for name in names)

"""Applies the paper's evaluation protocol to a config."""

from __future__ import annotations

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from spar_d2.data.datasets.catalog import BENCHMARKS
from spar_d2.encoders.registry import find_family
from spar_d2.text import Vocabulary
from spar_d2.text.examples import ExampleVocabulary

logger = logging.getLogger(__name__)

PROTOCOLS = ("paper", "config")


def with_test_set(cfg: CfgNode, dataset: str) -> CfgNode:
    """Return a copy of a config, not frozen, whose only test data set is this one."""
    result = cfg.clone()
    result.defrost()
    result.DATASETS.TEST = (dataset,)
    return result


def config_for(cfg: CfgNode, dataset: str) -> CfgNode:
    """Return the config for testing on a data set.

    If ``SPAR.TEST.PROTOCOL`` is "paper" and the data set is one of this package's benchmarks, the test size, logit
    scale and thresholds are set as in the paper, and logged.

    Args:
        cfg: config, which is not modified.
        dataset: name of a registered data set; becomes ``DATASETS.TEST``.

    Raises:
        ValueError: the protocol is unknown, or the configured vocabulary and the data set differ in their number of
            classes.
    """
    if cfg.SPAR.TEST.PROTOCOL not in PROTOCOLS:
        raise ValueError(f"SPAR.TEST.PROTOCOL must be one of {', '.join(PROTOCOLS)}; got {cfg.SPAR.TEST.PROTOCOL!r}")
    result = with_test_set(cfg, dataset)
    benchmark = BENCHMARKS.get(dataset)
    if benchmark is not None and cfg.SPAR.TEST.PROTOCOL == "paper":
        settings = benchmark.settings(find_family(cfg.MODEL.SPAR.ENCODER).name)
        overrides: list[Any] = [item for pair in settings.items() for item in pair]
        result.merge_from_list(overrides)
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        logger.info("%s by the paper's protocol (SPAR.TEST.PROTOCOL): %s", dataset, shown)
    check_vocabulary(result, dataset)
    result.freeze()
    return result


def check_vocabulary(cfg: CfgNode, dataset: str) -> None:
    """Check the configured vocabulary against a test data set.

    Test images that are also examples of the vocabulary cause a warning.

    Raises:
        ValueError: vocabulary and data set differ in their number of classes.
    """
    if not cfg.MODEL.SPAR.VOCABULARY or cfg.MODEL.SPAR.OUTPUT == "features":
        return
    vocabulary = Vocabulary.load(cfg.MODEL.SPAR.VOCABULARY)
    names = MetadataCatalog.get(dataset).get("stuff_classes", [])
    if len(vocabulary) != len(names):
        raise ValueError(
            f"MODEL.SPAR.VOCABULARY has {len(vocabulary)} classes, but {dataset!r} has {len(names)}: "
            "the vocabulary must have one class for each class of the data set, in the same order"
        )
    if isinstance(vocabulary, ExampleVocabulary):
        examples = {os.path.realpath(file) for file in vocabulary.files}
        shared = [r["file_name"] for r in DatasetCatalog.get(dataset) if os.path.realpath(r["file_name"]) in examples]
        if shared:
            logger.warning(
                "MODEL.SPAR.VOCABULARY: %d test images of %s are examples of the classes (%s, ...); "
                "scores on them are too high",
                len(shared),
                dataset,
                shared[0],
            )

"""The protocol of the paper's benchmarks, put into a config."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from spar_d2.data.datasets.catalog import BENCHMARKS
from spar_d2.encoders.registry import find_family
from spar_d2.text import Vocabulary

logger = logging.getLogger(__name__)

PROTOCOLS = ("paper", "config")


def config_for(cfg: CfgNode, dataset: str) -> CfgNode:
    """The config for testing on one data set.

    With ``SPAR.TEST.PROTOCOL`` "paper" and one of our benchmarks, test size, logit scale, thresholds and, where none is
    configured, the vocabulary become the benchmark's; the log says what they are.

    Args:
        cfg: left as it is.
        dataset: a registered name; ``DATASETS.TEST`` of the result.

    Raises:
        ValueError: another protocol, or a configured vocabulary of another number of classes than the data set.
    """
    if cfg.SPAR.TEST.PROTOCOL not in PROTOCOLS:
        raise ValueError(f"SPAR.TEST.PROTOCOL must be one of {', '.join(PROTOCOLS)}; got {cfg.SPAR.TEST.PROTOCOL!r}")
    own = cfg.clone()
    own.defrost()
    own.DATASETS.TEST = (dataset,)
    benchmark = BENCHMARKS.get(dataset)
    if benchmark is not None and cfg.SPAR.TEST.PROTOCOL == "paper":
        settings = benchmark.settings(find_family(cfg.MODEL.SPAR.ENCODER).name)
        words: list[Any] = [word for pair in settings.items() for word in pair]
        own.merge_from_list(words)
        shown = ", ".join(f"{key} {value}" for key, value in settings.items())
        logger.info("%s by the paper's protocol (SPAR.TEST.PROTOCOL): %s", dataset, shown)
    check_vocabulary(own, dataset)
    own.freeze()
    return own


def check_vocabulary(cfg: CfgNode, dataset: str) -> None:
    """Raise ``ValueError`` where the configured vocabulary is not of the classes of a data set."""
    words = cfg.MODEL.SPAR.VOCABULARY
    names = MetadataCatalog.get(dataset).get("stuff_classes", [])
    if words and cfg.MODEL.SPAR.OUTPUT != "features" and (count := len(Vocabulary.load(words))) != len(names):
        raise ValueError(
            f"MODEL.SPAR.VOCABULARY has {count} classes and {dataset!r} {len(names)}: "
            "each class of the data set needs one of the vocabulary's, in its order"
        )

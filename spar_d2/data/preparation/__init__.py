"""Converts official label files of benchmarks, training splits and panoptic data sets for Detectron2.

Needs no Detectron2.
"""

from spar_d2.data.preparation.common import MissingArchive
from spar_d2.data.preparation.registry import find_preparation
from spar_d2.data.preparation.survey import Status, prepared_pairs, survey
from spar_d2.data.preparation.writing import Summary, prepare

__all__ = ["MissingArchive", "Status", "Summary", "find_preparation", "prepare", "prepared_pairs", "survey"]

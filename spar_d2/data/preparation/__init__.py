"""Official label files of the benchmarks to what Detectron2 reads. Needs no Detectron2."""

from spar_d2.data.preparation.common import MissingArchive
from spar_d2.data.preparation.survey import Survey, prepared_pairs, survey
from spar_d2.data.preparation.writing import Summary, prepare

__all__ = ["MissingArchive", "Summary", "Survey", "prepare", "prepared_pairs", "survey"]

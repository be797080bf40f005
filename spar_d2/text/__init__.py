"""Vocabularies, prompt templates and text embeddings, independent of Detectron2."""

from spar_d2.text.embeddings import TextEmbeddings
from spar_d2.text.panoptic_vocabulary import PanopticVocabulary
from spar_d2.text.templates import load_templates
from spar_d2.text.vocabulary import Vocabulary

__all__ = ["PanopticVocabulary", "TextEmbeddings", "Vocabulary", "load_templates"]

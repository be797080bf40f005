"""Words of a data set's classes, however its metadata number them."""

import pytest

from spar_d2.modeling.mask_transformer.vocabulary_classes import dataset_vocabulary
from spar_d2.text import PanopticVocabulary, Vocabulary


@pytest.mark.parametrize("name", ["coco_2017_val_panoptic", "coco_2017_val_panoptic_separated"])
def test_things_and_stuff_that_are_numbered_together_or_apart(name):
    """Detectron2's metadata list all 133 classes as things and as stuff, or apart."""
    ours, found = dataset_vocabulary("spar_coco_panoptic_val", True), dataset_vocabulary(name, True)
    assert (found.things, len(found)) == (80, 133)
    # Detectron2's lists call a few kinds of stuff differently ("water", "water-other").
    same = [a == b for a, b in zip(found.vocabulary.names, ours.vocabulary.names)]
    assert all(same[:81]) and sum(same) > 100


def test_a_built_in_vocabulary_is_loaded():
    """The metadata of benchmarks name a vocabulary, with synonyms."""
    found = dataset_vocabulary("ade20k_train", False)
    assert found.vocabulary.classes == Vocabulary.load("ade20k").classes
    assert (found.things, len(found)) == (0, 150)


def test_data_sets_without_classes_are_named():
    with pytest.raises(ValueError, match="coco_2017_train' has no .*_to_contiguous_id"):
        dataset_vocabulary("coco_2017_train", True)


def test_headings_in_semantic_segmentation():
    assert PanopticVocabulary.of("stuff: sky; grass, lawn", False).vocabulary.classes == (("sky",), ("grass", "lawn"))
    both = PanopticVocabulary.of("Things: cat\nstuff: sky", False)
    assert both.vocabulary.classes == (("cat",), ("sky",)) and both.things == 0
    with pytest.raises(ValueError, match="the vocabulary is empty"):
        PanopticVocabulary.of("things:; stuff:")

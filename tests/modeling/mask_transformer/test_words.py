"""Classes that are words: scores of the best synonym, other words by one call, and features inside of masks."""

import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog

from small_mask_transformers import SEMANTIC, STUFF, TEXT, THINGS, image, panoptic_record, small_config, small_model
from spar_d2.modeling.mask_transformer.classifiers import TextClassifier, pooled_features, two_way
from spar_d2.modeling.mask_transformer.vocabulary_classes import dataset_vocabulary
from spar_d2.text import Vocabulary

WORDS = "things: circle, disk; sun; stuff: Grass; sea, ocean; road"
UNSEEN = ["MODEL.MASK_TRANSFORMER.UNSEEN", "('star', 'snow')"]
WEIGHTS = ["MODEL.MASK_TRANSFORMER.SEEN_WEIGHT", "MODEL.MASK_TRANSFORMER.UNSEEN_WEIGHT"]
ALL = ["MODEL.MASK_TRANSFORMER.OUTPUTS", "('panoptic_seg', 'sem_seg', 'instances')"]


@pytest.fixture(scope="module")
def unchanged():
    return small_model(*TEXT, *ALL)


@pytest.fixture
def model(unchanged):
    before = unchanged.vocabulary.tested
    yield unchanged
    unchanged.vocabulary.tested = before


def categories(output) -> set:
    return {(segment["isthing"], segment["category_id"]) for segment in output["panoptic_seg"][1]}


def test_logits_are_cosines_of_the_best_synonym(model):
    model.set_vocabulary(WORDS)
    embeddings = torch.randn(2, 3, 32)
    model.vocabulary.for_inference(model.classifier, torch.device("cpu"))
    with torch.no_grad():
        logits = model.classifier(embeddings)
        projected = F.normalize(model.classifier.projection(embeddings), dim=-1)
    synonyms = [["circle", "disk"], ["sun"], ["Grass"], ["sea", "ocean"], ["road"]]
    vectors, numbers = model.vocabulary.embeddings(Vocabulary(synonyms))
    assert logits.shape == (2, 3, 6)
    for number in range(5):
        cosines = projected @ vectors[numbers == number].T
        torch.testing.assert_close(logits[..., number], 14 * cosines.amax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[..., 5], model.classifier.no_object(embeddings)[..., 0])


def test_mixed_precision_does_not_round_cosines(model):
    model.vocabulary.for_inference(model.classifier, torch.device("cpu"))
    features = F.normalize(torch.randn(4, 5, 128), dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model.classifier.scores(features)
    assert torch.equal(found, model.classifier.scores(features)) and found.dtype == torch.float32


def test_the_scale_is_limited():
    classifier = TextClassifier(8, 4)
    vectors = F.normalize(torch.randn(3, 4), dim=1)
    classifier.set_classes(type("Vectors", (), {"vectors": vectors, "query_class": torch.arange(3)}), 3)
    torch.nn.init.constant_(classifier.log_scale, 50.0)
    assert classifier(torch.randn(5, 8))[:, :3].abs().max() <= 100.001


def test_classes_change_by_one_call(model):
    record = {"image": image((51, 77))}
    before = model([record])[0]
    assert before["sem_seg"].shape[0] == 1 + STUFF
    model.set_vocabulary(WORDS)
    after = model([record])[0]
    assert after["sem_seg"].shape[0] == 1 + 3
    assert after["instances"].pred_classes.max() < 2
    assert categories(after) <= {(True, 0), (True, 1), (False, 1), (False, 2), (False, 3)}
    model.set_vocabulary({"things": [], "stuff": ["sky", ["sea", "ocean"]]})
    stuff_only = model([record])[0]
    assert stuff_only["sem_seg"].shape[0] == 3 and not stuff_only["sem_seg"][0].any()
    assert len(stuff_only["instances"]) == 0 and categories(stuff_only) <= {(False, 1), (False, 2)}
    model.set_vocabulary("things: dog")
    assert categories(model([record])[0]) == {(True, 0)}


def test_the_order_of_words_is_the_numbering(model):
    record = {"image": image((51, 77))}
    model.set_vocabulary("things: circle; stuff: grass; sea; road")
    first = model([record])[0]["sem_seg"]
    model.set_vocabulary("stuff: road; sea; grass; things: circle")
    torch.testing.assert_close(model([record])[0]["sem_seg"], first[[0, 3, 2, 1]], rtol=1e-4, atol=1e-5)


def test_training_keeps_the_training_classes(model):
    model.set_vocabulary(WORDS)
    model.train()
    group = model._group([0], [model._normalize(image((40, 56)))], [panoptic_record((40, 56))])
    model.eval()
    assert group.logits.shape[-1] == THINGS + STUFF + 1
    assert model([{"image": image((40, 56))}])[0]["sem_seg"].shape[0] == 4


def test_wrong_vocabularies_change_nothing(model):
    for wrong in ("cat; dog", {"thing": ["cat"]}, ["cat"], 3, ""):
        with pytest.raises(ValueError):
            model.set_vocabulary(wrong)
    assert model([{"image": image((20, 20))}])[0]["sem_seg"].shape[0] == 1 + STUFF


def test_learned_classes_are_fixed():
    model = small_model()
    with pytest.raises(ValueError, match=r"fixed.*MODEL\.MASK_TRANSFORMER\.CLASSIFIER text"):
        model.set_vocabulary(WORDS)
    with model.classes_of("spar_scenes_panoptic_val"):
        assert model([{"image": image((20, 20))}])


def test_semantic_models_take_plain_words():
    model = small_model(*TEXT, *SEMANTIC, "MODEL.SPAR.OUTPUT", "scores")
    record = {"image": image((40, 56))}
    assert model([record])[0]["sem_seg"].shape == (13, 40, 56)
    model.set_vocabulary("cat, kitten; sky")
    assert model([record])[0]["sem_seg"].shape == (2, 40, 56)


def test_the_vocabulary_of_the_config_and_that_of_a_data_set():
    model = small_model(*TEXT, *ALL, "MODEL.SPAR.VOCABULARY", WORDS)
    record = {"image": image((40, 56))}
    assert model([record])[0]["sem_seg"].shape[0] == 4
    with pytest.raises(ZeroDivisionError), model.classes_of("spar_scenes_panoptic_val"):
        assert model([record])[0]["sem_seg"].shape[0] == 6
        raise ZeroDivisionError
    assert model([record])[0]["sem_seg"].shape[0] == 4


def plain_pooling(features, masks):
    """Mean feature inside of each mask, one cell after the other."""
    cells = masks.shape[1] // features.shape[1]
    result = []
    for mask in masks:
        weights = [(mask > 0).double(), mask.double().sigmoid()][int(not (mask > 0).any())]
        total = torch.zeros(len(features), dtype=torch.float64)
        for y in range(mask.shape[0]):
            for x in range(mask.shape[1]):
                total += weights[y, x] * features[:, y // cells, x // cells].double()
        result.append(total / total.norm())
    return torch.stack(result)


def test_features_are_averaged_inside_of_masks():
    torch.manual_seed(0)
    features, masks = torch.randn(2, 6, 3, 4), torch.randn(2, 5, 6, 8)
    masks[0, 2] = -3 - masks[0, 2].abs()
    masks[1, 0], masks[1, 0, 2, 2] = -9, 1  # less than half of a patch
    found = pooled_features(features, masks)
    for index in range(2):
        expected = plain_pooling(features[index], masks[index])
        torch.testing.assert_close(found[index].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, 1.0), (0.0, 1.0), (0.4, 0.8)])
def test_probabilities_are_a_geometric_mean(weights):
    torch.manual_seed(0)
    logits, cosines, seen = torch.randn(2, 3, 6), torch.rand(2, 3, 5), torch.tensor([1, 0, 1, 1, 0]).bool()
    found = two_way(logits, cosines, 7.0, seen, weights)
    query, nothing = logits[..., :5].double().softmax(-1), logits.double().softmax(-1)[..., 5]
    inside = (7.0 * cosines.double()).softmax(-1)
    weight = torch.where(seen, *torch.tensor(weights).double())
    mean = query ** (1 - weight) * inside**weight
    expected = mean / mean.sum(-1, keepdim=True) * (1 - nothing[..., None])
    torch.testing.assert_close(found[..., :5].double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[..., 5].double(), nothing, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3))
    if weights == (0.0, 0.0):
        torch.testing.assert_close(found, logits.softmax(-1))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_with_extreme_weights_the_model_uses_only_one_of_both(weight):
    model = small_model(*TEXT, WEIGHTS[0], weight, WEIGHTS[1], weight)
    x = model.encoder_input(image((40, 56)))
    with torch.no_grad():
        dense, (prediction,) = model._predictions(model._normalize(image((40, 56)))[None])
        found = model._probabilities(x, dense, prediction)
        logits = model.classifier(prediction.embeddings)
        cosines = model.classifier.scores(pooled_features(dense, prediction.masks))
    expected = logits.softmax(-1)
    if weight:
        nothing = expected[..., -1:]
        expected = torch.cat(
            [(cosines * small_config().MODEL.SPAR.LOGIT_SCALE).softmax(-1) * (1 - nothing), nothing], -1
        )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_class_is_seen_if_one_of_its_words_was_trained():
    model = small_model(*TEXT, *UNSEEN)
    device = torch.device("cpu")
    assert model.vocabulary.two_way(device)[1].tolist() == [name not in ("star", "snow") for name in names()]
    model.set_vocabulary("things: disk, CIRCLE; star; dog; stuff: sea; grass; snow")
    scale, seen, weights = model.vocabulary.two_way(device)
    assert seen.tolist() == [True, False, False, False, True, False]
    assert scale == small_config().MODEL.SPAR.LOGIT_SCALE and weights == (0.4, 0.8)


def names() -> list[str]:
    metadata = MetadataCatalog.get("spar_scenes_panoptic_train")
    return [*metadata.thing_classes, *metadata.stuff_classes[1:]]


def test_unseen_classes_have_no_part_in_training():
    model = small_model(*TEXT, *UNSEEN).train()
    numbers = {names().index("star"), names().index("snow")}
    record = panoptic_record((40, 56), 2, stuff=5)
    record["instances"].gt_classes[0] = names().index("star")
    group = model._group([0], [model._normalize(record["image"])], [record])
    (target,) = group.targets
    assert not numbers & set(target.classes.tolist()) and len(target.classes) == 5
    assert not target.valid[record["instances"].gt_masks.tensor[0]].any()
    assert (group.logits.softmax(-1)[..., sorted(numbers)] == 0).all()
    losses = model._losses([group])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    # They can be found in inference.
    probabilities = two_way(
        model.classifier(torch.randn(1, 9, 32)), torch.rand(1, 9, 13), *model.vocabulary.two_way(torch.device("cpu"))
    )
    assert (probabilities[..., sorted(numbers)] > 0).all()


def test_sliding_windows_encode_the_pooled_features():
    single = small_model(*TEXT)
    model = small_model(*TEXT, "MODEL.SPAR.INFERENCE", "sliding_window")
    record = {"image": image((90, 120))}
    x = model._normalize(record["image"])[None]
    with torch.no_grad():
        dense, (prediction,) = model._predictions(x)
        found, other = (one._probabilities(x, dense, prediction) for one in (model, single))
    assert model.dense_maps(model.backbone.convert(x)).shape == dense.shape
    assert not torch.allclose(found, other)
    assert model([record])[0]["panoptic_seg"][0].shape == (90, 120)


def test_classes_of_data_sets():
    panoptic = dataset_vocabulary("spar_scenes_panoptic_val", True)
    assert panoptic.things == 8 and panoptic.vocabulary.names == names()
    semantic = dataset_vocabulary("spar_scenes_val", False)
    assert semantic.things == 0 and semantic.vocabulary.names == MetadataCatalog.get("spar_scenes_val").stuff_classes
    # Detectron2's own sets: numbers of things and stuff are separate in the first one, and shared in the others.
    separated = dataset_vocabulary("coco_2017_val_panoptic_separated", True)
    assert separated.things == 80 and len(separated) == 133 and separated.vocabulary.names[80] == "banner"
    together = dataset_vocabulary("coco_2017_val_panoptic", True)
    assert together.things == 80 and together.vocabulary.names[:81] == separated.vocabulary.names[:81]
    cities = dataset_vocabulary("cityscapes_fine_panoptic_val", True)
    assert cities.things == 8 and cities.vocabulary.names[7:10] == ["bicycle", "road", "sidewalk"]
    with pytest.raises(ValueError, match="'photos_without_names' has no names of classes"):
        dataset_vocabulary("photos_without_names", True)


def test_words_are_encoded_once(model, monkeypatch):
    model([{"image": image((20, 20))}])
    monkeypatch.setattr(model.vocabulary.embeddings, "build_tower", lambda: pytest.fail("is built again"))
    model([{"image": image((24, 20))}])

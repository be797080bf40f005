import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from safetensors.torch import load_file

from reference import golden_names, load_golden
from spar_d2.encoders.weights import write_safetensors
from spar_d2.teacher import SlidingWindowTeacher
from spar_d2.text import Vocabulary


def rgb(image):
    return torch.from_numpy(image).permute(2, 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden_names("E_syn"))
def test_labels_of_the_reference_from_the_pixels(name, tiny_cfg, tmp_path):
    arrays, meta = load_golden(name)
    (tmp_path / "classes.txt").write_text(meta["class_file_text"])
    spar = tiny_cfg.MODEL.SPAR
    spar.VOCABULARY, spar.TEMPLATES = str(tmp_path / "classes.txt"), "imagenet"
    spar.LOGIT_SCALE, spar.PROB_THRESHOLD = float(meta["logit_scale"]), meta["prob_thd"]
    model = build_model(tiny_cfg).eval()
    labels = model([{"image": rgb(arrays["image_u8"][0])}])[0]["sem_seg_labels"]
    different = int((labels.numpy() != arrays["pred"][0]).sum())
    assert different <= meta["pixels_with_top2_margin_below_1e_5"] + meta["pixels_within_1e_5_of_prob_thd"]


@pytest.fixture
def model(tiny_cfg):
    tiny_cfg.MODEL.SPAR.VOCABULARY = "cat, kitten; dog; sky"
    return build_model(tiny_cfg).eval()


def test_batches_of_different_sizes_equal_single_images(model):
    inputs = [{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)} for size in ((70, 100), (33, 64), (1, 9))]
    together = [output["sem_seg_labels"] for output in model(inputs)]
    for labels, record in zip(together, inputs):
        assert labels.shape == record["image"].shape[1:]
        assert labels.dtype == torch.int64
        assert torch.equal(labels, model([record])[0]["sem_seg_labels"])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 20, 20), (20, 20), (4, 20, 20), (20, 20, 3)])
def test_images_that_are_not_rgb_are_named(model, shape):
    with pytest.raises(ValueError, match=r'"image" must be \(3, H, W\)'):
        model([{"image": torch.zeros(shape)}])


def test_the_result_has_the_requested_size(model):
    record = {"image": torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8), "height": 35, "width": 200}
    assert model([record])[0]["sem_seg_labels"].shape == (35, 200)


@pytest.mark.slow
@pytest.mark.parametrize(("given", "wanted"), [(336, 345), (112, 61), (448, 453), (64, 61), (400, 427)])
def test_no_size_is_lost_to_rounding(model, given, wanted):
    record = {"image": torch.zeros(3, given, 64, dtype=torch.uint8), "height": wanted, "width": 64}
    assert model([record])[0]["sem_seg_labels"].shape == (wanted, 64)


def test_scores_are_probabilities_whose_best_is_the_label(tiny_cfg, model):
    record = {"image": torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8)}
    tiny_cfg.MODEL.SPAR.OUTPUT = "scores"
    tiny_cfg.MODEL.SPAR.VOCABULARY = "cat, kitten; dog; sky"
    scores = build_model(tiny_cfg).eval()([record])[0]["sem_seg"]
    assert scores.shape == (3, 70, 100)
    assert 0 <= scores.min() <= scores.max() <= 1
    assert (scores.argmax(0) == model([record])[0]["sem_seg_labels"]).float().mean() > 0.999


def test_a_new_vocabulary_takes_effect_at_once(model):
    record = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    before = model([record])[0]["sem_seg_labels"]
    model.set_vocabulary(Vocabulary(["one"]))
    assert (model([record])[0]["sem_seg_labels"] == 0).all()
    model.set_vocabulary("cat, kitten; dog; sky")
    assert torch.equal(model([record])[0]["sem_seg_labels"], before)


def test_sliding_window_inference_is_the_teacher(tiny_cfg):
    tiny_cfg.MODEL.SPAR.INFERENCE = "sliding_window"
    tiny_cfg.MODEL.SPAR.VOCABULARY = "a;b"
    model = build_model(tiny_cfg).eval()
    image = torch.randint(0, 256, (3, 100, 90), dtype=torch.uint8)
    x = model.backbone.pixels(model._normalize(image)[None])
    expected = SlidingWindowTeacher(model.backbone.encoder, stride=24)(x)[0]
    assert torch.equal(model.encode(image), expected)


@pytest.mark.parametrize(("mean", "std"), [([0.0] * 3, [1.0] * 3), ([103.5, 116.3, 123.7], [57.4, 57.1, 58.4])])
def test_the_encoder_gets_its_own_normalization_from_any_statistics(mean, std, tiny_cfg):
    tiny_cfg.MODEL.PIXEL_MEAN, tiny_cfg.MODEL.PIXEL_STD, tiny_cfg.INPUT.FORMAT = mean, std, "RGB"
    model = build_model(tiny_cfg).eval()
    image = torch.randint(0, 256, (3, 40, 50)).float()
    before = image.clone()
    encoder = model.backbone.encoder
    pixel_mean, pixel_std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    torch.testing.assert_close(model.encoder_input(image)[0], (image / 255 - pixel_mean) / pixel_std)
    model.encode(image)
    assert torch.equal(image, before)


def test_class_names_of_the_test_set_are_the_default(tiny_cfg):
    tiny_cfg.DATASETS.TEST = ("spar_scenes_val",)
    assert build_model(tiny_cfg).vocabulary.names[:2] == ["grass", "sand"]


def test_without_classes_inference_says_so(tiny_cfg):
    model = build_model(tiny_cfg).eval()
    with pytest.raises(RuntimeError, match=r"MODEL\.SPAR\.VOCABULARY"):
        model([{"image": torch.zeros(3, 64, 64)}])


def test_training_without_the_hook_says_so(model):
    with pytest.raises(RuntimeError, match="DistillationHook"):
        model.train()([{"image": torch.zeros(3, 64, 64)}])


@pytest.mark.parametrize(
    ("key", "value"),
    [("OUTPUT", "masks"), ("INFERENCE", "tiles"), ("PROB_THRESHOLD", 1.5), ("AREA_THRESHOLD", -0.1)],
)
def test_wrong_keys_are_named(tiny_cfg, key, value):
    tiny_cfg.MODEL.SPAR[key] = value
    with pytest.raises(ValueError, match=rf"MODEL\.SPAR\.{key}"):
        build_model(tiny_cfg)


def test_another_backbone_is_refused(tiny_cfg):
    tiny_cfg.MODEL.BACKBONE.NAME = "SPARPyramid"
    with pytest.raises(ValueError, match="must be SPARViT"):
        build_model(tiny_cfg)


def test_images_may_have_separate_vocabularies(model):
    images = [torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8) for _ in range(3)]
    words = ["cat; sky", ["cat", ["dog", "puppy"]], Vocabulary(["one"])]
    inputs = [{"image": image, "vocabulary": own} for image, own in zip(images, words)] + [{"image": images[0]}]
    together = [output["sem_seg_labels"] for output in model(inputs)]
    for labels, image, own in zip(together, images, [*words, "cat, kitten; dog; sky"]):
        model.set_vocabulary(Vocabulary.of(own))
        assert torch.equal(labels, model([{"image": image}])[0]["sem_seg_labels"])
    model.set_vocabulary(Vocabulary.load("cat, kitten; dog; sky"))
    assert torch.equal(together[3], model([{"image": images[0]}])[0]["sem_seg_labels"])


@pytest.mark.slow
def test_many_vocabularies_are_never_mixed_up(model):
    image = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
    words = [f"cat; dog; {number}" for number in range(12)]
    first = [model([{"image": image, "vocabulary": own}])[0]["sem_seg_labels"] for own in words]
    again = model([{"image": image, "vocabulary": own} for own in words])
    assert all(torch.equal(labels, output["sem_seg_labels"]) for labels, output in zip(first, again))


def test_assigning_a_vocabulary_is_enough(model):
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    model([{"image": image}])
    model.vocabulary = Vocabulary(["one"])
    assert (model([{"image": image}])[0]["sem_seg_labels"] == 0).all()


def test_images_of_one_size_are_encoded_together(model, monkeypatch):
    shapes = []
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda x: shapes.append(tuple(x.shape)) or forward(x))
    inputs = [{"image": torch.zeros(3, *size, dtype=torch.uint8)} for size in ((64, 64), (32, 64), (64, 64))]
    assert len(model(inputs)) == 3
    assert shapes == [(2, 3, 64, 64), (1, 3, 32, 64)]


def test_another_config_holds_for_a_while(model, tiny_cfg):
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    before = model([{"image": image}])[0]["sem_seg_labels"]
    spar = tiny_cfg.MODEL.SPAR
    spar.VOCABULARY, spar.LOGIT_SCALE, spar.PROB_THRESHOLD, spar.AREA_THRESHOLD = "a; b; c", 7.0, 1.0, 0.5
    with model.configured(tiny_cfg):
        assert (model.logit_scale, model.prob_threshold, model.area_threshold) == (7.0, 1.0, 0.5)
        assert (model([{"image": image}])[0]["sem_seg_labels"] == 0).all()
    assert torch.equal(model([{"image": image}])[0]["sem_seg_labels"], before)
    assert (model.logit_scale, model.area_threshold) == (40.0, None)


def test_text_embeddings_are_cached_on_disk(tiny_cfg, tmp_path, monkeypatch):
    spar = tiny_cfg.MODEL.SPAR
    spar.VOCABULARY, spar.TEXT_CACHE = "cat; dog", str(tmp_path / "words")
    record = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    labels = build_model(tiny_cfg).eval()([record])[0]["sem_seg_labels"]
    (file,) = (tmp_path / "words").iterdir()

    def refuse(*arguments):
        raise AssertionError("the text tower was built")

    monkeypatch.setattr("spar_d2.modeling.words.build_text", refuse)
    assert torch.equal(build_model(tiny_cfg).eval()([record])[0]["sem_seg_labels"], labels)
    # Other weights under the same name: their content counts.
    weights = load_file(spar.PRETRAINED)
    weights["text_projection"] *= 2
    write_safetensors(weights, spar.PRETRAINED)
    with pytest.raises(AssertionError, match="text tower"):
        model = build_model(tiny_cfg).eval()
        model([record])
    assert [file] == list((tmp_path / "words").iterdir())


@pytest.fixture
def repeated_classes():
    """A data set whose classes are two words, one of them twice, and one without a name."""
    name = "test_classes_that_repeat"
    MetadataCatalog.get(name).set(stuff_classes=["cat", "", "dog", "Cat ", "sky"])
    yield name
    MetadataCatalog.pop(name)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["metadata", "set", "of the image"])
def test_labels_are_the_numbers_of_the_data_set(tiny_cfg, model, repeated_classes, given):
    generator = torch.Generator().manual_seed(0)
    record = {"image": torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8, generator=generator)}
    model.set_vocabulary(["cat", "dog", "sky"])
    labels = model([record])[0]["sem_seg_labels"]
    assert len(labels.unique()) == 3
    classes = MetadataCatalog.get(repeated_classes).stuff_classes
    if given == "metadata":
        tiny_cfg.DATASETS.TEST, tiny_cfg.MODEL.SPAR.VOCABULARY = (repeated_classes,), ""
        model = build_model(tiny_cfg).eval()
    elif given == "set":
        model.set_vocabulary(classes)
    else:
        record["vocabulary"] = classes
    assert torch.equal(model([record])[0]["sem_seg_labels"], torch.tensor([0, 2, 4])[labels])
    model.area_threshold = 0.01
    assert set(model([record])[0]["sem_seg_labels"].unique().tolist()) <= {0, 2, 4}
    model.output = "scores"
    scores = model([record])[0]["sem_seg"]
    assert scores.shape[0] == 5
    assert scores[[1, 3]].count_nonzero() == 0
    assert torch.equal(scores.argmax(0), torch.tensor([0, 2, 4])[labels])


def test_where_every_class_is_removed_pixels_are_of_class_0_even_if_it_has_no_word(model):
    record = {"image": torch.randint(0, 256, (3, 70, 100), dtype=torch.uint8)}
    model.set_vocabulary(["", "cat", "dog"])
    model.area_threshold = 1.0
    assert (model([record])[0]["sem_seg_labels"] == 0).all()

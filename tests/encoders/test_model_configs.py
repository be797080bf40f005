"""Model config files that are wrong in any way."""

import json

import pytest

from reference import ROOT, TINY_CONFIG
from spar_d2.encoders import build_encoder, build_text_tower, describe_encoder

POOLED = json.loads((ROOT / "configs/toy/tiny_pooled.json").read_text())


def with_value(config, path, value):
    config = json.loads(json.dumps(config))
    node = config
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return config


WRONG = [
    (TINY_CONFIG, ("vision_cfg",), None, "vision_cfg must be a JSON object, got None"),
    (TINY_CONFIG, ("vision_cfg",), [1], "vision_cfg must be a JSON object"),
    (TINY_CONFIG, ("text_cfg",), "x", "text_cfg must be a JSON object"),
    (TINY_CONFIG, ("embed_dim",), None, "embed_dim must be an integer"),
    (TINY_CONFIG, ("embed_dim",), "64", "embed_dim must be an integer"),
    (TINY_CONFIG, ("embed_dim",), 1e999, "embed_dim must be an integer"),
    (TINY_CONFIG, ("quick_gelu",), "no", "quick_gelu must be true or false"),
    (TINY_CONFIG, ("vision_cfg", "patch_size"), 0, "vision_cfg.patch_size must be an integer"),
    (TINY_CONFIG, ("vision_cfg", "patch_size"), "16", "vision_cfg.patch_size"),
    (TINY_CONFIG, ("vision_cfg", "patch_size"), [16], "vision_cfg.patch_size"),
    (TINY_CONFIG, ("vision_cfg", "patch_size"), 128, "must not be greater than vision_cfg.image_size"),
    (TINY_CONFIG, ("vision_cfg", "image_size"), {}, "vision_cfg.image_size"),
    (TINY_CONFIG, ("vision_cfg", "image_size"), 10**12, "vision_cfg.image_size"),
    (TINY_CONFIG, ("vision_cfg", "layers"), True, "vision_cfg.layers"),
    (TINY_CONFIG, ("vision_cfg", "layers"), 10**9, "vision_cfg.layers"),
    (TINY_CONFIG, ("vision_cfg", "width"), -96, "vision_cfg.width"),
    (TINY_CONFIG, ("text_cfg", "heads"), 2.0, "text_cfg.heads"),
    (TINY_CONFIG, ("text_cfg", "vocab_size"), None, "text_cfg.vocab_size"),
    (TINY_CONFIG, ("preprocess_cfg",), 3, "preprocess_cfg must be a JSON object"),
    (TINY_CONFIG, ("preprocess_cfg",), {"mean": [0.5]}, "preprocess_cfg.mean must be three numbers"),
    (TINY_CONFIG, ("preprocess_cfg",), {"std": [0.5, 0, 1]}, "preprocess_cfg.std must be three numbers above 0"),
    (TINY_CONFIG, ("vision_cfg", "layer_norm_eps"), 0, "vision_cfg.layer_norm_eps must be a number between 0 and 1"),
    (TINY_CONFIG, ("layer_norm_eps",), "1e-5", "layer_norm_eps must be a number between 0 and 1"),
    (POOLED, ("vision_cfg", "layer_norm_eps"), 1e-5, "vision_cfg.layer_norm_eps"),
    (POOLED, ("vision_cfg", "timm_model_name"), 7, "timm_model_name must be a string"),
    (POOLED, ("vision_cfg", "timm_model_name"), "vit_no_such_siglip", "vit_no_such_siglip"),
]


@pytest.mark.parametrize(("config", "place", "value", "message"), WRONG)
@pytest.mark.parametrize("use", [build_encoder, describe_encoder])
def test_wrong_values_are_named(tmp_path, config, place, value, message, use):
    path = tmp_path / "wrong-values.json"
    path.write_text(json.dumps(with_value(config, place, value)))
    with pytest.raises(ValueError, match=r"MODEL\.SPAR\.ENCODER") as error:
        use(str(path))
    assert message in str(error.value)


def test_nested_without_end(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not valid JSON"):
        build_encoder(str(tmp_path / "deep.json"))


@pytest.mark.parametrize(
    ("place", "expected"), [(("layer_norm_eps",), (1e-3, 1e-3)), (("text_cfg", "layer_norm_eps"), (1e-5, 1e-3))]
)
def test_layer_norm_eps_reaches_the_towers(tmp_path, place, expected):
    path = tmp_path / f"norm-eps-{len(place)}.json"
    path.write_text(json.dumps(with_value(TINY_CONFIG, place, 1e-3)))
    image, text = build_encoder(str(path)), build_text_tower(str(path)).model
    assert (image.visual.ln_post.eps, text.ln_final.eps) == expected
    assert {block.ln_1.eps for block in image.blocks} == {expected[0]}

"""Targets that the hook requests from the teacher, caches and reports."""

import pytest
import torch

from reference import reference_image
from small_trainers import as_tensor, trainer_for
from spar_d2.distillation import DistillationHook
from spar_d2.teacher import cache as cache_module


@pytest.mark.slow
def test_by_cell_large_images_count_for_more(tiny_cfg):
    images = [as_tensor(reference_image(h, w)) for h, w in ((64, 64), (128, 192))]
    alone = []
    for image in images:
        trainer = trainer_for(tiny_cfg, [image], DistillationHook(tiny_cfg))
        trainer.train(0, 1)
        alone += trainer.losses
    for average, expected in (("image", sum(alone) / 2), ("cell", (16 * alone[0] + 96 * alone[1]) / 112)):
        tiny_cfg.SPAR.DISTILL.AVERAGE = average
        together = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))
        together.train(0, 1)
        assert together.losses[0] == pytest.approx(expected, rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=1e-2)


@pytest.mark.slow
def test_windows_of_an_image_are_drawn_by_its_place_in_the_run_alone(tiny_cfg):
    """Beside other images or alone, in this step or another."""
    tiny_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 2
    records = [
        {"image": as_tensor(reference_image(h, w)), "position": 7 + i}
        for i, (h, w) in enumerate(((96, 96), (128, 96), (96, 96)))
    ]

    def drawn(inputs) -> list:
        hook = DistillationHook(tiny_cfg)
        samples, original = [], hook.teacher.samples

        def remember(*arguments):
            samples.extend(original(*arguments))
            return samples

        hook.teacher.samples = remember
        trainer = trainer_for(tiny_cfg, [], hook)
        trainer._data_loader_iter_obj = iter([inputs])
        trainer.train(0, 1)
        return samples

    together = drawn(records)
    for place, number in enumerate([0, 2, 1]):  # images of one size are encoded together
        (alone,) = drawn([records[number]])
        assert torch.equal(alone.weight, together[place].weight)
    assert not torch.equal(together[0].weight, together[1].weight)


@pytest.mark.slow
def test_a_cache_gives_the_full_target_and_is_filled_once(tiny_cfg, tmp_path):
    images = [as_tensor(reference_image(128, 128)), as_tensor(reference_image(64, 96))]
    plain = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg))
    plain.train(0, 3)
    tiny_cfg.SPAR.TEACHER.CACHE_DIR = str(tmp_path / "cache")
    hook = DistillationHook(tiny_cfg)
    cached = trainer_for(tiny_cfg, images, hook)
    cached.train(0, 3)
    assert cached.losses == pytest.approx(plain.losses, rel=1e-3)
    planned = sum(len(hook.teacher.plan(*image.shape[1:])) for image in images)
    assert (hook.windows_encoded, hook.cache.hits, hook.cache.misses) == (planned, 4, 2)
    # With windows at random it is read where it can be, and not filled.
    tiny_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 2
    hook = DistillationHook(tiny_cfg)
    sampled = trainer_for(tiny_cfg, [*images, as_tensor(reference_image(128, 96))], hook)
    sampled.train(0, 3)
    assert (hook.windows_encoded, hook.cache.hits, hook.cache.misses) == (6, 6, 3)


@pytest.mark.slow
@pytest.mark.parametrize("windows", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_nonfinite_features_stop_the_run_and_name_the_image(who, cached, windows, tiny_cfg, tmp_path):
    tiny_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = windows
    if cached:
        tiny_cfg.SPAR.TEACHER.CACHE_DIR = str(tmp_path / "cache")
    hook = DistillationHook(tiny_cfg)
    trainer = trainer_for(tiny_cfg, [], hook)
    encoder = {"teacher": hook.teacher.encoder, "student": trainer.model.backbone.encoder}[who]

    def spoil(module, inputs, features):
        # Of the second image, by its size; the teacher's windows are all of one size, and of one image at a time here.
        return features / 0 if inputs[0].shape[-1] in (96, 64) else features

    encoder.register_forward_hook(spoil)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    sizes = {"good.jpg": (128, 160), "bad.jpg": (64, 96)} if who == "student" else {"bad.jpg": (64, 96)}
    trainer._data_loader_iter_obj = iter(
        [[{"image": as_tensor(reference_image(*size)), "file_name": name} for name, size in sizes.items()]]
    )
    with pytest.raises(FloatingPointError, match=rf"the {who}'s features are NaN or infinite for bad\.jpg"):
        trainer.train(0, 1)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.slow
def test_monitored_values_are_stored(tiny_cfg):
    images = [as_tensor(reference_image(64, 96))]
    trainer = trainer_for(tiny_cfg, images, DistillationHook(tiny_cfg), lr=1e-3)
    trainer.train(0, 20)
    cosine = [value for value, _ in trainer.storage.history("distill/cosine").values()]
    assert -1 <= cosine[0] < cosine[-1] <= 1
    latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    assert latest["distill/images_per_second"] > 0
    windows = len(DistillationHook(tiny_cfg).teacher.plan(64, 96))
    assert latest["distill/windows_encoded"] == 20 * windows
    ratio = latest["distill/windows_per_second"] / latest["distill/images_per_second"]
    assert ratio == pytest.approx(windows)


def test_the_count_of_windows_continues_after_a_resume(tiny_cfg):
    first, second = DistillationHook(tiny_cfg), DistillationHook(tiny_cfg)
    first.targets.total_passes = 12
    second.load_state_dict(first.state_dict())
    assert second.windows_encoded == 12


@pytest.mark.parametrize("changed", [False, True])
def test_a_cache_lookup_is_used_only_for_the_encoded_image(changed, tiny_cfg, tmp_path, monkeypatch):
    """A model that does more to images than to normalize them is not given the targets of others."""
    tiny_cfg.SPAR.TEACHER.CACHE_DIR = str(tmp_path / "cache")
    tiny_cfg.SPAR.TEACHER.WINDOWS_PER_IMAGE = 2
    hook = DistillationHook(tiny_cfg)
    images = [as_tensor(reference_image(64, 96, index)) for index in range(2)]
    trainer = trainer_for(tiny_cfg, [], hook)
    for image in images:
        hook.cache.target(trainer.model.encoder_input(image)[0])
    look_up = hook.cache.look_up()
    batch = [{"image": image, **look_up(image)} for image in images]
    if changed:
        batch = [{**record, "image": image.flip(2)} for record, image in zip(batch, images)]
    hashed = []
    original = cache_module.image_key
    monkeypatch.setattr(cache_module, "image_key", lambda *given: hashed.append(1) or original(*given))
    hook.cache.hits = hook.cache.misses = 0
    trainer._data_loader_iter_obj = iter([batch] * 3)
    trainer.train(0, 3)
    assert (hook.cache.hits, hook.cache.misses) == ((0, 6) if changed else (6, 0))
    # The training itself hashes pixels only where it must.
    assert len(hashed) == (6 if changed else 0)

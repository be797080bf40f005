"""Targets on disk: found again, never by mistake, and nothing lost where the disk fails."""

import copy
import logging
import os
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

from processes import run_tool, start_tool
from reference import example_encoder, reference_encoder
from spar_d2.encoders import FAMILIES
from spar_d2.modeling.pixels import PixelConversion
from spar_d2.teacher import SlidingWindowTeacher, TargetCache
from spar_d2.teacher import cache as cache_module
from spar_d2.teacher.cache import TargetLookUp
from spar_d2.teacher.keys import image_key, pixel_checksum, teacher_key


def make_teacher(family="open_clip ViT", **settings) -> SlidingWindowTeacher:
    torch.manual_seed(0)
    return SlidingWindowTeacher(example_encoder(family), **{"stride": 24, **settings})


@pytest.fixture
def image():
    return torch.randn(3, 100, 120, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_target_is_computed_once_and_found_by_any_later_run(family, tmp_path, image):
    first, second = (TargetCache(tmp_path, make_teacher(family)) for _ in range(2))
    target = first.target(image)
    assert (first.hits, first.misses) == (0, 1)
    torch.testing.assert_close(target, first.teacher(image[None]), rtol=2e-3, atol=2e-3)
    second.teacher.encoder.register_forward_hook(lambda *_: pytest.fail("computed again"))
    assert torch.equal(second.target(image), target), "read, it is what it was when it was written"
    assert (second.hits, second.misses) == (1, 0)
    (entry,) = tmp_path.rglob("*.safetensors")
    with safe_open(entry, "pt") as file:
        assert file.get_tensor("target").dtype == torch.float16


def test_images_of_other_pixels_have_other_names(image):
    encoder = make_teacher().encoder
    own = image_key(image, encoder)
    nudged = image.clone()
    nudged[1, 5, 7] += 0.5 / 255 / encoder.pixel_std[1]
    far = image * 100  # more than any pixel
    further = far.clone()
    further[0, 0, 0] += 2**16 / (255 * 64)
    assert image_key(far, encoder) != image_key(further, encoder)
    others = [nudged, far, image.flip(-1), image[:, :, :-1], image.transpose(1, 2), image.reshape(3, 120, 100)]
    assert own not in [image_key(other.contiguous(), encoder) for other in others]


def test_rounding_in_the_normalization_plays_no_part():
    encoder = make_teacher().encoder
    pixels = torch.randint(0, 256, (3, 40, 50))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    single = (pixels.float() / 255 - mean) / std
    double = ((pixels.double() - 255 * mean.double()) / (255 * std.double())).float()
    assert not torch.equal(single, double)
    assert image_key(single, encoder) == image_key(double, encoder)


def other_teachers() -> dict[str, SlidingWindowTeacher]:
    teachers = {
        "window": make_teacher(window=48),
        "stride": make_teacher(stride=16),
        "family": make_teacher("SigLIP"),
    }
    changed = copy.deepcopy(make_teacher().encoder)
    with torch.no_grad():
        next(changed.parameters()).flatten()[3] += 1e-4
    teachers["one weight"] = SlidingWindowTeacher(changed, stride=24)
    teachers["precision"] = SlidingWindowTeacher(make_teacher().encoder.accelerate("bfloat16"), stride=24)
    compat = make_teacher().encoder
    compat.reference_compat = True
    teachers["sizes"] = SlidingWindowTeacher(compat, stride=24)
    activation = make_teacher().encoder
    activation.blocks[0].mlp.gelu = nn.ReLU()
    teachers["activation"] = SlidingWindowTeacher(activation, stride=24)
    heads = make_teacher().encoder
    heads.blocks[0].attn.num_heads = 1
    teachers["heads"] = SlidingWindowTeacher(heads, stride=24)
    return teachers


@pytest.mark.slow
def test_a_cache_of_another_teacher_is_never_read(tmp_path, image):
    identities = {name: teacher_key(teacher) for name, teacher in other_teachers().items()}
    own = TargetCache(tmp_path, make_teacher())
    assert len({own.folder.name, *identities.values()}) == len(identities) + 1, identities
    own.target(image)
    for teacher in other_teachers().values():
        assert TargetCache(tmp_path, teacher).read(image) is None
    # Not even where someone moved the files.
    other = TargetCache(tmp_path, make_teacher(stride=16))
    other.path(image).parent.mkdir(parents=True)
    own.path(image).rename(other.path(image))
    assert other.read(image) is None


@pytest.mark.parametrize("same", [{"batch_size": 5}, {"window": None}, {"window": 64}])
def test_irrelevant_settings_share_a_cache(same):
    assert teacher_key(make_teacher(**same)) == teacher_key(make_teacher())
    used = make_teacher()
    used(torch.randn(1, 3, 64, 90))
    used.encoder.accelerate("float32", checkpointing=True)
    assert teacher_key(used) == teacher_key(make_teacher())


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "a bit", "text", "folder"])
def test_a_damaged_entry_is_computed_again(damage, tmp_path, image, caplog):
    cache = TargetCache(tmp_path, make_teacher())
    target = cache.target(image)
    path = cache.path(image)
    content = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        content[-5] ^= 1
        path.write_bytes({"cut": content[:-9], "empty": b"", "a bit": content, "text": b"no tensors" * 9}[damage])
    with caplog.at_level(logging.WARNING):
        assert torch.equal(cache.target(image), target)
    assert "will be recomputed" in caplog.text
    if damage != "folder":
        assert torch.equal(TargetCache(tmp_path, make_teacher()).read(image), target)


def test_nonfinite_targets_are_not_cached(tmp_path, image):
    teacher = make_teacher()
    cache = TargetCache(tmp_path, teacher)
    with torch.no_grad():
        next(teacher.encoder.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        cache.target(image)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_targets_beyond_float16_are_cached_in_float32(tmp_path, image):
    cache = TargetCache(tmp_path, make_teacher())
    target = cache.teacher(image[None])
    target[0, 0, 0, 0] = 1e6
    assert torch.equal(cache.write(image, target), target)
    assert torch.equal(cache.read(image), target)


def test_a_full_disk_is_reported_once_and_training_continues(tmp_path, image, caplog, monkeypatch):
    monkeypatch.setattr(cache_module, "RESERVE", 1 << 60)
    cache = TargetCache(tmp_path, make_teacher())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert cache.target(image).isfinite().all()
    assert caplog.text.count("CACHE_DIR: no longer writing") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


FULL = """
import resource, torch
from reference import example_encoder
from spar_d2.teacher import SlidingWindowTeacher, TargetCache
torch.manual_seed(0)
cache = TargetCache({folder!r}, SlidingWindowTeacher(example_encoder("open_clip ViT"), stride=24))
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
if {user}:
    import os
    os.setuid({user})
print(cache.target(torch.randn(3, 100, 120)).isfinite().all().item())
"""


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("case", ["no room", "read-only"])
def test_a_failed_write_leaves_no_file_and_does_not_stop_the_run(case, tmp_path):
    if case == "read-only" and os.getuid():
        pytest.skip("needs to become another user")
    limit, user = (2000, 0) if case == "no room" else (0, 65534)
    code = FULL.format(folder=str(tmp_path / "cache"), limit=limit, user=user)
    (tmp_path / "code.py").write_text(code)
    assert run_tool(tmp_path / "code.py", [], tmp_path / "log") == 0
    log = (tmp_path / "log").read_text()
    assert "no longer writing" in log and log.split()[-1] == "True"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_a_folder_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"SPAR\.TEACHER\.CACHE_DIR"):
        TargetCache(tmp_path / "file", make_teacher())


def test_a_cache_belongs_to_the_weights_it_was_opened_with(tmp_path):
    encoder = reference_encoder("openclip-tiny")
    own = TargetCache(tmp_path, SlidingWindowTeacher(encoder, stride=24))
    assert own.folder == TargetCache(tmp_path, SlidingWindowTeacher(encoder, stride=24)).folder


SHARED = """
import torch
from reference import example_encoder
from spar_d2.teacher import SlidingWindowTeacher, TargetCache
torch.manual_seed(0)
cache = TargetCache({folder!r}, SlidingWindowTeacher(example_encoder("open_clip ViT"), stride=24))
images = [torch.randn(3, 100, 120, generator=torch.Generator().manual_seed(i)) for i in range(12)]
print(sum(cache.target(image).isfinite().all().item() for _ in range(2) for image in images), cache.hits + cache.misses)
"""


@pytest.mark.processes
def test_two_runs_share_a_cache(tmp_path):
    code = tmp_path / "code.py"
    code.write_text(SHARED.format(folder=str(tmp_path / "cache")))
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    for run in [start_tool(code, [], log, {}) for log in logs]:
        run.join(120)
    for log in logs:
        assert log.read_text().split() == ["24", "24"]
    cache = TargetCache(tmp_path / "cache", make_teacher())
    files = [path for path in cache.folder.rglob("*") if path.is_file()]
    assert len(files) == 12
    assert all(path.suffix == ".safetensors" and not path.name.startswith(".") for path in files)
    for seed in range(12):
        image = torch.randn(3, 100, 120, generator=torch.Generator().manual_seed(seed))
        assert cache.read(image) is not None


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_an_image_is_the_same_by_its_bytes_and_as_the_encoder_takes_it(family):
    encoder = example_encoder(family)
    pixels = torch.randint(0, 256, (3, 33, 47), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    assert pixel_checksum(pixels) == image_key((pixels / 255 - mean) / std, encoder)
    # As a backbone does it, from another framework's normalization.
    means, stds = (103.5, 116.3, 123.7), (57.4, 57.1, 58.4)
    conversion = PixelConversion(means, stds, "BGR", encoder.pixel_mean, encoder.pixel_std)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (means, stds))
    given = (pixels.flip(0) - mean) / std
    assert pixel_checksum(pixels) == image_key(conversion(given[None])[0], encoder)
    assert pixel_checksum(pixels) != pixel_checksum(pixels.flip(0))


def test_targets_are_found_by_the_processes_that_read_images(tmp_path):
    encoder = example_encoder("SigLIP")
    cache = TargetCache(tmp_path, SlidingWindowTeacher(encoder))
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.pixel_mean, encoder.pixel_std))
    image = (pixels / 255 - mean) / std
    look_up = pickle.loads(pickle.dumps(cache.look_up()))
    missing = look_up(pixels)[TargetLookUp.NAME]
    assert missing.target is None
    target = cache.target(image, missing)
    found = look_up(pixels)[TargetLookUp.NAME]
    assert torch.equal(found.target.float(), target)
    assert torch.equal(cache.target(image, found), target)
    assert torch.equal(cache.target(image), target), "under the same name either way"
    assert (cache.hits, cache.misses) == (2, 1)

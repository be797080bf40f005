import logging

import pytest
import torch
from safetensors.torch import save_file

from spar_d2.utils.content_cache import ContentCache, digest

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}


def test_tensors_are_read_as_they_were_written(tmp_path):
    cache = ContentCache(tmp_path, identity="x")
    cache.save("sub/file.safetensors", TENSORS)
    loaded = cache.load("sub/file.safetensors", dict)
    assert loaded.keys() == TENSORS.keys() and all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)
    assert cache.load("sub/missing.safetensors", dict) is None


@pytest.mark.parametrize("damage", ["bit", "cut", "json", "other metadata", "other content"])
def test_corrupt_files_count_as_missing_with_a_warning(damage, tmp_path, caplog):
    name = "file.json" if damage == "json" else "file.safetensors"
    cache = ContentCache(tmp_path, identity="x")
    cache.save(name, TENSORS)
    content = bytearray((tmp_path / name).read_bytes())
    content[-1] ^= damage == "bit"
    (tmp_path / name).write_bytes(content[:-2] if damage == "cut" else content)
    read = ContentCache(tmp_path, identity="y") if damage == "other metadata" else cache
    with caplog.at_level(logging.WARNING):
        assert read.load(name, lambda tensors: tensors["c" if damage == "other content" else "a"]) is None
    assert caplog.text.count("file") and caplog.text.count("will be recomputed") == 1


def test_files_of_earlier_versions_without_a_checksum_are_read(tmp_path):
    save_file(TENSORS, tmp_path / "file.safetensors")
    assert ContentCache(tmp_path).load("file.safetensors", len) == 2


def test_a_failed_write_leaves_nothing_and_is_reported_once(tmp_path, caplog):
    full = ContentCache(tmp_path, "SOME.KEY", reserve=1 << 60)
    with pytest.raises(OSError, match="GiB free"):
        full.save("file.safetensors", TENSORS)
    for _ in range(2):
        full.try_save("file.safetensors", TENSORS)
    assert not full.writable and caplog.text.count("SOME.KEY") == 1
    assert not list(tmp_path.iterdir())


def test_a_digest_tells_texts_and_tensors_apart():
    noncontiguous = torch.arange(6.0)[::2]
    assert digest("a", noncontiguous) == digest("a", noncontiguous.clone()) != digest("b", noncontiguous)

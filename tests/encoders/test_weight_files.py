"""Weight files as they are found in the wild, good and bad."""

import json
import zipfile
from importlib import import_module

import open_clip
import pytest
import torch

from reference import TINY_CONFIG, fill_with_reference
from spar_d2.encoders import build_encoder, build_text_tower
from spar_d2.encoders.fit import check_values
from spar_d2.encoders.weights import read_state_dict, write_safetensors


@pytest.fixture
def state(reference_clip):
    return dict(reference_clip.state_dict())


def holds(tiny_model, path, state, part=""):
    own = build_encoder(tiny_model[0], str(path), pretrained_part=part).state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in own.items())


@pytest.mark.slow
def test_archives_of_openai_are_read_without_running_them(tiny_model, tmp_path, state):
    model = fill_with_reference(open_clip.CLIP(**TINY_CONFIG).eval())
    for name, value in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    images, texts = torch.randn(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.long)
    script = torch.jit.trace_module(model, {"encode_image": images, "encode_text": texts})
    script.save(str(tmp_path / "openai.pt"))
    assert holds(tiny_model, tmp_path / "openai.pt", state)
    tower = build_text_tower(tiny_model[0], str(tmp_path / "openai.pt"))
    assert torch.equal(tower.model.text_projection, state["text_projection"])
    torch.save({**state, "input_resolution": torch.tensor(64), "attn_mask": torch.zeros(77, 77)}, tmp_path / "dict.pt")
    assert holds(tiny_model, tmp_path / "dict.pt", state)


class _Restores(torch.nn.Module):
    """A script that would write a file while it is loaded."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = torch.nn.Parameter(torch.ones(3))

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.path = state[0]
        self.weight = state[1]
        self.training = state[2]
        torch.save(self.weight, self.path)

    def forward(self, x):
        return x * self.weight


def test_a_script_that_acts_when_it_is_loaded_does_not(tiny_model, tmp_path):
    path = tmp_path / "acts.pt"
    torch.jit.script(_Restores(str(tmp_path / "written"))).save(str(path))
    (tmp_path / "written").unlink(missing_ok=True)
    with pytest.raises(RuntimeError, match=r"MODEL\.SPAR\.PRETRAINED.*acts\.pt"):
        build_encoder(tiny_model[0], str(path))
    assert not (tmp_path / "written").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "prefix", ["_orig_mod.module.", "module._orig_mod.", "module.module.", "module.model.", "backbone."]
)
def test_prefixes_come_in_any_order(tiny_model, tmp_path, state, prefix):
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "w.pt")
    assert holds(tiny_model, tmp_path / "w.pt", state)


def test_compiled_parts_are_found(tiny_model, tmp_path, state):
    torch.save({name.replace("visual.", "visual._orig_mod."): t for name, t in state.items()}, tmp_path / "w.pt")
    assert holds(tiny_model, tmp_path / "w.pt", state)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["teacher", "ema", "state_dict_ema", "model_ema", "model_state_dict", "student"])
def test_a_container_is_opened_and_named(tiny_model, tmp_path, state, caplog, part):
    torch.save({part: state, "epoch": 3}, tmp_path / "w.pt")
    assert holds(tiny_model, tmp_path / "w.pt", state)
    assert (f"the weights {part!r}" in caplog.text) == (part != "model_state_dict")


def test_of_two_containers_one_must_be_named(tiny_model, tmp_path, state, monkeypatch):
    other = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    path = tmp_path / "two.pt"
    torch.save({"state_dict": other, "state_dict_ema": state, "optimizer": {"lr": 1.0}}, path)
    with pytest.raises(RuntimeError, match=r"several.*state_dict, state_dict_ema.*MODEL\.SPAR\.PRETRAINED_PART"):
        build_encoder(tiny_model[0], str(path))
    assert holds(tiny_model, path, state, "state_dict_ema")
    with pytest.raises(RuntimeError, match=r"PRETRAINED_PART.*no 'teacher'.*optimizer, state_dict, state_dict_ema"):
        build_encoder(tiny_model[0], str(path), pretrained_part="teacher")
    arguments = ["--encoder", tiny_model[0], "--input", str(path), "--output", str(tmp_path / "out.pt")]
    monkeypatch.setattr("sys.argv", ["convert_weights.py", *arguments, "--part", "state_dict_ema"])
    import_module("spar_d2.cli.convert").main()
    assert holds(tiny_model, tmp_path / "out.pt", state)


def test_shards_are_beside_their_index(tiny_model, tmp_path, state):
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    names = sorted(name for name, tensor in state.items() if tensor.is_floating_point())
    shard_of = {name: shards[place % 2] for place, name in enumerate(names)}
    for shard in shards:
        write_safetensors({n: state[n] for n in names if shard_of[n] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": shard_of}))
    assert holds(tiny_model, index, state)

    wrong = {
        "is not the name of a weight file": {**shard_of, names[0]: "../weights.safetensors"},
        "has no tensor 'nothing'": {**shard_of, "nothing": shards[0]},
        "is missing": {**shard_of, names[0]: "model-3.safetensors"},
        'has no "weight_map"': [],
    }
    for message, weight_map in wrong.items():
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(RuntimeError, match=message):
            build_encoder(tiny_model[0], str(index))


def itself():
    content = {"epoch": 1}
    content["model"] = content
    return content


def in_a_ring():
    inner = {}
    content = {"model": {"state_dict": inner}}
    inner["model"] = content
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (itself(), "contains itself"),
        (in_a_ring(), "contains itself"),
        ({0: torch.zeros(2), 1: torch.zeros(3)}, "key 0, which is not a string"),
        ({"model": {("a", 1): torch.zeros(2)}}, r"key \('a', 1\), which is not a string"),
        ({"module.a": torch.zeros(1), "a": torch.zeros(1)}, "two tensors for 'a'"),
    ],
    ids=["itself", "ring", "numbers", "tuples", "twice"],
)
def test_malformed_dictionaries_are_a_readable_error(tiny_model, tmp_path, content, message):
    torch.save(content, tmp_path / "strange.pth")
    with pytest.raises(RuntimeError, match=message):
        build_encoder(tiny_model[0], str(tmp_path / "strange.pth"))


def test_an_archive_that_unpacks_to_more_than_it_is(tiny_model, tmp_path):
    torch.save({"visual.proj": torch.zeros(1000, 1000)}, tmp_path / "plain.pt")
    packed = zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, packed as bomb:
        for info in plain.infolist():
            bomb.writestr(info.filename, plain.read(info))
    assert (tmp_path / "bomb.pt").stat().st_size < 10_000
    with pytest.raises(RuntimeError, match=r"bomb\.pt cannot be read.*unpacks to"):
        build_encoder(tiny_model[0], str(tmp_path / "bomb.pt"))
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as other:
        other.writestr("a.txt", "no weights")
    with pytest.raises(RuntimeError, match="not a PyTorch archive"):
        build_encoder(tiny_model[0], str(tmp_path / "other.pt"))


def nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


def quantized(tensor):
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


BAD = {
    "nan": (nan, "NaN or infinite"),
    "infinite": (lambda t: t.clone().fill_(float("-inf")), "NaN or infinite"),
    "half": (lambda t: nan(t).half(), "NaN or infinite"),
    "int8": (lambda t: t.to(torch.int8), "is torch.int8"),
    "int64": (lambda t: t.long(), "is torch.int64"),
    "bool": (lambda t: t > 0, "is torch.bool"),
    "complex": (lambda t: t.to(torch.complex64), "is torch.complex64"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
    "meta": (lambda t: t.to("meta"), "without values"),
    "sparse": (lambda t: t.to_sparse(), "sparse"),
    "quantized": (quantized, "quantized"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BAD)
def test_numbers_that_are_no_weights_are_named(tiny_model, tmp_path, state, kind):
    change, message = BAD[kind]
    path = str(tmp_path / "bad.pt")
    for name, build in (("visual.proj", build_encoder), ("text_projection", build_text_tower)):
        torch.save({**state, name: change(state[name])}, path)
        with pytest.raises(RuntimeError, match=rf"PRETRAINED: {name} in .*bad\.pt .*{message}"):
            build(tiny_model[0], path)


def test_a_tensor_that_repeats_one_number_is_of_another_shape(tmp_path, tiny_model, state):
    torch.save({**state, "visual.proj": torch.zeros(1).expand(10**7, 10**7)}, tmp_path / "wide.pt")
    with pytest.raises(RuntimeError, match="mismatched shapes"):
        build_encoder(tiny_model[0], str(tmp_path / "wide.pt"))


def test_integer_buffers_may_differ_but_not_in_type(tmp_path):
    """Positions and masks are no weights: DINOv3.txt and others keep such buffers."""
    from spar_d2.encoders.fit import check_fit

    own = {"ids": torch.arange(3), "mask": torch.zeros(2, dtype=torch.bool), "w": torch.zeros(2)}
    check_fit(own, {**own, "text.transformer.embeddings.position_ids": torch.arange(5)}, own, "file")
    with pytest.raises(RuntimeError, match="ids in file is torch.float32 where the model has torch.int64"):
        check_fit(own, {**own, "ids": torch.zeros(3)}, own, "file")


def test_reading_says_which_part(tmp_path, state):
    torch.save({"model": {"x": torch.ones(1)}, "ema": {"x": torch.zeros(1)}}, tmp_path / "w.pt")
    assert read_state_dict(tmp_path / "w.pt", part="ema")["x"] == 0


def test_a_second_set_of_weights_of_any_name_is_seen(tmp_path):
    weights = {"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 3)}
    others = {name: 2 * tensor for name, tensor in weights.items()}
    torch.save(
        {"model": weights, "smoothed": others, "optimizer": {"state": {0: {"m": torch.ones(2, 2)}}}}, tmp_path / "x.pth"
    )
    with pytest.raises(RuntimeError, match="contains several sets of weights: model, smoothed"):
        read_state_dict(tmp_path / "x.pth")
    assert torch.equal(read_state_dict(tmp_path / "x.pth", part="smoothed")["a.weight"], others["a.weight"])


def test_weights_that_overflow_in_the_models_type_are_an_error():
    with pytest.raises(RuntimeError, match=r"a in x has values that are NaN or infinite in torch\.float32"):
        check_values({"a": torch.zeros(2)}, {"a": torch.full((2,), 1e60, dtype=torch.float64)}, "x")

"""How much is compiled where teacher, student and evaluation live in one process."""

import copy
from collections import Counter

import pytest
import torch
import torch._dynamo

from reference import example_encoder
from spar_d2.encoders import compilation, set_trainable
from spar_d2.teacher import SlidingWindowTeacher

# Cases that PyTorch itself distinguishes: one image or several, and tokens with a gradient or without. A block whose
# output is only its value path (open_clip's last) is a separate function.
MOST_FOR_A_USE = 4


@pytest.fixture
def graphs(monkeypatch) -> Counter:
    """Counts graphs by the function they are compiled from, without the time that compiling takes."""
    counted: Counter = Counter()
    torch._dynamo.reset()
    compilation.compiled.cache_clear()
    real = torch.compile

    def compile(function, **options):
        def backend(graph, inputs):
            counted[function.__code__.co_name] += 1
            return graph.forward

        return real(function, backend=backend, **options)

    monkeypatch.setattr(torch, "compile", compile)
    yield counted
    compilation.compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
def test_every_use_has_compiled_code_and_few_graphs(graphs, caplog):
    # Its blocks take rotations besides tokens; other families share the code.
    student = example_encoder("DINOv3").accelerate("bfloat16", compile=True)
    set_trainable(student, "last_blocks:2")
    student.train()
    teacher = SlidingWindowTeacher(copy.deepcopy(student), stride=24, batch_size=4)

    def train(count: int, height: int, width: int) -> None:
        student(torch.randn(count, 3, height, width)).square().mean().backward()

    side = student.native_size
    with student.frozen_blocks_cast():
        for width in (side + 24 * 4, side):
            teacher(torch.randn(1, 3, side, width))
            teacher.samples(torch.randn(2, 3, side, width), 3, torch.rand(2, 2))
        for size in ((1, 80, 96), (1, 96, 128), (2, 96, 80), (3, 64, 112)):
            train(*size)
            with torch.no_grad():
                student(torch.randn(*size[:1], 3, *size[1:]))
    assert not [r for r in caplog.records if "recompile_limit" in r.getMessage()]
    uses = {name.split("_")[-1] if "fixed" not in name else "fixed shape" for name in graphs}
    assert uses == {"fixed shape", "frozen", "trained", "inference"}
    assert max(graphs.values()) <= MOST_FOR_A_USE, dict(graphs)


def test_a_teacher_with_a_fixed_batch_shape_gives_the_same_targets(monkeypatch):
    # Compiled blocks themselves are tested elsewhere.
    monkeypatch.setattr("spar_d2.encoders.base.compiled", lambda step, use: step)
    encoder = example_encoder("SigLIP")
    x, images, shapes = torch.randn(1, 3, 112, 176), torch.randn(3, 3, 112, 176), set()
    usual = SlidingWindowTeacher(encoder, stride=24, batch_size=16)
    teacher = SlidingWindowTeacher(encoder.accelerate(compile=True), stride=24, batch_size=16)
    teacher.encoder.register_forward_pre_hook(lambda module, inputs: shapes.add(tuple(inputs[0].shape)))
    torch.testing.assert_close(teacher(x), usual(x), rtol=1e-5, atol=1e-6)
    for found, expected in zip(*(one.samples(images, 7, torch.full((3, 2), 0.3)) for one in (teacher, usual))):
        torch.testing.assert_close(found.weighted_sum, expected.weighted_sum, rtol=1e-5, atol=1e-6)
    assert shapes == {(16, 3, 64, 64)}

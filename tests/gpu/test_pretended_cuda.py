"""The pretended CUDA device behaves like CUDA."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from pretended_cuda import PretendedCuda


@pytest.fixture
def gpu():
    with PretendedCuda() as pretended:
        yield pretended


def reasons(gpu) -> list[str]:
    """Why the CPU waited, since the device was last asked."""
    found = sorted(what for (what, _), count in gpu.waits.items() for _ in range(count))
    gpu.reset()
    return found


def test_the_device_exists_only_inside_the_context():
    before = (torch.cuda.is_available(), torch.Generator, F.scaled_dot_product_attention)
    with PretendedCuda():
        x = torch.zeros(2, device="cuda")
        assert x.is_cuda and torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    assert not x.is_cuda
    assert (torch.cuda.is_available(), torch.Generator, F.scaled_dot_product_attention) == before


def test_devices_of_tensors(gpu):
    x = torch.ones(2, 3, device="cuda")
    for tensor in (x, x[0], x.T, x + 1, x.sum(), x.new_empty(0), torch.zeros_like(x), torch.nn.Parameter(x), x.data):
        assert tensor.is_cuda and not tensor.is_cpu and tensor.get_device() == 0
        assert tensor.device == torch.device("cuda", 0)
    for tensor in (
        torch.ones(2),
        x.cpu(),
        x.to("cpu"),
        torch.zeros_like(x, device="cpu"),
        x.new_zeros(1, device="cpu"),
    ):
        assert tensor.is_cpu and not tensor.is_cuda and tensor.get_device() == -1
    with torch.device("cuda"):
        assert torch.ones(2).is_cuda
    for tensor in (torch.ones(2).cuda(), torch.ones(2).to(x), torch.ones(2).to(0), torch.ones(2).type_as(x)):
        assert tensor.is_cuda
    assert torch.ones(2, dtype=torch.float16).new_ones(2, device="cuda").is_cuda
    assert x.cuda() is x and x.to("cuda", torch.float32) is x


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.full((2, 2), 3.0, device="cuda"),
        lambda: torch.arange(4, device="cuda"),
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.eye(2, device="cuda"),
        lambda: torch.randn(2, device="cuda", generator=torch.Generator(device="cuda").manual_seed(1)),
        lambda: torch.zeros(2, device="cuda").new_full((2,), 1.0),
        lambda: torch.zeros(2).new_full((2,), 1.0, device="cuda"),
    ],
)
def test_creating_tensors_is_a_launch(gpu, make):
    assert make().is_cuda
    assert gpu.launches and not gpu.copies and not gpu.waits


def test_memory_alone_is_no_launch(gpu):
    x = torch.empty(2, 3, device="cuda")
    torch.empty_like(x), x.new_empty(2), x.view(3, 2), x.detach(), x[0], x.T
    assert not gpu.launches
    x.add_(1)
    assert list(gpu.launches.values()) == [1]


@pytest.mark.parametrize("data", [[1, 2], 3.5, np.ones(2)])
@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor, torch.asarray])
def test_tensors_from_python_data_are_copies_and_waits(gpu, make, data):
    made = make(data, device="cuda")
    assert made.is_cuda and made.tolist() == np.asarray(data).tolist()
    assert reasons(gpu) == ["blocking copy", "tolist"]
    like = torch.zeros(1, dtype=torch.float16, device="cuda").new_tensor(data)
    assert like.is_cuda and like.dtype == torch.float16 and reasons(gpu) == ["blocking copy"]


def test_tensors_of_tensors(gpu):
    cpu, cuda = torch.ones(2), torch.ones(2, device="cuda")
    assert torch.as_tensor(cuda, device="cuda") is cuda and not reasons(gpu)
    assert torch.as_tensor(cpu, device="cuda").is_cuda and not cpu.is_cuda
    assert reasons(gpu) == ["blocking copy"]
    assert cuda.new_tensor(cuda).is_cuda and not reasons(gpu)


def test_copies(gpu):
    x = torch.arange(6.0)
    assert x.to("cuda", non_blocking=True).is_cuda and x.pin_memory().cuda(non_blocking=True).is_cuda
    assert not gpu.waits and sum(gpu.copies.values()) == 2 and sum(gpu.bytes_copied.values()) == 48
    y = x.to("cuda", torch.float16)
    assert y.dtype == torch.float16
    assert [what for what, _ in gpu.copies if "cast" in what] == [
        "to the device, cast torch.float32 to torch.float16 before"
    ]
    assert y.cpu().tolist() == x.tolist() and reasons(gpu) == ["blocking copy"] * 2
    y.to("cpu", non_blocking=True), torch.empty(6).copy_(y, non_blocking=True)
    assert not reasons(gpu)
    y.copy_(x), x.copy_(y)
    assert reasons(gpu) == ["blocking copy"] * 2 and y.is_cuda and not x.is_cuda
    assert x.to(torch.float64).dtype == torch.float64 and not gpu.copies
    with pytest.raises(RuntimeError, match="cannot pin"):
        y.pin_memory()


def test_numpy_is_refused(gpu):
    x = torch.ones(2, device="cuda")
    for convert in (lambda: x.numpy(), lambda: np.asarray(x), lambda: np.add(x, 1)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            convert()
    assert not reasons(gpu)
    assert x.cpu().numpy().tolist() == x.numpy(force=True).tolist() == [1, 1]
    assert reasons(gpu) == ["blocking copy"] * 2


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda x: x[0].item(), ["_local_scalar_dense"]),
        (lambda x: float(x.sum()), ["_local_scalar_dense"]),
        (lambda x: bool((x > 0).all()), ["_local_scalar_dense"]),
        (lambda x: x.tolist(), ["tolist"]),
        (lambda x: x.nonzero(), ["nonzero"]),
        (lambda x: torch.where(x > 1), ["nonzero"]),
        (lambda x: x[x > 1], ["index by a mask"]),
        (lambda x: x[torch.tensor([0, 1])], ["index on the CPU"]),
        (lambda x: x[torch.ones(3, dtype=torch.bool)], ["index by a mask"]),
        (lambda x: x.masked_select(x > 1), ["masked_select"]),
        (lambda x: x.long().bincount(), ["bincount"]),
        (lambda x: x.unique(), ["_unique2"]),
        (lambda x: torch.equal(x, x), ["equal"]),
        (lambda x: 2.0 in x, ["_local_scalar_dense"]),
        (lambda x: x.repeat_interleave(x.long()), ["repeat_interleave"]),
        (lambda x: x.repeat_interleave(x.long(), output_size=6), []),
        (lambda x: x.repeat_interleave(2), []),
        (lambda x: x[(x - 1).long()], []),
        (lambda x: x.index_put_(((x - 1).long(),), x + 1), []),
        (lambda x: torch.where(x > 1, x, 0).max(dim=0), []),
        (lambda x: torch.cuda.synchronize(), ["synchronize"]),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_waits(gpu, read, expected, inference):
    with torch.inference_mode(inference):
        x = torch.arange(1.0, 4.0, device="cuda")
        gpu.reset()
        read(x)
    assert reasons(gpu) == expected


def test_numbers_that_are_put(gpu):
    x, index = torch.zeros(3, device="cuda"), torch.arange(2, device="cuda")
    x[:2] = 1.0
    x[x > 0] = 2.0  # fills
    assert not reasons(gpu) and x.tolist() == [2, 2, 0]
    gpu.reset()
    x[index] = 3.0
    assert reasons(gpu) == ["number on the CPU"]
    x[x > 0] = x[:2].clone()
    assert reasons(gpu) == ["index by a mask"]


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: y + x.sum(),
        lambda x, y: x @ y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.stack([x.sum(), y.sum()]),
        lambda x, y: F.linear(x, y),
        lambda x, y: x.index_select(0, y[0].long()),
        lambda x, y: y[x[0].long()],
        lambda x, y: x.clone().index_put_((x[0].long(),), y),
        lambda x, y: y.sum().add_(x.sum()),
        lambda x, y: x.add_(y),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_devices_do_not_mix(gpu, mix, inference):
    with torch.inference_mode(inference):
        x, y = torch.zeros(3, 3, device="cuda"), torch.zeros(3, 3)
        mix(x, x), mix(y, y)
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            mix(x, y)


def test_numbers_of_the_cpu_are_taken(gpu):
    x, number = torch.ones(3, device="cuda"), torch.tensor(2.0)
    assert all(
        y.is_cuda for y in (x * number, number + x, x.mul_(number), torch.where(x > 0, x, number), x[:2].fill_(3))
    )
    assert not gpu.waits


def test_gradients_are_seen(gpu):
    layer = torch.nn.Linear(3, 4).to("cuda")
    x = torch.randn(2, 3, requires_grad=True)
    gpu.reset()
    layer(x.to("cuda", non_blocking=True))[:, 1:].square().mean().backward()
    assert layer.weight.grad.is_cuda and not x.grad.is_cuda
    assert {what for what, _ in gpu.launches} >= {"mm", "mean", "slice_backward"}
    torch.testing.assert_close(x.grad, torch.autograd.grad(layer.cpu()(x)[:, 1:].square().mean(), x)[0])


def test_python_in_backward_passes_is_seen(gpu):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            assert gradient.is_cuda
            return gradient * torch.full((1,), 2.0, device=gradient.device)

    x = torch.ones(2, device="cuda", requires_grad=True)
    Doubled.apply(x).sum().backward()
    (other,) = torch.autograd.grad(Doubled.apply(x).sum(), x)
    assert x.grad.is_cuda and x.grad.tolist() == other.tolist() == [2, 2]


@pytest.mark.slow
def test_memory_used_again_carries_no_mark(gpu):
    for _ in range(3000):
        torch.zeros(8, device="cuda").add_(1)
        assert not torch.ones(8).is_cuda
    assert len(gpu.storages._known) < 2100
    assert torch.zeros(0, device="cuda").is_cuda and not torch.zeros(0).is_cuda


def test_modules_and_their_copies(gpu):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).to("cuda")
    for moved in (model, copy.deepcopy(model), copy.deepcopy(model).half(), copy.deepcopy(model).to(torch.bfloat16)):
        assert all(tensor.is_cuda for tensor in moved.state_dict().values())
        assert moved[1].num_batches_tracked.dtype == torch.int64
    both = torch.nn.Linear(2, 2).to("cuda", torch.float16)
    assert both.weight.is_cuda and both.weight.dtype == torch.float16
    assert not any(tensor.is_cuda for tensor in copy.deepcopy(model).cpu().state_dict().values())
    pair = copy.deepcopy(
        [torch.ones(2, device="cuda"), torch.ones(2), torch.ones(2, device="cuda", requires_grad=True)]
    )
    assert [tensor.is_cuda for tensor in pair] == [True, False, True]
    other = torch.nn.Linear(2, 3)
    other.load_state_dict(model[0].state_dict())
    assert not other.weight.is_cuda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_by_the_rules_of_cuda(gpu, dtype):
    x, layer = torch.ones(2, 4, device="cuda"), torch.nn.Linear(4, 4).to("cuda")
    with torch.autocast("cuda", dtype):
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == dtype
        assert not torch.is_autocast_enabled("cpu")
        y = layer(x)
        assert y.dtype == (x @ x.T).dtype == F.gelu(y).dtype == dtype
        in_float32 = (
            F.layer_norm(y, (4,)),
            y.softmax(-1),
            y.sum(),
            y.square(),
            y**2,
            F.normalize(y),
            y.norm(),
            y.exp(),
        )
        assert {tensor.dtype for tensor in in_float32} == {torch.float32}
        # The CPU's own autocast would compute this in the lower type.
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        with torch.autocast("cuda", enabled=False):
            assert layer(x).dtype == torch.float32
    assert layer(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float32 and (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with torch.autocast("cuda"):
        assert layer(x).dtype == torch.float16


def test_checkpoints_compute_alike(gpu):
    norm, layer = torch.nn.LayerNorm(4).to("cuda"), torch.nn.Linear(4, 4).to("cuda")
    seen = []

    def block(x):
        seen.append([y.dtype for y in (layer(x), norm(layer(x)))])
        return norm(layer(x)).sum()

    x = torch.randn(2, 4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        checkpoint(block, x, use_reentrant=False).backward()
    assert seen == [[torch.bfloat16, torch.float32]] * 2
    assert layer.weight.grad.is_cuda


def test_gradients_are_scaled(gpu):
    layer = torch.nn.Linear(4, 4).to("cuda")
    before = layer.weight.detach().cpu()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda")
    assert scaler.is_enabled()
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = layer(torch.ones(2, 4, device="cuda")).square().mean()
        scaler.scale(loss).backward()
        gpu.reset()
        scaler.step(optimizer)
        scaler.update()
        assert reasons(gpu) == ["_local_scalar_dense"]
    assert not torch.equal(layer.weight.cpu(), before)
    assert all(state["exp_avg"].is_cuda for state in optimizer.state.values())


def test_generators_are_of_their_device(gpu):
    ours, theirs = torch.Generator(device="cuda"), torch.Generator()
    assert (ours.device.type, theirs.device.type) == ("cuda", "cpu") and isinstance(ours, torch.Generator)
    first = torch.rand(3, device="cuda", generator=ours.manual_seed(5))
    assert torch.equal(first, torch.rand(3, device="cuda", generator=ours.manual_seed(5)))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator but found 'cpu'"):
        torch.rand(3, device="cuda", generator=theirs)
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator but found 'cuda'"):
        torch.randperm(3, generator=ours)
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device"):
        first.uniform_(generator=theirs)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_pin(gpu, workers, recwarn):
    loader = DataLoader(torch.arange(6.0), batch_size=3, num_workers=workers, pin_memory=True)
    batches = [batch.to("cuda", non_blocking=True) for batch in loader]
    assert torch.cat(batches).tolist() == list(range(6)) and reasons(gpu) == ["tolist"]
    assert not [warning for warning in recwarn if "pin_memory" in str(warning.message)]


@pytest.mark.parametrize(
    ("dtype", "channels", "mask", "backend"),
    [
        (torch.bfloat16, 64, False, "flash"),
        (torch.float16, 20, False, "flash"),
        (torch.float32, 64, False, "efficient"),
        (torch.bfloat16, 64, True, "efficient"),
        (torch.bfloat16, 20, True, "MATH"),
        (torch.float32, 6, False, "MATH"),
        (torch.bfloat16, 320, False, "efficient"),
    ],
)
def test_attention_by_the_rules_of_hopper(gpu, dtype, channels, mask, backend):
    x = torch.randn(1, 2, 5, channels, device="cuda", dtype=dtype)
    F.scaled_dot_product_attention(x, x, x, torch.zeros(5, 5, device="cuda", dtype=dtype) if mask else None)
    assert gpu.attention_by(backend) == sum(gpu.attention.values()) == 1
    if dtype == torch.float32 and channels == 64:
        with torch.autocast("cuda", torch.bfloat16):
            F.scaled_dot_product_attention(x, x, x)
        assert gpu.attention_by("flash") == 1
    F.scaled_dot_product_attention(x.cpu(), x.cpu(), x.cpu())
    assert gpu.attention_by("") == 1 + gpu.attention_by("flash") * (backend != "flash")


def test_attention_within_modules_is_seen(gpu):
    attention = torch.nn.MultiheadAttention(16, 2, batch_first=True).to("cuda")
    x = torch.randn(1, 5, 16, device="cuda")
    attention(x, x, x, need_weights=False)
    assert gpu.attention_by("efficient") == 1
    # Transposed parts have no channels side by side.
    strange = torch.randn(1, 2, 16, 5, device="cuda").transpose(2, 3)
    F.scaled_dot_product_attention(strange, strange, strange)
    assert gpu.attention_by("MATH") == 1


def test_nondeterministic_operators_are_found(gpu):
    x, index = torch.zeros(4, device="cuda"), torch.zeros(9, dtype=torch.int64, device="cuda")
    values = torch.ones(9, device="cuda", requires_grad=True)
    x.long().scatter_add_(0, index, index), x.index_put((index,), values), x.scatter_reduce_(0, index, x[index], "amax")
    assert not gpu.unordered
    x.index_add(0, index, values), x.scatter_reduce(0, index, values, "sum")
    values[index].sum().backward()
    assert {what for what, _ in gpu.unordered} == {"index_add", "scatter_reduce", "index_put"}


def test_places_and_report(gpu, monkeypatch):
    from spar_d2.distillation.loss import distillation_loss

    x = torch.ones(1, 2, 3, 3, device="cuda")
    distillation_loss(x, x).item()
    assert {place.split(":")[0] for _, place in gpu.waits} == {"gpu/test_pretended_cuda.py"}
    assert {place.split(":")[0] for _, place in gpu.launches} >= {"spar_d2/distillation/loss.py"}
    assert gpu.waits_in() == 0 and gpu.waits_in("gpu") == 1
    report = gpu.report()
    assert re.search(r"^\d launches, 1 waits, 0 copies \(0\.000 MB\)$", report, re.M)
    assert re.search(r"wait +1 x _local_scalar_dense, gpu/test_pretended_cuda\.py:\d+", report)
    gpu.reset()
    assert not gpu.launches

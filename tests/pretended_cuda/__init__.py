"""A pretended CUDA device, which finds failures and waits of a GPU without one.

    with PretendedCuda() as gpu:
        model.to("cuda")(x.to("cuda"))
    assert gpu.waits_in("spar_d2") == 0, gpu.report()

Tensors "on CUDA" are CPU tensors whose storage is remembered. Values are real: the same code gives the same numbers,
control flow that depends on data works, and so do autograd, autocast, optimizers and loaders. Two modes keep it up:

- a function mode answers ``.device`` and its kin, takes devices out of calls, refuses ``.numpy()``, and lets autocast
  do what it does on CUDA;
- a dispatch mode, below autograd, so that backward passes are seen too, raises where an operator mixes devices as CUDA
  does, and writes down waits of the CPU, copies, launches, attention kernels and operators without a fixed order, by
  file and line of the code that asked for them.

Limits. There are no kernels, streams, events, memory, NCCL or ``torch.compile``, and one device. Speed and rounding are
a CPU's. Operators are those of CPU kernels, which at places are split differently, so launches are about right.
Within Python functions of ``torch`` that take tensors, such as ``F.multi_head_attention_forward``, neither device nor
float32 list of autocast is pretended; functions that autocast promotes are left to type promotion. Every copy with
``non_blocking`` counts as not waited for, whatever memory is pinned. Tensors cannot be loaded, exported
(``__dlpack__``) or sent to other processes as CUDA tensors; files hold them as CPU tensors. Other threads see CPU
tensors.
"""

from pretended_cuda.device import PretendedCuda

__all__ = ["PretendedCuda"]

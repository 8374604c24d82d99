"""Whether kernels can be compiled on this machine, found out by compiling one before anything depends on it; small kernels of our own."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import _cur_sdpa_kernel_backends

Rest = ParamSpec("Rest")
Result = TypeVar("Result")
_SHAPES_GRAPHS = ("checkpointing", "compiling", "quantized")
"""Files of this folder: what a graph keeps, and how its operations are run."""
_TAG_OF_THE_USER = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Why blocks are better left uncompiled here; None where compiling pays and works."""
    if device.type != "cuda":
        return "compiling pays on a GPU only"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (on Windows: pip install triton-windows)"
    return compiler_failure(device)


@functools.cache
def compiler_failure(device: torch.device) -> str | None:
    """The error of torch's compiler on one small kernel; None where the kernel runs."""
    x = torch.linspace(0, 1, 64, device=device)
    try:
        result = torch.compile(_small)(x)
    except RuntimeError as error:  # what the compiler raises derives from it
        return first_line(error)
    return None if torch.allclose(result, _small(x), atol=1e-4) else "a small compiled kernel gives wrong results"


def compiler_message(error: Exception) -> str | None:
    """The first line of an error of torch's compiler; None where the error is of another kind."""
    from torch._dynamo.exc import TorchDynamoException

    return first_line(error) if isinstance(error, TorchDynamoException) else None


def compiles_for(tensor: Tensor) -> bool:
    """Whether kernels for the device of `tensor` are compiled."""
    return tensor.is_cuda and obstacle_to_compiling(tensor.device) is None


def fused(function: Callable[Concatenate[Tensor, Rest], Result]) -> Callable[Concatenate[Tensor, Rest], Result]:
    """A chain of small operations on a tensor as one kernel, at any size, where one can be compiled; `function` itself elsewhere, and in
    a graph that is being compiled, of which it becomes a part. Compiled, it takes part in no gradient: one kernel serves all passes."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True))

    @functools.wraps(function)
    def run(first: Tensor, /, *rest: Rest.args, **named: Rest.kwargs) -> Result:
        if torch.compiler.is_compiling() or not compiles_for(first):
            return function(first, *rest, **named)
        with torch.no_grad():
            return compiled()(first.detach(), *rest, **named)

    return run


def keep_graphs_apart() -> None:
    """Have torch's cache on disk, which gives back graphs of earlier runs, tell apart what it does not see: the order of attention kernels
    that a graph was traced with, and the code whose recompute policies and lowerings decide what a graph is. Call it whenever that order
    has changed."""
    from torch._functorch import config as autograd
    from torch.compiler import config as cache

    kernels = " ".join(kernel.name for kernel in _cur_sdpa_kernel_backends(with_priority=True))
    cache.cache_key_tag = f"{_TAG_OF_THE_USER} {_digest_of_code()} {kernels}"
    # Graphs with an autograd function of our own (fp8) are kept too: what it does is a part of the graph.
    autograd.autograd_cache_allow_custom_autograd_functions = True


@functools.cache
def _digest_of_code() -> str:
    sources = [Path(__file__).with_name(f"{name}.py") for name in _SHAPES_GRAPHS]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def add_in_place(max_rank: int) -> None:
    """Have compiled graphs add a thin product to a tensor that nothing else reads in that tensor's own memory.

    `addmm(y, low, up)` copies `y` first, which costs as much as the product itself. Inductor has a pass that turns such operations into
    those that work in place, wherever it finds that no one else reads what they overwrite; its table lacks `addmm`.

    Args:
        max_rank: products that contract no more than this.
    """
    from torch._inductor import lowering
    from torch._inductor.fx_passes import reinplace
    from torch._inductor.ir import FallbackKernel

    aten = torch.ops.aten

    def is_thin(node: torch.fx.Node) -> bool:
        base, low = (argument.meta["val"] for argument in node.args[:2] if isinstance(argument, torch.fx.Node))
        return base.ndim == 2 and low.shape[1] <= max_rank and not node.kwargs

    def lower(base: Any, low: Any, up: Any) -> Any:
        """The operation as it is called, and what it has overwritten in place of its result."""
        base.realize()
        FallbackKernel.create(aten.addmm_.default, base, low, up)
        return base

    if aten.addmm_.default not in lowering.lowerings:
        lowering.register_lowering(aten.addmm_.default, type_promotion_kind=None)(lower)
    reinplace.inplaceable_ops[aten.addmm.default] = reinplace.InplaceableOp(aten.addmm_.default, 0, extra_check=is_thin)


def first_line(error: Exception) -> str:
    """The first line of an error's message; of one that wraps another, of that one."""
    error = getattr(error, "inner_exception", error)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _small(x: Tensor) -> Tensor:
    return (x * 2).sin() + x

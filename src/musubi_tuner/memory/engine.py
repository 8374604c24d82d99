"""Runs a model's blocks in training: recomputation rung, compiled graph and streamed weights of each block in one place."""

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.memory.checkpointing import Recompute, checkpointed
from musubi_tuner.memory.offload import HostCheckpoint, HostStore, spread_out
from musubi_tuner.memory.streaming import BlockStreamer

log = logging.getLogger(__name__)

_MOST_GRAPHS = 128
"""Kinds of blocks (rung, weight format, adapters) times kinds of batches (masks, given frames, absent streams). A run has a few of them;
torch's own limit of 8 would end it in the middle."""

SequenceAxes = Callable[..., list[tuple[Tensor, int]]]
"""Arguments of a block -> its tensors whose length follows the clip, and which axis of theirs."""


class BlockEngine:
    """Takes the place of a model's `run_block`.

    With gradients a block runs on its rung, compiled where wanted: one graph for all blocks of a rung, at every length. Without
    gradients it is compiled too while the model trains (a teacher's passes come at every step), and runs as it is while the model
    evaluates: validation and previews come too seldom, and differ too much, to wait for a compiler.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        rungs: Sequence[Recompute | None],
        *,
        max_rank: int,
        compiled: bool = False,
        backend: str = "inductor",
        sequence_axes: SequenceAxes | None = None,
        streamer: BlockStreamer | None = None,
        inputs_on_host: bool = False,
    ) -> None:
        """
        Args:
            rungs: of each block; None keeps whatever autograd keeps.
            max_rank: the largest rank of the network.
            backend: of torch.compile.
            sequence_axes: needed where `compiled`.
            inputs_on_host: blocks are computed again as a whole, and their inputs wait in host memory; rungs then say what the second
                run keeps for its own moment.
        """
        assert len(rungs) == len(blocks)
        if inputs_on_host:
            rungs = [Recompute.NOTHING if compiled else None] * len(blocks)
        self._store = HostStore() if inputs_on_host else None
        functions = {rung: _function(rung, max_rank, backend if compiled else None) for rung in set(rungs)}
        self._runs: Mapping[nn.Module, Callable[..., Any]] = {block: functions[rung] for block, rung in zip(blocks, rungs, strict=True)}
        self._forward = _function(None, max_rank, backend) if compiled else _run_plain
        self._compiled = compiled
        self._in_block = False
        if compiled:
            _tell_of_compiling(self)
        self._axes = sequence_axes
        self._streamer = streamer
        self._anchors: dict[torch.device, Tensor] = {}

    def __call__(self, block: nn.Module, *arguments: Any) -> tuple[Tensor | None, ...]:
        """Run one block. Its first two arguments are its states, which it returns; the others are the same for all blocks."""
        with_gradients = torch.is_grad_enabled()
        if self._streamer is not None:
            self._streamer.before_forward(block)
        if with_gradients:
            states = self._gate(arguments[:2], block, entering=True)
            states = self._gate(self._with_gradients(block, states, arguments[2:]), block, entering=False)
        else:
            states = self._without_gradients(block)(*arguments)
        if self._streamer is not None:
            self._streamer.after_forward(block, last=not with_gradients)
        return states

    def _with_gradients(self, block: nn.Module, states: tuple[Tensor | None, ...], rest: tuple) -> tuple:
        run = partial(self._run_compiled if self._compiled else _run_plain, self._runs[block], block)
        if self._store is None:
            return run(*states, *rest)
        present = tuple(tensor is not None for tensor in states)
        kept = [tensor for tensor in states if tensor is not None]
        results = HostCheckpoint.apply(self._store, self._without_gradients(block), run, present, rest, *kept)
        return spread_out(results, present)

    def _without_gradients(self, block: nn.Module) -> Callable[..., tuple]:
        return partial(self._run_compiled, self._forward, block) if self._compiled and block.training else block

    def _run_compiled(self, run: Callable[..., tuple], block: nn.Module, *arguments: Any) -> tuple:
        for tensor, axis in self._axes(*arguments) if self._axes else ():
            torch._dynamo.mark_dynamic(tensor, axis)
        self._in_block = True
        try:
            return run(block, *arguments)
        finally:
            self._in_block = False

    def _gate(self, states: tuple[Tensor | None, ...], block: nn.Module, *, entering: bool) -> tuple[Tensor | None, ...]:
        """The states, through a node of the graph that tells the streamer of the block's backward pass."""
        present = [tensor for tensor in states if tensor is not None]
        if self._streamer is None:
            if not entering or all(tensor.requires_grad for tensor in present):
                return states
            notify = None
        else:
            notify = self._streamer.after_backward if entering else self._streamer.before_backward
        passed = _Gate.apply(self._anchor(present[0].device), notify, block, *present)
        return spread_out(passed, [tensor is not None for tensor in states])

    def _anchor(self, device: torch.device) -> Tensor:
        """Makes all states require gradients from the first block on, so that one graph serves all blocks."""
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        return self._anchors[device]


class _Gate(torch.autograd.Function):
    """Passes tensors through, and says so in the backward pass once all their gradients are there."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, notify: Callable[[nn.Module], None] | None, block: nn.Module, *tensors: Tensor) -> tuple:
        ctx.set_materialize_grads(False)
        ctx.notify, ctx.block = notify, block
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple:
        if ctx.notify is not None:
            ctx.notify(ctx.block)
        return (None, None, None, *gradients)


def _function(rung: Recompute | None, max_rank: int, backend: str | None) -> Callable[..., Any]:
    run = _run_plain if rung is None else checkpointed(rung, max_rank)
    if backend is None:
        return run
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_concerns_us)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 2 * _MOST_GRAPHS)
    return torch.compile(run, fullgraph=True, backend=backend)


def _tell_of_compiling(engine: BlockEngine) -> None:
    """A pause of a minute has a reason that the user can read."""
    from torch._dynamo.callback import callback_handler

    known = weakref.ref(engine)

    def tell(_: object) -> None:
        running = known()
        if running is not None and running._in_block:
            log.info("compiling the blocks, as a kind of block or batch is new in this run; it takes up to a minute")

    callback_handler.register_start_callback(tell)


def _concerns_us(record: logging.LogRecord) -> bool:
    """Torch asks for no operation in place under a checkpoint that chooses; a block has none."""
    return "context_fn is passed" not in record.getMessage()


def _run_plain(run: Callable[..., Any], *arguments: Any) -> Any:
    return run(*arguments)

"""Runs the blocks of a model in training: recompute level, compiled graph and streamed weights of each block, in one place.

The model file states the arithmetic and calls `run_block(block, states, inputs)` for each of its blocks. It knows nothing of memory; the
engine takes the place of that call. One visit of a block:

                     gate in                  the block                  gate out
    forward  states ────>────  its weights are  ──>──  its slot takes a  ────>────  next states
                               in their slot           later block
    backward         ────<────  its slot takes an  ──<──  its weights are ────<────
                                earlier block             there again

What is kept for the backward pass. Left to itself, one compiled block of 2.3 keeps some thirty times the size of its input, and there are
48 of them. So each block has a recompute level (activation checkpointing, memory/checkpointing.py): how much it keeps, and how much its
backward pass computes again. Levels differ from block to block, because a mixture that just fits is faster than the next level everywhere.
Where every block recomputes everything, even the blocks' inputs can wait in host memory (memory/offload.py).

Gates. The weights of a streamed block (memory/streaming.py) must be in their slot when the backward pass comes to the block, and may leave
it no sooner than that pass is done with them. Autograd alone knows when that is. So the states go through an identity on the way in and
another on the way out, whose backward passes are these two moments: the gate out is the first node of the block that autograd reaches, and
the gate in is the last, because of the nodes that are ready autograd runs the one first that was made last. Gates stand outside of the
compiled graph, which therefore knows nothing of streaming.

One graph for all blocks. Compiling a block takes up to a minute, so 48 graphs are out of the question. A compiled function serves whatever
passes its guards, and blocks differ in nothing that is guarded: they have no index, weights are inputs of the graph, and the axes that
follow the clip are marked as dynamic. Whether the states require gradients is guarded too; those of the first block do not by themselves,
so a gate ties them to a constant that does (`_anchor`). Levels are guarded on purpose: each has a graph of its own.

Passes without gradients keep nothing, so levels mean nothing to them. Those of a teacher come with every training step and are compiled,
which makes one more graph. Those of validation and previews, where the model evaluates, come too seldom and differ too much to wait for a
compiler. No backward pass follows, so behind the last streamed blocks the slots turn back to the first ones.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.memory.checkpointing import Recompute, Run, States, checkpointed
from musubi_tuner.memory.offload import HostStore, run_from_host, spread_out
from musubi_tuner.memory.streaming import BlockStreamer

log = logging.getLogger(__name__)

_MOST_GRAPHS = 128
"""Kinds of blocks (recompute level, weight format, adapters) times kinds of batches (masks, conditioning frames, absent streams). A run has
a few of them; torch's own limit of 8 would end it in the middle."""

SequenceAxes = Callable[[States, Any], list[tuple[Tensor, int]]]
"""(states, inputs) of a block -> their tensors whose length follows the clip, and which axis of theirs."""


class BlockEngine:
    """Takes the place of a model's `run_block`."""

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
            rungs: recompute level of each block; None keeps whatever autograd keeps.
            max_rank: the largest rank of the network.
            backend: of torch.compile.
            sequence_axes: needed where `compiled`.
            inputs_on_host: every block recomputes everything, and its input waits in host memory; `rungs` is left aside, as what the
                second run keeps is there for a moment only.
        """
        assert len(rungs) == len(blocks)
        if inputs_on_host:
            rungs = [Recompute.NOTHING if compiled else None] * len(blocks)
        self._store = HostStore() if inputs_on_host else None
        self._streamer = streamer
        self._anchors: dict[torch.device, Tensor] = {}
        runs: dict[Recompute | None, Run] = {rung: _run_plain if rung is None else checkpointed(rung, max_rank) for rung in set(rungs)}
        self._without_gradients: Run = _run_plain
        if compiled:
            _allow_many_graphs()
            runs = {rung: _Compiled(run, backend, sequence_axes) for rung, run in runs.items()}
            self._without_gradients = _Compiled(_run_plain, backend, sequence_axes)
        self._runs = {block: runs[rung] for block, rung in zip(blocks, rungs, strict=True)}

    def __call__(self, block: nn.Module, states: States, inputs: Any) -> States:
        """The block's next states. `inputs` is whatever it reads beside them, and takes no gradient."""
        streamer, learns = self._streamer, torch.is_grad_enabled()
        plain = self._without_gradients if block.training else _run_plain
        if streamer is not None:
            streamer.before_forward(block)
        if not learns:
            states = plain(block, states, inputs)
        else:
            if streamer is not None or not all(state is None or state.requires_grad for state in states):
                states = self._gate(states, block, None if streamer is None else streamer.after_backward)
            run = self._runs[block]
            if self._store is None:
                states = run(block, states, inputs)
            else:
                states = run_from_host(self._store, plain, run, block, states, inputs)
            if streamer is not None:
                states = self._gate(states, block, streamer.before_backward)
        if streamer is not None:
            streamer.after_forward(block, last=not learns)
        return states

    def _gate(self, states: States, block: nn.Module, notify: Callable[[nn.Module], None] | None) -> States:
        present = [state for state in states if state is not None]
        passed = _Gate.apply(self._anchor(present[0].device), notify, block, *present)
        return spread_out(passed, (states[0] is not None, states[1] is not None))

    def _anchor(self, device: torch.device) -> Tensor:
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


def _run_plain(block: nn.Module, states: States, inputs: Any) -> States:
    """The block's own forward pass; autograd keeps what it likes."""
    return block(states, inputs)


class _Compiled:
    """Runs a block as one graph."""

    def __init__(self, run: Run, backend: str, sequence_axes: SequenceAxes | None) -> None:
        self._graph = torch.compile(run, fullgraph=True, backend=backend)
        self._axes = sequence_axes
        self.is_running = False
        _report_compiling(self)

    def __call__(self, block: nn.Module, states: States, inputs: Any) -> States:
        for tensor, axis in self._axes(states, inputs) if self._axes else ():
            torch._dynamo.mark_dynamic(tensor, axis)
        self.is_running = True
        try:
            return self._graph(block, states, inputs)
        finally:
            self.is_running = False


def _allow_many_graphs() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2 * _MOST_GRAPHS)
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    """Torch warns that selective checkpointing allows no operation in place; a block has none."""
    return "context_fn is passed" not in record.getMessage()


def _report_compiling(compiled: _Compiled) -> None:
    """A pause of a minute has a reason that the user can read."""
    from torch._dynamo.callback import callback_handler

    known = weakref.ref(compiled)

    def report(_: object) -> None:
        running = known()
        if running is not None and running.is_running:
            log.info("compiling the blocks, as a kind of block or batch is new in this run; it takes up to a minute")

    callback_handler.register_start_callback(report)

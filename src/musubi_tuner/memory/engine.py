"""Runs a model's blocks in training: recompute level, compiled graph, streamed weights and offloaded inputs of each block, in one place.

A diffusion transformer is a chain of equal blocks, and nearly all memory and time of a training step is theirs. What saves memory
(activation checkpointing, weight streaming, activation offload) and what saves time (torch.compile) therefore works block by block, and
from outside: the model states the maths and calls `run_block(block, states, inputs)` where it would call `block(states, inputs)`; a
`BlockEngine` takes the place of that function. Uncompiled, it gives the same bits as the plain model.

The contract of a block
    `states = block(states, inputs)`. The states are the tensors (B, N, D) of video and audio, None where a stream is absent. The inputs are
    all else that a block reads (`BlockInputs` of the model: modulation, text, RoPE, masks), shared by the blocks of a pass. So the states
    are the only thing that joins one block to the next: they are what a block on the level `everything` keeps, what waits in host memory,
    and what passes through the gates. Inputs need no gradients as long as adapters sit inside blocks; with states on the host they must
    not.

A visit of a block, in training with streamed weights: forward goes down, backward comes up.

        forward                                                      backward
           |                                                            ^
    before_forward     wait for the copy of its weights                 |
           |                                                            |
    entry gate         - - - - - - - - - - - - - - - - - - - - - >  after_backward    its slot takes the streamed block `slots` before it
           |                                                            ^
    the block,         - - - what the level keeps - - - - - - - - >  recompute the rest, then gradients
    compiled                                                            ^
           |                                                            |
    exit gate          - - - - - - - - - - - - - - - - - - - - - >  before_backward   wait for the copy of its weights
           |                                                            ^
    after_forward      its slot takes the streamed block `slots` after it
           |                                                            |
           v  the next block                                            |

Recompute levels (memory/checkpointing.py). What a block keeps for its backward pass is chosen block by block, because memory is spent in
units of a block: the plan (memory/plan.py) takes the cheapest mixture of levels that fits. None leaves the choice to autograd, or to the
partitioner of the compiler.

Gates. Autograd runs the backward pass, not our code, so the only way to know that it reaches a block is a node in its graph. A gate passes
the states through and calls the streamer when its own backward runs. Autograd runs a node once all gradients of its outputs are there. The
exit gate therefore runs before anything of its block does, recomputation included, and the entry gate runs after the block has its input
gradients. All reads of frozen weights lie on the way to these (the gradient of an adapter needs none), so the slot may then be overwritten.

Streamed weights (memory/streaming.py). A streamed block's parameters are views of one slot of a small ring on the device, always the same
one. Their addresses never change, so what autograd saved, and the compiled graph, are valid whenever the slot holds the block again.

One graph for all blocks and lengths. torch.compile keeps a graph for each set of guards: code, and dtype, shape and `requires_grad` of all
tensors, parameters included. Blocks of one level, weight format and kind of adapter differ in values alone, and so share a graph: compiling
takes a minute, not 48. Three things would spoil that. The first block's states come from frozen layers and need no gradient, while all
later ones do: the entry gate adds an anchor, a zero that requires gradients, so that all states do from the first block on (this gate is
there without a streamer too). Every clip has its own length: `sequence_axes` names the tensors and axes that follow it, and they are marked
dynamic. The functions of two levels have the same code: they read their level under a guard. A plan (memory/plan.py) so needs one graph
or two, and three where its first and last blocks stay in full precision. `fullgraph` makes a graph break an error
instead of a slow step.

Passes without gradients have no gates and keep nothing. A teacher's (the base model's prediction, for preservation) come at every step
while the model trains, and get a compiled graph of their own. Validation and previews come while the model evaluates, too seldom and in too
many shapes to wait for a compiler, and run the block as it is. No backward pass follows, so the ring of slots turns back to the first
blocks at the end.

Inputs on the host (memory/offload.py). On the level `everything` the states that each block keeps can wait in pinned host memory. Every
block is then recomputed as a whole just before its own backward, so the level of the second run concerns one block at a time, and is
`nothing`.
"""

import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from musubi_tuner.memory.checkpointing import Recompute, RunBlock, States, checkpointed
from musubi_tuner.memory.compiling import add_in_place, keep_graphs_apart
from musubi_tuner.memory.offload import HostStore, as_states, run_from_host
from musubi_tuner.memory.quantized import QuantizedLinear
from musubi_tuner.memory.streaming import BlockStreamer

log = logging.getLogger(__name__)

_MOST_GRAPHS = 128
"""Kinds of blocks (level, weight format, adapters) times kinds of batches (masks, conditioning frames, absent streams). A run has a few of
them; torch's own limit of 8 would end it in the middle."""

_COMPILER: dict[str, Any] = {
    "combo_kernels": True,
    "combo_kernels_pointwise_only": True,
    "realize_opcount_threshold": 100,
    "size_asserts": False,
}
"""Inductor's options: small operations that do not depend on each other, such as the casts of all adapters, go into one kernel. Merged
reductions are no faster, and run in the blocks of one size that suits none. The threshold is how long a chain of operations grows before
it is written to memory: at torch's own 30, fp8 wrote eight units of float32 between GELU's gradient and its conversion.
Shapes of inputs are what guards have compared already; to assert each once more takes the host 4 % of a step."""

SequenceAxes = Callable[[States, Any], list[tuple[Tensor, int]]]
"""(states, inputs) of a block -> its tensors whose length follows the clip, and which axis of theirs."""


class BlockEngine:
    """Takes the place of a model's `run_block`: see the head of this file."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        levels: Sequence[Recompute | None],
        *,
        max_rank: int,
        keeps_sums: bool = False,
        keeps_trained: bool = False,
        compiled: bool = False,
        backend: str = "inductor",
        sequence_axes: SequenceAxes | None = None,
        streamer: BlockStreamer | None = None,
        inputs_on_host: bool = False,
        compiles_always: bool = False,
    ) -> None:
        """
        Args:
            compiles_always: passes without gradients are compiled while the model evaluates too: of a program that only samples.
            levels: recompute level of each block; None keeps whatever autograd keeps.
            max_rank: the largest rank of the network; see `checkpointing.keeps`.
            keeps_sums: as `sums` of `checkpointing.keeps`, where blocks are compiled.
            keeps_trained: as `checkpointing.keeps`.
            backend: of torch.compile.
            sequence_axes: needed where `compiled`.
            inputs_on_host: every block is on the level `everything`, and its states wait in host memory; `levels` are not read.
        """
        assert len(levels) == len(blocks)
        if inputs_on_host:
            levels = [Recompute.NOTHING if compiled else None] * len(blocks)
        self._store = HostStore() if inputs_on_host else None
        self._compiles_always = compiles_always
        self._streamer = streamer
        self._anchors: dict[torch.device, Tensor] = {}
        runs: dict[Recompute | None, RunBlock] = {
            level: _call
            if level is None
            else checkpointed(level, max_rank, sums=keeps_sums and compiled, keeps_trained=keeps_trained, compiled=compiled)
            for level in set(levels)
        }
        self._run_without_gradients: RunBlock = _call
        if compiled:
            _allow_many_graphs()
            keep_graphs_apart()
            add_in_place(max_rank)
            runs = {level: _Compiled(run, backend, sequence_axes, _recomputing(level)) for level, run in runs.items()}
            self._run_without_gradients = _Compiled(_call, backend, sequence_axes, "without gradients")
        self._run_with_gradients = {block: runs[level] for block, level in zip(blocks, levels, strict=True)}

    def __call__(self, block: nn.Module, states: States, inputs: Any) -> States:
        """Visit one block: the states after it."""
        with_gradients = torch.is_grad_enabled()
        run_without_gradients = self._run_without_gradients if block.training or self._compiles_always else _call
        if self._streamer is not None:
            self._streamer.before_forward(block)
        if with_gradients:
            run = self._run_with_gradients[block]
            states = self._gate(block, states, entering=True)
            if self._store is None:
                states = run(block, states, inputs)
            else:
                states = run_from_host(self._store, run_without_gradients, run, block, states, inputs)
            states = self._gate(block, states, entering=False)
        else:
            states = run_without_gradients(block, states, inputs)
        if self._streamer is not None:
            self._streamer.after_forward(block, last=not with_gradients)
        return states

    @property
    def streams_weights(self) -> bool:
        return self._streamer is not None

    def together(self, block: nn.Module, states: Sequence[States], inputs: Sequence[Any]) -> list[States]:
        """Several passes without gradients visit one block, so that its streamed weights are copied once for all of them."""
        assert not torch.is_grad_enabled()
        run = self._run_without_gradients if block.training or self._compiles_always else _call
        if self._streamer is not None:
            self._streamer.before_forward(block)
        after = [run(block, one, given) for one, given in zip(states, inputs, strict=True)]
        if self._streamer is not None:
            self._streamer.after_forward(block, last=True)
        return after

    def _gate(self, block: nn.Module, states: States, *, entering: bool) -> States:
        """The states, through a node of autograd's graph that notifies the streamer of the block's backward pass."""
        present = [state for state in states if state is not None]
        if self._streamer is not None:
            notify = self._streamer.after_backward if entering else self._streamer.before_backward
        elif entering and not all(state.requires_grad for state in present):
            notify = None  # for the anchor alone
        else:
            return states
        device = present[0].device
        if device not in self._anchors:
            self._anchors[device] = torch.zeros((), device=device, requires_grad=True)
        passed = _Gate.apply(self._anchors[device], notify, block, *present)
        return as_states(passed, [state is not None for state in states])


class _Gate(torch.autograd.Function):
    """Passes tensors through, and notifies in the backward pass once all their gradients are there."""

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


def _call(block: nn.Module, states: States, inputs: Any) -> States:
    return block(states, inputs)


class _Compiled:
    """Runs blocks as one graph, with their lengths marked as dynamic."""

    def __init__(self, run: RunBlock, backend: str, sequence_axes: SequenceAxes | None, name: str) -> None:
        """
        Args:
            name: how it runs them, for the log.
        """
        options = _COMPILER if backend == "inductor" else None
        self._graph = torch.compile(run, fullgraph=True, backend=backend, options=options)
        self._axes = sequence_axes
        self.name = name
        self.running: nn.Module | None = None
        _log_compilation(self)

    def __call__(self, block: nn.Module, states: States, inputs: Any) -> States:
        for tensor, axis in self._axes(states, inputs) if self._axes else ():
            if axis not in getattr(tensor, "_dynamo_dynamic_indices", ()):  # what all blocks share is marked once
                torch._dynamo.mark_dynamic(tensor, axis)
        self.running = block
        try:
            return self._graph(block, states, inputs)
        finally:
            self.running = None


def _allow_many_graphs() -> None:
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2 * _MOST_GRAPHS)
    # Torch warns that a block with a policy must not work in place; ours does not.
    logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_policy_warning)


def _is_no_policy_warning(record: logging.LogRecord) -> bool:
    return "context_fn is passed" not in record.getMessage()


def _recomputing(level: Recompute | None) -> str:
    if level in (None, Recompute.NOTHING):
        return "without recomputation"
    return f"recomputing {level.replace('_', ' ')}"


def _log_compilation(compiled: _Compiled) -> None:
    """Log whenever a block is compiled, so that a step of a minute has a reason that the user can read."""
    from torch._dynamo.callback import callback_handler

    reference = weakref.ref(compiled)

    def on_start(_: object) -> None:
        compiled = reference()
        if compiled is not None and compiled.running is not None:
            few = any(isinstance(module, QuantizedLinear) for module in compiled.running.modules())
            log.info(
                "compiling the blocks that run %s%s, as they or the batch are new in this run; it takes up to a minute",
                compiled.name,
                " in few bits" if few else "",
            )

    callback_handler.register_start_callback(on_start)

"""What one block at real size keeps, computes and moves on each recompute level, counted on tensors without storage:
no GPU, no memory, a few seconds.

`python -m benchmarks.block_counts` prints the table of docs/development/benchmarks.md, to which tests/unit/test_block_budgets.py holds it.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import flop_registry

from musubi_tuner.conditioning.tokens import audio_stream, noised, video_stream
from musubi_tuner.ltxv2.transformer.config import TransformerConfig
from musubi_tuner.ltxv2.transformer.modality import Modality
from musubi_tuner.ltxv2.transformer.model import LTXModel
from musubi_tuner.memory.checkpointing import Recompute
from musubi_tuner.memory.engine import BlockEngine
from musubi_tuner.networks.lora import group_projections
from musubi_tuner.networks.lora_ltxv2 import create_network

RANK = 32
TEXT_TOKENS = 1024
SHAPES = {
    "512x768x49": (7, 24, 16, 51),
    "768x512x121": (16, 16, 24, 126),
    "960x544x89": (12, 17, 30, 93),
    "1280x704x49": (7, 22, 40, 51),
    "1280x704x121": (16, 22, 40, 126),
}
"""Latent frames, rows, columns, and steps of sound at 24 frames a second."""

_VIEWS = {"view", "reshape", "permute", "t", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "alias", "detach",
          "_unsafe_view", "unbind", "as_strided", "split_with_sizes", "getitem", "sym_size", "chunk"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """One block, forward and backward."""

    saved_units: float
    """Kept for the backward pass beside the block's input, in units of the video stream (tokens * width * 2 bytes)."""
    forward_flops: float
    """Of matrix products and attention."""
    backward_flops: float
    forward_operations: int
    """Before fusion, views apart."""
    backward_operations: int
    forward_bytes: float
    """Read and written by each of these operations, before fusion."""
    backward_bytes: float


def real_config(version: str = "2.3") -> TransformerConfig:
    """The released sizes (docs/explanation/model.md, "configuration")."""
    values: dict[str, Any] = {"av_ca_timestep_scale_multiplier": 1000.0, "frequencies_precision": "float64"}
    if version != "2.0":
        values |= {"apply_gated_attention": True, "cross_attention_adaln": True, "caption_proj_before_connector": True}
    return TransformerConfig(**values)


def config_section(toy: bool, blocks: int) -> dict[str, Any]:
    """`transformer` of a 2.3-style checkpoint's config, with so many blocks of the released sizes, or of toy width."""
    from musubi_tuner.tiny import configs

    section = configs.transformer_section("2.3") | {"num_layers": blocks}
    if toy:
        return section
    real = real_config()
    names = ("num_attention_heads", "attention_head_dim", "cross_attention_dim", "caption_channels", "audio_num_attention_heads",
             "audio_attention_head_dim", "audio_cross_attention_dim", "in_channels", "out_channels", "audio_in_channels",
             "audio_out_channels")  # fmt: skip
    return section | {name: getattr(real, name) for name in names}


def empty_input(config: TransformerConfig, shape: Sequence[int]) -> tuple[Modality, Modality]:
    """A clip with sound and text; what is in it does not matter here."""
    frames, rows, columns, steps = shape
    streams = (video_stream(torch.empty(1, 128, frames, rows, columns), torch.empty(1)), audio_stream(torch.empty(1, 8, steps, 16), None))
    given = []
    for stream, width in zip(streams, (config.video_context_width, config.audio_context_width), strict=True):
        modality, _ = noised(stream, torch.empty(stream.clean.shape), torch.empty(1))
        given.append(dataclasses.replace(modality, context=torch.empty(1, TEXT_TOKENS, width, dtype=torch.bfloat16)))
    return given[0], given[1]


def count_block(level: Recompute | None, shape: Sequence[int], config: TransformerConfig | None = None) -> BlockCounts:
    """Trace and partition one block's step as the compiler does, and count the two graphs."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    config = dataclasses.replace(config or real_config(), num_layers=1)
    graphs: list[fx.GraphModule] = []

    def capture(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=capture, bw_compiler=capture, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        model = LTXModel(config).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        create_network(model, dim=RANK, alpha=RANK, args={}, seed=0)
        group_projections(model)
        model.run_block = BlockEngine(
            model.transformer_blocks, [level], max_rank=RANK, keeps_sums=True, compiled=True, backend=backend, sequence_axes=lambda *_: []
        )
        velocity = model(*empty_input(config, shape))
        (velocity.video.float().sum() + velocity.audio.float().sum()).backward()
    forward, backward = graphs
    unit = shape[0] * shape[1] * shape[2] * config.video_dim * 2
    return BlockCounts(
        _saved_bytes(forward) / unit, *_flops(forward, backward), *_operations(forward, backward), *_bytes(forward, backward)
    )


def _saved_bytes(forward: fx.GraphModule) -> float:
    """What the forward graph computes and hands on beyond its two results."""
    (output,) = [node for node in forward.graph.nodes if node.op == "output"]
    kept = {node for node in output.args[0][2:] if isinstance(node, fx.Node) and node.op != "placeholder"} - set(output.args[0][:2])
    return sum(_size(node.meta["val"]) for node in kept)


def _calls(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "call_function" and _name(node) not in _VIEWS]


def _name(node: fx.Node) -> str:
    return getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))


def _flops(*graphs: fx.GraphModule) -> list[float]:
    return [float(sum(_node_flops(node) for node in _calls(graph))) for graph in graphs]


def _node_flops(node: fx.Node) -> int:
    arguments = node.args
    if isinstance(node.target, torch._ops.HigherOrderOperator):  # attention that is run again carries its random state along
        place = next(place for place, argument in enumerate(arguments) if isinstance(argument, torch._ops.OpOverload))
        packet, arguments = arguments[place].overloadpacket, arguments[place + 1 :]
    else:
        packet = getattr(node.target, "overloadpacket", None)
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        query, key = (arguments[place].meta["val"].shape for place in (0, 1))
        return 4 * query[0] * query[1] * query[2] * key[2] * query[3]
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        query, key = (arguments[place].meta["val"].shape for place in (1, 2))
        return 10 * query[0] * query[1] * query[2] * key[2] * query[3]
    if packet not in flop_registry:
        return 0
    values = fx.node.map_arg(arguments, lambda argument: argument.meta["val"])
    return flop_registry[packet](*values, out_val=node.meta["val"])


def _operations(*graphs: fx.GraphModule) -> list[int]:
    return [len(_calls(graph)) for graph in graphs]


def _bytes(*graphs: fx.GraphModule) -> list[float]:
    return [float(sum(_node_bytes(node) for node in _calls(graph))) for graph in graphs]


def _node_bytes(node: fx.Node) -> float:
    return _size(node.meta.get("val")) + sum(_size(argument.meta.get("val")) for argument in node.all_input_nodes)


def _size(value: Any) -> float:
    if isinstance(value, Tensor):
        return float(value.numel() * value.element_size())
    return sum(_size(one) for one in value) if isinstance(value, (tuple, list)) else 0.0


def table(shapes: Sequence[str] = ("768x512x121",)) -> str:
    """One row for each shape and recompute level."""
    lines = [
        "| shape | computed again | units kept | TFLOP forward | TFLOP backward | operations | TB moved unfused |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in shapes:
        for level in (None, *Recompute):
            counts = count_block(level, SHAPES[name])
            lines.append(
                f"| {name} | {level or 'as the partitioner likes'} | {counts.saved_units:.1f} | {counts.forward_flops / 1e12:.3f} | "
                f"{counts.backward_flops / 1e12:.3f} | {counts.forward_operations} + {counts.backward_operations} | "
                f"{(counts.forward_bytes + counts.backward_bytes) / 1e12:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(("768x512x121", "1280x704x121")))

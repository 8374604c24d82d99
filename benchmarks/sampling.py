"""Memory of sampling against its plan, on a machine without a card: torch's own allocator works on the simulated one.

    python -m benchmarks.sampling                       48 blocks, guided, 2.3: formats, compiled and not, three sizes
    python -m benchmarks.sampling --streamed 44         with so many blocks streamed

The model is built as `ltxv2 generate` builds it, and `generation.denoise.generate` runs two guided steps of it. It needs a CUDA build of
torch (benchmarks/simulated_card), and says so where there is none.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.block_counts import config_section
from benchmarks.simulated_card import Card, run_within
from musubi_tuner.runtime.allocator import GROWING, VARIABLE

BLOCKS = 48
SIZES = {"512x768x49": (512, 768, 49), "768x512x121": (768, 512, 121), "1536x1024x121": (1536, 1024, 121)}
_CARD_GB = 320.0


def main(argv: Sequence[str]) -> int:
    options = _parse(argv)
    if not Card.is_here():
        return run_within("benchmarks.sampling", argv, gigabytes=_CARD_GB, settings={VARIABLE: GROWING})
    Card()
    from musubi_tuner.memory.attention import use_attention

    use_attention(("math",) if options.attention == "math" else ("flash", "efficient"))
    print("| weights | blocks | streamed | passes | clip | planned GB | allocated | reserved |\n" + "|---" * 8 + "|", flush=True)
    for weight_format in options.formats:
        for run in options.run:
            measure(weight_format, run == "compiled", options)
    return 0


def measure(weight_format: str, compiled: bool, options: argparse.Namespace) -> None:
    import torch

    from benchmarks import step_models as models
    from musubi_tuner.config.model import MemoryOptions
    from musubi_tuner.ltxv2.filling import set_tensor
    from musubi_tuner.ltxv2.transformer.config import TransformerConfig
    from musubi_tuner.ltxv2.transformer.model import LTXModel
    from musubi_tuner.memory.quantized import LowBitPlacer
    from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper
    from musubi_tuner.placement.load import Weights, run_blocks
    from musubi_tuner.placement.planning import place_by_hand

    torch._dynamo.reset()
    device, dtype = torch.device("cuda"), torch.bfloat16
    config = TransformerConfig.from_checkpoint_config(config_section(False, BLOCKS))
    tensors = models.make_weights(config, device, dtype)
    with torch.device("meta"):
        model = LTXModel(config)
    memory = MemoryOptions(weight_format=weight_format, blocks_to_swap=options.streamed, compile=compiled, gradient_checkpointing=False)  # type: ignore[arg-type]
    placement = place_by_hand(memory, BLOCKS, device)
    placer = LowBitPlacer(
        device=device, dtype=dtype, weight_format=placement.weight_format,
        low_bit=lambda name: models.in_few_bits(name, tensors[name]) and int(name.split(".")[1]) not in placement.unquantized,
    )  # fmt: skip
    for name in list(tensors):
        set_tensor(model, name, placer(name, tensors[name]) if weight_format != "bf16" else tensors[name])
        tensors[name] = tensors[name].to("meta")
    placer.swap_linears(model)
    weights = Weights(model.requires_grad_(False).eval(), {}, None)
    run_blocks(weights, placement, device, max_rank=0, samples=True)
    wrapper = OfficialLTXV2Wrapper(model, "sd3_0_1").eval()
    torch.cuda.empty_cache()
    for size in options.sizes:
        _measure_size(wrapper, size, weight_format, compiled, options)


def _measure_size(wrapper: Any, size: str, weight_format: str, compiled: bool, options: argparse.Namespace) -> None:
    import torch

    from musubi_tuner.config.preview import GuidanceOptions
    from musubi_tuner.generation import denoise
    from musubi_tuner.generation.contexts import TextContext
    from musubi_tuner.generation.denoise import SampleInputs, generate
    from musubi_tuner.generation.sampling import make_plan, refining_plan
    from musubi_tuner.prompts.prompt import PreviewPrompt

    denoise._Denoiser._require_finite = lambda *_: None  # values are none here
    width, height, frames = SIZES[size]
    prompt = PreviewPrompt(
        index=0, prompt="", negative="", width=width, height=height, frames=frames, fps=24.0, seed=1, steps=2, video_cfg=None,
        audio_cfg=None, where="",
    )  # fmt: skip
    context = TextContext(torch.zeros(1, 1024, 4096 + 2048, dtype=torch.bfloat16), None)
    guided = make_plan(GuidanceOptions(), prompt, mode="av", version="2.3", num_layers=BLOCKS)
    for plan in (guided, refining_plan(("video", "audio"))):
        sample = SampleInputs(prompt=prompt, plan=plan, positive=context, negative=context)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            generate(wrapper, sample)
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        passes = 4 if plan is guided else 1
        planned = _planned(weight_format, compiled, options, width // 32 * (height // 32) * (1 + frames // 8), frames, passes)
        found = [f"{value / 1e9:.2f} ({value / planned - 1:+.1%})" for value in (allocated, reserved)]
        cells = (weight_format, "compiled" if compiled else "eager", options.streamed, passes, size, f"{planned / 1e9:.2f}", *found)
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _planned(weight_format: str, compiled: bool, options: argparse.Namespace, tokens: int, frames: int, passes: int) -> int:
    from benchmarks.plans import MODEL, rates
    from musubi_tuner.memory.attention import SCORE_BYTES
    from musubi_tuner.memory.plan import Limits
    from musubi_tuner.memory.sampling_plan import SamplingWork, sampling_plans

    work = SamplingWork(
        video_tokens=tokens, audio_tokens=round(frames / 24 * 25), text_tokens=1024, passes=passes, networks_bytes=0,
        scores_bytes=SCORE_BYTES if options.attention == "math" else 0,
    )  # fmt: skip
    limits = Limits(device_bytes=2**60, host_bytes=2**60, formats=(weight_format,), streamed=options.streamed, compiled=compiled)
    return next(sampling_plans(MODEL, work, rates("H100 80G"), limits)).device_bytes


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8"], choices=["bf16", "fp8", "int8", "nf4"], help="default: bf16 fp8")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="default: %(default)s")
    parser.add_argument("--run", nargs="+", default=["eager"], choices=["compiled", "eager"], help="default: eager")
    parser.add_argument("--attention", default="flash", choices=["flash", "math"], help="kernel (default: flash)")
    parser.add_argument("--streamed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

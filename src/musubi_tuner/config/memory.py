"""Memory and speed, where the plan is not to decide alone."""

from dataclasses import dataclass
from typing import Literal

from musubi_tuner.config.flags import flag
from musubi_tuner.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryOptions:
    """Memory and speed (a plan decides all of it; see docs/memory_and_speed.md)."""

    vram_gb: float | None = flag("use no more device memory than this; default: what is free", default=None)
    ram_gb: float | None = flag("use no more host memory than this; default: what is free", default=None)
    weight_format: Literal["auto", "bf16", "fp8", "int8", "nf4"] = flag("how the frozen linears of the blocks are stored", default="auto")
    fp8_base: bool = flag("the same as --weight_format fp8", default=False)
    fp8_scaled: bool = flag("the same as --weight_format fp8: its codes are always scaled", default=False)
    blocks_to_swap: int | None = flag("blocks whose weights are streamed from host memory; default: as planned", default=None)
    gradient_checkpointing: bool | None = flag("compute whole blocks again in the backward pass; default: as planned", default=None)
    compile: bool | None = flag("compile the blocks; default: on a GPU", default=None)
    attn_mode: Literal["auto", "cudnn", "flash", "efficient", "math"] = flag(
        "attention kernel; auto measures them on the largest clip", default="auto", aliases=("--attention_backend",)
    )

    @property
    def wanted_format(self) -> str:
        """`auto` or the one format that was asked for."""
        return "fp8" if self.fp8_base or self.fp8_scaled else self.weight_format


def check_memory_options(options: MemoryOptions) -> None:
    """Rules over several fields, and ranges.

    Raises:
        UserError: the first rule that is broken.
    """
    for name, value in (("--vram_gb", options.vram_gb), ("--ram_gb", options.ram_gb)):
        if value is not None and value <= 0:
            raise UserError(f"{name} {value}: must be positive.")
    if options.blocks_to_swap is not None and options.blocks_to_swap < 0:
        raise UserError(f"--blocks_to_swap {options.blocks_to_swap}: must not be negative.")
    if (options.fp8_base or options.fp8_scaled) and options.weight_format not in ("auto", "fp8"):
        raise UserError(f"--fp8_base and --weight_format {options.weight_format} contradict each other; give one of them.")

"""Memory and speed, where the plan is not to decide alone."""

from typing import Literal

from pydantic import model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import Positive, Whole, options
from musubi_tuner.runtime.errors import UserError


@options
class MemoryOptions:
    """Memory and speed (a plan decides all of it; see docs/memory_and_speed.md)."""

    vram_gb: Positive | None = flag("use no more device memory than this; default: what is free", default=None, common=True)
    ram_gb: Positive | None = flag("use no more host memory than this; default: what is free", default=None)
    weight_format: Literal["auto", "bf16", "fp8", "int8", "nf4"] = flag("how the frozen linears of the blocks are stored", default="auto")
    fp8_base: bool = flag("the same as --weight_format fp8", default=False)
    fp8_scaled: bool = flag("the same as --weight_format fp8: its codes are always scaled", default=False)
    blocks_to_swap: Whole | None = flag("blocks whose weights are streamed from host memory; default: as planned", default=None)
    gradient_checkpointing: bool | None = flag("compute whole blocks again in the backward pass; default: as planned", default=None)
    compile: bool | None = flag("compile the blocks; default: on a GPU", default=None)
    attn_mode: Literal["auto", "cudnn", "flash", "efficient", "math"] = flag(
        "attention kernel; auto measures them on the largest clip", default="auto", aliases=("--attention_backend",)
    )

    @property
    def wanted_format(self) -> str:
        """`auto` or the one format that was asked for."""
        return "fp8" if self.fp8_base or self.fp8_scaled else self.weight_format

    @model_validator(mode="after")
    def _check(self) -> "MemoryOptions":
        if (self.fp8_base or self.fp8_scaled) and self.weight_format not in ("auto", "fp8"):
            raise UserError(f"--fp8_base and --weight_format {self.weight_format} contradict each other; give one of them.")
        return self

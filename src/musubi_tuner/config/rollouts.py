"""Options of making rollouts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.generation import (
    ClipOptions,
    EnhancementOptions,
    GenerateConfig,
    GenerationMemoryOptions,
    GenerationModelOptions,
    GridOptions,
    LoraOptions,
    PipelineOptions,
)
from musubi_tuner.config.preview import GuidanceOptions
from musubi_tuner.config.validation import AnyPath, Count, List, Seed, Text, Whole, options
from musubi_tuner.runtime.errors import UserError


@options
class RolloutOptions:
    """What is made."""

    rl_prompts: AnyPath = flag("prompt file (.txt, .toml, .json or .jsonl), as previews take it; all of one size and length", common=True)
    rl_rollout_cache: AnyPath = flag("folder of the rollouts", common=True)
    rl_policy: AnyPath | None = flag(
        "LoRA that makes them, which is then trained further; default: the base model", default=None, common=True
    )
    lora: Annotated[tuple[Text, ...], List] = flag(
        "FILE or FILE:STRENGTH beside the policy, such as a distilled LoRA; it is not trained", default=(), repeats=True
    )
    rl_group_size: Annotated[int, Field(ge=2, le=99)] = flag(
        "samples of each prompt, which are compared with each other", default=8, common=True
    )
    rl_seed: Seed = flag("of the run; each sample's own follows from it, the round, the prompt and its place", default=42, common=True)
    rl_round: Whole = flag("number of the round, so that no two rounds share noise", default=0)
    rl_distilled: bool = flag("the eight fixed steps of a distilled checkpoint (or LoRA, by --lora), without guidance", default=False)


@options
class StochasticOptions:
    """Stochastic steps, which --rl_loss grpo learns from; without them rollouts serve all other rules."""

    rl_sde_type: Literal["none", "cps", "flow_sde"] = flag(
        "kind of step; none = the sampler's own steps alone", default="none", common=True
    )
    rl_sde_eta: Annotated[float, Field(gt=0, le=1)] = flag("noise level of such a step", default=0.7)
    rl_sde_window: Text = flag("FIRST:END, steps of sampling, from 0, among which they are chosen", default="0:10")
    rl_sde_steps: Count = flag("how many of the window's steps are stochastic, other ones for each prompt", default=3)
    rl_sde_streams: Literal["both", "video", "audio"] = flag(
        "streams that take them; a stream without learns nothing by grpo", default="both"
    )

    @property
    def window(self) -> tuple[int, int]:
        first, _, end = self.rl_sde_window.partition(":")
        return int(first), int(end)

    def streams(self, mode: str) -> tuple[str, ...]:
        """Those of a mode that take stochastic steps, where there are any."""
        chosen = ("video", "audio") if self.rl_sde_streams == "both" else (self.rl_sde_streams,)
        return tuple(name for name in chosen if mode == "av" or name == "video")

    @model_validator(mode="after")
    def _check(self) -> "StochasticOptions":
        first, _, end = self.rl_sde_window.partition(":")
        if not (first.isascii() and first.isdigit() and end.isascii() and end.isdigit() and int(first) < int(end) < 10**6):
            raise UserError(f"--rl_sde_window {self.rl_sde_window}: must be FIRST:END, such as 0:10, with FIRST below END.")
        return self


@options
class RolloutConfig:
    """All sections."""

    rollouts: RolloutOptions
    stochastic: StochasticOptions
    guidance: GuidanceOptions
    model: GenerationModelOptions
    memory: GenerationMemoryOptions

    @property
    def is_guided(self) -> bool:
        """By these flags; what they leave to the model's version is guidance."""
        if self.rollouts.rl_distilled:
            return False
        asked = self.guidance
        off = [asked.video_cfg_scale == 1, asked.stg_scale == 0]
        if self.model.ltx_mode == "av":
            off += [asked.audio_cfg_scale == 1, asked.modality_scale == 1]
            off += [asked.audio_stg_scale in (None, 0), asked.audio_modality_scale in (None, 1)]
        return not all(off)

    def as_of_generation(self) -> GenerateConfig:
        """The same choices, for what generates clips."""
        policy = () if self.rollouts.rl_policy is None else (self.rollouts.rl_policy,)
        return GenerateConfig(
            clips=ClipOptions(sample_prompts=self.rollouts.rl_prompts, output_dir=self.rollouts.rl_rollout_cache),
            pipeline=PipelineOptions(pipeline="distilled_one_stage" if self.rollouts.rl_distilled else "one_stage"),
            loras=LoraOptions(lora=self.rollouts.lora, lora_weight=policy),
            grid=GridOptions(),
            guidance=self.guidance,
            model=self.model,
            enhancement=EnhancementOptions(),
            memory=self.memory,
        )

    @model_validator(mode="after")
    def _check(self) -> "RolloutConfig":
        if self.model.ltx_mode == "audio":
            raise UserError("--ltx_mode audio: rollouts have pictures; give av or video.")
        return self

"""Options of training on rollouts: those of training, and the rule."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.model import Mode, ModeOptions
from musubi_tuner.config.training import OptimizationOptions, Steps, TrainingConfig
from musubi_tuner.config.validation import AnyPath, Count, Seed, Text, options
from musubi_tuner.runtime.errors import UserError

RuleNumber = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Of a rule's formula; beyond it float32 holds no loss."""


@options
class RlOptions:
    """Reinforcement learning."""

    rl_rollout_cache: AnyPath = flag("folder of rollouts with their scores", common=True)
    rl_loss: Literal["nft", "grpo", "grpo_guard", "awm", "rwr", "dpo", "ppo"] = flag(
        "update rule; grpo and grpo_guard need rollouts with stochastic steps; ppo is grpo", default="nft", common=True
    )
    reward_fn: Text | None = flag(
        "REWARD:WEIGHT,..., rewards that were scored and what each weighs; needed but with --dpo_pairs", default=None, common=True
    )
    rl_advantage: Literal["sum", "gdpo"] = flag(
        "sum: weighted sum of each reward's advantages within the group; gdpo: that, normalized over all samples", default="sum"
    )
    rl_shuffle_advantages: Seed | None = flag(
        "deal the advantages of each group out at random by this seed: a control, from which nothing can be learned", default=None
    )
    rl_timesteps_per_sample: Annotated[int, Field(ge=1, le=10_000)] = flag(
        "noise levels (or stochastic steps) at which each sample is learned", default=3, common=True
    )
    rl_micro_batch_size: Count = flag("samples of a batch; of dpo always a pair", default=1, common=True)
    rl_ref_mse_weight: Annotated[float, Field(ge=0, le=1e6)] = flag("weight of the distance from the base model's prediction", default=0.0)
    nft_beta_mix: RuleNumber = flag("nft: how far from the old policy the compared predictions lie", default=1.0)
    nft_adv_clip_max: RuleNumber = flag("largest advantage", default=5.0)
    ppo_clip_eps: RuleNumber = flag("grpo, awm: how far a ratio may move from 1", default=1e-4)
    awm_weighting: Literal["uniform", "sigma", "sigma2"] = flag("awm: weight of noise levels", default="sigma")
    rwr_temperature: RuleNumber = flag("rwr: the lower, the more the best samples weigh", default=1.0)
    dpo_beta: RuleNumber = flag("dpo: how sharply pairs are told apart", default=2000.0)
    dpo_pairs: AnyPath | None = flag(
        "dpo: JSONL of pairs that you picked, of the page of --save_first or {chosen, rejected} names of samples, in place of rewards",
        default=None,
    )

    @property
    def rule(self) -> str:
        """`ppo` is called what it is."""
        return "grpo" if self.rl_loss == "ppo" else self.rl_loss

    @model_validator(mode="after")
    def _check(self) -> "RlOptions":
        if self.dpo_pairs is not None and self.rl_loss != "dpo":
            raise UserError(f"--dpo_pairs: is read by --rl_loss dpo alone, not by {self.rl_loss}.")
        if self.dpo_pairs is None and self.reward_fn is None:
            raise UserError("missing --reward_fn: REWARD:WEIGHT,..., rewards that were scored and what each weighs, such as loudness:1.")
        if self.dpo_pairs is not None and self.rl_shuffle_advantages is not None:
            raise UserError("--rl_shuffle_advantages: --dpo_pairs has no advantages that could be shuffled. Leave one of them out.")
        return self


@options
class RolloutModeOptions(ModeOptions):
    """What is trained; the rollouts say it."""

    dataset_config: AnyPath = flag("dataset TOML; default: that of the rollouts", default=Path("dataset.toml"))
    ltx_mode: Mode | None = flag("video alone, video with sound, or sound alone; default: as for the rollouts", default=None, common=True)
    ltxv2_timestep_format: Literal["flowmatch_1_1000", "legacy_0_1000", "sd3_0_1"] = flag(
        "how noise levels are written down; default: as for the rollouts", default="sd3_0_1"
    )


@options
class PassOptions(OptimizationOptions):
    """Optimization."""

    max_train_steps: Steps = flag("optimizer steps; default: those of one pass", default=1600, common=True)
    max_train_epochs: Count | None = flag("passes over the rollouts; wins over --max_train_steps; default: 1", default=None, common=True)


@options
class RlTrainingConfig(TrainingConfig):
    """All sections of training, and the rule."""

    mode: RolloutModeOptions  # pyrefly: ignore[bad-override] - the same options, with defaults
    optimization: PassOptions
    rl: RlOptions

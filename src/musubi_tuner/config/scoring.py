"""Options of scoring rollouts."""

from typing import Annotated

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Count, List, Text, options
from musubi_tuner.runtime.errors import UserError


@options
class RewardOptions:
    """What is scored, and by what."""

    rl_rollout_cache: AnyPath = flag("folder of the rollouts; scores lie in its folder scores", common=True)
    reward_fn: Text = flag("REWARD,..., such as loudness,motion; weights as in training (loudness:0.5) may stand here too", common=True)
    reward_args: Annotated[tuple[Text, ...], List] = flag(
        "REWARD.KEY=VALUE, such as loudness.target=-20 (docs/how-to/rewards.md)", default=(), common=True, repeats=True
    )
    reward_plugins: Annotated[tuple[AnyPath, ...], List] = flag(
        "Python files with rewards of your own; they are run", default=(), common=True, repeats=True
    )


@options
class DecodingOptions:
    """Decoding."""

    vae: AnyPath | None = flag("checkpoint with the video VAE; needed by rewards that see or hear", default=None, common=True)
    audio_vae: AnyPath | None = flag("audio VAE and vocoder; default: --vae", default=None)
    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)


@options
class ScoringRunOptions:
    """How."""

    dry_run: bool = flag(
        "score one group twice and write nothing: is the spread within it larger than the noise of scoring?", default=False, common=True
    )
    force: bool = flag("with --dry_run: go on where it is not", default=False)
    save_media: Annotated[int, Field(ge=0, le=1000)] = flag(
        "write so many of the best and of the worst samples of each reward, with their scores in their names", default=0, common=True
    )

    save_first: Annotated[int, Field(ge=0, le=99)] = flag(
        "write the first samples of each prompt, so many, and a page on which pairs are picked for --dpo_pairs", default=0
    )
    best_directory: AnyPath | None = flag(
        "write the best samples of each prompt, by --reward_fn with its weights, as a cached dataset into this new folder (best of n)",
        default=None,
    )
    best_count: Count = flag("how many of each prompt", default=1)

    @model_validator(mode="after")
    def _check(self) -> "ScoringRunOptions":
        if self.best_directory is not None and self.dry_run:
            raise UserError("--best_directory: --dry_run writes nothing. Leave one of them out.")
        if self.force and not self.dry_run:
            raise UserError("--force: is for --dry_run, which refuses rewards without a signal.")
        for name in ("save_media", "save_first"):
            if self.dry_run and getattr(self, name):
                raise UserError(f"--{name}: --dry_run writes nothing. Leave one of them out.")
        return self


@options
class ScoringConfig:
    """All sections."""

    rewards: RewardOptions
    decoding: DecodingOptions
    run: ScoringRunOptions

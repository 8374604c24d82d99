"""What rounds are to be run with, read as the three programs will read it, so that a fault is found before the first rollouts."""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from musubi_tuner.config.flags import Beneath, parse
from musubi_tuner.config.rl import RlTrainingConfig
from musubi_tuner.config.rollouts import RolloutConfig
from musubi_tuner.config.rounds import RoundOptions, StageFlags
from musubi_tuner.config.scoring import ScoringConfig
from musubi_tuner.reinforcement.advantages import Scored
from musubi_tuner.reinforcement.drawn import check_drawn
from musubi_tuner.reinforcement.making import asked_prompts
from musubi_tuner.reinforcement.rewards.catalog import choose
from musubi_tuner.reinforcement.scores import parse_rewards
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.tables import names_of

log = logging.getLogger(__name__)

Config = TypeVar("Config")

_PROGRAMS = {"rollouts": "ltxv2_cache_rollouts.py", "scores": "ltxv2_score_rollouts.py", "training": "ltxv2_train_rl.py"}


def check_stages(options: RoundOptions, stages: StageFlags) -> None:
    """
    Raises:
        UserError: a flag or value that a program does not take, prompts that it refuses, a reward that is none, or a rule that these
            rollouts teach nothing.
    """

    def read(stage: str, kind: type[Config], own: Mapping[str, Any], **beneath: str) -> Config:
        try:
            return parse(
                kind,
                stages.words(stage, own),
                prog=_PROGRAMS[stage],
                description="",
                beneath=lambda _: Beneath(where="the rounds", values=beneath),
            )
        except UserError as error:
            raise UserError(f"{options.rl_config}: [{stage}] {error}") from error

    folder = options.output_dir
    rollouts = read("rollouts", RolloutConfig, {"rl_prompts": options.rl_prompts, "rl_rollout_cache": folder})
    learned = {one.prompt for one in asked_prompts(rollouts)}
    judged = {"rl_prompts": options.rl_heldout_prompts, "rl_rollout_cache": folder, "rl_sde_type": "none"}
    held_out = asked_prompts(read("rollouts", RolloutConfig, judged), "--rl_heldout_prompts")
    both = sorted(learned & {one.prompt for one in held_out})
    if both:
        log.warning(
            "WARNING: --rl_heldout_prompts %s: %s learned from too, so the gain is not that of prompts that were never seen (%s)",
            options.rl_heldout_prompts, "1 prompt is" if len(both) == 1 else f"{len(both)} prompts are", names_of(both, 2),
        )  # fmt: skip
    scores = read("scores", ScoringConfig, {"rl_rollout_cache": folder}).rewards
    own = {"rl_rollout_cache": folder, "reward_fn": scores.reward_fn, "output_dir": folder, "output_name": options.output_name}
    training = read("training", RlTrainingConfig, own, dataset_config=str(folder), ltx_mode=rollouts.model.ltx_mode)
    rule = training.rl
    if rule.dpo_pairs is not None:
        raise UserError(
            f"{options.rl_config}: [training] dpo_pairs: are of the samples of one round, and every round makes others. Take it out, and "
            "train on picks by ltxv2_train_rl.py."
        )
    weights = parse_rewards(scores.reward_fn)
    rewards = [
        Scored(reward=one.name, route=one.kind.route, weight=weights[one.name], scores={})
        for one in choose(list(weights), scores.reward_args, scores.reward_plugins)
    ]
    if not rule.rule.startswith("grpo"):
        return
    if rollouts.stochastic.rl_sde_type == "none":
        raise UserError(
            f"{options.rl_config}: [training] rl_loss {rule.rl_loss}: learns from stochastic steps, and these rollouts have none. Put "
            'rl_sde_type = "cps" (or "flow_sde") into [rollouts], or take nft, awm, rwr or dpo.'
        )
    if rollouts.is_guided:
        raise UserError(
            f"{options.rl_config}: [training] rl_loss {rule.rl_loss}: a step's probability is the model's own alone, and these rollouts "
            "are guided. Put video_cfg_scale = 1.0, audio_cfg_scale = 1.0, stg_scale = 0.0 and modality_scale = 1.0 into [rollouts], or "
            "take nft, awm, rwr or dpo."
        )
    if rollouts.rollouts.lora and not training.network.base_weights:
        raise UserError(
            f"{options.rl_config}: [training] rl_loss {rule.rl_loss}: a step's probability is by all that sampled it. Put the file of "
            "[rollouts] lora into [training] as base_weights, its strength as base_weights_multiplier."
        )
    drawn = rollouts.stochastic.streams(rollouts.model.ltx_mode)
    check_drawn(rule.rl_loss, rewards, drawn, mode=rollouts.model.ltx_mode, where=f"{options.rl_config}: [rollouts]")

"""From checked rollouts and their scores to what a run trains on: which samples, with which advantage, by which rule."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from musubi_tuner.cache.store import canonical, text_fingerprint
from musubi_tuner.config.dataset import DatasetSpec
from musubi_tuner.config.rl import RlOptions, RlTrainingConfig
from musubi_tuner.dataset.items import Item
from musubi_tuner.generation.recipe import file_hash
from musubi_tuner.ltxv2.versions import transformer_names
from musubi_tuner.ltxv2.weights import Checkpoint, open_checkpoint
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork
from musubi_tuner.reinforcement.advantages import STREAMS, Advantages, advantages, group_softmax
from musubi_tuner.reinforcement.drawn import check_drawn
from musubi_tuner.reinforcement.objective import COMPARED_WITH_OLD, COPY_BYTES, OldPolicy, RolloutObjective, RuleSettings
from musubi_tuner.reinforcement.rollouts import Rollouts, read_rollouts
from musubi_tuner.reinforcement.scores import rewards_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.files import read_json_lines
from musubi_tuner.runtime.tables import names_of
from musubi_tuner.training.objective import FlowMatching
from musubi_tuner.training.preflight import Learns, RunInputs, check_inputs

log = logging.getLogger(__name__)

_FILES = ("rl_rollout_cache", "dpo_pairs")
"""Flags that name files: what counts is what these hold."""
Weights = Mapping[str, Mapping[str, float]]
"""{item: {stream: what it weighs}}"""


def check_rollouts(config: RlTrainingConfig) -> RunInputs:
    """As `check_inputs` of training, on rollouts.

    Raises:
        UserError: another policy or model than made the rollouts, a reward that was not scored, nothing to learn.
    """
    options = config.rl
    if config.network.full_finetune:
        raise UserError(
            "--full_finetune: rules compare the policy with the base model, which is gone where its own weights are trained. Train a LoRA, "
            "or whole linears by --network_args type=full include_patterns=..."
        )
    rollouts = read_rollouts(options.rl_rollout_cache)
    if config.ltx_mode != rollouts.facts["mode"]:
        raise UserError(f"--ltx_mode {config.ltx_mode}: the rollouts are of the mode {rollouts.facts['mode']} ({rollouts.folder}).")
    _check_policy(config, rollouts)
    _check_beside(config, rollouts)
    _check_model(open_checkpoint(config.model.ltxv2_model), rollouts)
    rollouts.check_whole(steps=options.rule.startswith("grpo"))
    inputs = check_inputs(config)
    if options.rule.startswith("grpo") and rollouts.stochastic is None:
        raise UserError(
            f"--rl_loss {options.rl_loss}: learns from stochastic steps, and the rollouts in {rollouts.folder} have none. Make them with "
            "--rl_sde_type cps or flow_sde; nft, awm, rwr and dpo learn from these."
        )
    if options.rule.startswith("grpo") and _guided(rollouts):
        raise UserError(
            f"--rl_loss {options.rl_loss}: the rollouts were sampled with guidance, and a step's probability is the model's own alone. "
            "Make them with --video_cfg_scale 1 --audio_cfg_scale 1 --stg_scale 0 --modality_scale 1, or take nft, awm, rwr or dpo."
        )
    items, weights = _of_picks(options, inputs.items) if options.dpo_pairs is not None else _of_rewards(config, inputs.items, rollouts)
    _tell_of_passes(config, len(items))
    copied = COPY_BYTES if options.rule in COMPARED_WITH_OLD else 0.0
    learned_by = {field.name: getattr(options, field.name) for field in dataclasses.fields(options) if field.name not in _FILES}
    learned_by["advantages"] = text_fingerprint(canonical(weights))[:12]
    return dataclasses.replace(inputs, items=items, learns=_learns(options, weights, rollouts), copy_bytes=copied, learned_by=learned_by)


def _of_rewards(config: RlTrainingConfig, items: Sequence[Item], rollouts: Rollouts) -> tuple[tuple[Item, ...], Weights]:
    """The samples from which there is anything to learn, and what each weighs."""
    options = config.rl
    assert options.reward_fn is not None
    rewards = rewards_of(rollouts, options.reward_fn)
    drawn: Sequence[str] = STREAMS
    if options.rule.startswith("grpo"):
        assert rollouts.stochastic is not None
        drawn = rollouts.stochastic["streams"]
        check_drawn(options.rl_loss, rewards, drawn, mode=config.ltx_mode, where=f"the rollouts in {rollouts.folder}")
    found = advantages(
        rollouts.groups,
        rewards,
        clip=options.nft_adv_clip_max,
        over_all=options.rl_advantage == "gdpo",
        shuffled=options.rl_shuffle_advantages,
    ).within(drawn)
    _tell(found, rollouts)
    return _learned(options, items, rollouts, found)


def _learns(options: RlOptions, weights: Weights, rollouts: Rollouts) -> Learns:
    settings = settings_of(options)

    def objective(matching: FlowMatching, network: LoRANetwork) -> RolloutObjective:
        old = OldPolicy(network) if options.rule in COMPARED_WITH_OLD else None
        return RolloutObjective(matching=matching, network=network, old=old, settings=settings, advantages=weights, rollouts=rollouts)

    return objective


def settings_of(options: RlOptions) -> RuleSettings:
    """What the rule's formulas take."""
    return RuleSettings(
        rule=options.rule,
        mix=options.nft_beta_mix,
        most=options.nft_adv_clip_max,
        width=options.ppo_clip_eps,
        awm_weighting=options.awm_weighting,
        beta=options.dpo_beta,
        reference_weight=options.rl_ref_mse_weight,
    )


def weights_of(options: RlOptions, groups: Mapping[int, Sequence[str]], found: Advantages) -> Weights:
    """Of samples that are learned one by one: their advantages, or, of RWR, how much they weigh."""
    return group_softmax(groups, found, options.rwr_temperature) if options.rule == "rwr" else found.of


def _learned(options: RlOptions, items: Sequence[Item], rollouts: Rollouts, found: Advantages) -> tuple[tuple[Item, ...], Weights]:
    """
    Raises:
        UserError: there are none.
    """
    by_name = {item.clip.key: item for item in items}
    if unlisted := [one.name for one in rollouts.samples if one.name not in by_name]:
        raise UserError(
            f"{rollouts.folder}: its index lists {len(by_name)} of {len(rollouts.samples)} samples ({names_of(unlisted, 3)} not). Run "
            "ltxv2_cache_rollouts.py again, which writes the index."
        )
    if options.rule == "dpo":
        return _paired(best_and_worst(rollouts.groups, found), by_name, options)
    if not found.learned:
        raise UserError(
            f"{rollouts.folder}: nothing to learn: in no group do the rewards {options.reward_fn} tell samples apart. Score another "
            "reward, or make larger groups."
        )
    most = len(found.learned) * options.rl_timesteps_per_sample  # a larger batch would be planned for, and never come
    size = min(options.rl_micro_batch_size, most)
    spec = dataclasses.replace(items[0].spec, batch_size=size, num_repeats=options.rl_timesteps_per_sample)
    of = weights_of(options, rollouts.groups, found)
    chosen = [dataclasses.replace(by_name[name], spec=spec) for name in found.learned]
    return tuple(chosen), {item.key: of[item.clip.key] for item in chosen}


Pair = tuple[str, str, tuple[str, ...]]
"""The better sample, the worse one, and the streams in which it is better."""


def best_and_worst(groups: Mapping[int, Sequence[str]], found: Advantages) -> list[Pair]:
    """A pair of each group in which there is an order."""
    pairs = []
    for names in groups.values():
        ranked = sorted((name for name in names if name in found.learned), key=lambda name: sum(found.of[name].values()))
        if len(ranked) > 1:
            worst, best = ranked[0], ranked[-1]
            pairs.append((best, worst, tuple(stream for stream in STREAMS if found.of[best][stream] > found.of[worst][stream])))
    return [pair for pair in pairs if pair[2]]


def _of_picks(options: RlOptions, items: Sequence[Item]) -> tuple[tuple[Item, ...], Weights]:
    """Pairs that a person chose; both streams are learned.

    Raises:
        UserError: a line that names no two samples.
    """
    path = options.dpo_pairs
    assert path is not None
    by_name, pairs = {item.clip.key: item for item in items}, []
    for where, line in read_json_lines(path):
        names = _names_of_pick(line)
        if not all(isinstance(name, str) and name in by_name for name in names) or names[0] == names[1]:
            raise UserError(
                f"{where}: 'chosen' and 'rejected' (or the files of 'better' and 'worse', as the page of ltxv2_score_rollouts.py "
                f"--save_first downloads them) must name two samples of {options.rl_rollout_cache}, such as g0000_k01; they name "
                f"{' and '.join(map(str, names))}."
            )
        pair: Pair = (str(names[0]), str(names[1]), STREAMS)
        pairs.append(pair)
    if not pairs:
        raise UserError(f"--dpo_pairs {path}: holds no pairs.")
    return _paired(pairs, by_name, options)


def _names_of_pick(line: Any) -> list[Any]:
    """The better sample and the worse one, where the line names them."""
    if not isinstance(line, dict):
        return [None, None]
    clips = [line.get(key) for key in ("better", "worse")]
    if all(isinstance(clip, dict) and isinstance(clip.get("file"), str) for clip in clips):
        return [Path(clip["file"]).stem for clip in clips if isinstance(clip, dict)]
    return [line.get(key) for key in ("chosen", "rejected")]


def _paired(pairs: Sequence[Pair], by_name: Mapping[str, Item], options: RlOptions) -> tuple[tuple[Item, ...], Weights]:
    """Each pair as a dataset of its own, so that it makes a batch."""
    if not pairs:
        raise UserError(
            f"{options.rl_rollout_cache}: no group has a better and a worse sample. Score another reward, or make larger groups."
        )
    items, weights = [], {}
    for number, (best, worst, streams) in enumerate(pairs):
        for name, sign in ((best, 1.0), (worst, -1.0)):
            item = by_name[name]
            spec: DatasetSpec = dataclasses.replace(
                item.spec, label=f"pair {number}", batch_size=2, num_repeats=options.rl_timesteps_per_sample
            )
            items.append(dataclasses.replace(item, key=f"pair {number}/{name}", spec=spec))
            weights[items[-1].key] = weights_in_pair(sign, streams)
    return tuple(items), weights


def weights_in_pair(sign: float, streams: Sequence[str]) -> dict[str, float]:
    """Of the better sample (1) or the worse one (-1): 0 in streams in which it is neither."""
    return {stream: sign if stream in streams else 0.0 for stream in STREAMS}


def _check_policy(config: RlTrainingConfig, rollouts: Rollouts) -> None:
    """The run starts from the very file that made the rollouts.

    Raises:
        UserError: from another one, or none.
    """
    policy, path = rollouts.facts["policy"], config.network.network_weights
    if policy is None:
        if path is not None:
            raise UserError(f"--network_weights {path}: the rollouts in {rollouts.folder} were made by the base model. Leave it out.")
        return
    if path is None:
        raise UserError(
            f"{rollouts.folder}: was made by the LoRA '{policy['name']}'. Give --network_weights that file, to train it further."
        )
    if not path.is_file() or file_hash(path) != policy["sha256"]:
        raise UserError(
            f"--network_weights {path}: is not the file that made the rollouts in {rollouts.folder} ('{policy['name']}', sha256 "
            f"{policy['sha256'][:16]}...). Rules compare the policy with the one that sampled, so it must be that; or make new rollouts."
        )


def _check_beside(config: RlTrainingConfig, rollouts: Rollouts) -> None:
    """LoRAs that sampled beside the policy are merged into the model that is trained, and no others.

    Raises:
        UserError: one is merged that did not sample; or one is not, and the rule is by the probability of steps, which were its steps too.
    """
    sampled = {(one["sha256"], one["video"], one["audio"]): one for one in rollouts.facts["frozen"]}
    merged = {(file_hash(path), strength, strength): path for path, strength in config.network.base_networks if path.is_file()}
    if strange := [path for one, path in merged.items() if one not in sampled]:
        raise UserError(
            f"--base_weights {strange[0]}: was not beside the policy, at this strength, when the rollouts in {rollouts.folder} were made. "
            "Leave it out, or make new rollouts with --lora FILE:STRENGTH."
        )
    for one in [facts for key, facts in sampled.items() if key not in merged]:
        text = (
            f"the rollouts in {rollouts.folder} were sampled with the LoRA '{one['name']}' beside the policy, at {one['video']:g}, and "
            f"this run trains without. Give --base_weights that file --base_weights_multiplier {one['video']:g}"
        )
        if config.rl.rule.startswith("grpo"):
            raise UserError(f"--rl_loss {config.rl.rl_loss}: {text}: a step's probability is by all that sampled it.")
        log.warning("WARNING: %s, to learn what the policy does beside it.", text)


def _check_model(checkpoint: Checkpoint, rollouts: Rollouts) -> None:
    if checkpoint.fingerprint(transformer_names(checkpoint)) != rollouts.facts["model"]["fingerprint"]:
        raise UserError(
            f"--ltxv2_model {checkpoint.path}: is another model than '{rollouts.facts['model']['name']}', which made the rollouts in "
            f"{rollouts.folder}. Give that one, or make new rollouts."
        )


def _guided(rollouts: Rollouts) -> bool:
    return bool(rollouts.facts["sampling"]["guided"])


def _tell(found: Advantages, rollouts: Rollouts) -> None:
    for one in found.flagged:
        prompt = rollouts.facts["prompts"][one.group]["prompt"]
        log.warning("WARNING: prompt %d (%.40s): nothing is learned from '%s': %s", one.group, json.dumps(prompt), one.reward, one.reason)


def _tell_of_passes(config: RlTrainingConfig, items: int) -> None:
    optimization, rl = config.optimization, config.rl
    if optimization.max_train_epochs == 1:
        return
    a_pass = -(-items * rl.rl_timesteps_per_sample // (2 if rl.rule == "dpo" else rl.rl_micro_batch_size))
    asked = optimization.max_train_epochs or optimization.max_train_steps * optimization.gradient_accumulation_steps / a_pass
    if asked > 1:
        log.warning(
            "WARNING: %.1f passes over the rollouts: after one the policy has moved away from the one that made them. Make new ones.", asked
        )

"""Rollouts on the tiny 2.3 family, scores, and every update rule through the trainer."""

import json
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_train_network, ltxv2_train_rl
from musubi_tuner.cache.store import read_metadata, serialize, write_bytes
from musubi_tuner.dataset.merge import merge_sources
from musubi_tuner.media.audio import Waveform
from musubi_tuner.media.write import write_wav
from musubi_tuner.placement import prove
from musubi_tuner.reinforcement import objective as objectives
from musubi_tuner.reinforcement.advantages import Scored
from musubi_tuner.reinforcement.best import best_samples, write_best
from musubi_tuner.reinforcement.decoding import Decoders, decoding
from musubi_tuner.reinforcement.rollouts import read_rollouts
from musubi_tuner.reinforcement.scores import rewards_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training import setup
from tests.e2e.test_processes import launch
from tests.rl_parts import PROMPTS, arguments, make, score


@pytest.fixture(scope="module")
def rollouts(tiny_family, tmp_path_factory):
    """By the base model, with stochastic steps of both streams, scored."""
    folder = make(tiny_family, tmp_path_factory.mktemp("rl") / "mit Leerzeichen", "--rl_sde_type", "cps", "--rl_sde_steps", "2")
    score(folder)
    return folder


def train(family, folder: Path, out: Path, *flags: str, rewards: tuple[str, ...] = ("--reward_fn", "tone:1")) -> int:
    base = ["--rl_rollout_cache", str(folder), *rewards, "--ltxv2_model", str(family.ltx23), "--output_dir", str(out)]
    base += ["--device", "cpu", "--mixed_precision", "no", "--no-compile", "--network_dim", "4", "--max_data_loader_n_workers", "0"]
    return ltxv2_train_rl.main([*base, "--learning_rate", "1e-3", "--save_precision", "float32", *flags])


def supervised(family, dataset: Path, out: Path, *flags: str) -> int:
    base = ["--dataset_config", str(dataset), "--ltxv2_model", str(family.ltx23), "--ltx_mode", "av", "--device", "cpu"]
    base += ["--ltxv2_timestep_format", "sd3_0_1", "--output_dir", str(out), "--mixed_precision", "no", "--no-compile"]
    return ltxv2_train_network.main([*base, "--max_data_loader_n_workers", "0", *(flags or ("--max_train_steps", "2"))])


def losses(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "ltxv2_lora-loss.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_sample_does_not_depend_on_how_many_others_there_are(tiny_family, rollouts, tmp_path):
    larger = make(tiny_family, tmp_path, "--rl_sde_type", "cps", "--rl_sde_steps", "2", "--rl_group_size", "4")
    for k in range(3):
        name = f"g0000_k{k:02d}"
        for ending in ("_ltxv2", "_ltxv2_audio", "_ltxv2_steps"):
            assert (larger / f"{name}{ending}.safetensors").read_bytes() == (rollouts / f"{name}{ending}.safetensors").read_bytes()
    assert len({one.seed for one in (*read_rollouts(larger).samples, *read_rollouts(rollouts).samples)}) == 8


def test_two_processes_make_the_same_files_as_one(tiny_family, rollouts, tmp_path):
    flags = arguments(tiny_family, tmp_path, "--rl_sde_type", "cps", "--rl_sde_steps", "2")
    done = launch(2, "musubi_tuner.ltxv2_cache_rollouts", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "ltxv2_checked.jsonl"}
        for folder in (tmp_path / "rollouts", rollouts)
    )  # that one holds times of files
    assert ours == theirs and sum(name.endswith("_steps.safetensors") for name in ours) == 6


def test_what_is_there_is_kept_and_other_settings_are_refused(tiny_family, rollouts, tmp_path):
    flags = ("--rl_sde_type", "cps", "--rl_sde_steps", "2")
    folder = make(tiny_family, tmp_path, *flags)
    before = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert before == {path.name: path.read_bytes() for path in rollouts.glob("*.safetensors")}
    gone = folder / "g0001_k02_ltxv2.safetensors"
    kept = (folder / "g0001_k01_ltxv2.safetensors").stat().st_mtime_ns
    gone.unlink()
    make(tiny_family, tmp_path, *flags)
    assert gone.read_bytes() == before[gone.name] and (folder / "g0001_k01_ltxv2.safetensors").stat().st_mtime_ns == kept
    make(tiny_family, tmp_path, *flags, "--rl_group_size", "4")
    assert (folder / "g0001_k01_ltxv2.safetensors").stat().st_mtime_ns == kept and (folder / "g0001_k03_ltxv2.safetensors").is_file()
    assert len(read_rollouts(folder).groups[0]) == 4
    with pytest.raises(UserError, match="holds rollouts of larger groups: 4 samples of each prompt, not 3 as by --rl_group_size"):
        make(tiny_family, tmp_path, *flags)
    with pytest.raises(UserError, match="holds rollouts with another 'seed': 42, not 1"):
        make(tiny_family, tmp_path, *flags, "--rl_seed", "1")


def put(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Other tensors under the same metadata."""
    write_bytes(path, serialize(tensors, read_metadata(path)))


DAMAGE = {
    "cut off": lambda folder, path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda folder, path: path.write_bytes(b""),
    "gone": lambda folder, path: path.unlink(),
    "of another sample": lambda folder, path: path.write_bytes((folder / path.name.replace("g0000", "g0001")).read_bytes()),
    "without tensors": lambda folder, path: put(path, {}),
    "of another shape": lambda folder, path: put(path, {key: value[..., None] for key, value in load_file(path).items()}),
    "shorter": lambda folder, path: put(path, {key: value[:, :1] if value.ndim == 3 else value for key, value in load_file(path).items()}),
}


DAMAGED = [(damage, ending) for damage in DAMAGE for ending in ("_ltxv2", "_ltxv2_audio", "_ltxv2_steps")]
DAMAGED = [one for one in DAMAGED if one[0] != "shorter" or one[1] == "_ltxv2_steps"]  # forms of latents are those of every cache


@pytest.mark.parametrize(("damage", "ending"), DAMAGED)
def test_damaged_samples_are_refused_and_made_again(tiny_family, rollouts, tmp_path, ending, damage):
    """And not kept for what their names say, nor met in the middle of a run."""
    folder = tmp_path / "rollouts"
    shutil.copytree(rollouts, folder)
    path = folder / f"g0000_k01{ending}.safetensors"
    DAMAGE[damage](folder, path)
    with pytest.raises(UserError, match=rf"cannot be used .{path.name}\W.*Run ltxv2_cache_rollouts.py again"):
        train(tiny_family, folder, tmp_path / "out", "--rl_loss", "grpo")
    assert not (tmp_path / "out").exists()
    make(tiny_family, tmp_path, "--rl_sde_type", "cps", "--rl_sde_steps", "2")
    assert path.read_bytes() == (rollouts / path.name).read_bytes()


def test_steps_are_needed_by_the_rules_that_learn_from_them_alone_and_texts_by_all(tiny_family, rollouts, tmp_path):
    folder = tmp_path / "rollouts"
    shutil.copytree(rollouts, folder)
    for path in folder.glob("*_steps.safetensors"):
        path.unlink()
    assert train(tiny_family, folder, tmp_path / "out", "--max_train_steps", "1") == 0
    text = folder / "p0001_ltxv2_te.safetensors"
    text.write_bytes(text.read_bytes()[:-7])
    with pytest.raises(UserError, match="p0001_ltxv2_te.safetensors is missing or damaged"):
        train(tiny_family, folder, tmp_path / "out2", "--max_train_steps", "1")
    make(tiny_family, tmp_path, "--rl_sde_type", "cps", "--rl_sde_steps", "2")
    assert text.read_bytes() == (rollouts / text.name).read_bytes()


def test_an_index_of_fewer_samples_is_refused_and_written_again(tiny_family, rollouts, tmp_path):
    """As a run leaves it that is killed while a group grows."""
    folder = tmp_path / "rollouts"
    shutil.copytree(rollouts, folder)
    (path,) = folder.glob("ltxv2_index_*.json")
    whole = path.read_bytes()
    index = json.loads(whole)
    path.write_text(json.dumps(index | {"clips": index["clips"][:5]}), encoding="utf-8")
    with pytest.raises(UserError, match="its index lists 5 of 6 samples .g0001_k02 not.. Run ltxv2_cache_rollouts.py again"):
        train(tiny_family, folder, tmp_path / "out")
    make(tiny_family, tmp_path, "--rl_sde_type", "cps", "--rl_sde_steps", "2")
    assert path.read_bytes() == whole


def test_samples_of_which_nothing_is_told_are_not_taken_for_ones_own(tiny_family, rollouts, tmp_path):
    folder = tmp_path / "rollouts"
    shutil.copytree(rollouts, folder)
    (folder / "rollouts.json").unlink()
    with pytest.raises(UserError, match="g0000_k00_ltxv2.safetensors: is there, and no rollouts.json that says how it was made"):
        make(tiny_family, tmp_path, "--sample_steps", "5")


@pytest.mark.parametrize("flags", [("--sample_steps", "1"), ("--rl_sde_window", "3:9")])
def test_a_window_without_a_step_that_can_be_drawn_is_refused(tiny_family, tmp_path, caplog, flags):
    """Of four steps 0, 1 and 2 can."""
    with pytest.raises(UserError, match="none of its steps can be stochastic"):
        make(tiny_family, tmp_path, "--rl_sde_type", "cps", *flags)
    make(tiny_family, tmp_path, "--rl_sde_type", "cps", "--rl_sde_window", "2:9", "--rl_group_size", "2", prompts=PROMPTS[:1])
    assert "--rl_sde_steps 3: 1 of 4 steps of sampling can be stochastic by --rl_sde_window 2:9" in caplog.text


def test_recorded_steps_are_what_was_sampled(rollouts):
    """Each step's values are rounded before they are used, so what lies in the file is what the model saw; levels fall."""
    for one in read_rollouts(rollouts).samples:
        steps = load_file(rollouts / f"{one.name}_ltxv2_steps.safetensors")
        assert set(steps) == {"levels", "second", "video_before", "video_after", "audio_before", "audio_after"}
        assert steps["video_before"].dtype == torch.bfloat16 and steps["video_before"].shape == (2, 2 * 2 * 3, 128)
        assert bool((steps["levels"][:, 0] > steps["levels"][:, 1]).all()) and float(steps["levels"][-1, 1]) > 0
    groups = {
        one.prompt: load_file(rollouts / f"{one.name}_ltxv2_steps.safetensors")["levels"].tolist()
        for one in read_rollouts(rollouts).samples
    }
    assert len(groups) == 2


@pytest.mark.parametrize("rule", ["nft", "grpo", "grpo_guard", "awm", "rwr", "dpo"])
def test_every_rule_trains(tiny_family, rollouts, tmp_path, rule):
    assert train(tiny_family, rollouts, tmp_path, "--rl_loss", rule, "--rl_timesteps_per_sample", "2", "--rl_ref_mse_weight", "0.001") == 0
    lora = load_file(tmp_path / "ltxv2_lora.safetensors")
    moved = [float(tensor.abs().max()) for key, tensor in lora.items() if key.endswith("lora_B.weight")]
    assert moved and min(moved) > 0 and all(math.isfinite(value) for value in moved)
    rows = losses(tmp_path)
    assert len(rows) == (4 if rule == "dpo" else 12), "one pass: samples times noise levels, pairs times noise levels"
    if rule in ("grpo", "grpo_guard", "awm"):
        assert rows[0]["clipped"] == 0 and any(row["clipped"] for row in rows) and all(row["clipped"] in (0, 0.5, 1) for row in rows)
    else:
        assert not any("clipped" in row for row in rows)


@pytest.mark.parametrize("rule", ["nft", "grpo", "grpo_guard", "awm"])
def test_before_it_has_moved_the_policy_is_the_old_one(tiny_family, rollouts, tmp_path, monkeypatch, rule):
    """Bit for bit, so every ratio is exactly 1 in the first step; after it they differ."""
    seen, real = [], objectives.RolloutObjective.loss

    def loss(self, prediction):
        for stream in ("video", "audio"):
            new, old = getattr(prediction.velocity, stream), getattr(prediction.old, stream)
            seen.append(bool(torch.equal(new, old)))
        return real(self, prediction)

    monkeypatch.setattr(objectives.RolloutObjective, "loss", loss)
    assert (
        train(tiny_family, rollouts, tmp_path, "--rl_loss", rule, "--gradient_accumulation_steps", "2", "--rl_micro_batch_size", "2") == 0
    )
    assert all(seen[:4]) and not any(seen[4:])


def test_batches_are_no_larger_than_what_there_is_to_learn(tiny_family, rollouts, tmp_path, monkeypatch):
    """The trial of the plan makes one of the size that is asked for."""
    sizes, real = [], setup.make_batch
    monkeypatch.setattr(setup, "make_batch", lambda draws, *args, **keys: sizes.append(len(draws)) or real(draws, *args, **keys))
    assert train(tiny_family, rollouts, tmp_path, "--rl_micro_batch_size", "1000000") == 0
    assert sizes and max(sizes) == 6 * 3 and len(losses(tmp_path)) == 1


def test_a_resumed_run_compares_with_the_policy_that_made_the_rollouts(tiny_family, rollouts, tmp_path):
    """Not with the weights that it resumes from: it ends where a run that was not interrupted ends."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = ("--max_train_steps", "6", "--save_state", "--save_every_n_steps", "3")
    assert train(tiny_family, rollouts, whole, *flags) == 0
    assert train(tiny_family, rollouts, parts, *flags, "--max_train_steps", "3") == 0
    assert train(tiny_family, rollouts, parts, *flags, "--resume", str(next(parts.glob("*step00000003-state")))) == 0
    ours, theirs = (load_file(folder / "ltxv2_lora.safetensors") for folder in (parts, whole))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    ours, theirs = ({path.name: path.read_bytes() for path in next(folder.glob("*06-state")).iterdir()} for folder in (parts, whole))
    assert ours == theirs, "torch's own generator too, from which some optimizers draw"


def test_a_resumed_run_tells_what_it_learns_otherwise(tiny_family, rollouts, tmp_path, caplog):
    """Another rule, other scores: they are in no dataset, and the run is another one all the same."""
    folder, out = tmp_path / "rollouts", tmp_path / "out"
    shutil.copytree(rollouts, folder)
    assert train(tiny_family, folder, out, "--max_train_steps", "2", "--save_state") == 0
    state = str(next(out.glob("*-state")))
    caplog.clear()
    assert train(tiny_family, folder, out, "--max_train_steps", "3", "--resume", state) == 0
    assert "max_train_steps: 2 then, 3 now" in caplog.text and "advantages" not in caplog.text
    path = folder / "scores" / "tone.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    facts["scores"] = {name: -value for name, value in facts["scores"].items()}
    path.write_text(json.dumps(facts), encoding="utf-8")
    caplog.clear()
    assert train(tiny_family, folder, out, "--max_train_steps", "3", "--resume", state, "--rl_loss", "awm") == 0
    assert "rl_loss: 'nft' then, 'awm' now" in caplog.text and "advantages: " in caplog.text


def test_the_next_round_starts_from_the_very_file_that_sampled(tiny_family, rollouts, tmp_path):
    first = tmp_path / "first"
    assert train(tiny_family, rollouts, first) == 0
    policy = first / "ltxv2_lora.safetensors"
    folder = make(tiny_family, tmp_path / "second", "--rl_policy", str(policy), "--rl_round", "1")
    score(folder)
    assert not {one.seed for one in read_rollouts(folder).samples} & {one.seed for one in read_rollouts(rollouts).samples}
    with pytest.raises(UserError, match="was made by the LoRA 'ltxv2_lora.safetensors'. Give --network_weights"):
        train(tiny_family, folder, tmp_path / "out")
    with pytest.raises(UserError, match="the base model. Leave it out"):
        train(tiny_family, rollouts, tmp_path / "out", "--network_weights", str(policy))
    assert train(tiny_family, folder, tmp_path / "out", "--network_weights", str(policy)) == 0
    other = tmp_path / "other.safetensors"
    data = bytearray(policy.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    with pytest.raises(UserError, match="is not the file that made the rollouts"):
        train(tiny_family, folder, tmp_path / "out2", "--network_weights", str(other))


def test_samples_are_an_ordinary_dataset(tiny_family, rollouts, tmp_path):
    assert supervised(tiny_family, rollouts / "dataset.toml", tmp_path) == 0


def test_the_best_of_each_prompt_are_a_dataset_of_their_own(tiny_family, rollouts, tmp_path):
    read, scores = read_rollouts(rollouts), score(rollouts)
    best = write_best(read, rewards_of(read, "tone:1"), 2, tmp_path / "best")
    assert best.samples == tuple(name for names in read.groups.values() for name in sorted(names, key=lambda name: -scores[name])[:2])
    assert not best.flagged and not (tmp_path / "best" / "rollouts.json").exists()
    for path in (tmp_path / "best").glob("*.safetensors"):
        assert path.read_bytes() == (rollouts / path.name).read_bytes()
    with pytest.raises(UserError, match=r"--best_directory .*best: is there already"):
        write_best(read, rewards_of(read, "tone:1"), 2, tmp_path / "best")
    with pytest.raises(UserError, match="--best_directory .: give the name of a new folder"):
        write_best(read, rewards_of(read, "tone:1"), 2, Path())
    with pytest.raises(UserError, match="--best_directory .*prompts.txt.*a file"):
        write_best(read, rewards_of(read, "tone:1"), 2, rollouts.parent / "prompts.txt" / "best")
    # nothing leads back: it is trained on where it stands alone
    (tmp_path / "best").rename(tmp_path / "elsewhere")
    assert supervised(tiny_family, tmp_path / "elsewhere" / "dataset.toml", tmp_path / "out", "--max_train_epochs", "1") == 0
    assert len(losses(tmp_path / "out")) == 4
    (trained,) = (tmp_path / "out").glob("*.safetensors")
    assert read_metadata(trained)["ss_max_train_steps"] == "4", "of the epoch, and not the flag's default"


def test_a_prompt_whose_samples_score_alike_has_no_best():
    groups = {0: ("a", "b"), 1: ("c", "d"), 2: ("e", "f")}
    first = Scored(reward="one", route="video", weight=1.0, scores={"a": 0.0, "b": 1.0, "c": 2.0, "d": 2.0, "e": 0.0, "f": 1.0})
    second = Scored(reward="two", route="sync", weight=3.0, scores={"a": 1.0, "b": 0.0, "c": 2.0, "d": 2.0, "e": 5.0, "f": 9.0})
    names, flagged = best_samples(groups, [first, second], 1)
    assert names == ("a", "f"), "the second weighs more, and no stream counts twice"
    assert {(one.group, one.reward) for one in flagged} == {(1, "one"), (1, "two")}


def test_a_first_frame_stays_clean(tiny_family, tmp_path, monkeypatch):
    """In sampling, in what is recorded, and out of every loss."""
    from PIL import Image

    Image.new("RGB", (96, 64), (200, 40, 90)).save(tmp_path / "start.png")
    prompts = tuple(f"{text} --i start.png" for text in PROMPTS)
    folder = make(tiny_family, tmp_path, "--rl_sde_type", "flow_sde", prompts=prompts)
    score(folder)
    first = {
        tuple(merge_sources([folder / f"{one.name}_ltxv2.safetensors"])["latents"][:, 0].flatten().tolist())
        for one in read_rollouts(folder).samples
    }
    assert len(first) == 1
    steps = [load_file(folder / f"{one.name}_ltxv2_steps.safetensors") for one in read_rollouts(folder).samples]
    assert len({tuple(one[f"video_{when}"][:, :6].flatten().tolist()) for one in steps for when in ("before", "after")}) == 1
    weights, real = [], objectives.RolloutObjective.loss
    monkeypatch.setattr(
        objectives.RolloutObjective,
        "loss",
        lambda self, prediction: weights.append(prediction.noised.weights["video"].clone()) or real(self, prediction),
    )
    for rule in ("nft", "grpo"):
        assert train(tiny_family, folder, tmp_path / rule, "--rl_loss", rule) == 0
    assert weights and all(not one[:, :6].any() and one[:, 6:].all() for one in weights)


def test_a_prompts_sound_is_for_rewards_alone(tiny_family, rollouts, tmp_path):
    """The model never hears it; it lies beside the samples, and another one makes other rollouts."""
    steps = ("--rl_sde_type", "cps", "--rl_sde_steps", "2")
    sound = tmp_path / "Stimme é.wav"
    write_wav(sound, Waveform(torch.rand(2, 4800) - 0.5, 48000))
    prompts = (f"{PROMPTS[0]} --a {sound.name}", PROMPTS[1])
    folder = make(tiny_family, tmp_path, *steps, prompts=prompts)
    made = read_rollouts(folder)
    for one in made.samples:
        assert (folder / f"{one.name}_ltxv2.safetensors").read_bytes() == (rollouts / f"{one.name}_ltxv2.safetensors").read_bytes()
    with decoding(made, ("latents",), Decoders(vae=None, audio_vae=None, device=torch.device("cpu"))) as decode:
        given = {one.name: decode(one).prompt_sound for one in made.samples}
    assert given.pop("g0001_k00") is None
    kept = given.pop("g0000_k02")
    assert kept is not None and kept.parent == folder and kept.read_bytes() == sound.read_bytes()
    write_wav(tmp_path / "other.wav", Waveform(torch.zeros(2, 4800), 48000))
    with pytest.raises(UserError, match="holds rollouts with another 'prompts.0.audio.name': 'Stimme é.wav', not 'other.wav'"):
        make(tiny_family, tmp_path, *steps, prompts=(f"{PROMPTS[0]} --a other.wav", PROMPTS[1]))
    with pytest.raises(UserError, match="--ltx_mode video makes none"):
        make(tiny_family, tmp_path / "still", "--ltx_mode", "video", prompts=(f"{PROMPTS[0]} --a {sound}",))
    sound.write_bytes(b"no sound")
    with pytest.raises(UserError, match=re.escape(sound.name)):
        make(tiny_family, tmp_path / "spoiled", prompts=(f"{PROMPTS[0]} --a {sound}",))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--reward_fn", "loudness"), "loudness.json: not found. Score it by: python ltxv2_score_rollouts.py"),
        (("--reward_fn", "tone:much"), "--reward_fn tone:much: must be NAME:WEIGHT"),
        (("--reward_fn", "tone:1e308"), "--reward_fn tone:1e308: must be NAME:WEIGHT"),
        (("--rl_loss", "grpo", "--ppo_clip_eps", "1e300"), "--ppo_clip_eps 1e300: must be at most"),
        (("--nft_beta_mix", "1e-300"), "--nft_beta_mix 1e-300: must be at least"),
        (("--ltx_mode", "video"), "--ltx_mode video: the rollouts are of the mode av"),
        (("--dpo_pairs", "picks.jsonl"), "is read by --rl_loss dpo alone"),
        (("--ltxv2_model", "other"), "is another model than"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_model_is_loaded(tiny_family, rollouts, tmp_path, flags, says):
    flags = tuple(str(tiny_family.ltx20) if flag == "other" else flag for flag in flags)
    with pytest.raises(UserError, match=re.escape(says)):
        train(tiny_family, rollouts, tmp_path, *flags)


def test_rules_on_steps_need_steps_and_no_guidance(tiny_family, tmp_path):
    plain = make(tiny_family, tmp_path / "plain")
    score(plain)
    with pytest.raises(UserError, match="learns from stochastic steps, and the rollouts in .* have none"):
        train(tiny_family, plain, tmp_path / "out", "--rl_loss", "ppo")
    guided = make(tiny_family, tmp_path / "guided", "--rl_sde_type", "cps", "--video_cfg_scale", "3")
    score(guided)
    with pytest.raises(UserError, match="were sampled with guidance"):
        train(tiny_family, guided, tmp_path / "out", "--rl_loss", "grpo")


@pytest.mark.parametrize("rule", ["grpo", "grpo_guard"])
def test_a_reward_of_a_stream_without_stochastic_steps_teaches_nothing(tiny_family, tmp_path, caplog, rule):
    """An error where it is the only one; beside another it is told, and costs no step."""
    folder = make(tiny_family, tmp_path, "--rl_sde_type", "cps", "--rl_sde_streams", "video")
    score(folder, "tone", route="audio")
    with pytest.raises(UserError, match=f"--rl_loss {rule}: .*nothing from 'tone', which teaches audio .*video.*--rl_sde_streams both"):
        train(tiny_family, folder, tmp_path / "out", "--rl_loss", rule)
    assert not (tmp_path / "out").exists()
    seen = score(folder, "look", route="video")
    flat = {name: 0.0 if name.startswith("g0000") else value for name, value in seen.items()}
    path = folder / "scores" / "look.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"scores": flat}), encoding="utf-8")
    assert train(tiny_family, folder, tmp_path / "out", "--rl_loss", rule, "--reward_fn", "tone:1,look:1") == 0
    assert "audio learns nothing from 'tone'" in caplog.text and "learns nothing from 'look'" not in caplog.text
    assert len(losses(tmp_path / "out")) == 9, "of the group that the picture's reward orders: three samples, three times"
    caplog.clear()
    score(folder, "both", route="sync")
    assert train(tiny_family, folder, tmp_path / "sync", "--rl_loss", rule, "--reward_fn", "both") == 0
    assert "audio learns nothing from 'both'" in caplog.text
    assert train(tiny_family, folder, tmp_path / "nft", "--reward_fn", "tone", "--rl_loss", "nft") == 0


@pytest.mark.parametrize("sampling", [None, {}, {"stochastic": {}}, {"stochastic": {"streams": "video"}}, {"stochastic": ["video"]}])
def test_what_no_steps_can_be_is_a_damaged_description(rollouts, tmp_path, sampling):
    facts = json.loads((rollouts / "rollouts.json").read_text(encoding="utf-8"))
    sampling = {"guided": False, **sampling} if sampling else sampling
    (tmp_path / "rollouts.json").write_text(json.dumps(facts | {"sampling": sampling}), encoding="utf-8")
    with pytest.raises(UserError, match="'sampling'(: 'stochastic')? is .*, so the file is damaged"):
        read_rollouts(tmp_path)


@pytest.mark.parametrize("rule", ["nft", "grpo", "grpo_guard", "awm", "rwr", "dpo"])
def test_the_memory_plan_counts_the_old_policy_where_there_is_one(tiny_family, rollouts, tmp_path, monkeypatch, rule):
    """By the bytes of the tensors that the objective holds."""
    planned, held = [], []
    plan, loss = prove.place_by_plan, objectives.RolloutObjective.loss
    monkeypatch.setattr(prove, "place_by_plan", lambda *given, **named: planned.append(given[3]) or plan(*given, **named))

    def watched(self, prediction):
        copies = [] if self.old is None else self.old._weights
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in copies))
        return loss(self, prediction)

    monkeypatch.setattr(objectives.RolloutObjective, "loss", watched)
    assert train(tiny_family, rollouts, tmp_path, "--rl_loss", rule, "--vram_gb", "4", "--max_train_steps", "1") == 0
    (work,) = planned
    assert set(held) == {int(work.trainable * work.copy_bytes)}
    assert (held[0] > 0) == (rule not in ("rwr", "dpo"))


def test_a_lora_beside_the_policy_is_merged_by_the_update_or_missed(tiny_family, rollouts, tmp_path, caplog):
    """Which samples it made is told by the table, too."""
    caplog.set_level(logging.INFO)
    beside = ("--lora", f"{tiny_family.distilled_lora}:0.5", "--rl_distilled", "--rl_sde_type", "cps")
    folder = make(tiny_family, tmp_path, *beside)
    assert re.search(r"by +the base model beside ltx2_tiny_distilled_lora.safetensors\nguidance +off", caplog.text)
    score(folder)
    says = "were sampled with the LoRA 'ltx2_tiny_distilled_lora.safetensors' beside the policy, at 0.5, and this run trains without"
    few = ("--max_train_steps", "1")
    with pytest.raises(UserError, match=says):
        train(tiny_family, folder, tmp_path / "grpo", "--rl_loss", "grpo", *few)
    merged = ("--base_weights", str(tiny_family.distilled_lora), "--base_weights_multiplier")
    with pytest.raises(UserError, match="was not beside the policy, at this strength"):
        train(tiny_family, folder, tmp_path / "grpo", "--rl_loss", "grpo", *few, *merged, "1")
    with pytest.raises(UserError, match="--base_weights .* was not beside the policy"):
        train(tiny_family, rollouts, tmp_path / "nft", *merged, "0.5")
    assert train(tiny_family, folder, tmp_path / "nft", *few) == 0 and says in caplog.text
    caplog.clear()
    assert train(tiny_family, folder, tmp_path / "grpo", "--rl_loss", "grpo", *few, *merged, "0.5") == 0
    assert says not in caplog.text


def test_pairs_that_a_person_picked(tiny_family, rollouts, tmp_path):
    picks = tmp_path / "picks.jsonl"
    picks.write_text('{"chosen": "g0000_k01", "rejected": "g0000_k00"}\n', encoding="utf-8")
    flags = ("--rl_loss", "dpo", "--dpo_pairs", str(picks))
    assert train(tiny_family, rollouts, tmp_path / "out", *flags) == 0
    assert len(losses(tmp_path / "out")) == 3
    picks.write_text('{"better": {"file": "g0000_k01.mp4"}, "worse": {"file": "g0000_k00.mp4"}}\n', encoding="utf-8")
    unscored = Path(shutil.copytree(rollouts, tmp_path / "unscored"))
    shutil.rmtree(unscored / "scores")
    assert train(tiny_family, unscored, tmp_path / "of the page", *flags, rewards=()) == 0
    assert losses(tmp_path / "of the page") == losses(tmp_path / "out")
    picks.write_text('{"chosen": "g0000_k01", "rejected": "g0009_k00"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"line 1: 'chosen' and 'rejected' .* must name two samples"):
        train(tiny_family, rollouts, tmp_path / "out2", *flags)
    with pytest.raises(UserError, match="missing --reward_fn"):
        train(tiny_family, rollouts, tmp_path / "out2", rewards=())

"""Rounds of reinforcement learning through the real programs: killed drivers, and every `training_configs/rl_*.toml`."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

from musubi_tuner import ltxv2_rl_rounds
from musubi_tuner.command import dispatch
from musubi_tuner.page.fill import data_of
from musubi_tuner.reinforcement.rollouts import read_rollouts
from musubi_tuner.reinforcement.rounds import standing
from musubi_tuner.runtime.errors import UserError
from tests.rl_parts import make

PATIENCE = 300.0
"""Seconds until the first rollouts lie there."""
CONFIGS = sorted((Path(__file__).resolve().parents[2] / "training_configs").glob("rl_*.toml"))
SMALL = {
    "rollouts": {
        "rl_group_size": 2, "sample_width": 64, "sample_height": 64, "sample_frames": 9, "sample_steps": 3, "device": "cpu",
    },
    "scores": {"device": "cpu"},
    "training": {
        "device": "cpu", "mixed_precision": "no", "compile": False, "max_data_loader_n_workers": 0, "learning_rate": 1e-3,
        "save_precision": "float32",
    },
}  # fmt: skip
"""In place of what the files give."""


def config_for(path: Path, family, folder: Path, **training) -> Path:
    """The file with the tiny models and sizes."""
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    tables["rollouts"] |= {"ltxv2_model": str(family.ltx23), "text_encoder": str(family.gemma)} | SMALL["rollouts"]
    tables["scores"] |= {"vae": str(family.ltx23), "reward_fn": "loudness:1"} | SMALL["scores"]
    tables["training"] |= {"ltxv2_model": str(family.ltx23)} | SMALL["training"] | training
    if "network_dim" in tables["training"]:
        tables["training"]["network_dim"] = 4
    tables["training"]["network_args"] = [
        part.replace("4[0-7]", "1") for part in tables["training"].get("network_args", ["rank_dropout=0"])
    ]
    out = folder / "rl.toml"
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items()), ""]
    out.write_text("\n".join(lines), encoding="utf-8")
    (folder / "prompts.txt").write_text("a dog barks\nrain on a roof\n", encoding="utf-8")
    (folder / "heldout.txt").write_text("a cat\nwind\n", encoding="utf-8")
    return out


def words(config: Path, out: Path, rounds: int, *more: str) -> list[str]:
    folder = config.parent
    prompts = ["--rl_prompts", str(folder / "prompts.txt"), "--rl_heldout_prompts", str(folder / "heldout.txt")]
    return [
        "--rl_config",
        str(config),
        *prompts,
        "--rl_heldout_group_size",
        "2",
        "--output_dir",
        str(out),
        "--rl_rounds",
        str(rounds),
        *more,
    ]


@pytest.fixture
def here(monkeypatch):
    """Programs run in this process, which is faster."""
    ran = []

    def run(name: str, argv: list[str]) -> int:
        ran.append(name)
        return dispatch([name, *argv])

    monkeypatch.setattr(ltxv2_rl_rounds, "run_command", run)
    return ran


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs_a_round(tiny_family, tmp_path, here, path):
    config = config_for(path, tiny_family, tmp_path)
    out = tmp_path / "die Runden"
    assert ltxv2_rl_rounds.main(words(config, out, 1)) == 0
    facts = json.loads((out / "rounds.json").read_text(encoding="utf-8"))
    assert [row["round"] for row in facts["rounds"]] == [None, 0] and facts["best"] == 0
    assert read_rollouts(out / "round_000" / "rollouts").facts["sampling"]["guided"] is False
    assert facts["rounds"][0]["heldout"]["gain"] == 0 and facts["rounds"][1]["heldout"]["gain"] != 0
    assert (out / "ltxv2_lora.safetensors").read_bytes() == (out / "round_000/training/ltxv2_lora.safetensors").read_bytes()
    assert here == ["cache-rollouts", "score-rollouts", "cache-rollouts", "score-rollouts", "train-rl", "cache-rollouts", "score-rollouts"]


def test_more_rounds_go_on_and_caches_can_be_removed(tiny_family, tmp_path, here, caplog):
    """And a best round that is no better than the base model is told as such."""
    caplog.set_level(logging.INFO)
    config = config_for(CONFIGS[0], tiny_family, tmp_path)
    out = tmp_path / "out"
    assert ltxv2_rl_rounds.main(words(config, out, 1)) == 0
    facts = json.loads((out / "rounds.json").read_text(encoding="utf-8"))
    for gain in (0.5, 0.01):
        caplog.clear()
        facts["rounds"][1]["heldout"] |= {"gain": gain, "error": 0.1}
        (out / "rounds.json").write_text(json.dumps(facts), encoding="utf-8")
        assert ltxv2_rl_rounds.main(words(config, out, 1)) == 0
        assert re.search(r"round 0 \(best\) +\+0\.\d+ ± 0\.1000 +-[\d.]+\n", caplog.text)
        assert ("no round is above the base model" in caplog.text) == (gain < 0.1)
    here.clear()
    assert ltxv2_rl_rounds.main(words(config, out, 2, "--rl_delete_round_caches")) == 0
    assert here == ["cache-rollouts", "score-rollouts", "train-rl", "cache-rollouts", "score-rollouts"]
    for number in (0, 1):
        rollouts = out / f"round_{number:03d}" / "rollouts"
        assert not list(rollouts.glob("*.safetensors")) and (rollouts / "scores" / "loudness.json").is_file()
        assert not (rollouts / "ltxv2_prompts").exists()
    here.clear()
    mine = [out / "round_000/rollouts" / name for name in ("best/clip.safetensors", "notes.safetensors")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"of a person")
    shutil.rmtree(out / "round_001" / "rollouts")
    assert ltxv2_rl_rounds.main(words(config, out, 2, "--rl_delete_round_caches")) == 0
    assert all(path.is_file() for path in mine), "only what the round has made is removed, and what is gone already is no fault"
    assert ltxv2_rl_rounds.main(words(config, out, 2)) == 0
    assert here == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_rounds_that_are_killed_end_as_undisturbed_ones(tiny_family, tmp_path, here):
    """Killed with all their processes while rollouts are made; `dev/kill_rl_rounds.py` does it at random moments."""
    config = config_for(CONFIGS[0], tiny_family, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert ltxv2_rl_rounds.main(words(config, whole, 1)) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "musubi_tuner.ltxv2_rl_rounds", *words(config, parts, 1)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
    )  # fmt: skip
    end = time.monotonic() + PATIENCE
    while not list((parts / "round_000" / "rollouts").glob("g*.safetensors")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (parts / "round_000" / "training").exists()
    here.clear()
    assert ltxv2_rl_rounds.main(words(config, parts, 1)) == 0
    assert here == ["cache-rollouts", "score-rollouts", "train-rl", "cache-rollouts", "score-rollouts"], "what was judged before is kept"
    ours, theirs = (json.loads((folder / "rounds.json").read_text(encoding="utf-8")) for folder in (parts, whole))
    assert ours == theirs
    assert (parts / "ltxv2_lora.safetensors").read_bytes() == (whole / "ltxv2_lora.safetensors").read_bytes()


def test_rewards_are_judged_by_their_spread_and_not_by_their_unit(tiny_family, tmp_path, caplog):
    """One in decibels loses a tenth of its spread, one in shares gains a whole one; one without a spread counts as it is."""
    base = make(tiny_family, tmp_path)
    after = Path(shutil.copytree(base, tmp_path / "after"))
    steps = (-1.0, 0.0, 1.0)
    spread = (2 / 3) ** 0.5
    for folder, moved in ((base, (0.0, 0.0, 0.0)), (after, (-0.1 * spread * 8, spread * 0.05, -0.25))):
        (folder / "scores").mkdir()
        for name, unit, by in zip(("decibels", "share", "flat"), (8.0, 0.05, 0.0), moved, strict=True):
            scores = {one.name: 100 * one.prompt * unit + steps[one.k] * unit + by for one in read_rollouts(folder).samples}
            facts = {"format": 1, "reward": name, "route": "audio", "arguments": {}, "weight_files": {}, "scores": scores, "errors": {}}
            (folder / "scores" / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")
    assert standing(after, base, "decibels:1,share:0.5,flat:2").gain == pytest.approx(-0.1 + 0.5 - 0.5)
    assert standing(after, base, "decibels:1,share:0.5").gain == pytest.approx(0.4)
    assert standing(base, None, "decibels:1,share:0.5").gain == 0 and "standard error" not in caplog.text
    for folder in (base, after):
        path = folder / "scores" / "share.json"
        facts = json.loads(path.read_text(encoding="utf-8"))
        facts["scores"] |= {name: None for name in facts["scores"] if name.startswith("g0001")}
        path.write_text(json.dumps(facts), encoding="utf-8")
    assert standing(after, base, "share").error == 0 and "a single held-out prompt has scores" in caplog.text


def test_what_a_failed_stage_says_ends_the_rounds(tiny_family, tmp_path, monkeypatch):
    monkeypatch.setattr(ltxv2_rl_rounds, "run_command", lambda name, argv: 75 if name == "score-rollouts" else 0)
    assert ltxv2_rl_rounds.main(words(config_for(CONFIGS[0], tiny_family, tmp_path), tmp_path / "out", 1)) == 75


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[rollouts]\n[scores]\nreward_fn = 'a'\n", "the table [training] is missing"),
        ("[rollout]\n", "'rollout' is no table of the rounds. Did you mean 'rollouts'"),
        ("[rollouts]\nrl_round = 1\n[scores]\n[training]\n", "[rollouts] rl_round: is given by the rounds themselves"),
        ("[rollouts]\n[scores]\n[training]\n", "[scores] reward_fn is missing"),
    ],
)
def test_files_that_make_no_sense_are_refused(tiny_family, tmp_path, text, says):
    config = config_for(CONFIGS[0], tiny_family, tmp_path)
    config.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(says)):
        ltxv2_rl_rounds.main(words(config, tmp_path / "out", 1))


def with_changes(config: Path, **tables: dict) -> None:
    """Values put into a file of `config_for`; None takes one out."""
    known = tomllib.loads(config.read_text(encoding="utf-8"))
    lines = []
    for name, table in known.items():
        found = {key: value for key, value in (table | tables.get(name, {})).items() if value is not None}
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in found.items()), ""]
    config.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"rollouts": {"rl_sde_streams": "video"}}, "nothing from 'loudness', which teaches audio"),
        ({"rollouts": {"ltx_mode": "video", "rl_sde_streams": "audio"}}, "nothing from 'loudness', which teaches audio"),
        ({"rollouts": {"rl_sde_type": "none"}}, "learns from stochastic steps, and these rollouts have none"),
        ({"rollouts": {"video_cfg_scale": 3.0}}, "these rollouts are guided"),
        ({"rollouts": {"modality_scale": 3.0}}, "these rollouts are guided"),
        ({"rollouts": {"lora": ["distilled.safetensors"]}}, "Put the file of [rollouts] lora into [training] as base_weights"),
        ({"training": {"learning_rat": 1e-3}}, "[training] unknown flag '--learning_rat'"),
        ({"training": {"rl_loss": "nfd"}}, "[training] --rl_loss nfd"),
        ({"training": {"rl_loss": "dpo", "dpo_pairs": "picks.jsonl"}}, "[training] dpo_pairs: are of the samples of one round"),
        ({"rollouts": {"rl_group_size": 1}}, "[rollouts] --rl_group_size 1"),
        ({"scores": {"reward_fn": "loudnes"}}, "--reward_fn loudnes: no such reward"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_the_first_rollouts(tiny_family, tmp_path, here, tables, says):
    config = config_for(CONFIGS[[path.stem for path in CONFIGS].index("rl_grpo")], tiny_family, tmp_path)
    with_changes(config, **tables)
    with pytest.raises(UserError, match=re.escape(says)):
        ltxv2_rl_rounds.main(words(config, tmp_path / "out", 1))
    assert here == []


def test_several_processes_are_refused_by_what_starts_them(tiny_family, tmp_path, here, monkeypatch):
    config = config_for(CONFIGS[0], tiny_family, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="without accelerate launch"):
        ltxv2_rl_rounds.main(words(config, tmp_path / "out", 1))
    assert here == [] and not (tmp_path / "out").exists()


def test_folders_of_other_rounds_and_controls_that_are_none_are_refused(tiny_family, tmp_path, here):
    config = config_for(CONFIGS[0], tiny_family, tmp_path)
    out = tmp_path / "out"
    assert ltxv2_rl_rounds.main(words(config, out, 1)) == 0
    page = data_of(out / "rounds.html")
    assert page["control"] == [] and [row["label"] for row in page["rounds"]] == ["base model", "round 0 (best)"]
    for folder, says in ((tmp_path / "no", "holds no rounds"), (out, "its advantages were not shuffled: put rl_shuffle_advantages = 1")):
        with pytest.raises(UserError, match=says):
            ltxv2_rl_rounds.main(words(config, tmp_path / "other", 1, "--rl_control", str(folder)))
    facts = json.loads((out / "rounds.json").read_text(encoding="utf-8"))
    facts["settings"]["stages"]["training"]["rl_shuffle_advantages"] = 1
    facts["settings"]["stages"]["scores"]["reward_fn"] = "silence"
    (out / "rounds.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UserError, match="was judged by other rewards"):
        ltxv2_rl_rounds.main(words(config, tmp_path / "other", 1, "--rl_control", str(out)))
    (tmp_path / "heldout.txt").write_text("another\nand another\n", encoding="utf-8")
    with pytest.raises(UserError, match="holds rounds of other settings"):
        ltxv2_rl_rounds.main(words(config, out, 2))
    (out / "rounds.json").write_text(json.dumps(facts | {"format": 1}), encoding="utf-8")
    with pytest.raises(UserError, match="was written by another version"):
        ltxv2_rl_rounds.main(words(config, out, 2))
    (out / "rounds.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UserError, match="was judged on other held-out prompts"):
        ltxv2_rl_rounds.main(words(config, tmp_path / "other", 1, "--rl_control", str(out)))


def test_what_lies_there_and_is_none_of_the_rounds_is_not_overwritten(tiny_family, tmp_path, here):
    config = config_for(CONFIGS[0], tiny_family, tmp_path)
    out = tmp_path / "out"
    for name in ("ltxv2_lora.safetensors", "rounds.html"):
        out.mkdir(exist_ok=True)
        (out / name).write_bytes(b"of a person")
        with pytest.raises(UserError, match=f"{name}: is there already, and no rounds.json beside it"):
            ltxv2_rl_rounds.main(words(config, out, 1))
        assert (out / name).read_bytes() == b"of a person"
        (out / name).unlink()
    assert here == []


@pytest.mark.parametrize(("name", "flag"), [("prompts.txt", "--rl_prompts"), ("heldout.txt", "--rl_heldout_prompts")])
@pytest.mark.parametrize(
    ("data", "says"),
    [(None, "no such file"), ("caf\xe9".encode("latin-1"), "not UTF-8"), (b"\n", "holds no prompt"), (b"a\nb --f 17\n", "of one size")],
)
def test_prompts_that_no_stage_could_take_are_refused_before_the_first(tiny_family, tmp_path, here, name, flag, data, says):
    config = config_for(CONFIGS[0], tiny_family, tmp_path)
    (tmp_path / name).unlink()
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}.*{says}") as refused:
        ltxv2_rl_rounds.main(words(config, tmp_path / "out", 1))
    assert says not in ("no such file", "holds no prompt") or str(refused.value).startswith(f"{flag} ")
    assert here == []


_REWARD = """
from musubi_tuner.reinforcement.rewards.base import Reward

class Mine(Reward):
    name, route, needs = "mine", "sync", ["latents"]

    def score(self, samples):
        return [{sign}float(one.latents["video"].float().mean()) for one in samples]

REWARDS = [Mine]
"""


def test_rounds_are_judged_by_one_reward_and_their_notes_are_read_whole(tiny_family, tmp_path, here, caplog):
    """A plug-in that has changed since the base model was judged would tell a gain that is none."""
    config, plugin, out = config_for(CONFIGS[0], tiny_family, tmp_path), tmp_path / "mine.py", tmp_path / "out"
    with_changes(config, scores={"reward_fn": "mine:1", "reward_plugins": [str(plugin)]})
    plugin.write_text(_REWARD.format(sign=""), encoding="utf-8")
    (tmp_path / "heldout.txt").write_text("a dog barks\nwind\n", encoding="utf-8")
    assert ltxv2_rl_rounds.main(words(config, out, 1)) == 0
    assert "1 prompt is learned from too" in caplog.text
    plugin.write_text(_REWARD.format(sign="-"), encoding="utf-8")
    here.clear()
    with pytest.raises(UserError, match="scored by another 'mine' than"):
        ltxv2_rl_rounds.main(words(config, out, 2))
    assert here == ["cache-rollouts", "score-rollouts"], "before anything is learned"
    facts = json.loads((out / "rounds.json").read_text(encoding="utf-8"))
    (row,) = facts["rounds"][:1]
    for change in ({"rounds": []}, {"rounds": [row, row]}, {"rounds": [row | {"heldout": {"mean": 1}}]}, {"settings": {}}, {"rounds": "x"}):
        (out / "rounds.json").write_text(json.dumps(facts | change), encoding="utf-8")
        with pytest.raises(UserError, match="rounds.json: is damaged"):
            ltxv2_rl_rounds.main(words(config, out, 2))

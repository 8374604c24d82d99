"""The commands of the pages on reinforcement learning and rewards, in their order and as they stand there but for sizes, on toy files."""

import json
import shutil
import tomllib
from pathlib import Path
from urllib.parse import unquote

import pytest

from musubi_tuner import ltxv2_cache_rollouts, ltxv2_generate_video, ltxv2_rl_rounds, ltxv2_score_rollouts, ltxv2_train_rl
from musubi_tuner.command import dispatch
from musubi_tuner.media.write import write_video, write_wav
from musubi_tuner.page.fill import data_of
from musubi_tuner.reinforcement.rollouts import read_rollouts
from musubi_tuner.runtime.files import read_json
from tests import reward_models
from tests.e2e.test_http_reward import serving
from tests.unit.test_docs import DOCS, blocks, commands
from tests.unit.test_reward_models import stripes, tone

PROGRAMS = {module.PROG: module for module in (ltxv2_cache_rollouts, ltxv2_score_rollouts, ltxv2_train_rl)}
SMALL = {"--sample_width": "96", "--sample_height": "64", "--sample_frames": "9", "--rl_group_size": "2", "--network_dim": "4"}
"""In place of what the pages give."""
MORE = {
    ltxv2_cache_rollouts.PROG: ["--sample_steps", "2"],
    ltxv2_train_rl.PROG: ["--mixed_precision", "no", "--no-compile", "--max_data_loader_n_workers", "0", "--network_dim", "4"],
}


def of_page(page: str, programs=PROGRAMS) -> list[list[str]]:
    """Words of each command of these programs, from the program's name on."""
    found = [words for name, words in commands() if name == page]
    starts = [next((place for place, word in enumerate(words) if word in programs), None) for words in found]
    return [words[start:] for words, start in zip(found, starts, strict=True) if start is not None]


def run(words: list[str]) -> int:
    program, *given = words
    small = [SMALL.get(before, word) for before, word in zip(["", *given[:-1]], given, strict=True)]
    if program == ltxv2_cache_rollouts.PROG and "--rl_group_size" not in small:
        small += ["--rl_group_size", "2"]
    return PROGRAMS[program].main([*small, *MORE.get(program, []), "--device", "cpu"])


@pytest.fixture(scope="module")
def project(tiny_family, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("of the page")
    shutil.copy(tiny_family.ltx23, folder / "ltx-2.3-22b-dev.safetensors")
    shutil.copytree(tiny_family.gemma, folder / "gemma-3-12b-it-qat-q4_0-unquantized")
    (folder / "prompts.txt").write_text('a dog barks\na man says "come in"\n', encoding="utf-8")
    return folder


def test_the_commands_of_a_round_and_of_the_next_in_the_order_of_the_page(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    words = of_page("reinforcement_learning.md")
    a_round = [ltxv2_cache_rollouts.PROG, ltxv2_score_rollouts.PROG, ltxv2_train_rl.PROG]
    of_picks = [ltxv2_score_rollouts.PROG, ltxv2_train_rl.PROG]
    assert [one[0] for one in words] == [*a_round, *a_round, *of_picks, ltxv2_score_rollouts.PROG]
    (line,) = (one for one in blocks(DOCS / "how-to" / "reinforcement_learning.md", "text") if "chosen" in one)
    Path("round_0_picks.jsonl").write_text(line.replace("g0000_k03", "g0000_k00"), encoding="utf-8")
    for one in words:
        assert run(one) == 0, one
    assert Path("rl/round_1/ltxv2_lora.safetensors").is_file()
    assert Path("best_of_round_0/dataset.toml").is_file()


def test_the_tutorial_from_its_files_to_a_clip(project, tmp_path, monkeypatch):
    """Its prompt files, its TOML at toy sizes, each command once; both drivers make one round."""
    shutil.copytree(project, here := tmp_path / "der Abend")
    monkeypatch.chdir(here)
    monkeypatch.setattr(ltxv2_rl_rounds, "run_command", lambda name, argv: dispatch([name, *argv]))
    tutorial = DOCS / "tutorials" / "clearer_voice.md"
    learned, heldout = blocks(tutorial, "text")
    (here / "prompts.txt").write_text("".join(learned.splitlines(keepends=True)[:2]), encoding="utf-8")
    (here / "heldout.txt").write_text(heldout, encoding="utf-8")
    reward_models.write_whisper(here / "models" / "whisper-small")
    tables, control = (tomllib.loads(text) for text in blocks(tutorial, "toml"))
    tables["rollouts"] |= {"device": "cpu", "sample_steps": 2, **{name[2:]: int(SMALL[name]) for name in list(SMALL)[:4]}}
    tables["scores"] |= {"device": "cpu", "reward_args": without_language(tables["scores"]["reward_args"])}
    tables["training"] |= {"device": "cpu", "mixed_precision": "no", "compile": False, "max_data_loader_n_workers": 0, "network_dim": 4}
    write_tables(here / "rl.toml", tables)
    write_tables(here / "rl_control.toml", tables | {"training": tables["training"] | control})
    words = of_page(tutorial.name, {**PROGRAMS, ltxv2_rl_rounds.PROG: ltxv2_rl_rounds, ltxv2_generate_video.PROG: ltxv2_generate_video})
    names = [ltxv2_cache_rollouts.PROG, ltxv2_score_rollouts.PROG, *[ltxv2_rl_rounds.PROG] * 3, ltxv2_generate_video.PROG]
    assert [one[0] for one in words] == names
    assert run(words[0]) == 0
    assert run([*without_language(words[1]), "--force"]) == 0, "what a toy of random weights says is the same every time"
    for program, *given in words[2:5]:
        assert program == ltxv2_rl_rounds.PROG
        given[given.index("--rl_rounds") + 1] = "1"
        assert ltxv2_rl_rounds.main([*given, "--rl_heldout_group_size", "2"]) == 0
    page, facts = data_of(here / "rl" / "rounds.html"), read_json(here / "rl" / "rounds.json")
    assert [row["label"] for row in page["rounds"]] == ["base model", "round 0 (best)"]
    assert [row["gain"] for row in page["rounds"]] == [row["heldout"]["gain"] for row in facts["rounds"]]
    assert page["control"][1]["gain"] not in (0, page["rounds"][1]["gain"])
    assert page["columns"] == ["base model", "round 0"] and [row["prompt"] for row in page["rows"]] == heldout.splitlines()
    assert sorted(clip["at"] for clip in page["clips"]) == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert all((here / "rl" / unquote(clip["href"])).is_file() for clip in page["clips"])
    assert all(set(clip["scores"]) == {"word_error", "clipping", "loudness"} for clip in page["clips"])
    assert all(isinstance(score, float) for clip in page["clips"] for score in clip["scores"].values())
    small = ["--sample_width", "96", "--sample_height", "64", "--sample_frames", "9", "--sample_steps", "2", "--device", "cpu"]
    assert ltxv2_generate_video.main([*words[5][1:], *small]) == 0
    assert len(list((here / "clips").glob("*.mp4"))) == 1


def without_language(words: list[str]) -> list[str]:
    """A toy Whisper knows none by name."""
    assert "word_error.language=en" in words
    return [word for word in words if word != "word_error.language=en"]


def write_tables(path: Path, tables: dict) -> None:
    lines = [f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items()) for name, table in tables.items()]
    path.write_text("\n".join(lines), encoding="utf-8")


def test_every_command_on_rewards_scores(project, tmp_path, monkeypatch):
    monkeypatch.chdir(project)
    assert run(of_page("reinforcement_learning.md")[0]) == 0
    for name, kind in (("siglip", "siglip"), ("wavlm-base-plus-sv", "wavlm_speakers"), ("whisper-small", "whisper"), ("clap", "clap")):
        getattr(reward_models, f"write_{kind}")(project / "models" / name)
    reward_models.write_clip(project / "models" / "clip")
    (project / "my_clips").mkdir()
    write_video(project / "my_clips" / "a.mp4", stripes(), 24.0, tone(220, 9 / 24))
    write_wav(project / "my_clips" / "b.wav", tone(220))
    (plugin,) = blocks(DOCS / "how-to" / "rewards.md", "python")
    (project / "dark.py").write_text(plugin, encoding="utf-8")
    assert len(plugin.strip().splitlines()) <= 21, "in twenty lines, the list among them"
    words = of_page("rewards.md")
    assert len(words) >= 7
    folder = project / "rollouts" / "round_0"
    with serving(lambda body, number: (200, {"score": number})) as (url, seen):
        for one in words:
            assert run([word.replace("http://127.0.0.1:8000/score", url) for word in one]) == 0, one
    assert len(seen) == 4 and {len(body["frames"]) for _, _, body in seen} == {8}
    scored = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "scores").glob("*.json")}
    assert set(scored) == {
        "loudness", "motion", "clipping", "picture_likeness", "voice_likeness", "word_error", "clap", "clip", "http_sync", "dark",
    }  # fmt: skip
    names = [one.name for one in read_rollouts(folder).samples]
    for reward, facts in scored.items():
        without = [name for name in names if facts["scores"][name] is None]
        assert without == (names[:2] if reward == "word_error" else []), "the first prompt quotes no speech"
    assert len(list((folder / "scores" / "loudness_media").glob("*.mp4"))) == 4


def test_the_page_names_every_reward_with_its_route_and_arguments():
    from musubi_tuner.reinforcement.rewards import catalog

    page = (DOCS / "how-to" / "rewards.md").read_text(encoding="utf-8").partition("## Which reward")[2].partition("\n## ")[0]
    rows = {cells[1]: cells for line in page.splitlines() if line.startswith("| `") for cells in [[one.strip() for one in line.split("|")]]}
    named = {name.strip(" `"): cells for first, cells in rows.items() for name in first.split(",")}
    assert set(named) == {kind.name for kind in catalog._BUILT_IN}
    for kind in catalog._BUILT_IN:
        if not kind.name.startswith("http"):
            assert named[kind.name][2] == kind.route
            words = {"model": "model=m", "clips": "clips=c"}
            arguments = [f"{kind.name}.{words[key]}" for key in words if f"`{key}`" in named[kind.name][4]]
            (chosen,) = catalog.choose([kind.name], arguments, ())
            assert all(f"`{key}`" in named[kind.name][4] for key in chosen.arguments)

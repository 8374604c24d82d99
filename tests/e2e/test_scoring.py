"""Scores of rollouts of the tiny 2.3 family: what is decoded, what is kept, what is written, what is refused."""

import contextlib
import gc
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import av
import pytest
import torch

from musubi_tuner import ltxv2_score_rollouts, ltxv2_train_rl
from musubi_tuner.generation import decode as decoders
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.media.write import fit_audio
from musubi_tuner.reinforcement import decoding, scoring
from musubi_tuner.reinforcement.judging import _trial
from musubi_tuner.reinforcement.rewards import catalog
from musubi_tuner.reinforcement.rewards.sound import loudness
from musubi_tuner.reinforcement.rollouts import read_rollouts
from musubi_tuner.reinforcement.scores import rewards_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.lock import held
from tests.rl_parts import make

SOURCES = str(Path(__file__).resolve().parent.parent.parent / "src")
SOUND = ("loudness", "silence", "clipping")
BUILT_IN = "loudness,silence,clipping,sharpness,motion,saturation,onsets"


@pytest.fixture(scope="module")
def made(tiny_family, tmp_path_factory) -> Path:
    return make(tiny_family, tmp_path_factory.mktemp("scored") / "mit Leerzeichen")


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """Rollouts without scores."""
    return Path(shutil.copytree(made, tmp_path / "röll outs"))


def run(family, folder: Path, rewards: str, *flags: str) -> int:
    base = ["--rl_rollout_cache", str(folder), "--reward_fn", rewards, "--device", "cpu", "--vae", str(family.ltx23)]
    return ltxv2_score_rollouts.main([*base, *flags])


def written(folder: Path, reward: str) -> dict:
    return json.loads((folder / "scores" / f"{reward}.json").read_text(encoding="utf-8"))


def plugin(folder: Path, body: str) -> Path:
    """A file of one's own."""
    path = folder / "mine.py"
    path.write_text(f"import math\n\nfrom musubi_tuner.reinforcement.rewards.base import NoScore, Reward\n\n\n{body}", encoding="utf-8")
    return path


def own(folder: Path, methods: str, name: str = "a", route: str = "video", needs: str = "latents") -> Path:
    """A file with one reward, whose methods are lines `signature: body`."""
    lines = "".join(f"    def {line}\n" for line in methods.splitlines())
    return plugin(folder, f"class A(Reward):\n    name, route, needs = {name!r}, {route!r}, [{needs!r}]\n{lines}\n\nREWARDS = [A]\n")


def test_every_built_in_reward_scores_every_sample(tiny_family, folder, caplog):
    caplog.set_level(logging.INFO)
    assert run(tiny_family, folder, BUILT_IN) == 0
    names = {one.name for one in read_rollouts(folder).samples}
    for reward in BUILT_IN.split(","):
        facts = written(folder, reward)
        assert (facts["format"], facts["reward"]) == (1, reward) and set(facts["scores"]) == names == set(facts["fingerprints"])
        assert all(isinstance(score, float) for score in facts["scores"].values()) and not facts["errors"]
        seen, heard = reward not in SOUND, reward in (*SOUND, "onsets")
        assert set(facts["weight_files"]) == {*(["vae"] if seen else []), *(["audio_vae"] if heard else [])}
    assert len(set(written(folder, "loudness")["scores"].values())) == len(names), "samples differ, so what is measured does"
    assert "spread within groups" in caplog.text and "6 of 6" in caplog.text
    assert not list((folder / "scores").glob(".*")), "no lock and no temporary file is left"


def test_scores_are_those_of_the_decoded_media(tiny_family, folder):
    """By generation's own decoder."""
    assert run(tiny_family, folder, "loudness", "--reward_args", "loudness.target=-20") == 0
    rollouts = read_rollouts(folder)
    for one in rollouts.samples[::3]:
        latents = decoding.read_latents(rollouts, one)["audio"][None].float()
        (sound,) = decoders.decode_audio([latents], open_checkpoint(tiny_family.ltx23), torch.device("cpu"))
        assert written(folder, "loudness")["scores"][one.name] == pytest.approx(-abs(loudness(fit_audio(sound, 9 / 24)) + 20), abs=1e-4)


def test_rewards_of_the_sound_never_decode_pictures_and_those_of_pictures_no_sound(tiny_family, folder, monkeypatch):
    seen = []
    for name in ("sound_decoder", "video_decoder"):
        real = getattr(decoding, name)
        monkeypatch.setattr(decoding, name, lambda *given, real=real, name=name: seen.append(name) or real(*given))
    run(tiny_family, folder, "loudness,silence")
    assert seen == ["sound_decoder"]
    run(tiny_family, folder, "motion")
    assert seen == ["sound_decoder", "video_decoder"]
    mine = own(folder, 'score(self, samples): return [float(one.latents["video"].float().mean()) for one in samples]', "mean")
    assert (
        ltxv2_score_rollouts.main(
            ["--rl_rollout_cache", str(folder), "--reward_fn", "mean", "--reward_plugins", str(mine), "--device", "cpu"]
        )
        == 0
    )
    assert len(seen) == 2 and len(written(folder, "mean")["scores"]) == 6


def test_media_of_one_sample_are_held_at_a_time(tiny_family, folder, monkeypatch):
    alive: list[weakref.ref] = []
    most, real = [], scoring._of_sample

    def spy(name, reward, decoded):
        alive.append(weakref.ref(decoded.frames))
        gc.collect()
        most.append(sum(one() is not None for one in alive))
        return real(name, reward, decoded)

    monkeypatch.setattr(scoring, "_of_sample", spy)
    run(tiny_family, folder, "motion")
    assert most == [1] * 6


def test_one_reward_is_alive_at_a_time(tiny_family, folder):
    body = "".join(
        f'class {name.title()}(Reward):\n    name, route, needs = "{name}", "audio", ["audio"]\n\n    def setup(self, device):\n'
        f'        print("up {name}")\n\n    def score(self, samples):\n        return [0.0 for one in samples]\n\n'
        f'    def teardown(self):\n        print("down {name}")\n\n\n'
        for name in ("one", "two")
    )
    mine = plugin(folder, f"{body}REWARDS = [One, Two]\n")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run(tiny_family, folder, "one,two", "--reward_plugins", str(mine))
    assert said.getvalue().split("\n")[:4] == ["up one", "down one", "up two", "down two"]


def test_what_has_a_score_is_not_scored_again(tiny_family, folder, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    run(tiny_family, folder, "loudness")
    before = {path.name: path.read_bytes() for path in (folder / "scores").iterdir()}
    scored, real = [], scoring._of_sample
    monkeypatch.setattr(
        scoring, "_of_sample", lambda one, reward, decoded: scored.append((one.name, decoded.name)) or real(one, reward, decoded)
    )
    run(tiny_family, folder, "loudness,clipping")
    assert {name for name, _ in scored} == {"clipping"} and len(scored) == 6
    assert {name: (folder / "scores" / name).read_bytes() for name in before} == before
    scored.clear()
    facts = written(folder, "loudness")
    del facts["scores"]["g0001_k02"]
    facts["fingerprints"]["g0000_k01"] = "0" * 32
    (folder / "scores" / "loudness.json").write_text(json.dumps(facts), encoding="utf-8")
    run(tiny_family, folder, "loudness")
    assert sorted(scored) == [("loudness", "g0000_k01"), ("loudness", "g0001_k02")]
    assert written(folder, "loudness")["scores"] == json.loads(before["loudness.json"])["scores"]
    scored.clear()
    run(tiny_family, folder, "loudness", "--reward_args", "loudness.target=-16")
    assert len(scored) == 6 and "loudness: scored again, as target was None and is -16.0" in caplog.text


def test_a_stopped_run_goes_on_where_it_was(tiny_family, folder, monkeypatch):
    real, count = scoring._of_sample, []

    def stops(name, reward, decoded):
        count.append(decoded.name)
        if len(count) == 5:
            raise KeyboardInterrupt
        return real(name, reward, decoded)

    monkeypatch.setattr(scoring, "_of_sample", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_family, folder, "loudness")
    assert list(written(folder, "loudness")["scores"]) == count[:4]
    run(tiny_family, folder, "loudness")
    assert count[4:] == ["g0001_k01", "g0001_k01", "g0001_k02"]


def test_a_number_that_is_none_becomes_null_with_its_reason(tiny_family, folder, caplog):
    told = '{"g0000_k00": math.nan, "g0000_k01": math.inf, "g0001_k00": NoScore("no speech"), "g0001_k02": 1e300}'
    mine = own(folder, f"score(self, samples): return [{told}.get(one.name, 1) for one in samples]", "odd")
    assert run(tiny_family, folder, "odd", "--reward_plugins", str(mine)) == 0
    facts = written(folder, "odd")
    assert [facts["scores"][name] for name in ("g0000_k00", "g0000_k01", "g0000_k02", "g0001_k00")] == [None, None, 1.0, None]
    assert facts["scores"]["g0001_k02"] is None
    assert facts["errors"] == {
        "g0000_k00": "the reward gave nan, which is not finite",
        "g0000_k01": "the reward gave inf, which is not finite",
        "g0001_k00": "no speech",
        "g0001_k02": "the reward gave 1e+300; 1e+30 is the most that is compared",
    }
    assert "WARNING: odd: 1 samples have no score" in caplog.text and "no speech (g0001_k00)" in caplog.text


def test_a_reward_that_compares_a_group_gets_whole_groups(tiny_family, folder):
    methods = "score_groups(self, groups): return [[float(place) for place, one in enumerate(group)] for group in groups]"
    mine = own(folder, methods, "rank", "audio", "audio")
    assert run(tiny_family, folder, "rank", "--reward_plugins", str(mine)) == 0
    assert [written(folder, "rank")["scores"][f"g0001_k{k:02d}"] for k in range(3)] == [0.0, 1.0, 2.0]


def test_a_dry_run_writes_nothing_and_refuses_what_tells_no_samples_apart(tiny_family, folder, caplog):
    caplog.set_level(logging.INFO)
    assert run(tiny_family, folder, "loudness,sharpness", "--dry_run") == 0
    assert "noise of scoring" in caplog.text and not (folder / "scores").exists()
    methods = "setup(self, device, value: float): self.value = value\nscore(self, samples): return [self.value for one in samples]"
    mine = own(folder, methods, "same")
    flags = ("--reward_plugins", str(mine), "--dry_run", "--reward_args", "same.value=3")
    with pytest.raises(UserError, match="same: samples of a group do not differ by more than scoring itself does"):
        run(tiny_family, folder, "loudness,same", *flags)
    assert run(tiny_family, folder, "same", *flags, "--force") == 0


def test_a_dry_run_looks_for_a_group_with_scores(tiny_family, folder, caplog):
    """A prompt may have none by a reward."""
    caplog.set_level(logging.INFO)
    value = "None if one.group == 0 else float(one.latents['video'].float().mean())"
    mine = own(folder, f"score(self, samples): return [{value} for one in samples]")
    assert run(tiny_family, folder, "a", "--reward_plugins", str(mine), "--dry_run") == 0
    assert re.search(r"^a +3 ", caplog.text, re.MULTILINE)


def test_stills_are_scored_and_saved(tiny_family, tmp_path):
    stills = make(tiny_family, tmp_path, "--ltx_mode", "video", "--rl_group_size", "2", "--sample_frames", "1", prompts=("a dog",))
    assert run(tiny_family, stills, "saturation,sharpness,motion", "--save_media", "1") == 0
    assert len(set(written(stills, "saturation")["scores"].values())) == 2 and set(written(stills, "motion")["scores"].values()) == {0.0}
    assert len(list((stills / "scores" / "sharpness_media").glob("*.png"))) == 2


def test_training_needs_nothing_of_what_scores(tiny_family):
    """Reading scores loads no models and no media."""
    code = "import sys, musubi_tuner.reinforcement.learning; print([name for name in ('av', 'transformers', 'PIL') if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": SOURCES}
    )
    assert found.stdout.strip() == "[]"


def test_noise_as_large_as_the_spread_is_no_signal():
    assert _trial("r", [(0.0, 0.1), (1.0, 0.9), (2.0, 2.1)]).tells_apart
    noisy = _trial("r", [(0.0, 1.0), (1.0, 0.0), (0.4, 0.6)])
    assert not noisy.tells_apart and noisy.noise == pytest.approx(((1 + 1 + 0.04) / 6) ** 0.5)
    assert not _trial("r", [(1.0, 1.0)]).tells_apart and not _trial("r", [(1.0, 1.0)] * 3).tells_apart


def test_the_best_and_the_worst_are_saved_with_their_scores_in_their_names(tiny_family, folder):
    assert run(tiny_family, folder, "loudness", "--save_media", "2") == 0
    scores = written(folder, "loudness")["scores"]
    ranked = sorted(scores, key=lambda name: -scores[name])
    files = sorted((folder / "scores" / "loudness_media").iterdir())
    wanted = [f"best_{place:02d}_{scores[name]:+.4f}_{name}.mp4" for place, name in ((1, ranked[0]), (2, ranked[1]))]
    wanted += [f"worst_{place:02d}_{scores[name]:+.4f}_{name}.mp4" for place, name in ((1, ranked[-1]), (2, ranked[-2]))]
    assert [path.name for path in files] == wanted
    for path in files:
        with av.open(str(path)) as container:
            assert len(list(container.decode(video=0))) == 9
        with av.open(str(path)) as container:
            assert sum(frame.samples for frame in container.decode(audio=0)) > 0
    assert run(tiny_family, folder, "loudness", "--save_media", "9") == 0
    assert len(list((folder / "scores" / "loudness_media").iterdir())) == 6, "nothing is both"


@pytest.mark.parametrize(
    ("rewards", "flags", "says"),
    [
        ("loudnes", (), "--reward_fn loudnes: no such reward. Did you mean 'loudness'? There are loudness, silence"),
        ("loudness:x", (), "--reward_fn loudness:x: must be NAME:WEIGHT"),
        ("../evil", (), "--reward_fn ../evil: must be NAME:WEIGHT"),
        ("loudness,", (), "must be NAME:WEIGHT"),
        ("loudness,loudness:2", (), "'loudness' is given twice"),
        ("loudness", ("--reward_args", "loudness.taget=1"), "loudness.taget: no such argument. Did you mean 'target'? It takes target."),
        ("loudness", ("--reward_args", "loudness.target=loud"), "loudness.target=loud: must be a number."),
        ("loudness", ("--reward_args", "loudness.target=nan"), "loudness.target=nan: must be a number."),
        ("loudness", ("--reward_args", "motion.most=1"), "'motion' is not in --reward_fn"),
        ("loudness", ("--reward_args", "target=1"), "must be REWARD.KEY=VALUE"),
        ("sharpness", ("--reward_args", "sharpness.x=1"), "sharpness.x: no such argument. It takes none."),
        ("loudness", ("--reward_plugins", "gone.py"), "--reward_plugins gone.py: no such file."),
        ("loudness", ("--force",), "--force: is for --dry_run"),
        ("motion", ("--vae", "other"), "--vae {other}: is another autoencoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_before_anything_is_decoded(tiny_family, folder, rewards, flags, says):
    flags = tuple(str(tiny_family.ltx20) if flag == "other" else flag for flag in flags)
    with pytest.raises(UserError, match=re.escape(says.format(other=tiny_family.ltx20))):
        run(tiny_family, folder, rewards, *flags)
    assert not (folder / "scores").exists()


NOTHING = "score(self, samples): return []"


@pytest.mark.parametrize(
    ("methods", "named", "says"),
    [
        (NOTHING, {"route": None}, "A: `route` = None: must be one of video, audio, sync"),
        (NOTHING, {"route": "both"}, "A: `route` = 'both': must be one of video, audio, sync"),
        (NOTHING, {"needs": "sound"}, "A: `needs` = ['sound']: must be a list of some of video, audio, latents"),
        (NOTHING, {"name": "a/b"}, "A: `name` = 'a/b': must be letters"),
        (NOTHING, {"name": "motion"}, "there is a reward 'motion' already"),
        ("other(self): return 0", {}, "A: has neither `score` nor `score_groups`"),
        (NOTHING, {}, "`score` was given 1 sample and returned []"),
        ("score(self, samples): return 1.0", {}, "`score` was given 1 sample and returned 1.0"),
        ("score(self, samples): return ['x']", {}, "gave 'x' as a score: must be a number"),
        ("score_groups(self, groups): return [[1.0]]", {}, "`score_groups` was given one group of 3 samples and returned [[1.0]]"),
        ("score(self, samples): return [samples[0].frames]", {}, 'its `needs` do not name "video"'),
    ],
)
def test_a_reward_of_ones_own_that_is_none_is_told_what_it_lacks(tiny_family, folder, methods, named, says):
    with pytest.raises(UserError, match=re.escape(says)):
        run(tiny_family, folder, "a", "--reward_plugins", str(own(folder, methods, **named)))


@pytest.mark.parametrize(
    ("methods", "says"),
    [
        ("score(self, samples): return [10**400]", "reward 'a': gave a whole number beyond any float as a score"),
        ("score(self, samples): import torch; return [torch.ones((), device='meta')]", "reward 'a': gave tensor(..., device='meta'"),
        ("score(self, samples): import torch; return [torch.tensor(1j)]", "reward 'a': gave tensor(0.+1.j) as a score"),
        ("score(self, samples): import sys; sys.exit(0)", "the reward 'a' failed to score g0000_k00 (SystemExit: 0)"),
        ("score(self, samples): return [0.5]\nteardown(self): 1 / 0", "the reward 'a' failed to tear itself down (ZeroDivisionError"),
        ("score(self, samples): return [0.5]\nweight_files(self): return None", "the reward 'a' failed to name its files (TypeError"),
        ("score(self, samples): return [0.5]\nweight_files(self): return ['a']", "reward 'a': `weight_files` returned 'a': must be a list"),
    ],
)
def test_whatever_a_reward_of_ones_own_does_is_laid_to_it(tiny_family, folder, methods, says):
    """Neither a traceback, nor an end with 0 before all is scored."""
    with pytest.raises(UserError, match=re.escape(says)):
        run(tiny_family, folder, "a", "--reward_plugins", str(own(folder, methods)))


def test_whatever_a_reason_or_an_argument_is_the_file_of_scores_can_be_read(tiny_family, folder):
    methods = "setup(self, device, a: float = math.nan, b: int = 2**80, c: object = ...): pass\nscore(self, samples): return [NoScore({})]"
    for reason, kept in (("5", "5"), ("None", "None"), ("ValueError('x')", "x"), ("'\\udcff\\n' + 9999 * 'x'", "? " + 298 * "x" + " ...")):
        for _ in range(2):
            assert run(tiny_family, folder, "a", "--reward_plugins", str(own(folder, methods.format(reason)))) == 0
        assert set(written(folder, "a")["errors"].values()) == {kept}
    assert written(folder, "a")["arguments"] == {"a": "nan", "b": str(2**80), "c": "Ellipsis"}
    with pytest.raises(UserError, match="a.b=111.*: must be a whole number"):
        run(tiny_family, folder, "a", "--reward_plugins", str(own(folder, methods)), "--reward_args", f"a.b={'1' * 400}")


def test_what_one_reward_does_to_a_sample_no_other_sees(tiny_family, folder):
    assert run(tiny_family, folder, "motion,loudness") == 0
    alone = [written(folder, name)["scores"] for name in ("motion", "loudness")]
    shutil.rmtree(folder / "scores")
    body = "class A(Reward):\n    name, route, needs, has_model = 'a', 'sync', ['video', 'audio', 'latents'], False\n\n"
    body += "    def score(self, samples):\n        (one,) = samples\n        one.frames.zero_()\n        one.sound.samples.zero_()\n"
    mine = plugin(folder, f"{body}        one.latents['video'].zero_()\n        return [1.0]\n\n\nREWARDS = [A]\n")
    assert run(tiny_family, folder, "a,motion,loudness", "--reward_plugins", str(mine)) == 0
    assert [written(folder, name)["scores"] for name in ("motion", "loudness")] == alone


@pytest.mark.parametrize("values", ["[0.5]", "(0.5,)", "np.array([0.5])", "torch.tensor([0.5])", "torch.tensor([0.5]).bfloat16()"])
def test_scores_may_be_a_list_an_array_or_a_tensor(tiny_family, folder, values):
    mine = own(folder, f"score(self, samples): import numpy as np, torch; return {values}")
    run(tiny_family, folder, "a", "--reward_plugins", str(mine))
    assert set(written(folder, "a")["scores"].values()) == {0.5}


def test_an_argument_without_annotation_has_the_type_of_its_default(tiny_family, folder):
    mine = own(folder, "setup(self, device, least=0.5): self.least = least\nscore(self, samples): return [self.least * 2]")
    run(tiny_family, folder, "a", "--reward_plugins", str(mine), "--reward_args", "a.least=0.25")
    assert set(written(folder, "a")["scores"].values()) == {0.5}


def test_what_a_reward_of_ones_own_raises_names_its_line_and_the_sample(tiny_family, folder):
    """And what was scored before it is kept."""
    mine = own(folder, "score(self, samples): return [1 / (samples[0].name != 'g0001_k00')]")
    with pytest.raises(UserError, match=re.escape(f"{mine}, line 8: the reward 'a' failed to score g0001_k00 (ZeroDivisionError")):
        run(tiny_family, folder, "a", "--reward_plugins", str(mine))
    assert list(written(folder, "a")["scores"]) == ["g0000_k00", "g0000_k01", "g0000_k02"]
    mine = own(folder, "setup(self): pass\nscore(self, samples): return [1]")
    with pytest.raises(UserError, match="the reward 'a' failed to set itself up .TypeError"):
        run(tiny_family, folder, "a", "--reward_plugins", str(mine))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"samples": []}, "'samples' is no list of samples"),
        ({"samples": [{"name": "g0000_k00"}]}, "the sample {'name': 'g0000_k00'} is none"),
        ({"samples": [{"name": "../g0000_k00", "prompt": 0, "k": 0, "seed": 1}]}, "a sample is called '../g0000_k00'"),
        ({"samples": [{"name": "g0000_k00", "prompt": 9, "k": 0, "seed": 1}]}, "the sample g0000_k00 is of prompt 9, and there are 2"),
        ({"prompts": [{"id": 0}]}, "'prompts' is no list of prompts"),
        ({"fps": 0}, "'fps' is 0"),
        ({"frames": "9"}, "'frames' is '9'"),
        ({"mode": "audio"}, "'mode' is 'audio'"),
        ({"model": {"name": "a"}}, "'model' is {'name': 'a'}"),
        ({"policy": "mila.safetensors"}, "'policy' is 'mila.safetensors'"),
        ({"sampling": {"guided": False}}, "'sampling' is {'guided': False}"),
        ({"timestep_format": ...}, "'timestep_format' is missing"),
    ],
)
def test_damaged_rollouts_are_told_of(folder, change, says):
    path = folder / "rollouts.json"
    facts = json.loads(path.read_text(encoding="utf-8")) | change
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not ...}), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{path}: {says}")):
        read_rollouts(folder)


def test_what_stands_in_the_way_of_the_scores_is_told_of(tiny_family, folder):
    (folder / "scores").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="scores is a file, not a folder"):
        run(tiny_family, folder, "loudness")
    (folder / "scores").unlink()
    (folder / "g0001_k00_ltxv2_audio.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="cannot be used .g0001_k00_ltxv2_audio.safetensors is damaged"):
        run(tiny_family, folder, "loudness")
    assert not (folder / "scores").exists()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("", "must end in REWARDS = [...]"),
        ("class A(Reward):\n    name, needs = 'a', ['video']\n\n\nREWARDS = [A]\n", "A: `route` = None"),
        ("class A:\n    pass\n\n\nREWARDS = [A]\n", "is no class that subclasses Reward"),
        ("1 / 0\n", "cannot be run (ZeroDivisionError: division by zero)"),
    ],
)
def test_a_file_without_rewards_is_refused(tiny_family, folder, body, says):
    with pytest.raises(UserError, match=re.escape(says)):
        run(tiny_family, folder, "a", "--reward_plugins", str(plugin(folder, body)))


def test_another_file_with_the_same_reward_scores_again(tiny_family, folder):
    for value in (1.0, 2.0):
        run(tiny_family, folder, "a", "--reward_plugins", str(own(folder, f"score(self, samples): return [{value}]")))
        assert set(written(folder, "a")["scores"].values()) == {value}


def test_scores_are_learned_from(tiny_family, folder, tmp_path):
    """And those of other samples are not."""
    run(tiny_family, folder, "loudness,motion")
    flags = ["--rl_rollout_cache", str(folder), "--reward_fn", "loudness:1.0,motion:0.5", "--ltxv2_model", str(tiny_family.ltx23)]
    flags += ["--device", "cpu", "--mixed_precision", "no", "--no-compile", "--network_dim", "4", "--max_data_loader_n_workers", "0"]
    flags += ["--max_train_steps", "2", "--output_dir", str(tmp_path / "out")]
    assert ltxv2_train_rl.main(flags) == 0
    path = folder / "g0001_k01_ltxv2.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="'fingerprints': g0001_k01: its latents are no longer those that were scored"):
        rewards_of(read_rollouts(folder), "loudness")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "its format is not 1"),
        ({"reward": "motion"}, "'reward' = 'motion': must be 'loudness'"),
        ({"route": "both"}, "'route' = 'both': must be one of"),
        ({"scores": {"g0000_k00": "1"}}, "'scores': g0000_k00 = '1': must be a number of at most 1e+30, or null"),
        ({"scores": {"g0000_k00": True}}, "'scores': g0000_k00 = True: must be a number of at most 1e+30, or null"),
        ({"scores": {"g0000_k00": 1e31}}, "g0000_k00 = 1e+31: must be a number of at most 1e+30, or null"),
        ({"scores": {"g0099_k00": 1.0}}, "'scores': g0099_k00: there is no such sample"),
        ({"scores": [1]}, "'scores' = [1]: must be an object"),
        ({"errors": {"g0000_k00": 1}}, "'errors': g0000_k00 = 1: must be text"),
    ],
)
def test_a_damaged_file_of_scores_names_what_is_wrong(folder, change, says):
    facts = {"format": 1, "reward": "loudness", "route": "audio", "arguments": {}, "weight_files": {}, "scores": {}, "errors": {}}
    (folder / "scores").mkdir()
    (folder / "scores" / "loudness.json").write_text(json.dumps(facts | change), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(says)):
        rewards_of(read_rollouts(folder), "loudness")


def test_a_folder_is_scored_by_one_run_at_a_time(tiny_family, folder):
    (folder / "scores").mkdir()
    with held(folder / "scores" / ".scoring.lock", what="it", remedy=""), pytest.raises(UserError, match="is at work on the scores of"):
        run(tiny_family, folder, "loudness")


def test_rewards_of_sound_need_rollouts_with_sound(tiny_family, tmp_path):
    silent = make(tiny_family, tmp_path, "--ltx_mode", "video", "--rl_group_size", "2", prompts=("a dog",))
    with pytest.raises(UserError, match="--reward_fn onsets: is about sound, and the rollouts in .* have none"):
        run(tiny_family, silent, "onsets")
    assert run(tiny_family, silent, "motion", "--save_media", "1") == 0
    assert len(list((silent / "scores" / "motion_media").glob("*.mp4"))) == 2


def test_every_built_in_reward_is_whole():
    """As a file of one's own has to be."""
    for kind in catalog._BUILT_IN:
        catalog._check(kind, "built in")
        assert kind.__doc__

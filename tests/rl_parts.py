"""What the tests of reinforcement learning share: rollouts on the tiny family, made by the program, and a reward of their latents."""

import json
from pathlib import Path

from musubi_tuner import ltxv2_cache_rollouts
from musubi_tuner.dataset.merge import merge_sources
from musubi_tuner.reinforcement.rollouts import read_rollouts

SIZE = ("--sample_width", "96", "--sample_height", "64", "--sample_frames", "9", "--sample_steps", "4")
UNGUIDED = ("--video_cfg_scale", "1", "--audio_cfg_scale", "1", "--stg_scale", "0", "--modality_scale", "1")
PROMPTS = ("a dog barks", "rain on a tin roof")


def make(family, folder: Path, *flags: str, prompts: tuple[str, ...] = PROMPTS) -> Path:
    """Rollouts in `folder`/rollouts."""
    assert ltxv2_cache_rollouts.main(arguments(family, folder, *flags, prompts=prompts)) == 0
    return folder / "rollouts"


def arguments(family, folder: Path, *flags: str, prompts: tuple[str, ...] = PROMPTS) -> list[str]:
    """Of the program that makes them; writes the prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    files = ["--rl_prompts", str(folder / "prompts.txt"), "--rl_rollout_cache", str(folder / "rollouts")]
    model = ["--ltxv2_model", str(family.ltx23), "--device", "cpu", "--text_encoder", str(family.gemma)]
    return [*files, *model, "--rl_group_size", "3", *SIZE, *UNGUIDED, *flags]


def score(folder: Path, name: str = "tone", route: str = "sync", key: str = "latents") -> dict[str, float]:
    """A reward that is cheap and real: the mean of a sample's latents."""
    samples = read_rollouts(folder).samples
    scores = {}
    for one in samples:
        files = [folder / f"{one.name}_ltxv2{kind}.safetensors" for kind in ("", "_audio")]
        scores[one.name] = float(merge_sources([path for path in files if path.is_file()])[key].float().mean())
    (folder / "scores").mkdir(exist_ok=True)
    facts = {"format": 1, "reward": name, "route": route, "arguments": {}, "weight_files": {}, "scores": scores, "errors": {}}
    (folder / "scores" / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")
    return scores

"""Many recipes for a LoRA in one process: trained on a lesson's latents, sampled in batches, and read by the scorer.

python -m dev.world.trials FOLDER TRIALS.toml [--only NAME ...]      TRIALS.toml: tables `[NAME]` with fields of `Trial`, `seeds`, and
                                                                     `like`, the name of a table whose fields hold besides

Each trial is a line of FOLDER/trials.jsonl and is not made again; `--table` prints them. See `lab.py` for what differs from the programs.
"""

import argparse
import json
import math
import random
import re
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dev.world.lab import SAMPLING_STEPS, Examples, Lab, Scores
from dev.world.transformer import AUDIO_TOKENS, VIDEO_TOKENS
from musubi_tuner.flow.path import add_noise, velocity_target
from musubi_tuner.flow.sigma import SigmaSettings, draw_sigma
from musubi_tuner.ltxv2.transformer.modality import Velocity
from musubi_tuner.networks.lora_ltxv2 import LoRANetwork, create_network
from musubi_tuner.tiny.world.lesson import Lesson, lesson_subjects, prompt_subjects
from musubi_tuner.tiny.world.subjects import CHARACTER
from musubi_tuner.training.optimizer import make_optimizer

SHOWN = {"character": ("identity", "shape", "color", "eye", "voice"), "base": ("color", "shape", "motion", "ground", "voice")}
_HELD_OUT, _HELD_OUT_SEED, _LEVELS = 72, 1000, 8
"""Clips of each kind that are not trained, the seed that draws them, and noise levels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One recipe."""

    args: Mapping[str, str] = field(default_factory=lambda: {"preset": "attention_ff"})
    """`--network_args`"""
    dim: int = 32
    alpha: float = 48.0
    rate: float = 2.5e-3
    audio_rate: float | None = None
    optimizer: str = "AdamW"
    """`--optimizer_type`"""
    optimizer_args: Mapping[str, str] = field(default_factory=dict)
    warmup: float = 0.02
    """Share of the steps."""
    schedule: str = "cosine"
    steps: int = 300
    character: int = 4
    """Clips of the character in a step."""
    reminded: int = 0
    """Clips of the base world beside them."""
    mixed: bool = True
    """False: a step has one of both kinds, drawn by their numbers, as batches of two datasets have."""
    reminders: int = 18
    """Different ones that there are."""
    teacher: bool = False
    """Reminders learn what the base model predicts of them (`preserve_base`)."""
    dop: str | None = None
    """`--dop_prompt`, in place of the character's name in its captions: what the base model predicts with it is to be kept."""
    clips: int = 16
    reminder_weight: float = 1.0
    """Of reminders' losses."""
    video_weight: float = 1.0
    audio_weight: float = 1.0
    sigma: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SigmaSettings`."""
    independent: bool = False
    """The sound's noise level is drawn separately."""
    dropped: tuple[float, float] = (0.0, 0.0)
    """Shares of clips without their caption: of the character and of reminders."""
    average: float = 0.0
    """Decay of a moving average, which is then what is sampled."""
    strengths: tuple[float, ...] = (1.0,)
    """Of the LoRA, when it is sampled."""
    guidances: tuple[float, ...] = (3.0,)
    looks: int = 1
    """How often it is sampled, evenly spread over the steps."""
    looks_from: int = 1
    """The first of them at which samples are made, and not held-out losses alone."""
    seed: int = 0
    prompts: int = 32
    misnamed: bool = False


class Training:
    """A trial on its way."""

    def __init__(self, lab: Lab, trial: Trial) -> None:
        self._lab, self._trial = lab, trial
        lesson = lesson_of(trial)
        characters, reminders = lesson_subjects(lesson)
        self._known = [lab.examples("character", characters, trial.seed), lab.examples("reminders", reminders, trial.seed)]
        if trial.misnamed:
            self._known = _moved_on(self._known)
        lab.text([caption for one in self._known for caption in one.captions])
        if trial.dop is not None:
            lab.text([self._of_the_class(caption) for caption in self._known[0].captions])
        self.model = lab.model()
        self.network: LoRANetwork = create_network(self.model.model, dim=trial.dim, alpha=trial.alpha, args=trial.args, seed=trial.seed)
        for parameter in self.network.parameters():
            parameter.requires_grad_(True)
        groups = self.network.parameter_groups(trial.rate, trial.audio_rate)
        self._optimizer = make_optimizer(trial.optimizer, groups, trial.rate, trial.optimizer_args)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._average = [parameter.detach().clone() for parameter in self.network.parameters()]
        self._sigma = SigmaSettings(**trial.sigma)
        self._random = random.Random(f"lab|{trial.seed}")
        self._generator = torch.Generator().manual_seed(trial.seed)
        self._turns = [self._endless(len(one.captions)) for one in self._known]

    def step(self, number: int) -> None:
        """One update."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share_of_rate(self._trial, number)
        character, reminded = self._trial.character, self._trial.reminded
        if not self._trial.mixed:
            alone = self._random.random() < character / (character + reminded)
            character, reminded = (character + reminded, 0) if alone else (0, character + reminded)
        self._optimizer.zero_grad()
        self._loss(character, reminded).backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self._optimizer.step()
        kept = min(self._trial.average, (1 + number) / (10 + number))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, [one.detach() for one in self.network.parameters()], 1 - kept)

    def _loss(self, character: int, reminded: int) -> Tensor:
        trial, generator = self._trial, self._generator
        chosen = [(kind, next(self._turns[kind])) for kind, count in enumerate((character, reminded)) for _ in range(count)]
        clean = [torch.stack([getattr(self._known[kind], stream)[place] for kind, place in chosen]) for stream in ("video", "audio")]
        captions = [self._known[kind].captions[place] for kind, place in chosen]
        text = self._lab.text(
            ["" if self._random.random() < trial.dropped[kind] else one for one, (kind, _) in zip(captions, chosen, strict=True)]
        )
        drawn = [[draw_sigma(self._sigma, tokens, generator) for _ in chosen] for tokens in (VIDEO_TOKENS, AUDIO_TOKENS)]
        video_sigma, audio_sigma = (torch.tensor(one) for one in (drawn if trial.independent else (drawn[0], drawn[0])))
        noise = [torch.randn(one.shape, generator=generator) for one in clean]
        levels = (video_sigma[:, None, None], audio_sigma[:, None, None])
        noised = [add_noise(x, n, sigma) for x, n, sigma in zip(clean, noise, levels, strict=True)]
        inputs = (*noised, video_sigma, audio_sigma, *text)
        targets = [velocity_target(x, n) for x, n in zip(clean, noise, strict=True)]
        if trial.teacher and reminded:
            with torch.no_grad(), self.network.disabled():
                base = self.model(*(one[character:] for one in inputs))
            for target, own in zip(targets, base, strict=True):
                assert own is not None
                target[character:] = own
        seeds = [self._random.getrandbits(60) for _ in chosen]
        with self.network.dropout(seeds):
            predicted: Velocity = self.model(*inputs)
        weights = torch.tensor([trial.reminder_weight if kind else 1.0 for kind, _ in chosen])
        errors = [(v - target).square().mean((1, 2)) for v, target in zip(predicted, targets, strict=True) if v is not None]
        losses = [(error * weights).mean() for error in errors]
        if trial.dop is not None and character:
            losses = [
                loss + more for loss, more in zip(losses, self._changes_of_the_class(inputs, captions[:character], seeds), strict=True)
            ]
        return trial.video_weight * losses[0] + trial.audio_weight * losses[1]

    def _of_the_class(self, caption: str) -> str:
        assert self._trial.dop is not None
        return caption.replace(CHARACTER, self._trial.dop)

    def _changes_of_the_class(self, inputs: Sequence[Tensor], captions: Sequence[str], seeds: Sequence[int]) -> list[Tensor]:
        """By stream, of the same noised clips with the class prompt: mean squared change of the base model's prediction."""
        count = len(captions)
        of_class = (*(one[:count] for one in inputs[:4]), *self._lab.text([self._of_the_class(caption) for caption in captions]))
        with torch.no_grad(), self.network.disabled():
            base = self.model(*of_class)
        with self.network.dropout(seeds[:count]):
            predicted = self.model(*of_class)
        return [(v - own).square().mean() for v, own in zip(predicted, base, strict=True) if v is not None and own is not None]

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Losses of clips that are not trained, at even noise levels; an average over them says more than samples, and sooner."""
        lesson = replace(lesson_of(self._trial), clips=_HELD_OUT, reminders=_HELD_OUT, seed=_HELD_OUT_SEED)
        found = {}
        characters, others = lesson_subjects(lesson)
        for kind, subjects in (("zorbo", characters), ("base", others), ("unnamed", others)):
            clips = self._lab.examples(kind, subjects, _HELD_OUT_SEED)
            captions = [""] * len(subjects) if kind == "unnamed" else clips.captions
            generator = torch.Generator().manual_seed(_HELD_OUT_SEED)
            noise = [torch.randn(one.shape, generator=generator) for one in (clips.video, clips.audio)]
            sigma = (torch.arange(len(clips.captions)) % _LEVELS + 0.5) / _LEVELS
            noised = [add_noise(x, n, sigma[:, None, None]) for x, n in zip((clips.video, clips.audio), noise, strict=True)]
            predicted = self.model(*noised, sigma, sigma, *self._lab.text(captions))
            for stream, v, clean, own in zip(("video", "audio"), predicted, (clips.video, clips.audio), noise, strict=True):
                assert v is not None
                found[f"{kind} {stream}"] = round(float((v - velocity_target(clean, own)).square().mean()), 4)
        return found

    def _endless(self, count: int) -> Iterator[int]:
        while True:
            yield from self._random.sample(range(count), count)

    def looked_at(self, strength: float, guidance: float) -> Scores:
        """Scores of what has been learned so far."""
        parameters = self.network.parameters()
        mine = [one.detach().clone() for one in parameters]
        with torch.no_grad():
            if self._trial.average:
                torch._foreach_copy_(list(parameters), self._average)
            for layer in self.network.layers.values():
                layer.scale *= strength
            scores = self._lab.read(self.model, *prompt_subjects(lesson_of(self._trial)), guidance)
            for layer in self.network.layers.values():
                layer.scale /= strength
            torch._foreach_copy_(list(parameters), mine)
        return scores


def lesson_of(trial: Trial) -> Lesson:
    """The lesson that the learning benchmark would write."""
    half = trial.prompts // 2
    return Lesson(
        clips=trial.clips,
        reminders=trial.reminders,
        character_prompts=half,
        base_prompts=trial.prompts - half,
        steps=SAMPLING_STEPS,
        seed=trial.seed,
    )


def share_of_rate(trial: Trial, number: int) -> float:
    """Of the learning rate at a step: a warm-up, then even (`constant`) or half a wave down to nothing (`cosine`)."""
    warm = trial.warmup * trial.steps
    if number < warm:
        return (number + 1) / (warm + 1)
    return 1.0 if trial.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * (number - warm) / max(1.0, trial.steps - warm)))


def run_trial(lab: Lab, trial: Trial) -> dict[str, Any]:
    """Train and look; the seconds are of the process, training alone."""
    training = Training(lab, trial)
    every = trial.steps // trial.looks
    spent, found, held = 0.0, {}, {}
    for number in range(trial.steps):
        started = time.process_time()
        training.step(number)
        spent += time.process_time() - started
        if (number + 1) % every == 0:
            print(trial.seed, number + 1, losses := training.held_out(), f"{spent:.0f} s", flush=True)
            held[str(number + 1)] = losses
            for strength in trial.strengths if (number + 1) // every >= trial.looks_from else ():
                for guidance in trial.guidances:
                    found[f"{number + 1}, strength {strength:g}, guidance {guidance:g}"] = training.looked_at(strength, guidance)
    return {"cpu_seconds": round(spent, 1), "looks": found, "held_out": held}


def _moved_on(known: Sequence[Examples]) -> list[Examples]:
    """Captions moved on by half of the clips, as in a misnamed lesson."""
    captions = [caption for one in known for caption in one.captions]
    half, count = len(captions) // 2, len(known[0].captions)
    captions = captions[half:] + captions[:half]
    return [replace(known[0], captions=captions[:count]), replace(known[1], captions=captions[count:])]


def line(name: str, seed: int, look: str, scores: Scores, seconds: float) -> str:
    """A row of the table."""
    cells = [f"{scores[kind][one]:.2f}" for kind, names in SHOWN.items() for one in names]
    return f"| {name} | {seed} | {look} | {' | '.join(cells)} | {seconds:.0f} |"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of all trials."""
    heads = [f"{'zorbo' if kind == 'character' else 'base'}: {one}" for kind, names in SHOWN.items() for one in names]
    lines = [f"| trial | seed | step | {' | '.join(heads)} | CPU s |", "|" + "---|" * (4 + len(heads))]
    for row in rows:
        lines += [line(row["name"], row["trial"]["seed"], look, scores, row["cpu_seconds"]) for look, scores in row["looks"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("trials", type=Path, nargs="?", help="TOML")
    parser.add_argument("--only", nargs="+", help="regular expressions over names")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    results = options.folder / "trials.jsonl"
    rows = [json.loads(text) for text in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []
    if options.table:
        print(table(rows))
        return
    lab = Lab(options.folder)
    tables = tomllib.loads(options.trials.read_text(encoding="utf-8"))
    for name, own in tables.items():
        values = tables[own["like"]] | {key: value for key, value in own.items() if key != "like"} if "like" in own else dict(own)
        if options.only and not any(re.fullmatch(pattern, name) for pattern in options.only):
            continue
        for seed in values.pop("seeds", [values.get("seed", 0)]):
            trial = Trial(**(values | {"seed": seed}))
            if any(row["name"] == name and row["trial"] == json.loads(json.dumps(asdict(trial))) for row in rows):
                continue
            row = {"name": name, "trial": asdict(trial), **run_trial(lab, trial)}
            for look, scores in row["looks"].items():
                print(line(name, seed, look, scores, row["cpu_seconds"]), flush=True)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

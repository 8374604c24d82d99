"""A small complete world, made once by the real programs, and what each malformed input is told of it.

    dataset.toml  sounds.toml  clips/ stills/ sounds/ cache/  clips.jsonl  captions beside the media
    recipe.toml   prompts.txt prompts.toml prompts.json   flags.toml        lora.safetensors  state/
    models/model.safetensors  models/vae.safetensors  models/audio_vae.safetensors  models/gemma3/   precomputed/
    models/upsampler.safetensors  models/duration_head.safetensors   models/other.safetensors (one weight differs)   other.safetensors
    pack.tar packed/ (of dataset.toml)   references.toml edges/   scenes/   tree/ (diffusers)   rollouts/ scored/

An input runs in a scratch folder that holds all of it, small files copied and large ones linked, and changes what is malformed there.
Names are relative to that folder, which is the working directory of the run.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_all, ltxv2_checkpoint, ltxv2_dataset, ltxv2_doctor, ltxv2_lora, ltxv2_rl_rounds, make_tiny
from musubi_tuner.cache.names import strip_key
from musubi_tuner.cache.store import serialize, write_bytes
from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.tiny.checkpoint import write_tiny_family
from musubi_tuner.tiny.clips import write_audio_files, write_clips, write_stills
from tools.make_options_table import PROGRAMS as DOCUMENTED

_RUN_OTHERS = (ltxv2_cache_all, ltxv2_rl_rounds)
CONFIGS = {program.module: program.config for program in DOCUMENTED if not program.subcommand and program.module not in _RUN_OTHERS}
"""Of every program but those that run several of them, and those with subcommands."""
CONFIGS |= {ltxv2_doctor: TrainingConfig, make_tiny: make_tiny.TinyConfig}
_WITH_SUBCOMMANDS = {"lora": ltxv2_lora, "checkpoint": ltxv2_checkpoint, "dataset": ltxv2_dataset}
SUBCOMMANDS = {f"{command} {name}": one for command, module in _WITH_SUBCOMMANDS.items() for name, one in module.SUBCOMMANDS.items()}
"""Each counts as a program, called as after `ltxv2`."""


def _main_of(command: str) -> Callable[[list[str]], int]:
    name, _, subcommand = command.partition(" ")
    return lambda words: _WITH_SUBCOMMANDS[name].main([subcommand, *words])


MAINS: Mapping[str, Callable[[list[str]], int]] = {
    **{module.__name__.rpartition(".")[2]: module.main for module in CONFIGS},
    **{command: _main_of(command) for command in SUBCOMMANDS},
}

LATENTS, SOUND, TEXT = "ltxv2_cache_latents", "ltxv2_cache_audio_latents", "ltxv2_cache_text_encoder_outputs"
TRAIN, IMPORT, ADOPT, DOCTOR, TINY = "ltxv2_train_network", "ltxv2_import_precomputed", "ltxv2_adopt_caches", "ltxv2_doctor", "make_tiny"
GENERATE, REPORT, ROLLOUTS, TRAIN_RL = "ltxv2_generate_video", "ltxv2_report", "ltxv2_cache_rollouts", "ltxv2_train_rl"
SCORE = "ltxv2_score_rollouts"

_DATASET = """\
[general]
resolution = [96, 64]
target_frames = [9]
batch_size = 1

[[datasets]]
video_directory = "clips"
cache_directory = "cache"

[[datasets]]
image_directory = "stills"
cache_directory = "cache"
"""
_SOUNDS = """\
[[datasets]]
audio_directory = "sounds"
cache_directory = "sound_cache"
"""
_REFERENCES = """\
[general]
resolution = [96, 64]
target_frames = [9]

[[datasets]]
video_directory = "clips"
reference_directory = "edges"
cache_directory = "reference_cache"
"""
_RECIPE = """\
[[video]]
rule = "first_frame"
probability = 0.5

[[audio]]
rule = "prefix"
seconds = [0.04, 0.1]
"""
_PROMPTS = """\
# one from text, one from a picture
A disc moves. --w 64 --h 32 --f 9 --d 7 --s 1 --fr 24 --l 3 --al 7 --n blurry
A disc again. --f 9 --w 64 --h 32 --s 1 --i stills/still_000.png
"""
_PROMPTS_TOML = """\
[prompt]
width = 64
height = 32
frame_count = 9
sample_steps = 1

[[prompt.subset]]
prompt = "A disc moves."
seed = 7
cfg_scale = 3.0
image_path = "stills/still_000.png"
"""
_ENTRY = {"prompt": "A disc moves.", "width": 64, "height": 32, "frame_count": 9, "sample_steps": 1, "seed": 7, "cfg_scale": 3.0}
_FLAGS = """\
learning_rate = 1e-3
network_args = ["rank_dropout=0.1"]
seed = 3
"""

_COMMON = ("--dataset_config", "dataset.toml", "--ltx_mode", "av", "--device", "cpu")
_MODEL = ("--ltxv2_model", "models/model.safetensors")
_TRAINING = (
    *_COMMON, *_MODEL, "--vae", "models/vae.safetensors", "--audio_vae", "models/audio_vae.safetensors",
    "--ltxv2_timestep_format", "flowmatch_1_1000", "--network_dim", "2", "--network_alpha", "2", "--max_data_loader_n_workers", "0",
    "--mixed_precision", "no", "--learning_rate", "1e-3", "--max_train_steps", "1", "--output_dir", "output",
)  # fmt: skip
_MADE = ("--output", "made.safetensors")
ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    LATENTS: (*_COMMON, "--vae", "models/vae.safetensors"),
    SOUND: (*_COMMON, "--audio_vae", "models/audio_vae.safetensors"),
    TEXT: (*_COMMON, *_MODEL, "--text_encoder", "models/gemma3"),
    TRAIN: _TRAINING,
    DOCTOR: _TRAINING,
    IMPORT: (
        "--precomputed_directory", "precomputed", "--output_dir", "imported", "--ltx_mode", "av", "--device", "cpu", *_MODEL,
        "--vae", "models/vae.safetensors", "--audio_vae", "models/audio_vae.safetensors",
    ),
    ADOPT: (
        "--dataset_config", "dataset.toml", "--ltx_mode", "av", *_MODEL, "--vae", "models/vae.safetensors",
        "--audio_vae", "models/audio_vae.safetensors",
    ),
    GENERATE: (
        *_MODEL, "--vae", "models/vae.safetensors", "--audio_vae", "models/audio_vae.safetensors", "--text_encoder", "models/gemma3",
        "--prompt", "a dog --w 64 --h 64 --f 9 --s 1", "--output_dir", "generated", "--device", "cpu",
        "--sample_width", "64", "--sample_height", "64", "--sample_frames", "9", "--sample_steps", "1",
    ),
    ROLLOUTS: (
        *_MODEL, "--vae", "models/vae.safetensors", "--audio_vae", "models/audio_vae.safetensors", "--text_cache", "cache",
        "--rl_prompts", "rl_prompts.txt", "--rl_rollout_cache", "rollouts", "--rl_group_size", "2", "--device", "cpu",
        "--sample_width", "64", "--sample_height", "64", "--sample_frames", "9", "--sample_steps", "2", "--rl_sde_type", "cps",
        "--video_cfg_scale", "1", "--audio_cfg_scale", "1", "--stg_scale", "0", "--modality_scale", "1",
    ),
    SCORE: (
        "--rl_rollout_cache", "rollouts", "--reward_fn", "loudness,motion", "--vae", "models/vae.safetensors",
        "--audio_vae", "models/audio_vae.safetensors", "--device", "cpu",
    ),
    TRAIN_RL: (
        "--rl_rollout_cache", "rollouts", "--reward_fn", "tone:1", *_MODEL, "--vae", "models/vae.safetensors",
        "--audio_vae", "models/audio_vae.safetensors", "--device", "cpu", "--network_dim", "2", "--network_alpha", "2",
        "--max_data_loader_n_workers", "0", "--mixed_precision", "no", "--max_train_steps", "1", "--output_dir", "output",
    ),
    REPORT: ("--runs", "trained", "--output", "page.html"),
    TINY: ("--output_dir", "tiny"),
    **{
        f"lora {name}": ("--lora", "lora.safetensors", *more)
        for name, more in {
            "inspect": ("--modules", "--json", "made.json"), "convert": ("--to", "kohya", *_MADE), "strip": ("--remove", "audio", *_MADE),
            "scale": ("--strength", "0.5", *_MADE), "resize": ("--rank", "1", *_MADE), "card": ("--output", "README.md"),
            "publish": ("--huggingface_repo_id", "a/b"), "metadata": ("--set", "a=b", *_MADE),
        }.items()
    },
    "lora merge": ("--loras", "lora.safetensors", "other.safetensors:0.5", *_MADE),
    "lora average": ("--loras", "lora.safetensors", "other.safetensors", *_MADE),
    "lora extract": ("--tuned", "models/model.safetensors", "--base", "models/other.safetensors", "--rank", "2", "--device", "cpu", *_MADE),
    **{
        f"checkpoint {name}": ("--checkpoint", "models/model.safetensors", *more)
        for name, more in {
            "inspect": ("--config", "--json", "made.json"), "verify": (), "split": ("--output_dir", "components"),
            "quantize": ("--to", "fp8", "--keep_blocks", "0", *_MADE), "bake": ("--lora", "lora.safetensors", *_MADE),
        }.items()
    },
    "checkpoint join": ("--checkpoints", "models/model.safetensors", "models/vae.safetensors", *_MADE),
    "checkpoint compare": ("--checkpoints", "models/model.safetensors", "models/other.safetensors"),
    "checkpoint convert": ("--checkpoints", "tree", "--to", "single_file", *_MADE),
    "dataset split-scenes": ("--input", "clips/clip_000.mp4", "--output_dir", "made", "--min_seconds", "0.1"),
    "dataset trim": ("--input", "clips/clip_000.mp4", "--end", "0.2", "--output", "made.mp4"),
    "dataset crop": ("--input", "clips/clip_000.mp4", "--output_dir", "made", "--aspect", "1:1"),
    "dataset caption": ("--media", "clips", "--endpoint", "http://127.0.0.1:9/v1", "--retries", "0", "--timeout", "1"),
    "dataset references": ("--dataset_config", "references.toml", "--kind", "gray"),
    "dataset audit": ("--dataset_config", "dataset.toml", "--page", "audit.html", "--json", "audit.json"),
    "dataset decode": (
        "--dataset_config", "dataset.toml", "--vae", "models/vae.safetensors", "--audio_vae", "models/audio_vae.safetensors",
        "--output_dir", "made", "--device", "cpu",
    ),
    "dataset pack": ("--dataset_config", "dataset.toml", "--output", "made.tar"),
    "dataset unpack": ("--pack", "packed", "--output", "made"),
}  # fmt: skip
"""Flags with which a program accepts the world as it is."""
DRY = ("--dry_run",)
"""What makes a caching program plan and not encode."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Malformed:
    """One input."""

    id: str
    """`family/...`, the same in every run."""
    program: str
    base: tuple[str, ...] | None = None
    """Flags in place of those of `ARGUMENTS`."""
    more: tuple[str, ...] = ()
    """Flags after them; the last one of a name counts."""
    prepare: Callable[[Path], None] = field(default=lambda folder: None)
    """Makes the malformed files in the scratch folder."""
    expect: str = "any"
    """`refused`, `told` (refused, or the output names it), `accepted` or `any`."""
    names: tuple[str, ...] = ()
    """What the message must name: at least one of them; nothing: not checked."""

    @property
    def family(self) -> str:
        return self.id.partition("/")[0]

    @property
    def argv(self) -> list[str]:
        return [*(ARGUMENTS[self.program] if self.base is None else self.base), *self.more]


def writes(name: str, data: bytes | str) -> Callable[[Path], None]:
    """A `prepare` that puts `data` in place of the file."""
    return lambda folder: put(folder, name, data)


def put(folder: Path, name: str, data: bytes | str) -> None:
    """A new file in place of the old one, which may be a link to the world's."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


def make_world(folder: Path) -> Path:
    """The world, made where it is not there yet, or another one is; several processes may ask for it at once."""
    done = folder / "complete"
    made_by = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    if done.is_file() and done.read_text(encoding="utf-8") == made_by:
        return folder
    making, before = folder.with_name(f"{folder.name} {os.getpid()}"), Path.cwd()
    making.mkdir(parents=True)
    _write_models(making)
    write_clips(making / "clips", count=2, frames=9)
    write_stills(making / "stills", count=1)
    write_audio_files(making / "sounds", count=1, seconds=0.4)
    _write_documents(making)
    os.chdir(making)
    try:
        _run_programs()
    finally:
        os.chdir(before)
    _write_precomputed(making)
    put(making, "trained/lora-loss.jsonl", '{"step": 1, "loss_video": 0.5}\n')
    (making / "complete").write_text(made_by, encoding="utf-8")
    if done.is_file() and done.read_text(encoding="utf-8") == made_by:
        shutil.rmtree(making)  # another process was faster
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return folder


_FOR_TOOLS = ("pack.tar", "packed", "references.toml", "edges", "scenes", "tree", "scored", "other.safetensors")


def furnish(scratch: Path, world: Path, *, for_tools: bool = True) -> None:
    """The world in a new scratch folder: large files as links, everything else as copies; and `loop`, a link to itself.

    Args:
        for_tools: with what the subcommands and the scores of rollouts alone need.
    """

    def take(source: str, target: str) -> str:
        linked = Path(source).stat().st_size > 2**16
        return str(os.link(source, target)) if linked else str(shutil.copyfile(source, target))

    shutil.copytree(world, scratch, copy_function=take, ignore=shutil.ignore_patterns("complete", *(() if for_tools else _FOR_TOOLS)))
    (scratch / "loop").symlink_to("loop")


def _write_models(folder: Path) -> None:
    """The 2.3-style checkpoint in three files, so that each malformed one is small."""
    family = write_tiny_family(folder / "family")
    whole = open_checkpoint(family.ltx23)
    parts = {"vae": ("vae.",), "audio_vae": ("audio_vae.", "vocoder."), "model": ("model.diffusion_model.", "text_embedding_projection.")}
    for part, prefixes in parts.items():
        tensors = {name: whole.tensor(name).clone() for name in whole.names() if name.startswith(prefixes)}
        write_bytes(folder / "models" / f"{part}.safetensors", serialize(tensors, whole.metadata))
    shutil.copytree(family.gemma, folder / "models" / "gemma3")
    other = load_file(folder / "models" / "model.safetensors")
    name = next(name for name in other if name.endswith("transformer_blocks.1.ff.net.2.weight"))
    write_bytes(folder / "models" / "other.safetensors", serialize(other | {name: other[name] * 1.1}, whole.metadata))
    shutil.copy(family.upsampler, folder / "models" / "upsampler.safetensors")
    shutil.copy(family.ltx25_duration_head, folder / "models" / "duration_head.safetensors")
    shutil.rmtree(family.folder)


def _write_documents(folder: Path) -> None:
    line = {"video_path": "clips/clip_000.mp4", "caption": "A disc."}
    texts = {
        "dataset.toml": _DATASET,
        "sounds.toml": _SOUNDS,
        "jsonl.toml": '[general]\nresolution = [96, 64]\ntarget_frames = [9]\n\n[[datasets]]\nvideo_jsonl_file = "clips.jsonl"\n'
        'cache_directory = "jsonl_cache"\n',
        "clips.jsonl": json.dumps(line) + "\n" + json.dumps(line | {"video_path": "clips/clip_001.mp4"}) + "\n",
        "recipe.toml": _RECIPE,
        "prompts.txt": _PROMPTS,
        "prompts.toml": _PROMPTS_TOML,
        "prompts.json": json.dumps([_ENTRY, _ENTRY | {"frame_count": 1}], indent=1),
        "flags.toml": _FLAGS,
        "rl_prompts.txt": "A disc moves.\n",
        "references.toml": _REFERENCES,
    }
    for name, text in texts.items():
        put(folder, name, text)


def _run_programs() -> None:
    for program, more in ((LATENTS, ()), (SOUND, ()), (TEXT, ("--sample_prompts", "prompts.txt"))):
        assert MAINS[program]([*ARGUMENTS[program], *more]) == 0, program
    assert MAINS[TRAIN]([*ARGUMENTS[TRAIN], "--max_train_steps", "2", "--save_state", "--save_every_n_steps", "2"]) == 0
    Path("output/ltxv2_lora.safetensors").rename("lora.safetensors")
    next(Path("output").glob("*-state")).rename("state")
    shutil.rmtree("output")
    assert MAINS["lora scale"](["--lora", "lora.safetensors", "--strength", "0.9", "--output", "other.safetensors"]) == 0
    assert MAINS["dataset pack"]([*ARGUMENTS["dataset pack"], "--output", "pack.tar"]) == 0
    assert MAINS["dataset pack"]([*ARGUMENTS["dataset pack"], "--output", "packed"]) == 0
    assert MAINS["dataset references"]([*ARGUMENTS["dataset references"], "--most", "1"]) == 0
    assert MAINS["dataset split-scenes"]([*ARGUMENTS["dataset split-scenes"], "--output_dir", "scenes"]) == 0
    tree = ["--checkpoints", "models/vae.safetensors", "--to", "diffusers", "--output_dir", "tree"]
    assert MAINS["checkpoint convert"](tree) == 0
    assert MAINS[ROLLOUTS]([*ARGUMENTS[ROLLOUTS]]) == 0
    scores = {"format": 1, "reward": "tone", "route": "sync", "arguments": {}, "weight_files": {}, "errors": {}}
    shutil.copytree("rollouts", "scored")
    assert MAINS[SCORE]([*ARGUMENTS[SCORE], "--rl_rollout_cache", "scored"]) == 0
    put(Path("rollouts"), "scores/tone.json", json.dumps(scores | {"scores": {"g0000_k00": 0.0, "g0000_k01": 1.0}}))


def _write_precomputed(folder: Path) -> None:
    """A tree of the official trainer with the caches of the clips; features are made up."""
    root = folder / "precomputed"
    for kind in ("latents", "audio_latents", "conditions"):
        (root / kind).mkdir(parents=True)
    for number in range(2):
        (latents,) = folder.glob(f"cache/clip_00{number}*_ltxv2.safetensors")
        (sound,) = folder.glob(f"cache/clip_00{number}*_ltxv2_audio.safetensors")
        video = {strip_key(key): value for key, value in load_file(latents).items()}["latents"]
        audio = {strip_key(key): value for key, value in load_file(sound).items()}["audio_latents"]
        sizes = dict(zip(("num_frames", "height", "width"), video.shape[1:], strict=True))
        torch.save({"latents": video, "fps": 24.0, **sizes}, root / "latents" / f"clip_{number}.pt")
        torch.save({"latents": audio, "duration": 0.375}, root / "audio_latents" / f"clip_{number}.pt")
        torch.save(_features(folder), root / "conditions" / f"clip_{number}.pt")


def _features(folder: Path) -> dict[str, torch.Tensor]:
    from musubi_tuner.ltxv2.text.pipeline import text_widths
    from musubi_tuner.ltxv2.transformer.load import read_config

    widths = text_widths(read_config(open_checkpoint(folder / "models" / "model.safetensors")), "av")
    generator = torch.Generator().manual_seed(0)
    made = {f"{stream}_prompt_embeds": torch.randn(8, width, generator=generator) for stream, width in zip(("video", "audio"), widths)}
    return made | {"prompt_attention_mask": torch.ones(8, dtype=torch.long)}

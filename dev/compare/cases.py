"""What both trees run: the programs' own command lines, on the tiny models and small data.

A case runs in a folder of its own, beside the folder `inputs` and the other cases. All paths are relative, so that both trees record
the same ones. Beyond the quickstart, the real clips, the training configs, resuming and the plans, short runs go through what else has
arithmetic of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

MODEL = "../inputs/models/ltx2_tiny_2.3.safetensors"
MODEL_20 = "../inputs/models/ltx2_tiny_2.0.safetensors"
MODEL_25 = "../inputs/models/ltx2_tiny_2.5_transformer.safetensors"
GEMMA, T5 = "../inputs/models/gemma3", "../inputs/models/t5"

Command = tuple[str, ...]
Commands = tuple[Command, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Commands that run one after the other; every file that they leave is compared."""

    name: str
    commands: Commands
    """Arguments of Python: a script of the tree, or -m or -c, and what follows."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Files that are written first."""
    from_tree: tuple[str, ...] = ()
    """Folders that are copied from the tree first, and not compared."""
    needs: tuple[str, ...] = ()
    """Cases whose files are read."""
    prints: str | None = None
    """File that keeps what the commands print, where that is to be compared."""
    twin: tuple[str, str] | None = None
    """Two folders that hold the same."""


QUICKSTART = """
import shutil, subprocess, sys
from pathlib import Path
import quickstart

quickstart.OUTPUT, quickstart.STEPS = Path("quickstart_output"), 20
quickstart.write_inputs()
for name in ("models", "clips", "held_out_clips"):
    shutil.copytree(Path("../inputs") / name, quickstart.OUTPUT / name)
for title, command in quickstart.commands(Path(sys.executable)):
    if not any(str(word).endswith(("make_tiny_checkpoints.py", "make_quickstart_clips.py")) for word in command):
        subprocess.run([str(word) for word in command], check=True)
"""
"""Its own commands but for the two that make its inputs, as a clip does not become the same bytes each time."""
COPY_WITHOUT_THE_END = """
import shutil
shutil.copytree("whole", "resumed", ignore=shutil.ignore_patterns("ltxv2_lora.safetensors", "*00000006-state", "*.png"))
"""

VIDEOS = 'video_directory = "../inputs/clips"'
NINE_FRAMES = "target_frames = [9]"
HELD_OUT = '[[validation_datasets]]\nvideo_directory = "../inputs/held_out_clips"\ncache_directory = "held_out"\ntarget_frames = [9]'
KEPT = f'[[datasets]]\n{VIDEOS}\n{NINE_FRAMES}\ncache_directory = "kept"\npreserve_base = true'
VOICES = 'reference_audio_directory = "../inputs/references"'
BESIDE = (
    'mask_directory = "../inputs/masks"', 'separate_audio_directory = "../inputs/sounds"', VOICES, "target_frames = [9, 17]",
    'frame_extraction = "uniform"', "frame_sample = 2", "target_fps = 20", 'flip_x = "force"', "batch_size = 2", "video_loss_weight = 0.5",
)  # fmt: skip

SIZE = "--w 96 --h 64 --f 17 --fr 24 --s 2"
CLIP, STILL = "../inputs/clips/clip_000.mp4", "../inputs/stills/still_001.png"
PROMPTS = "A red disc --w 64 --h 64 --f 9 --s 2 --d 3\nA still of it --w 64 --h 64 --f 1 --s 2 --n noise\n"
GIVEN = f"""\
A red disc {SIZE} --i {STILL} --ei {STILL}
A red disc {SIZE} --k 8={STILL} --l 1
A red disc {SIZE} --iv {CLIP} --vt 0.4-
A red disc {SIZE} --iv {CLIP} --box 32,0,32,32
A red disc {SIZE} --iv {CLIP} --crop 32,0,32,32
A red disc {SIZE} --a {CLIP} --at 0.2-
"""

READY_RECIPES = (
    "text_to_video_sound", "image_to_video", "extend_video", "extend_sound", "inpaint", "outpaint", "audio_to_video", "video_to_audio",
)  # fmt: skip
"""Those of `conditioning_recipes/` that plain clips will do for; the two with references have cases of their own, and keyframes have
meant another thing since they stand beside the clip."""
NETWORKS = {
    "lora": "rank_dropout=0.2 module_dropout=0.1 neuron_dropout=0.1 rank_stabilized=true audio_dim=2 ranks=attn2:3",
    "dora": "type=dora preset=cross",
    "lokr": "type=lokr factor=4 preset=all",
    "loha": "type=loha rank_dropout=0.2",
    "full": r"type=full include_patterns=blocks\.1\.attn1\.to_[qv]$,audio_ff",
}
OPTIONS = {
    "bf16": "--mixed_precision bf16 --gradient_accumulation_steps 2 --ema_decay 0.9 --lr_scheduler cosine --optimizer_type Adafactor",
    "int8": "--weight_format int8 --blocks_to_swap 1 --ltxv2_timestep_format sd3_0_1 --loss_type huber --weighting_scheme cosmap "
    "--noise_offset 0.1 --av_timestep_rule cross",
    "nf4": "--weight_format nf4 --mixed_precision bf16 --timestep_sampling uniform --ltxv2_timestep_format legacy_0_1000 "
    "--optimizer_type torch.optim.SGD --audio_balance ema",
    "fp8": "--weight_format fp8 --timestep_sampling logit_normal --min_timestep 200 --loss_type mae --weighting_scheme sigma_sqrt "
    "--no-independent_audio_timestep --av_timestep_rule own",
    "held": "--dop_prompt disc --video_caption_dropout_rate 0.3 --audio_caption_dropout_rate 0.3 --optimizer_type Prodigy "
    "--attn_mode math --first_frame_conditioning_p 0.5",
    "started": "--network_weights bf16/ltxv2_lora.safetensors --base_weights int8/ltxv2_lora.safetensors --base_weights_multiplier 0.5 "
    "--audio_learning_rate 2e-3 --optimizer_type AdamWScheduleFree",
    "kept": "--no-gradient_checkpointing --blocks_to_swap 2 --network_args loraplus_lr_ratio=4 --max_train_epochs 1 "
    "--save_every_n_epochs 1 --lr_decay_steps 2",
}
"""Number formats, losses, noise levels, optimizers and starts that no config names; a later one may start from an earlier one's files."""


def dataset(*lines: str, resolution: str = "[96, 64]", general: str = "") -> str:
    """A dataset TOML. `lines` are keys of its first dataset, and whole sections after them."""
    head = ("[general]", f"resolution = {resolution}", general, "[[datasets]]", 'cache_directory = "cache"')
    return "\n".join([*head, *lines]) + "\n"


def cached(mode: str, text: str = "", *, kinds: str = "pictures sound", model: str = MODEL, encoder: str = GEMMA) -> Commands:
    """The caching programs on `dataset.toml`.

    Args:
        text: further flags of the one that caches text.
        kinds: what else is cached.
    """
    common = ("--dataset_config", "dataset.toml", "--ltx_mode", mode, "--device", "cpu")
    vae = MODEL if model == MODEL_25 else model
    pictures = ("ltxv2_cache_latents.py", *common, "--vae", vae)
    sound = ("ltxv2_cache_audio_latents.py", *common, "--audio_vae", vae)
    captions = ("ltxv2_cache_text_encoder_outputs.py", *common, "--ltxv2_model", model, "--text_encoder", encoder, *text.split())
    return (*[pictures] * ("pictures" in kinds), *[sound] * ("sound" in kinds), captions)


def trained(output: str, flags: str, *, data: str = "dataset.toml", model: str = MODEL, steps: int = 3) -> Command:
    """A run that saves in float32, so that no difference is rounded away, and its state."""
    where = ("--dataset_config", data, "--ltxv2_model", model, "--output_dir", output, "--max_train_steps", str(steps))
    common = "--device cpu --max_data_loader_n_workers 0 --mixed_precision no --save_precision float32 --save_state"
    return ("ltxv2_train_network.py", *where, *common.split(), *flags.split())


def short_run(
    output: str, flags: str, *, mode: str = "av", data: str = "../clips/dataset.toml", model: str = MODEL, steps: int = 3
) -> Command:
    """A run without a config file."""
    own = f"--ltx_mode {mode} --ltxv2_timestep_format flowmatch_1_1000 --learning_rate 1e-3 --network_dim 4 --network_alpha 4"
    return trained(output, f"{own} {flags}", data=data, model=model, steps=steps)


def config_case(
    name: str, flags: str = "", *, data: str = "dataset.toml", caching: Commands = (), texts: Mapping[str, str] | None = None
) -> Case:
    """Four steps with a file of `training_configs/`, saved every other one."""
    own = f"--config_file training_configs/{name}.toml --lr_warmup_steps 1 --save_every_n_steps 2"
    return Case(
        name=name,
        commands=(*caching, trained("out", f"{own} {flags}", data=data, steps=4)),
        texts=texts or {},
        from_tree=("training_configs", "conditioning_recipes"),
        needs=() if caching else ("clips",),
    )


def config_cases() -> tuple[Case, ...]:
    """The six training configs: two on the clips with sound, the others on data of their own kind."""
    prompts, first = "--sample_prompts prompts.txt", "--sample_prompts prompts.txt --sample_at_first"
    stills = dataset('image_directory = "../inputs/stills"', "num_repeats = 2", "batch_size = 2")
    references = dataset(
        VIDEOS, NINE_FRAMES, 'reference_directory = "../inputs/references"', resolution="[128, 64]", general="reference_downscale = 2"
    )
    shown = f"A red disc --w 128 --h 64 --f 9 --s 2 --v {CLIP}\n"
    sounds, tone = dataset('audio_directory = "../inputs/sounds"'), "A tone --f 17 --fr 24 --s 2\n"
    of_pictures = cached("video", kinds="pictures")
    return (
        config_case("character_with_voice", "--sample_prompts ../clips/prompts.txt --sample_every_n_steps 2", data="../clips/dataset.toml"),
        config_case("quality_first", data="../clips/dataset.toml"),
        config_case("motion", "--lr_decay_steps 0.5", caching=of_pictures, texts={"dataset.toml": dataset(VIDEOS, NINE_FRAMES)}),
        config_case("style_from_stills", caching=of_pictures, texts={"dataset.toml": stills}),
        config_case(
            "voice_alone",
            first,
            caching=cached("audio", prompts, kinds="sound"),
            texts={"dataset.toml": sounds, "prompts.txt": tone},
        ),
        config_case(
            "reference_transformation",
            first,
            caching=cached("video", prompts, kinds="pictures"),
            texts={"dataset.toml": references, "prompts.txt": shown},
        ),
    )


def resume_case() -> Case:
    """A whole run, and a copy of its folder in which the second half is run again."""
    flags = "--save_every_n_steps 3 --lr_scheduler cosine --lr_warmup_steps 2 --gradient_accumulation_steps 2 --caption_dropout_rate 0.2"
    again = f"{flags} --resume resumed/ltxv2_lora-step00000003-state"
    return Case(
        name="resume",
        needs=("clips",),
        commands=(short_run("whole", flags, steps=6), ("-c", COPY_WITHOUT_THE_END), short_run("resumed", again, steps=6)),
        twin=("whole", "resumed"),
    )


def previews_case() -> Case:
    """Given pictures, clips and sounds; another schedule and plainer guidance."""
    given = f"--sample_prompts given.txt --sample_at_first --text_encoder {GEMMA}"
    plainer = "--sample_scheduler flowmatch_discrete --stg_scale 0 --modality_scale 1"
    shifted = f"--sample_prompts ../clips/prompts.txt --sample_every_n_steps 1 {plainer}"
    runs = (short_run("given", given, steps=1), short_run("shifted", shifted, steps=1))
    return Case(name="previews", needs=("clips",), commands=runs, texts={"given.txt": GIVEN})


def data_case() -> Case:
    """What a dataset file can ask for: masks, mirror images, other sound, reference sounds, windows, clips that keep the base model."""
    prompts = "--sample_prompts prompts.txt"
    flags = f"--conditioning_config conditioning_recipes/reference_sound.toml {prompts} --sample_at_first"
    return Case(
        name="data",
        commands=(*cached("av", prompts), short_run("out", flags, data="dataset.toml", steps=6)),
        texts={"dataset.toml": dataset(VIDEOS, *BESIDE, KEPT, VOICES), "prompts.txt": f"A red disc {SIZE} --ra {CLIP}\n"},
        from_tree=("conditioning_recipes",),
    )


def version_case(name: str, mode: str, text: str, flags: str, *, model: str, encoder: str = GEMMA) -> Case:
    """Another model than 2.3, with previews."""
    prompts = "--sample_prompts prompts.txt"
    kinds = "pictures sound" if mode == "av" else "pictures"
    run = short_run("out", f"{prompts} --sample_at_first {flags}", mode=mode, data="dataset.toml", model=model)
    return Case(
        name=name,
        commands=(*cached(mode, f"{prompts} {text}", kinds=kinds, model=model, encoder=encoder), run),
        texts={"dataset.toml": dataset(VIDEOS, NINE_FRAMES), "prompts.txt": PROMPTS},
    )


T5_FLAGS = "--text_encoder_backend t5 --max_length 32"
TINY = Case(name="tiny", commands=(("make_tiny_checkpoints.py", "--output_dir", "models"), ("tools/make_quickstart_clips.py", ".")))
"""Runs first: the inputs of all other cases are made of what the older tree's generators leave."""
MEDIA = Case(
    name="media",
    commands=cached("av"),
    texts={"dataset.toml": dataset('video_directory = "../inputs/media"', "target_frames = [25, 49]", resolution="[192, 128]")},
)
CASES = (
    TINY,
    Case(name="plans", commands=(("-m", "benchmarks.plans"), ("-m", "benchmarks.plans", "60")), prints="plans.md"),
    Case(name="quickstart", commands=(("-c", QUICKSTART),)),
    MEDIA,
    Case(
        name="clips",
        commands=cached("av", "--sample_prompts prompts.txt --dop_prompt disc"),
        texts={"dataset.toml": dataset(VIDEOS, NINE_FRAMES, HELD_OUT), "prompts.txt": PROMPTS},
    ),
    *config_cases(),
    resume_case(),
    previews_case(),
    Case(
        name="conditioning",
        needs=("clips",),
        commands=tuple(short_run(name, f"--conditioning_config conditioning_recipes/{name}.toml") for name in READY_RECIPES),
        from_tree=("conditioning_recipes",),
    ),
    Case(
        name="networks",
        needs=("clips",),
        commands=tuple(short_run(name, f"--network_args {arguments}") for name, arguments in NETWORKS.items()),
    ),
    Case(name="options", needs=("clips",), commands=tuple(short_run(name, flags) for name, flags in OPTIONS.items())),
    data_case(),
    version_case("ltx20", "av", "--text_cache_stage features", "--train_connectors", model=MODEL_20),
    version_case("ltx25", "video", f"{T5_FLAGS} --tokenizer {T5}", f"{T5_FLAGS} --vae {MODEL}", model=MODEL_25, encoder=T5),
)

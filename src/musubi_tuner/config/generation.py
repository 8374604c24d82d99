"""Options of generating clips."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.model import MemoryOptions, Mode, TextTokens
from musubi_tuner.config.preview import GuidanceOptions
from musubi_tuner.config.validation import AnyPath, FileName, Frames, List, Positive, Seed, Text, Whole, options
from musubi_tuner.runtime.errors import UserError

LoraStrength = Annotated[float, Field(ge=-100, le=100)]


@options
class ClipOptions:
    """What is made."""

    prompt: Annotated[tuple[Text, ...], List] = flag(
        "text of a clip; several make several clips. It may end in the flags of prompt files, such as 'a dog --w 512 --i start.png'",
        default=(), common=True, repeats=True,
    )  # fmt: skip
    sample_prompts: AnyPath | None = flag("prompt file (.txt, .toml, .json or .jsonl), as previews take it", default=None, common=True)
    negative_prompt: Text | None = flag("what to steer away from, where a prompt names none", default=None, may_be_empty=True)
    seed: Seed | None = flag("where a prompt names none; default: 10", default=None, common=True)
    image: AnyPath | None = flag("first frame, where a prompt names none", default=None, common=True)
    reference_video: AnyPath | None = flag("clip that an IC-LoRA is shown, where a prompt names none", default=None)
    audio: AnyPath | None = flag("sound that the pictures are made to, where a prompt names none", default=None)
    output_dir: AnyPath = flag("folder of the clips", default=Path("generated"), common=True)
    output_name: FileName = flag("what the names of the clips begin with", default="clip")
    debug_sampling: bool = flag("write statistics of every step and tensor beside the clip, as NAME_sampling.jsonl", default=False)
    recreate: AnyPath | None = flag(
        "make this clip again from the recipe in it, with the flags that are given besides; its files are looked for by their hashes",
        default=None,
    )
    lora_folder: AnyPath | None = flag("where --recreate looks for LoRAs, subfolders too, beside --lora", default=None)
    input_folder: AnyPath | None = flag(
        "where --recreate looks for pictures, clips and sounds, subfolders too, beside --image, --audio and --reference_video", default=None
    )


@options
class PipelineOptions:
    """Pipeline."""

    pipeline: Literal["one_stage", "two_stage", "distilled", "distilled_one_stage", "ic_lora", "keyframes", "hq"] = flag(
        "one_stage: at full size, guided; two_stage: at half size, doubled, refined; distilled and distilled_one_stage: eight steps of a "
        "distilled checkpoint, with a second stage and without; ic_lora: distilled, shown a reference; keyframes: two_stage from picture "
        "to picture; hq: two_stage by the second-order sampler",
        default="one_stage",
        common=True,
    )
    spatial_upsampler_path: AnyPath | None = flag("latent upsampler (x2) between two stages", default=None, common=True)
    distilled_lora: AnyPath | None = flag("distilled LoRA for the second stage of two_stage, keyframes and hq", default=None, common=True)
    window_frames: Frames | None = flag(
        "frames, 8n+1, that the model takes of a long clip at once, in windows that overlap; default: all of them", default=None
    )
    window_overlap: Frames | None = flag("frames, 8n+1, that neighboring windows share; default: a quarter of a window", default=None)
    distilled_lora_strength: LoraStrength | None = flag("default: 1; hq 0.25 and 0.5", default=None)

    @model_validator(mode="after")
    def _check(self) -> "PipelineOptions":
        if self.window_frames is None and self.window_overlap is not None:
            raise UserError("--window_overlap says how much windows share; give --window_frames too.")
        if self.window_frames is not None and self.window_frames < 17:
            raise UserError(f"--window_frames {self.window_frames}: must be 17 or more, so that windows can overlap.")
        if self.window_frames is not None and self.window_overlap is not None and not 1 < self.window_overlap < self.window_frames:
            most = self.window_frames - 8
            raise UserError(
                f"--window_overlap {self.window_overlap}: must be from 9 to {most}, 8 less than --window_frames {self.window_frames}; the "
                f"nearest that is allowed is {9 if self.window_overlap < 9 else most}."
            )
        return self


@options
class LoraOptions:
    """LoRAs."""

    lora: Annotated[tuple[Text, ...], List] = flag(
        "FILE, FILE:STRENGTH or FILE:STRENGTH:VIDEO:AUDIO, whose last two multiply it for each stream; 0 is off, 1 as trained",
        default=(), common=True, repeats=True,
    )  # fmt: skip
    lora_weight: Annotated[tuple[AnyPath, ...], List] = flag("the files alone, as musubi-tuner has it", default=(), repeats=True)
    lora_multiplier: Annotated[tuple[LoraStrength, ...], List] = flag(
        "strengths of the files of --lora_weight, in their order; 1 for those that have none", default=(), repeats=True
    )
    merge_loras: bool = flag(
        "merge all LoRAs of a stage, --distilled_lora too, into the weights while they are loaded, before these are quantized: faster "
        "steps, less memory, and a clip that differs by rounding; not with a grid over LoRAs or strengths",
        default=False,
    )

    @model_validator(mode="after")
    def _check(self) -> "LoraOptions":
        if len(self.lora_multiplier) > len(self.lora_weight):
            raise UserError(f"--lora_multiplier: {len(self.lora_multiplier)} numbers for {len(self.lora_weight)} files of --lora_weight.")
        return self


@options
class GridOptions:
    """Grid."""

    grid: Annotated[tuple[Text, ...], List] = flag(
        "AXIS=VALUE,VALUE,...: a clip of each combination, and a page that shows them beside each other. Axes: lora (files, wildcards, "
        "folders, none), strength, video_strength, audio_strength, seed, prompt (numbers or all), steps, and each flag of guidance that is "
        "a number",
        default=(), common=True, repeats=True,
    )  # fmt: skip
    grid_file: AnyPath | None = flag("TOML with a list of values by axis; --grid wins over it", default=None)

    @property
    def wanted(self) -> bool:
        return bool(self.grid) or self.grid_file is not None


@options
class GenerationModelOptions:
    """Model files."""

    ltxv2_model: AnyPath = flag("transformer file, full checkpoint, or folder of a split pack", common=True)
    vae: AnyPath | None = flag("video VAE; default: --ltxv2_model", default=None)
    audio_vae: AnyPath | None = flag("audio VAE and vocoder; default: --vae", default=None)
    text_encoder: str | None = flag(
        "encoder folder, file of LTX-2.5's, or hub id in the local cache, for what is not cached", default=None, common=True
    )
    text_encoder_backend: Literal["gemma", "t5"] = flag("kind of encoder", default="gemma")
    tokenizer: str | None = flag("tokenizer folder; default: --text_encoder", default=None)
    max_length: TextTokens | None = flag("cuts prompts to this many tokens", default=None)
    text_cache: AnyPath | None = flag("folder with texts that were cached for this model, which need no encoder", default=None)
    duration_head: AnyPath | None = flag(
        "duration head of LTX-2.5: prompts that name no frames (--f) are as long as it predicts from their text, 1 to 20 s, in place of "
        "--sample_frames",
        default=None,
    )
    ltx_mode: Mode = flag("video with sound, video alone, or sound alone", default="av", common=True)
    ltxv2_timestep_format: Literal["sd3_0_1", "flowmatch_1_1000", "legacy_0_1000"] = flag(
        "how noise levels are told to the model; sd3_0_1 is what official pipelines and ComfyUI do", default="sd3_0_1"
    )
    device: str | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)


@options
class EnhancementOptions:
    """Prompt enhancement."""

    enhance_prompt: Text | None = flag(
        "have the text encoder's model expand each prompt: 'default', or a text file with your own instruction; both prompts are kept",
        default=None,
    )
    prompt_enhancement_seed: Seed = flag("of what it writes; sampling does not depend on it", default=10)


@options
class GenerationMemoryOptions:
    """Memory and speed."""

    vram_gb: Positive | None = flag("use no more device memory than this; default: what is free", default=None, common=True)
    ram_gb: Positive | None = flag("use no more host memory than this; default: what is free", default=None)
    weight_format: Literal["auto", "bf16", "fp8", "int8", "nf4"] = flag("how the linears of the blocks are stored", default="auto")
    blocks_to_swap: Whole | None = flag("blocks whose weights are streamed from host memory; default: as planned", default=None)
    compile: bool = flag("compile the blocks: a minute before the first clip, faster steps after it", default=False)
    attn_mode: Literal["auto", "cudnn", "flash", "efficient", "math"] = flag("attention kernel", default="auto")

    def as_of_training(self) -> MemoryOptions:
        """The same choices, for what places models."""
        return MemoryOptions(
            vram_gb=self.vram_gb,
            ram_gb=self.ram_gb,
            weight_format=self.weight_format,
            blocks_to_swap=self.blocks_to_swap,
            gradient_checkpointing=False,
            compile=self.compile,
            attn_mode=self.attn_mode,
        )


@options
class GenerateConfig:
    """All sections."""

    clips: ClipOptions
    pipeline: PipelineOptions
    loras: LoraOptions
    grid: GridOptions
    guidance: GuidanceOptions
    model: GenerationModelOptions
    enhancement: EnhancementOptions
    memory: GenerationMemoryOptions

    @model_validator(mode="after")
    def _check(self) -> "GenerateConfig":
        given = [bool(self.clips.prompt), self.clips.sample_prompts is not None, self.clips.recreate is not None]
        if sum(given) != 1:
            raise UserError("give what to make by --prompt TEXT, --sample_prompts FILE or --recreate CLIP, by one of them.")
        if self.enhancement.enhance_prompt is not None and self.model.text_encoder is None:
            raise UserError("--enhance_prompt: it is the text encoder's model that writes; give --text_encoder FOLDER.")
        if self.model.duration_head is not None and self.clips.recreate is not None:
            raise UserError("--duration_head: --recreate takes the length of the clip from its recipe; leave one of them out.")
        if self.model.duration_head is not None and self.model.text_encoder_backend == "t5":
            raise UserError("--duration_head: was trained on contexts by Gemma 4; leave it out, or --text_encoder_backend t5.")
        for name in ("lora_folder", "input_folder"):
            if getattr(self.clips, name) is not None and self.clips.recreate is None:
                raise UserError(f"--{name}: is where --recreate looks for files; give --recreate CLIP, or leave it out.")
        return self

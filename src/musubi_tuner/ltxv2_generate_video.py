"""Makes clips with sound from prompts, with any LoRA at any strength: `ltxv2_generate_video.py`, `ltxv2 generate`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from musubi_tuner.config.flags import Beneath, parse
from musubi_tuner.config.generation import GenerateConfig
from musubi_tuner.runtime.program import run_program

if TYPE_CHECKING:
    from musubi_tuner.generation.contexts import TextSource
    from musubi_tuner.generation.setting import Setting
    from musubi_tuner.ltxv2.weights import Checkpoint

log = logging.getLogger(__name__)

PROG = "ltxv2_generate_video.py"
DESCRIPTION = "Make clips with sound from prompts, with any LoRA at any strength."


def main(argv: Sequence[str], prog: str = PROG) -> int:
    config = parse(GenerateConfig, argv, prog=prog, description=DESCRIPTION, beneath=_of_recipe)
    from musubi_tuner.generation.clips import make_clips
    from musubi_tuner.generation.durations import timed
    from musubi_tuner.generation.enhanced import enhanced
    from musubi_tuner.generation.jobs import chosen_loras, make_jobs, read_prompts
    from musubi_tuner.runtime.tables import format_table

    if config.clips.recreate is not None:
        from musubi_tuner.generation.recreate import read_again, tell_differences

        again = read_again(config)
        prompts, loras = (again.prompt,), again.loras
        setting = make_setting(config)
        tell_differences(again, setting)
    else:
        prompts, loras = enhanced(read_prompts(config), config), chosen_loras(config.loras)
        prompts, setting = timed(prompts, make_setting(config))
    if config.grid.wanted:
        from musubi_tuner.generation.axes import read_axes
        from musubi_tuner.generation.grid import make_grid
        from musubi_tuner.generation.sheet import make_cells

        made = make_cells(make_grid(config, read_axes(config.grid), prompts, loras), setting)
    else:
        made = make_clips(make_jobs(config, prompts, loras), setting)
    rows = [(str(one.path), f"{one.seconds:.1f} s" if one.seconds else "there already") for one in made]
    log.info("\n%s", format_table(rows, ("clip", "sampling")))
    return 0


def _of_recipe(given: Mapping[str, Any]) -> Beneath | None:
    """Flags of the clip that is to be made again."""
    if not isinstance(clip := given.get("recreate"), str) or not clip:
        return None
    from musubi_tuner.generation.recreate import flags_of

    return flags_of(Path(clip))


def make_setting(config: GenerateConfig) -> Setting:
    """The files that clips are made with, opened.

    Raises:
        UserError: one that is missing, or another kind of file.
    """
    from musubi_tuner.generation.prepare import ModelFiles
    from musubi_tuner.generation.setting import Setting, find_distilled_lora, open_upsampler
    from musubi_tuner.ltxv2.weights import open_checkpoint
    from musubi_tuner.runtime.device import pick_device

    model = config.model
    checkpoint = open_checkpoint(model.ltxv2_model)
    return Setting(
        config=config,
        files=ModelFiles.beside(checkpoint, model.vae, model.audio_vae),
        texts=_texts(config, checkpoint),
        device=pick_device(model.device),
        upsampler=open_upsampler(config),
        distilled_lora=find_distilled_lora(config),
    )


def _texts(config: GenerateConfig, checkpoint: Checkpoint) -> TextSource:
    from musubi_tuner.generation.contexts import TextSource
    from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint, encoder_options
    from musubi_tuner.ltxv2.text.pipeline import TextRecipe, text_widths
    from musubi_tuner.ltxv2.transformer.load import read_config
    from musubi_tuner.placement.text import encode_prompts
    from musubi_tuner.runtime.device import pick_device

    model, transformer = config.model, read_config(checkpoint)
    expected = {"widths": "+".join(map(str, text_widths(transformer, model.ltx_mode)))}
    if checkpoint.model_version:
        expected["model_version"] = checkpoint.model_version
    encode = encoder = None
    if model.text_encoder is not None:
        options = encoder_options(
            model.text_encoder,
            tokenizer=model.tokenizer,
            backend=model.text_encoder_backend,
            device=pick_device(model.device),
            max_length=model.max_length,
            vram_gb=config.memory.vram_gb,
            ram_gb=config.memory.ram_gb,
        )
        recipe = TextRecipe(checkpoint=checkpoint, config=transformer, options=options, mode=model.ltx_mode, stage="context")
        encode, encoder = partial(encode_prompts, recipe), encoder_fingerprint(options)
    return TextSource(
        cache_directory=model.text_cache or config.clips.output_dir / "texts",
        expected=expected,
        encode=encode,
        encoder=encoder,
        command=f"{PROG} ... --text_encoder FOLDER",
        remedy="or give the folder of texts that were cached for this model by --text_cache.",
    )


if __name__ == "__main__":
    run_program(main)

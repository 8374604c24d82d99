"""A LoRA's model card: YAML front matter as the Hugging Face Hub reads it (https://huggingface.co/docs/hub/model-cards), previews, how to
use the file, the settings that its metadata tell, and the notice of the licence that LTX-2's terms ask for."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from musubi_tuner.ltxv2.versions import transformer_prefix
from musubi_tuner.networks.reading import network_metadata
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.headers import read_header
from musubi_tuner.runtime.program import quoted

NAME = "README.md"
MARK = "<!-- written by musubi-tuner-ltxv2 -->"
"""In a card that was written here, which may be written anew."""
RELEASES: Mapping[str, tuple[str, str]] = {
    "ltx-2.0": ("LTX-2", "Lightricks/LTX-2"),
    "ltx-2.3": ("LTX-2.3", "Lightricks/LTX-2.3"),
    "ltx-2.5": ("LTX-2.5", "Lightricks/LTX-2.5"),
}
"""Name and repository by `ss_base_model_version`."""
LICENSE = ("ltx-2-community-license-agreement", "https://github.com/Lightricks/LTX-2/blob/main/LICENSE")
"""Its name on the hub, and where it stands."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_SETTINGS = (
    ("type", "ltxv2_network_type"), ("rank", "ss_network_dim"), ("alpha", "ss_network_alpha"), ("arguments", "ss_network_args"),
    ("modules", "ltxv2_network_shape"), ("streams", "ltxv2_adapted_streams"), ("mode", "ltxv2_mode"), ("base file", "ss_sd_model_name"),
    ("steps", "ss_steps"), ("epochs", "ss_epoch"), ("items", "ss_num_train_items"), ("optimizer", "ss_optimizer"),
    ("learning rate", "ss_learning_rate"), ("learning rate of the sound", "ltxv2_audio_learning_rate"), ("schedule", "ss_lr_scheduler"),
    ("gradient accumulation", "ss_gradient_accumulation_steps"), ("noise levels", "ltxv2_timestep_sampling"),
    ("conditioning", "ltxv2_conditioning"), ("average of weights (EMA)", "ltxv2_ema_decay"), ("precision", "ss_mixed_precision"),
    ("seed", "ss_seed"), ("made from", "ltxv2_made_from"),
)  # fmt: skip
"""What the table shows, and the entries of the metadata that it is from."""
_FACTOR = "reference_downscale_factor"
"""In the metadata of an IC-LoRA alone: how many times smaller than the clip its references are."""
_COMFY_ALONE = ("lokr", "loha", "full")
_NOTES = {
    "dora": "This is a DoRA, which diffusers and musubi-tuner-ltxv2 load as it was trained. ComfyUI and the official code do not: their "
    "outputs are 10 to 26 % off.",
    **dict.fromkeys(_COMFY_ALONE, "ComfyUI and musubi-tuner-ltxv2 load a file of this type; diffusers does not."),
}
"""By `ltxv2_network_type`."""
_EMPTY = ("", "None", "null", "[]", "{}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preview:
    """A clip, still or sound that the card shows."""

    path: Path
    prompt: str
    """Empty where it is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CardFacts:
    """What the file itself does not say."""

    title: str = ""
    """Default: the metadata's, or the file's name."""
    trigger: str = ""
    description: str = ""
    base_model: str = ""
    """A repository of the hub; default: the release's."""
    tags: Sequence[str] = ()
    repo_id: str = ""
    """Where it will lie."""
    previews: Mapping[str, Preview] = field(default_factory=dict)
    """By their path from the card's folder, with slashes."""


def card_text(lora: Path, facts: CardFacts) -> str:
    """
    Args:
        lora: or a whole checkpoint, as `--full_finetune` writes it.

    Raises:
        UserError: a file that cannot be read, or one that does not say which release it is for where `facts` do not either.
    """
    metadata = network_metadata(lora)
    release, base = RELEASES.get(metadata.get("ss_base_model_version", ""), ("", ""))
    base = facts.base_model or base
    if not base:
        known = metadata.get("ss_base_model_version") or "nothing"
        raise UserError(f"{lora}: does not say which release of LTX-2 it is for ({known}). Give --base_model, such as Lightricks/LTX-2.3.")
    release = release or base
    title = facts.title or metadata.get("modelspec.title") or lora.stem
    is_whole = transformer_prefix(read_header(lora).tensors) is not None
    head = _front_matter(metadata, facts, base, release, is_whole=is_whole)
    body = _body(lora, metadata, facts, title=title, base=base, release=release, is_whole=is_whole)
    return f"{head}\n{MARK}\n\n" + "\n\n".join(body) + "\n"


def relative_link(path: Path, folder: Path) -> str:
    """A file's path from a folder, with slashes.

    Raises:
        UserError: it does not lie in or below the folder, so that a link would break once the folder is uploaded.
    """
    try:
        relative = Path(os.path.relpath(path.resolve(), folder.resolve()))
    except ValueError:  # of another drive
        relative = Path("..")
    if relative.is_absolute() or ".." in relative.parts:
        raise UserError(f"{path}: lies outside of {folder}, where the card goes, so its link would break on the hub. Copy it there first.")
    return relative.as_posix()


def _front_matter(metadata: Mapping[str, str], facts: CardFacts, base: str, release: str, *, is_whole: bool) -> str:
    """JSON's texts are YAML's too."""
    kind, relation = ([], "finetune") if is_whole else (["lora", "template:diffusion-lora"], "adapter")
    tags = [*kind, "ltx-2", *([release.lower()] if release != base else []), "musubi-tuner-ltxv2", *facts.tags]
    task = pipeline_tag(metadata)
    lines = ["---", f"base_model: {_quoted(base)}", f"base_model_relation: {relation}", "library_name: diffusers", f"pipeline_tag: {task}"]
    lines += ["license: other", f"license_name: {LICENSE[0]}", f"license_link: {LICENSE[1]}", "tags:"]
    lines += [f"- {_quoted(tag)}" for tag in dict.fromkeys([*tags, task])]
    if facts.trigger:
        lines.append(f"instance_prompt: {_quoted(facts.trigger)}")
    shown = {link: one for link, one in facts.previews.items() if one.path.suffix.lower() in (".mp4", *IMAGES)}
    if shown:
        lines.append("widget:")
        for link, one in shown.items():
            lines += [f"- text: {_quoted(one.prompt or ' ')}", "  output:", f"    url: {_quoted(quote(link))}"]
    return "\n".join([*lines, "---"])


def pipeline_tag(metadata: Mapping[str, str]) -> str:
    """The hub's word for what a LoRA does."""
    if _FACTOR in metadata:
        return "video-to-video"
    return "text-to-audio" if metadata.get("ltxv2_mode") == "audio" else "text-to-video"


def _body(lora: Path, metadata: Mapping[str, str], facts: CardFacts, *, title: str, base: str, release: str, is_whole: bool) -> list[str]:
    found = [f"# {_plain(title)}"]
    what = "A fine-tuned checkpoint (full weights) of" if is_whole else "A LoRA for"
    found.append(f"{what} [{_plain(release)}](https://huggingface.co/{quote(base)}).{' ' + facts.description if facts.description else ''}")
    if facts.trigger:
        found.append(f"## Trigger words\n\nPut `{facts.trigger.replace('`', '')}` into the prompt.")
    if facts.previews:
        lines = [
            f"- [{_plain(link)}]({quote(link)}){': ' + _plain(one.prompt) if one.prompt else ''}" for link, one in facts.previews.items()
        ]
        found.append("## Previews\n\n<Gallery />\n\n" + "\n".join(lines))
    found.append(_use_of_checkpoint(lora) if is_whole else _use(lora, metadata, facts))
    rows = [(name, text) for name, key in _SETTINGS if (text := _setting(key, metadata))]
    if rows:
        table = "\n".join(f"| {name} | {_plain(value)} |" for name, value in rows)
        trainer = metadata.get("ltxv2_trainer_version")
        by = f"\n\nTrained with musubi-tuner-ltxv2 {_plain(trainer)}." if trainer else ""
        found.append(f"## Settings\n\n| | |\n|---|---|\n{table}{by}")
    name, link = "LTX-2 Community License Agreement", LICENSE[1]
    found.append(
        f"## Licence\n\nThis file is a derivative of {_plain(release)} by Lightricks, and is passed on under the [{name}]({link}). "
        "Its terms, the restrictions of use among them, bind everyone who uses the file or passes it on, with this notice."
    )
    return found


def _setting(key: str, metadata: Mapping[str, str]) -> str:
    """An entry in words; empty where it says nothing that a reader would want to know."""
    value = metadata.get(key, "")
    if value in _EMPTY or key == "ltxv2_ema_decay" and value in ("0", "0.0"):
        return ""
    if key == "ltxv2_network_shape":
        alpha = metadata.get("ss_network_alpha", "").removesuffix(".0")
        of_rows_above = f"{metadata.get('ltxv2_network_type')} rank {metadata.get('ss_network_dim')} alpha {alpha}"
        return "" if value == of_rows_above else value
    if key == "ltxv2_adapted_streams":
        return value.replace(",", ", ")
    return _in_words(value) if key == "ltxv2_conditioning" else value


def _in_words(recipe: str) -> str:
    """A conditioning recipe: the rules of each stream with their settings; the text itself where another trainer wrote it."""
    try:
        streams = {
            stream: [
                f"{rule['rule']} ({', '.join(f'{key} {value}' for key, value in rule.items() if key != 'rule')})".removesuffix(" ()")
                for rule in rules
            ]
            for stream, rules in json.loads(recipe).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return recipe
    return "; ".join(f"{stream}: {', '.join(rules)}" for stream, rules in streams.items() if rules)


def _use_of_checkpoint(path: Path) -> str:
    shell = f"ltxv2 generate --ltxv2_model {quoted(Path(path.name))} --prompt PROMPT --text_encoder GEMMA_FOLDER"
    comfy = f"ComfyUI: put `{path.name}` into `models/checkpoints`, in the place of the base model."
    return "\n\n".join(("## Use", comfy, _code("musubi-tuner-ltxv2", "bash", shell)))


def _use(lora: Path, metadata: Mapping[str, str], facts: CardFacts) -> str:
    name = lora.name
    load = f'pipeline.load_lora_weights("{facts.repo_id or "FOLDER"}", weight_name="{name}")'
    source = 'from_pretrained("LTX_IN_DIFFUSERS_FORM")'
    comfy = f"ComfyUI: put `{name}` into `models/loras`, and load it with a LoRA loader for the model"
    kind = metadata.get("ltxv2_network_type", "lora")
    notes = [note for note in (_NOTES.get(kind), _merged_first(metadata)) if note]
    if _FACTOR not in metadata:
        if _hears_a_reference(metadata):
            shell = (
                f'ltxv2 generate --lora {quoted(Path(name))} --prompt "PROMPT --ra voice.wav" \\\n'
                "  --ltxv2_model CHECKPOINT --text_encoder GEMMA_FOLDER"
            )
            says = "This LoRA is played a reference sound beside what it makes, such as a voice sample: `--ra` in a prompt."
            return "\n\n".join(("## Use", says, *notes, _code("musubi-tuner-ltxv2", "bash", shell)))
        code = f"from diffusers import LTX2Pipeline\n\npipeline = LTX2Pipeline.{source}\n{load}"
        return "\n\n".join(("## Use", *notes, *_where_it_loads(kind, f"{comfy}.", _code("diffusers", "python", code))))
    factor = _plain(metadata[_FACTOR])
    size = "of the clip's size" if factor == "1" else f"{factor} times smaller than the clip"
    shell = (
        f"ltxv2 generate --pipeline ic_lora --lora {quoted(Path(name))} --reference_video reference.mp4 --prompt PROMPT \\\n"
        "  --ltxv2_model DISTILLED_CHECKPOINT --text_encoder GEMMA_FOLDER --spatial_upsampler_path UPSAMPLER"
    )
    code = (
        "from diffusers import LTX2InContextPipeline\nfrom diffusers.pipelines.ltx2 import LTX2ReferenceCondition\n\n"
        f"pipeline = LTX2InContextPipeline.{source}\n{load}\n"
        f"reference = LTX2ReferenceCondition(frames=FRAMES)\n"
        f"made = pipeline(prompt=PROMPT, reference_conditions=reference, reference_downscale_factor={factor})"
    )
    return "\n\n".join(
        (
            "## Use",
            f"This is an IC-LoRA: it is shown a reference video beside the clip that it makes, {size} (`{_FACTOR}` of its metadata). "
            "Without a reference it does nothing of use.",
            *notes,
            _code("musubi-tuner-ltxv2", "bash", shell),
            *_where_it_loads(
                kind,
                f"{comfy}; its reference is given by the nodes for IC-LoRAs of ComfyUI-LTXVideo.",
                _code("diffusers", "python", code),
            ),
        )
    )


def _where_it_loads(kind: str, comfy: str, diffusers: str) -> list[str]:
    """What is said of the programs that load a type as it was trained (docs/reference/lora_files.md)."""
    return [text for text, others in ((comfy, ("dora",)), (diffusers, _COMFY_ALONE)) if kind not in others]


def _merged_first(metadata: Mapping[str, str]) -> str:
    """What was merged into the base model before the training, without which the file does not do what was trained."""
    value = metadata.get("ltxv2_base_weights", "")
    if value in _EMPTY:
        return ""
    try:
        shown = ", ".join(f"`{_plain(str(one))}`" for one in json.loads(value))
    except (TypeError, ValueError):  # of another trainer, or edited
        shown = f"`{_plain(value)}`"
    return f"It was trained on the base model with {shown} merged into it: load this together with it, at the same strength."


def _hears_a_reference(metadata: Mapping[str, str]) -> bool:
    """Whether the recipe of its training played reference sounds."""
    try:
        return any(rule["rule"] == "Reference" for rule in json.loads(metadata["ltxv2_conditioning"])["audio"])
    except (KeyError, TypeError, ValueError):  # of another trainer, or edited
        return False


def _code(title: str, language: str, code: str) -> str:
    return f"{title}:\n\n```{language}\n{code}\n```"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _plain(text: str) -> str:
    """Text that can stand in a cell of a table and is no markup."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()

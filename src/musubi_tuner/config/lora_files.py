"""All options of `ltxv2 lora` and its subcommands."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.publishing import HubOptions
from musubi_tuner.config.validation import AnyPath, Count, List, Share, Text, options
from musubi_tuner.runtime.errors import UserError

Part = Literal["audio", "video", "cross", "connectors"]
Strength = Annotated[float, Field(ge=-100, le=100)]
Energy = Annotated[float, Field(gt=0, le=1)]


@options
class FileOptions:
    """File."""

    lora: AnyPath = flag("the LoRA, or PEFT's folder; the flag's name may be left out")


@options
class WritingOptions:
    """What is written."""

    output: AnyPath = flag("the new file")
    save_precision: Literal["bfloat16", "float16", "float32"] | None = flag(
        "dtype of its values; default: that of the file, of extract bfloat16", default=None
    )
    overwrite: bool = flag("replace what is there", default=False)


@options
class InspectionOptions:
    """What is shown."""

    base: AnyPath | None = flag("the checkpoint that it was trained on, against which its changes are measured", default=None)
    modules: bool = flag("a row for each module, not for each stream and block alone", default=False)
    json: AnyPath | None = flag("write all of it to this file too", default=None)
    overwrite: bool = flag("replace the file of --json", default=False)


@options
class InspectConfig:
    """All sections."""

    file: FileOptions
    inspection: InspectionOptions


@options
class FormOptions:
    """Form."""

    to: Literal["official", "diffusers", "kohya", "peft"] = flag("whose naming: official (ComfyUI too), diffusers, kohya, or PEFT's folder")


@options
class ConvertConfig:
    """All sections."""

    file: FileOptions
    form: FormOptions
    writing: WritingOptions


@options
class RemovalOptions:
    """What is removed."""

    remove: Annotated[tuple[Part, ...], List] = flag(
        "all that makes the sound, all that makes the pictures, the attention between them, the text connectors", default=()
    )
    remove_pattern: Annotated[tuple[Text, ...], List] = flag("regular expressions over official module names", default=())

    @model_validator(mode="after")
    def _check(self) -> "RemovalOptions":
        if not self.remove and not self.remove_pattern:
            raise UserError("nothing to remove: give --remove audio, or --remove_pattern with a regular expression.")
        return self


@options
class StripConfig:
    """All sections."""

    file: FileOptions
    removal: RemovalOptions
    writing: WritingOptions


@options
class StrengthOptions:
    """Strength."""

    strength: Strength = flag("what all of it is multiplied by", default=1.0)
    video_strength: Strength = flag("besides, what makes the pictures", default=1.0)
    audio_strength: Strength = flag("besides, what makes the sound", default=1.0)


@options
class ScaleConfig:
    """All sections."""

    file: FileOptions
    strength: StrengthOptions
    writing: WritingOptions


@options
class RankOptions:
    """Rank."""

    rank: Count | None = flag("of every module; with --energy, the highest", default=None)
    energy: Energy | None = flag("share of each change's squared norm to keep, by as low a rank as does, such as 0.99", default=None)

    @model_validator(mode="after")
    def _check(self) -> "RankOptions":
        if self.rank is None and self.energy is None:
            raise UserError("give --rank N, --energy SHARE, or both.")
        return self


@options
class ResizeConfig:
    """All sections."""

    file: FileOptions
    rank: RankOptions
    writing: WritingOptions


@options
class MergeOptions:
    """What is added up."""

    loras: Annotated[tuple[Text, ...], List] = flag(
        "two or more, each FILE, FILE:STRENGTH or FILE:STRENGTH:VIDEO:AUDIO; the flag's name may be left out"
    )
    rank: Count | None = flag("bring the sum to this rank, with its error; default: all ranks side by side, exactly", default=None)


@options
class MergeConfig:
    """All sections."""

    merge: MergeOptions
    writing: WritingOptions


@options
class AverageOptions:
    """What is averaged."""

    loras: Annotated[tuple[Text, ...], List] = flag(
        "checkpoints of one run: files, folders or wildcards such as 'output/mila*.safetensors'; the flag's name may be left out"
    )
    beta: Share = flag(
        "exponential average: each file leaves this share of the average of those before it and adds the rest itself, so of N files the "
        "first one counts beta^(N-1): with few files, most of all",
        default=0.95,
    )
    beta2: Share | None = flag("where --beta goes to by the last file, in equal steps; default: stays", default=None)
    sigma_rel: Annotated[float, Field(gt=0, lt=0.288)] | None = flag(
        "power function average in place of --beta, by the files' steps: its width as a share of the training, such as 0.2", default=None
    )


@options
class AverageConfig:
    """All sections."""

    average: AverageOptions
    writing: WritingOptions


@options
class ExtractionOptions:
    """What is compared."""

    tuned: AnyPath = flag("the checkpoint whose difference becomes a LoRA")
    base: AnyPath = flag("the checkpoint that it is the difference to")
    rank: Count = flag("of every module; with --energy, the highest", default=64)
    energy: Energy | None = flag("share of each difference's squared norm to keep, by as low a rank as does", default=None)
    device: Text | None = flag("where it is computed; default: the GPU where there is one", default=None)


@options
class ExtractConfig:
    """All sections."""

    extraction: ExtractionOptions
    writing: WritingOptions


@options
class MetadataOptions:
    """Changes; without any, the entries are shown."""

    set: Annotated[tuple[Text, ...], List] = flag("entries NAME=VALUE to write, such as modelspec.title=Mila", default=(), repeats=True)
    remove: Annotated[tuple[Text, ...], List] = flag("names of entries to remove; * stands for anything, as in 'ss_*'", default=())
    picture: AnyPath | None = flag("a picture to show for it (modelspec.thumbnail), 256 pixels at most", default=None)
    output: AnyPath | None = flag("the new file", default=None)
    overwrite: bool = flag("replace what is there", default=False)

    @property
    def changes(self) -> bool:
        return bool(self.set or self.remove or self.picture)

    @model_validator(mode="after")
    def _check(self) -> "MetadataOptions":
        for entry in self.set:
            if "=" not in entry or not entry.partition("=")[0].strip():
                raise UserError(f"--set {entry}: must be NAME=VALUE.")
        if self.changes and self.output is None:
            raise UserError("--output is missing: the file with the changed entries.")
        return self


@options
class MetadataConfig:
    """All sections."""

    file: FileOptions
    metadata: MetadataOptions


@options
class CardOptions:
    """What the card says, beside what the file says of itself."""

    title: Text | None = flag("heading; default: the file's own title", default=None)
    trigger: Text | None = flag("words that a prompt needs to have (instance_prompt)", default=None)
    description: Text | None = flag("a sentence or more", default=None)
    base_model: Text | None = flag("repository of the base model on the hub; default: Lightricks' own, by the file's release", default=None)
    tags: Annotated[tuple[Text, ...], List] = flag("further tags", default=())
    previews: Annotated[tuple[AnyPath, ...], List] = flag(
        "clips, stills and sounds to show; default: those of its run in 'sample' beside the file, of its step", default=()
    )

    @model_validator(mode="after")
    def _check(self) -> "CardOptions":
        if self.base_model is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.base_model):
            raise UserError(
                f"--base_model {self.base_model}: must be a repository of the hub, NAME/REPOSITORY, such as Lightricks/LTX-2.3."
            )
        return self


@options
class CardFileOptions:
    """What is written."""

    output: AnyPath = flag("the card, README.md in the folder that will be uploaded")
    overwrite: bool = flag("replace what is there", default=False)


@options
class CardConfig:
    """All sections."""

    file: FileOptions
    card: CardOptions
    writing: CardFileOptions


@options
class PublishedOptions:
    """What is uploaded."""

    lora: AnyPath = flag("the LoRA, or the folder of its run; the flag's name may be left out")
    steps: bool = flag("of a run's folder, the LoRAs of steps and epochs too, not the last one alone", default=False)


@options
class PublishConfig:
    """All sections."""

    published: PublishedOptions
    card: CardOptions
    hub: HubOptions

    @model_validator(mode="after")
    def _check(self) -> "PublishConfig":
        if self.hub.huggingface_repo_id is None:
            raise UserError("--huggingface_repo_id is missing: NAME/REPOSITORY on the Hugging Face Hub.")
        return self

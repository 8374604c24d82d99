"""All options of `ltxv2 checkpoint` and its subcommands."""

from typing import Annotated, Literal

from pydantic import model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, List, NotNegative, Text, Whole, options
from musubi_tuner.runtime.errors import UserError


@options
class CheckpointOptions:
    """File."""

    checkpoint: AnyPath = flag("the checkpoint, or the folder of a split pack; the flag's name may be left out")


@options
class InspectionOptions:
    """What is shown."""

    config: bool = flag("all of its config too", default=False)
    json: AnyPath | None = flag("write all of it to this file too", default=None)
    overwrite: bool = flag("replace the file of --json", default=False)


@options
class InspectConfig:
    """All sections."""

    file: CheckpointOptions
    inspection: InspectionOptions


@options
class VerifyConfig:
    """All sections."""

    file: CheckpointOptions


@options
class SplitOptions:
    """What is written."""

    output_dir: AnyPath = flag("folder of the new files")
    folders: bool = flag("a folder for each component, in place of a file", default=False)
    overwrite: bool = flag("replace what is there", default=False)


@options
class SplitConfig:
    """All sections."""

    file: CheckpointOptions
    writing: SplitOptions


@options
class NewFileOptions:
    """What is written."""

    output: AnyPath = flag("the new file")
    overwrite: bool = flag("replace what is there", default=False)


@options
class JoinOptions:
    """What is joined."""

    checkpoints: Annotated[tuple[AnyPath, ...], List] = flag("two files or more, one for each component; the flag's name may be left out")


@options
class JoinConfig:
    """All sections."""

    joining: JoinOptions
    writing: NewFileOptions


@options
class QuantizeOptions:
    """Format."""

    to: Literal["fp8", "int8", "int8_convrot"] = flag("how linears of the blocks are stored: 8 bits, a scale for each row")
    keep_blocks: Whole = flag("the first and as many of the last blocks that stay as they are", default=2)


@options
class QuantizeConfig:
    """All sections."""

    file: CheckpointOptions
    quantization: QuantizeOptions
    writing: NewFileOptions


@options
class BakeOptions:
    """What is baked in."""

    lora: Annotated[tuple[Text, ...], List] = flag("LoRAs, each FILE, FILE:STRENGTH or FILE:STRENGTH:VIDEO:AUDIO", repeats=True)


@options
class BakeConfig:
    """All sections."""

    file: CheckpointOptions
    baking: BakeOptions
    writing: NewFileOptions


@options
class ConvertedOptions:
    """What is converted."""

    checkpoints: Annotated[tuple[AnyPath, ...], List] = flag(
        "the checkpoint, or the files of its components, or the folder of diffusers; the flag's name may be left out"
    )


@options
class ConversionOptions:
    """To what, and where it is written."""

    to: Literal["diffusers", "single_file"] = flag(
        "the folder that diffusers reads, or such a folder back as one file with the official names"
    )
    output_dir: AnyPath | None = flag("the new folder, of --to diffusers", default=None)
    output: AnyPath | None = flag("the new file, of --to single_file", default=None)
    gemma_path: AnyPath | None = flag("text encoder's folder, copied into the new folder with its tokenizer", default=None)
    dequantize: bool = flag("write the bf16 numbers of a checkpoint in 8 bits, which diffusers does not read", default=False)
    like: AnyPath | None = flag(
        "of a folder that another program has made: a release file of the same architecture, for names and config", default=None
    )
    overwrite: bool = flag("replace what is there", default=False)

    @model_validator(mode="after")
    def _check(self) -> "ConversionOptions":
        to_folder = self.to == "diffusers"
        if (self.output_dir if to_folder else self.output) is None:
            raise UserError(f"{'--output_dir' if to_folder else '--output'} is missing: where --to {self.to} writes.")
        of_other = (
            {"output": self.output, "like": self.like} if to_folder else {"output_dir": self.output_dir, "gemma_path": self.gemma_path}
        )
        given = [name for name, value in of_other.items() if value is not None] + (
            ["dequantize"] if self.dequantize and not to_folder else []
        )
        if given:
            raise UserError(f"--{given[0]}: does nothing with --to {self.to}. Leave it out.")
        return self


@options
class ConvertConfig:
    """All sections."""

    source: ConvertedOptions
    conversion: ConversionOptions


@options
class ComparedOptions:
    """What is compared."""

    checkpoints: Annotated[tuple[AnyPath, ...], List] = flag(
        "two checkpoints, or folders of split packs or of diffusers; the flag's name may be left out"
    )
    tolerance: NotNegative = flag("difference up to which two numbers count as the same", default=0.0)

    @model_validator(mode="after")
    def _check(self) -> "ComparedOptions":
        if len(self.checkpoints) != 2:
            raise UserError(f"--checkpoints: {len(self.checkpoints)} given; two are compared.")
        return self


@options
class CompareConfig:
    """All sections."""

    comparison: ComparedOptions

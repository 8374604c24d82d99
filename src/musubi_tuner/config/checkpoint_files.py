"""All options of `ltxv2 checkpoint` and its subcommands."""

from typing import Annotated, Literal

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, List, Text, Whole, options


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

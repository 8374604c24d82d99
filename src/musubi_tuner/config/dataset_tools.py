"""All options of `ltxv2 dataset` and its subcommands."""

from typing import Annotated

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Count, List, Text, options


@options
class DatasetFileOptions:
    """Dataset."""

    dataset_config: AnyPath = flag("dataset TOML; the flag's name may be left out")


@options
class DecoderOptions:
    """Models."""

    ltxv2_model: AnyPath | None = flag("full checkpoint", default=None)
    vae: AnyPath | None = flag("full checkpoint or video VAE file; default: --ltxv2_model", default=None)
    audio_vae: AnyPath | None = flag("full checkpoint or audio VAE file; default: --vae", default=None)


@options
class DecodeOptions:
    """What is decoded."""

    output_dir: AnyPath = flag("folder of the files; a folder in it for each dataset")
    clips: Annotated[tuple[Text, ...], List] = flag("names of clips; * stands for anything, as in 'dance*'; default: all", default=())
    most: Count | None = flag("clips of each dataset, at most", default=None)
    references: bool = flag("reference videos too", default=True)
    device: Text | None = flag("device, such as cuda:0 or cpu; default: the best there is", default=None)


@options
class DecodeConfig:
    """All sections."""

    dataset: DatasetFileOptions
    models: DecoderOptions
    decoding: DecodeOptions

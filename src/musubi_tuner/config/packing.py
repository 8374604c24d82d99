"""All options of `ltxv2 dataset pack` and `unpack`."""

from typing import Literal

from pydantic import model_validator

from musubi_tuner.config.dataset_tools import DatasetFileOptions
from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, options
from musubi_tuner.runtime.errors import UserError

_ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


@options
class PackOptions:
    """What is packed."""

    output: AnyPath = flag("the pack: an archive where its name ends with .tar, otherwise a folder")
    ltx_mode: Literal["video", "av", "audio"] = flag(
        "what will be trained from it; files that this does not read stay behind", default="av"
    )

    @model_validator(mode="after")
    def _check(self) -> "PackOptions":
        if self.output.suffix.lower() in _ARCHIVES:
            raise UserError(f"--output {self.output}: must end with .tar, or be a folder. Latents do not get smaller by compression.")
        return self

    @property
    def is_archive(self) -> bool:
        return self.output.suffix.lower() == ".tar"


@options
class PackConfig:
    """All sections."""

    dataset: DatasetFileOptions
    packing: PackOptions


@options
class UnpackOptions:
    """Pack."""

    pack: AnyPath = flag("the archive or folder that pack has made; the flag's name may be left out")
    output: AnyPath | None = flag("new folder for its caches and dataset TOML", default=None)
    check: bool = flag("compare every file with its checksum, and write nothing", default=False)

    @model_validator(mode="after")
    def _check(self) -> "UnpackOptions":
        if (self.output is None) != self.check:
            raise UserError(
                "give --output, the new folder, or --check to write nothing."
                if self.output is None
                else "--check writes nothing; leave --output out."
            )
        return self


@options
class UnpackConfig:
    """All sections."""

    unpacking: UnpackOptions

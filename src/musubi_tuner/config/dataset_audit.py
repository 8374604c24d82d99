"""Options of `ltxv2 dataset audit`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from musubi_tuner.config.dataset_tools import DatasetFileOptions
from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, List, Text, options
from musubi_tuner.runtime.errors import UserError

Kind = Literal[
    "hole", "changed", "new", "dropped", "unreadable", "companion", "orphan", "late_sound", "clipped_sound", "silent_sound", "static",
    "upscaled", "duplicate", "leak", "caption", "same_caption", "no_trigger",
]  # fmt: skip
"""What can be found."""
_Failing = Literal[
    "any", "hole", "changed", "new", "dropped", "unreadable", "companion", "orphan", "late_sound", "clipped_sound", "silent_sound",
    "static", "upscaled", "duplicate", "leak", "caption", "same_caption", "no_trigger",
]  # fmt: skip


@options
class AuditOptions:
    """The audit."""

    page: AnyPath | None = flag("write an HTML page of it, which opens from disk", default=None)
    json: AnyPath | None = flag("write it as JSON", default=None)
    fail_on: Annotated[tuple[_Failing, ...], List] = flag("kinds of findings for which the program ends with 1", default=())
    trigger: Text | None = flag("trigger word that every caption should have", default=None)
    near: Annotated[float, Field(ge=0, le=2)] = flag(
        "distance of latents, as a share of their size, up to which two clips are duplicates", default=0.1
    )
    media: bool = flag("decode the media too: for sound, motion and damage", default=True)

    @model_validator(mode="after")
    def _two_files(self) -> Self:
        if self.page is not None and self.page == self.json:
            raise UserError(f"--page, --json: both are {self.page}. Give each its own file.")
        return self


@options
class AuditConfig:
    """All sections."""

    dataset: DatasetFileOptions
    audit: AuditOptions

"""Options of uploads to the Hugging Face Hub, by musubi-tuner's names."""

from typing import Literal

from pydantic import model_validator

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import Secret, Text, options
from musubi_tuner.runtime.errors import UserError


@options
class HubOptions:
    """Upload to the Hugging Face Hub."""

    huggingface_repo_id: Text | None = flag("repository, NAME/REPOSITORY, that LoRAs, card and previews are uploaded to", default=None)
    huggingface_repo_type: Literal["model", "dataset"] = flag("its kind", default="model")
    huggingface_path_in_repo: Text | None = flag("folder in it; default: its root", default=None)
    huggingface_token: Secret | None = flag("token that may write there; default: HF_TOKEN or that of `hf auth login`", default=None)
    huggingface_repo_visibility: Literal["private", "public"] = flag("of a repository that is made", default="private")

    @model_validator(mode="after")
    def _check(self) -> "HubOptions":
        place = self.huggingface_path_in_repo or ""
        if (
            place.startswith("/")
            or place.endswith("/")
            or "\\" in place
            or any(part in ("", ".", "..") for part in place.split("/") if place)
        ):
            raise UserError(f"--huggingface_path_in_repo {place}: must be a folder in the repository, such as loras/mila.")
        if self.huggingface_repo_id is None and (
            place or self.huggingface_token is not None or self.huggingface_repo_visibility == "public"
        ):
            raise UserError("--huggingface_repo_id is missing: the other flags of the hub do nothing without it.")
        return self


@options
class TrainingHubOptions(HubOptions):
    """Upload to the Hugging Face Hub."""

    save_state_to_huggingface: bool = flag("upload training states too, which --save_state writes", default=False)

    @model_validator(mode="after")
    def _check_state(self) -> "TrainingHubOptions":
        if self.save_state_to_huggingface and self.huggingface_repo_id is None:
            raise UserError("--save_state_to_huggingface: give --huggingface_repo_id too.")
        return self

"""A repository of the Hugging Face Hub that files are uploaded to. Where it is asked for alone is `huggingface_hub` imported."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from musubi_tuner.config.publishing import HubOptions
from musubi_tuner.publishing.card import MARK, NAME
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.offline import online

_LOGIN = "Log in with `hf auth login`, set HF_TOKEN, or give --huggingface_token; the token must be allowed to write."


class NotReached(Exception):
    """The hub did not answer, or failed: what may pass."""


class Hub:
    """One repository."""

    def __init__(self, options: HubOptions) -> None:
        """
        Raises:
            UserError: `huggingface_hub` is not installed, or the repository's name is none.
        """
        assert options.huggingface_repo_id is not None
        self.repo_id, self.repo_type = options.huggingface_repo_id, options.huggingface_repo_type
        self._prefix = options.huggingface_path_in_repo or ""
        self._private = options.huggingface_repo_visibility == "private"
        self._token = None if options.huggingface_token is None else options.huggingface_token.reveal()
        self._card_is_ours: bool | None = None
        try:
            import huggingface_hub
        except ImportError as error:
            raise UserError("--huggingface_repo_id: huggingface_hub is not installed. Remedy: pip install huggingface_hub.") from error
        from huggingface_hub.utils import disable_progress_bars, validate_repo_id

        try:
            validate_repo_id(self.repo_id)
        except ValueError as error:
            raise UserError(f"--huggingface_repo_id {self.repo_id}: is no name of a repository (NAME/REPOSITORY): {error}") from error
        disable_progress_bars()
        self._api: Any = huggingface_hub.HfApi(token=self._token, library_name="musubi-tuner-ltxv2")

    @property
    def url(self) -> str:
        """Of its page."""
        kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self._api.endpoint}/{kind}{self.repo_id}"

    def create(self) -> None:
        """Make the repository where it is not there.

        Raises:
            UserError: no token, one that may not write there, or a name that the hub refuses.
            NotReached: the hub did not answer.
        """
        self._ask(
            lambda: self._api.create_repo(self.repo_id, repo_type=self.repo_type, private=self._private, exist_ok=True), "cannot be used"
        )

    def upload(self, files: Mapping[str, Path | bytes]) -> list[str]:
        """Put files there, all or none of them.

        Args:
            files: by their paths in the repository, below its `--huggingface_path_in_repo`. A card is left out where the
                repository has one that was not written here.

        Returns:
            Those that were left out.

        Raises:
            UserError, NotReached: as `create`.
        """
        from huggingface_hub import CommitOperationAdd

        left_out = [NAME] if NAME in files and not self._may_write_card() else []
        kept = {name: content for name, content in files.items() if name not in left_out}
        if kept:
            self._ask(lambda: self._commit(CommitOperationAdd, kept), "took no upload")
        return left_out

    def _commit(self, operation: Any, files: Mapping[str, Path | bytes]) -> None:
        operations = [
            operation(path_in_repo=self._place(name), path_or_fileobj=content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        first = next(iter(files))
        said = first if len(files) == 1 else f"{first} and {len(files) - 1} more"
        self._api.create_commit(self.repo_id, operations, commit_message=f"Upload {said}", repo_type=self.repo_type)

    def _place(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    def _may_write_card(self) -> bool:
        """Whether there is none, or one that was written here: people edit cards on the hub."""
        if self._card_is_ours is None:
            self._card_is_ours = self._ask(self._read_card, "does not show its card")
        return self._card_is_ours

    def _read_card(self) -> bool:
        place = self._place(NAME)
        if not self._api.file_exists(self.repo_id, place, repo_type=self.repo_type):
            return True
        with tempfile.TemporaryDirectory() as folder:
            path = Path(self._api.hf_hub_download(self.repo_id, place, repo_type=self.repo_type, local_dir=folder))
            return MARK in path.read_text(encoding="utf-8", errors="replace")

    def _ask(self, request: Any, what: str) -> Any:
        """What a request gives; whatever the hub's client raises becomes one of two errors, and names no token."""
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

        named = f"--huggingface_repo_id {self.repo_id}"
        try:
            with online():
                return request()
        except OfflineModeIsEnabled as error:
            raise UserError(f"{named}: HF_HUB_OFFLINE is set, so nothing can be uploaded. Unset it, or leave the flag out.") from error
        except (LocalTokenNotFoundError, HFValidationError) as error:
            raise UserError(f"{named}: {what}: {self._said(error)}. {_LOGIN}") from None
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (400, 401, 403, 404):
                raise UserError(f"{named}: {what} (HTTP {status}): {self._said(error)}. {_LOGIN}") from None
            raise NotReached(f"HTTP {status}: {self._said(error)}") from None
        except Exception as error:  # of its HTTP client, of the network, of its upload's own threads
            raise NotReached(f"{type(error).__name__}: {self._said(error)}") from None

    def _said(self, error: BaseException) -> str:
        """Its words and those of what caused it, without a link to what HTTP's numbers mean."""
        texts = list(dict.fromkeys(str(one).partition("For more information")[0] for one in (error, error.__cause__) if one is not None))
        server = getattr(error, "server_message", None) or ""
        words = " ".join([*texts, "" if server in texts[0] else server]).split()
        text = " ".join(words)[:400].rstrip(".")
        return text.replace(self._token, "(hidden)") if self._token else text

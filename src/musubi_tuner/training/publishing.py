"""A run's files on the Hugging Face Hub, while it trains: each LoRA when it is saved, with previews that were made since, the card, and
states where they are asked for. Training never waits for it, and no upload that fails costs a run."""

import logging
from pathlib import Path

from musubi_tuner.config.training import TrainingConfig
from musubi_tuner.networks.formats import CONNECTORS_ENDING, connectors_path
from musubi_tuner.publishing.card import NAME, CardFacts, Preview, card_text, relative_link
from musubi_tuner.publishing.hub import Hub, NotReached
from musubi_tuner.publishing.uploads import Uploads
from musubi_tuner.runtime.disk import reason
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.program import quoted
from musubi_tuner.training.checkpoint import steps_of
from musubi_tuner.training.hooks import Hook
from musubi_tuner.training.page.runs import FoundRun, find_run
from musubi_tuner.training.run import Outcome

log = logging.getLogger(__name__)


class Publishing(Hook):
    """In the main process, behind all other hooks."""

    def __init__(self, config: TrainingConfig) -> None:
        """
        Raises:
            UserError: the hub refuses the repository, which is known before anything is loaded. Where it only was not reached,
                a warning.
        """
        self._config, hub = config, Hub(config.hub)
        try:
            hub.create()
        except NotReached as error:
            log.warning("WARNING: %s: not reached (%s); training goes on, and uploads are tried again", hub.url, error)
        self._uploads = Uploads(hub)
        self._handed: set[Path] = set()

    def after_step(self, outcome: Outcome, seconds: float) -> None:
        if any(file not in self._handed for file in outcome.files):
            self._hand_over(outcome)

    def finish(self, outcome: Outcome) -> list[tuple[str, str]]:
        """Upload what is left, unless the program was asked to end.

        Returns:
            Rows for the last table.
        """
        if not outcome.interrupted:
            self._hand_over(outcome)
        uploads, saving = self._uploads, self._config.saving
        uploads.finish(patient=not outcome.interrupted)
        rows = uploads.rows()
        if uploads.failed:
            again = f"ltxv2 lora publish {quoted(saving.output_dir)} --huggingface_repo_id {uploads.hub.repo_id}"
            rows.append(("to upload it", again))
        return rows

    @property
    def is_complete(self) -> bool:
        """Whether all that was to be uploaded is."""
        return not self._uploads.failed

    @property
    def is_busy(self) -> bool:
        """Whether an upload is still under way, which the program would wait for."""
        return self._uploads.is_busy

    def _hand_over(self, outcome: Outcome) -> None:
        try:
            files, lora = self._new_files(outcome)
            if files and lora is not None:
                files[NAME] = self._card(lora)
            self._uploads.add(files)
        except (OSError, UserError) as error:
            log.warning("WARNING: not all is uploaded (%s); training goes on", reason(error))

    def _new_files(self, outcome: Outcome) -> tuple[dict[str, Path | bytes], Path | None]:
        """By their paths in the repository; and the newest LoRA."""
        saving, files = self._config.saving, {}
        new = [path for path in outcome.files if path not in self._handed]
        self._handed.update(new)
        for path in new:
            if path.is_dir() and self._config.hub.save_state_to_huggingface:
                files |= {f"{path.name}/{one.relative_to(path).as_posix()}": one for one in sorted(path.rglob("*")) if one.is_file()}
            elif path.is_file():
                files |= {one.name: one for one in (path, connectors_path(path)) if one.is_file()}
        previews = [one.path for one in self._found().previews if one.path not in self._handed]
        self._handed.update(previews)
        files |= {relative_link(path, saving.output_dir): path for path in previews}
        loras = [path for path in outcome.files if path.is_file() and not path.name.endswith(CONNECTORS_ENDING)]
        return files, loras[-1] if loras else None

    def _found(self) -> FoundRun:
        return find_run(self._config.saving.output_dir, self._config.saving.output_name)

    def _card(self, lora: Path) -> bytes:
        facts = CardFacts(repo_id=self._config.hub.huggingface_repo_id or "", previews=previews_of(self._found(), lora))
        return card_text(lora, facts).encode()


def previews_of(found: FoundRun, lora: Path) -> dict[str, Preview]:
    """The newest previews that were made up to a LoRA's step, with their prompts, by their paths from the run's folder."""
    last = steps_of(lora) or max((one.step for one in found.previews), default=0)
    newest = max((one.step for one in found.previews if one.step <= last), default=None)
    prompts = {} if found.record is None else {(one.index, one.seed): one.prompt for one in found.record.prompts}
    return {
        relative_link(one.path, found.folder): Preview(path=one.path, prompt=prompts.get((one.index, one.seed), ""))
        for one in found.previews
        if one.step == newest
    }

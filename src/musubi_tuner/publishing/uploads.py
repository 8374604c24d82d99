"""Uploads beside a run: one after the other in a thread of their own, so that training never waits for them. What fails is told of once,
kept, and tried again at the end."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from musubi_tuner.publishing.hub import Hub, NotReached
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.runtime.tables import names_of

log = logging.getLogger(__name__)

Contents = Mapping[str, Path | bytes]
_TRIES = 3
_PAUSE = 2.0
"""Seconds between them; each time twice as many."""


class Uploads:
    """What was handed over, what is there, and what is not."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub
        self.done: dict[str, None] = {}
        """Paths in the repository, in their order."""
        self.failed: dict[str, str] = {}
        """Why, by path in the repository."""
        self.left_out: dict[str, None] = {}
        """Cards that would have taken the place of somebody's own."""
        self._contents: dict[str, Path | bytes] = {}
        self._jobs: queue.Queue[Contents] = queue.Queue()
        self._told: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)  # a run that ends by an error waits for none
        self._thread.start()

    def add(self, files: Contents) -> None:
        """Have them uploaded when their turn comes, together."""
        if files:
            self._contents |= files
            self._jobs.put(dict(files))

    def finish(self, *, patient: bool) -> None:
        """Wait for what is under way, and try what has failed again.

        Args:
            patient: false where the program was asked to end: nothing is tried again, and what takes longer than some seconds is left.
        """
        if not patient:
            deadline = time.monotonic() + 10
            while self._jobs.unfinished_tasks and time.monotonic() < deadline:
                time.sleep(0.05)
        else:
            if self._jobs.unfinished_tasks:
                log.info("uploading what is left to %s ...", self.hub.url)
            self._jobs.join()
            pause = _PAUSE
            for _ in range(_TRIES):
                if not self.failed:
                    break
                time.sleep(pause)
                pause *= 2
                self._upload({name: self._contents[name] for name in self.failed})
        for name in list(self._contents):
            if name not in self.done and name not in self.failed and name not in self.left_out:
                self.failed[name] = "there was no time for it"

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                self._upload(job)
            finally:
                self._jobs.task_done()

    def _upload(self, files: Contents) -> None:
        """Together; where that fails, nothing of it is there."""
        gone = [name for name, content in files.items() if isinstance(content, Path) and not content.is_file()]
        for name in gone:
            self.failed.pop(name, None)
            self._contents.pop(name, None)
            log.info("%s: was removed before it was uploaded", name)
        kept = {name: content for name, content in files.items() if name not in gone}
        if not kept:
            return
        try:
            left_out = self.hub.upload(kept)
        except Exception as error:  # whatever it is: an upload is not worth a run
            why = str(error) if isinstance(error, UserError | NotReached) else f"{type(error).__name__}: {error}"
            self.failed |= dict.fromkeys(kept, why)
            if why not in self._told:
                log.warning("WARNING: not uploaded, and tried again at the end: %s: %s", names_of(list(kept), 3), why)
            self._told.add(why)
            return
        self.left_out |= dict.fromkeys(left_out)
        self.done |= dict.fromkeys(name for name in kept if name not in left_out)
        for name in kept:
            self.failed.pop(name, None)
        if left_out:
            log.info("%s: has a model card of its own, which stays as it is", self.hub.url)

    @property
    def is_busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._jobs.unfinished_tasks)

    def rows(self) -> list[tuple[str, str]]:
        """For the table at the end."""
        found = []
        if self.done:
            found.append(("uploaded", f"{len(self.done)} file(s) to {self.hub.url}"))
        if self.left_out:
            found.append(("left as it is", f"the card of {self.hub.url}, which was not written here"))
        for why in dict.fromkeys(self.failed.values()):
            found.append(("NOT uploaded", f"{', '.join(name for name, own in self.failed.items() if own == why)}: {why}"))
        return found


def upload_now(hub: Hub, files: Contents, advance: Callable[[], object]) -> list[str]:
    """Without a thread, a commit a file, so that what is there stays there where a later one fails.

    Returns:
        Cards that were left out.

    Raises:
        UserError: the hub refuses a file, or was not reached three times.
    """
    left_out = []
    for name, content in files.items():
        for number in range(1, _TRIES + 1):
            try:
                left_out += hub.upload({name: content})
                break
            except NotReached as error:
                if number == _TRIES:
                    raise UserError(
                        f"{name}: was not uploaded to {hub.url}: {error}. Run the same command again; what is there already stays."
                    ) from error
                time.sleep(_PAUSE * number)
        advance()
    return left_out

"""The two trees: the working tree, a revision beside it, and running cases in either."""

import hashlib
import importlib.metadata
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from compare import cases, inputs
from compare.cases import TINY, Case

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUTF8": "1",
}


class CaseFailed(Exception):
    """A command of a case failed, or a case that it needs did."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two trees."""

    tree: Path
    folder: Path
    """Where its cases have their folders."""
    keeps: bool
    """Whether a case that ran before is left as it is."""

    def run(self, case: Case, needed: Sequence[Future] = ()) -> None:
        """Run a case's commands in its folder, which is there only when all of them have ended well.

        Raises:
            CaseFailed: with the end of what the command said.
        """
        for one in needed:
            one.result()
        done, working = self.folder / case.name, self.folder / f".{case.name}.{os.getpid()}"
        if self.keeps and done.is_dir():
            return
        try:
            self._prepare(case, working)
            for number, command in enumerate(case.commands):
                self._call(case, command, working, self.folder / "logs" / f"{case.name}_{number}.txt")
            working.rename(done)
        finally:
            shutil.rmtree(working, ignore_errors=True)

    def _prepare(self, case: Case, folder: Path) -> None:
        folder.mkdir(parents=True)
        for name, text in case.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        for name in case.from_tree:
            if not (self.tree / name).is_dir():
                raise CaseFailed(f"{self.tree} has no folder {name}")
            shutil.copytree(self.tree / name, folder / name)

    def _call(self, case: Case, command: Sequence[str], folder: Path, log: Path) -> None:
        words = [str(self.tree / command[0]) if command[0].endswith(".py") else command[0], *command[1:]]
        answer = self.python(words, folder)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"{words}\n{answer.stdout}\n{answer.stderr}", encoding="utf-8")
        if case.prints is not None:
            with (folder / case.prints).open("a", encoding="utf-8") as file:
                file.write(answer.stdout)
        if answer.returncode != 0:
            end = "\n".join((answer.stdout + answer.stderr).strip().splitlines()[-8:])
            raise CaseFailed(f"failed in {self.tree}: {' '.join(command)[:200]}\n{end}\nAll of it is in {log}")

    def python(self, words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        """Python with this tree's modules and one thread, on the CPU."""
        modules = os.pathsep.join([str(self.tree / "src"), str(self.tree)])
        environment = os.environ | ENVIRONMENT | {"PYTHONPATH": modules}
        command = [sys.executable, *words]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace")

    def check(self) -> None:
        """Make sure that this tree's code is run, and not that of an installed package."""
        answer = self.python(["-c", "import musubi_tuner; print(musubi_tuner.__path__[0])"], self.folder)
        found = Path(answer.stdout.strip())
        if not found.is_relative_to(self.tree):
            sys.exit(f"musubi_tuner is imported from {found} in place of {self.tree}\n{answer.stderr}")


def make_sides(revision: str, work: Path, media: Path | None, *, fresh: bool) -> tuple[Side, Side]:
    """The revision and the working tree, each with a copy of the inputs among its cases' folders.

    Args:
        work: the revision's results stay in it, under a name that says what they were made with.
        fresh: make them anew.
    """
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    tree, kept = work / f"{commit[:12]}_tree", work / f"{commit[:12]}_{_fingerprint(media)}"
    if not tree.is_dir():
        _extract(commit, tree)
    if fresh:
        shutil.rmtree(kept, ignore_errors=True)
    print(f"what {commit[:12]} leaves is {'taken from' if kept.is_dir() else 'computed, and kept in'} {kept} (--fresh computes it anew)")
    old = Side(tree, kept, keeps=True)
    new = Side(ROOT, work / f"{ROOT.name}_{hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]}", keeps=False)
    shutil.rmtree(new.folder, ignore_errors=True)
    old.run(TINY)
    if not (kept / "inputs").is_dir():
        inputs.make_inputs(kept / TINY.name, media, kept / ".inputs")
        (kept / ".inputs").rename(kept / "inputs")
    shutil.copytree(kept / "inputs", new.folder / "inputs")
    for side in (old, new):
        side.check()
    return old, new


def _fingerprint(media: Path | None) -> str:
    """Of what shapes a revision's results: the cases, their inputs and the installed packages."""
    packages = sorted(f"{one.name} {one.version}" for one in importlib.metadata.distributions())
    clips = [] if media is None else sorted((path.name, path.stat().st_size) for path in media.iterdir())
    sources = [Path(module.__file__).read_text(encoding="utf-8") for module in (cases, inputs)]
    return hashlib.sha256(repr((sys.version, packages, clips, sources)).encode()).hexdigest()[:8]


def _extract(commit: str, folder: Path) -> None:
    working = folder.with_name(f".{folder.name}.{os.getpid()}")
    with tarfile.open(fileobj=io.BytesIO(_git("archive", "--format=tar", commit))) as archive:
        archive.extractall(working, filter="data")
    working.rename(folder)


def _git(*words: str) -> bytes:
    answer = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True)
    if answer.returncode != 0:
        sys.exit(f"git {' '.join(words)}: {answer.stderr.decode(errors='replace').strip()}")
    return answer.stdout

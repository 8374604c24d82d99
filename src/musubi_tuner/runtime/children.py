"""Other commands of this package, run one after the other in processes of their own, so that each has the machine to itself."""

import subprocess
import sys
from collections.abc import Sequence

from musubi_tuner.runtime.parent import started_by_this
from musubi_tuner.runtime.program import EXIT_NOT_ALL


def run_command(name: str, words: Sequence[str], *, quiet: bool = False) -> int:
    """Run `ltxv2 NAME WORDS` and return its exit code; what it says is shown unless `quiet`, where it ends well."""
    command = [sys.executable, "-m", "musubi_tuner.command", name, *words]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        env=started_by_this(),
    )
    try:
        said, _ = process.communicate()
    except BaseException:  # Ctrl-C, or a signal that asks for the end
        process.terminate()
        process.wait()
        raise
    if quiet and process.returncode > EXIT_NOT_ALL:
        sys.stderr.buffer.write(said)
        sys.stderr.flush()
    return process.returncode if process.returncode >= 0 else 128 - process.returncode

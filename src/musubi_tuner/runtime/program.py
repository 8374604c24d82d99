"""How every program starts and ends: logging, errors of the user, interrupts."""

import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from musubi_tuner.runtime.allocator import choose_allocator
from musubi_tuner.runtime.errors import TemporaryFailure, UserError
from musubi_tuner.runtime.offline import go_offline
from musubi_tuner.runtime.parent import end_with_parent
from musubi_tuner.runtime.progress import LogHandler
from musubi_tuner.runtime.signals import EndAsCtrlC, end_at_once, launcher_pid, leave
from musubi_tuner.runtime.tables import printable

EXIT_NOT_ALL = 1
"""Done, and something that was wanted is not there, or not where it was wanted; the messages name it."""
EXIT_USER_ERROR = 2
EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h."""
EXIT_INTERRUPTED = 130


def run_program(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main(argv)` and exit with its code.

    `UserError` becomes one line on stderr and exit code 2, `TemporaryFailure` the same and 75, each with the notes that were added on its
    way; a signal that asks for the end gives 130. Everything else is our fault and keeps its traceback.
    """
    ending = EndAsCtrlC()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[LogHandler(sys.stderr)], force=True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    for noisy in ("httpx", "httpx2", "urllib3", "filelock", "fsspec", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    go_offline()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # warns where it could not fetch a kernel
    try:
        end_with_parent()
        choose_allocator()
        code = main(sys.argv[1:])
        _flush_stdout()
    except (Exception, KeyboardInterrupt) as error:
        if ending.asked or isinstance(error, KeyboardInterrupt):
            end_at_once(EXIT_INTERRUPTED)
            print("interrupted", file=sys.stderr)
            code = EXIT_INTERRUPTED
        elif isinstance(error, UserError):
            print(printable("\n".join([f"error: {error}", *getattr(error, "__notes__", ())])), file=sys.stderr)
            code = EXIT_TRY_AGAIN if isinstance(error, TemporaryFailure) else EXIT_USER_ERROR
        elif isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.EINVAL) and _is_closed():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        else:
            raise
    if "RANK" in os.environ:
        # One of a group: objects of sharded weights hold its threads beyond its end, which aborts a process that waits for nothing else.
        leave(code)
    sys.exit(code)


def _flush_stdout() -> None:
    if sys.stdout is not None:  # pythonw has none
        sys.stdout.flush()


def _is_closed() -> bool:
    """Whether what reads our output, such as head or more, has had enough of it, which Windows calls an invalid argument."""
    try:
        _flush_stdout()
        os.write(sys.stdout.fileno(), b"\n")  # a text that is longer than the buffer has left nothing to flush
    except OSError:
        return True
    return False


def quoted(path: object) -> str:
    """A path as it is typed in a command, under Linux and Windows alike."""
    text = str(path)
    return f'"{text}"' if any(sign in text for sign in " '&()") else text


def command_line(prog: str, argv: Sequence[str]) -> str:
    """A command as it would be typed here: the script or the subcommand, with the launcher that has started this process."""
    script = Path(sys.argv[0])
    started = prog if not prog.endswith(".py") else quoted(script if script.name == prog else prog)
    python = "python " if prog.endswith(".py") else ""
    if launcher_pid() is not None:
        count, precision = os.environ.get("WORLD_SIZE", "1"), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        several = f"--multi_gpu --num_processes {count}" if int(count) > 1 else "--num_processes 1"
        python = f"accelerate launch {several} --mixed_precision {precision} "
    return f"{python}{started} {' '.join(quoted(word) if os.name == 'nt' else shlex.quote(word) for word in argv)}"

"""How every program starts and ends: logging, errors of the user, interrupts."""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from musubi_tuner.runtime.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run_program(main: Callable[[Sequence[str]], int]) -> None:
    """Run `main(argv)` and exit with its code.

    `UserError` becomes one line on stderr and exit code 2; everything else is our fault and keeps its traceback.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    for noisy in ("httpx", "urllib3", "filelock", "fsspec", "torch.distributed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # what reads our output, such as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def quoted(path: object) -> str:
    """A path as it is typed in a command, under Linux and Windows alike."""
    text = str(path)
    return f'"{text}"' if any(sign in text for sign in " '&()") else text

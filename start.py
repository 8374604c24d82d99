"""Sets everything up on this machine: Python's environment, the torch build that fits the graphics driver, the trainer; then looks at it.

    python start.py              installs into .venv, or brings it up to date, and runs the doctor
    python start.py --dry_run    says what it would install

`start.bat` (Windows, by a double click) and `start.sh` find a Python for it.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (read by older versions too, to say so)
    sys.exit(f"Python 3.11 or newer is needed; this is Python {sys.version_info[0]}.{sys.version_info[1]}.")

from tools.environment import make_environment, run
from tools.graphics_driver import find_card, torch_indexes

EXTRAS = ("bitsandbytes", "tensorboard")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    if unknown := [word for word in arguments if word != "--dry_run"]:
        print(f"unknown: {unknown[0]}. start.py takes --dry_run, and nothing else.", file=sys.stderr)
        return 2
    card = find_card()
    print(card.told, flush=True)
    indexes = torch_indexes(card)
    if arguments:
        print("torch from the first of these that has the pinned version:")
        print("\n".join(f"  {index}" for index in (*indexes, "the usual package index")))
        return 0
    python = make_environment(extras=EXTRAS, torch_indexes=indexes)
    code = run([python, "-m", "musubi_tuner.command", "doctor"])
    print("\nNext: python quickstart.py, or docs/tutorials/first_lora.md. In a new window, activate the environment first:")
    print("  .venv\\Scripts\\activate" if sys.platform == "win32" else "  source .venv/bin/activate")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Installs what the tests need into .venv and runs them: python run_tests.py [arguments of pytest]

Needs nothing but Python 3.11 or newer.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (read by older versions too, to say so)
    sys.exit(f"Python 3.11 or newer is needed; this is Python {sys.version_info[0]}.{sys.version_info[1]}.")

from tools.environment import ROOT, make_environment, run

ORACLES = ("ltx-core==1.0.0", "ltx-pipelines==1.0.0")
"""The official implementation, which the parity tests compare with. It comes alone: what it asks for besides is not used by them."""

PARALLEL = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
"""Each file in one process, which makes what its tests share once; long files, those of tests/e2e, come first."""


def main(arguments: list[str]) -> int:
    python = make_environment(extras=("test",), without_dependencies=ORACLES)
    return run([python, "-m", "pytest", "-q", *PARALLEL, *arguments], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

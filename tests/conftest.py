"""Shared fixtures: real tiny checkpoints and encoders, made once a session."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several workers share two cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.settled import Settled

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
settled = Settled()


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_unconfigure() -> None:
    settled.end()


def pytest_runtest_setup() -> None:
    settled.look()


@pytest.fixture(scope="session")
def tiny_family(tmp_path_factory: pytest.TempPathFactory):
    """Paths of complete tiny checkpoints and encoder folders (`musubi_tuner.tiny.checkpoint.TinyFamily`)."""
    from musubi_tuner.tiny.checkpoint import write_tiny_family

    return write_tiny_family(tmp_path_factory.mktemp("tiny family"))


@pytest.fixture(scope="session")
def shared_media() -> Path:
    """The folder of real clips, beside the repository; tests that need it skip where it is not."""
    folder = SHARED / "media"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def cpp_compiler() -> None:
    """For tests in which torch compiles kernels for the CPU; they skip where the C++ compiler that it asks for is not to be found."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"torch's compiler: {error}")


@pytest.fixture
def global_seed():
    """Tests that draw from torch's global generator start from the same place, and leave it as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield

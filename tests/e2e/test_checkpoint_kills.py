"""`ltxv2 checkpoint convert` killed in the middle: nothing false under the asked name, and the same command then makes the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from musubi_tuner import ltxv2_checkpoint
from tests.killed import held

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 9

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills processes that are forked")


def killed(folder: Path, *words: object) -> dict:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.killed", str(folder), str(ROUNDS), "checkpoint", *map(str, words)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, name: str, earlier: dict[str, str]) -> None:
    """Under `name` there is nothing, what was there before, or all of it."""
    assert len(found["rounds"]) == ROUNDS and sum(one["killed"] == -9 for one in found["rounds"]) >= ROUNDS - 1
    partial = 0
    for one in found["rounds"]:
        seen = {path: digest for path, digest in one["left"].items() if path.split("/")[0] == name}
        assert seen in ({}, earlier, found["whole"]), f"killed at {one['at']}"
        others = [path for path in one["left"] if path not in seen]
        assert all(path.startswith(".") and path.split("/")[0].endswith(".tmp") for path in others), others
        partial += bool(others)
        assert one["again"] == 0 and one["whole"] == found["whole"], f"again, after it was killed at {one['at']}"
    assert partial >= ROUNDS // 2, "it was killed in the midst of writing"


def test_a_killed_conversion_to_diffusers_leaves_nothing_false(tiny_family, tmp_path):
    """In place of a folder that is there, which stays until the new one is whole."""
    made = tmp_path / "made"
    flags = ["--to", "diffusers", "--output_dir", str(made / "tree")]
    assert ltxv2_checkpoint.main(["convert", str(tiny_family.ltx25_duration_head), *flags]) == 0
    earlier = held(made)
    found = killed(made, "convert", tiny_family.ltx25_vae, tiny_family.ltx25_duration_head, *flags, "--overwrite")
    assert len(found["whole"]) > len(earlier) > 2
    check(found, "tree", earlier)


def test_a_killed_conversion_to_one_file_leaves_nothing_false(tiny_family, tmp_path):
    tree, output = tmp_path / "tree", tmp_path / "made" / "one.safetensors"
    assert ltxv2_checkpoint.main(["convert", str(tiny_family.ltx25_duration_head), "--to", "diffusers", "--output_dir", str(tree)]) == 0
    found = killed(output.parent, "convert", tree, "--to", "single_file", "--output", output, "--overwrite")
    assert list(found["whole"]) == ["one.safetensors"]
    check(found, "one.safetensors", {})

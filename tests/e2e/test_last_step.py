"""A step that is read one step later is the step that is read at once: the same lines, weights, and end where it is not finite."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_train_network
from musubi_tuner.dataset import verify
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training.last_step import LastStep
from tests import training_parts as parts


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("data"), tiny_family, "av", held_out=False)


def run(data: parts.Data, folder: Path, monkeypatch, *, ahead: bool) -> None:
    """With an optimizer that refuses a step by itself, on the CPU too."""
    original = LastStep.__init__

    def made(self, *arguments) -> None:
        original(self, *arguments)
        assert self.device_refuses
        self.device_refuses = ahead

    monkeypatch.setattr(LastStep, "__init__", made)
    torch.manual_seed(1)
    flags = ["--output_dir", str(folder), "--max_train_steps", "6", "--save_state", "--save_every_n_steps", "4", "--audio_balance", "ema"]
    flags += ["--optimizer_args", "fused=True", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"]
    try:
        assert ltxv2_train_network.main(data.arguments(*flags)) == 0
    finally:
        monkeypatch.setattr(LastStep, "__init__", original)


def contents(folder: Path) -> dict[str, object]:
    """All that a run has written: tensors, the losses, and what its states tell beside the sums of their files. Its page tells
    times, which are never the same."""
    found: dict[str, object] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("-report.json")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = plain(load_file(path))
        elif path.suffix == ".pt":
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.suffix == ".json":
            found[name] = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "fingerprints"}
        elif path.suffix == ".jsonl":
            found[name] = path.read_text(encoding="utf-8")
    return found


def plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return {key: plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def test_a_run_that_reads_each_step_later_writes_the_same(data, tmp_path, monkeypatch):
    for name in ("later", "at_once"):
        run(data, tmp_path / name, monkeypatch, ahead=name == "later")
    ours, theirs = contents(tmp_path / "later"), contents(tmp_path / "at_once")
    assert len(ours) > 6 and ours == theirs


def test_a_step_that_is_not_finite_changes_nothing_and_is_taken_back(data, tmp_path, monkeypatch):
    """What is saved is the step before it, with its schedule, its balance and its random state; a step was begun after it in between."""
    clips = sorted((data.folder / "cache").glob("*_ltxv2.safetensors"))
    kept = clips[1].read_bytes()
    tensors = {name: torch.full_like(value, float("nan")) for name, value in load_file(clips[1]).items()}
    save_file(tensors, clips[1], metadata=dict(open_checkpoint(clips[1]).metadata))
    monkeypatch.setattr(verify, "content_faults", lambda files: {})
    told = []
    try:
        for name in ("later", "at_once"):
            with pytest.raises(UserError, match="not finite: video loss nan") as error:
                run(data, tmp_path / name, monkeypatch, ahead=name == "later")
            told.append(
                (
                    str(error.value),
                    "\n".join(error.value.__notes__).replace(str(tmp_path / name), "FOLDER"),
                )
            )
    finally:
        clips[1].write_bytes(kept)
    assert told[0] == told[1] and "the last good one, is saved" in told[0][1]
    ours, theirs = contents(tmp_path / "later"), contents(tmp_path / "at_once")
    assert len(ours) > 3 and ours == theirs

"""The page that a run keeps: what is on it, that it costs the run nothing, and the page that compares runs."""

import json
import os
from pathlib import Path
from urllib.parse import unquote

import pytest

from musubi_tuner import ltxv2_report
from musubi_tuner.page.fill import data_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training import reporting
from tests import training_parts as parts
from tests.e2e.test_preview_training import project, train  # noqa: F401  (a fixture)

PROMPTS = 2


@pytest.fixture(scope="module")
def runs(project: Path, tiny_family) -> tuple[Path, Path]:  # noqa: F811
    flags = previewed(project)
    one = train(project, tiny_family.ltx23, "page one", *flags)
    return one, train(project, tiny_family.ltx23, "page two", *flags, "--seed", "7")


def previewed(project: Path) -> list[str]:  # noqa: F811
    """Flags of a run with previews and saves at step 2."""
    every = ("--sample_every_n_steps", "--save_every_n_steps")
    return ["--sample_prompts", str(project / "prompts.txt"), "--sample_at_first", *(word for flag in every for word in (flag, "2"))]


def test_a_run_keeps_a_page_of_itself(runs: tuple[Path, Path], project: Path) -> None:  # noqa: F811
    data = data_of(runs[0] / "report.html")
    (run,) = data["runs"]
    record = run["record"]
    assert {path.name for path in runs[0].iterdir() if path.name.startswith(".")} == set(), "nothing half-written is left"
    assert [(clip["step"], clip["index"]) for clip in data["clips"]] == [(step, index) for step in (0, 2, 4) for index in range(PROMPTS)]
    assert all((runs[0] / clip["href"]).is_file() for clip in data["clips"])
    assert [row["prompt"] for row in data["rows"]] == ["A red disc", "A still of it"]
    assert {clip["kind"] for clip in data["clips"]} == {"video", "image"}
    assert (record["state"], record["step"], record["total"], record["peak_bytes"]) == ("done", 4, 4, None)
    assert [step for step, _, _ in record["pace"]] == [1, 2, 3, 4] and all(seconds > 0 for _, _, seconds in record["pace"])
    elapsed = [one for _, one, _ in record["pace"]]
    assert elapsed == sorted(elapsed)
    changed = {name: value for name, value, default in record["settings"] if value != default}
    assert changed["--network_dim"] == "4" and changed["--sample_at_first"] == "on" and "--optimizer_type" not in changed
    assert record["command"].startswith("python ") and "--sample_every_n_steps 2" in record["command"]
    assert dict(record["plan"])["network"].startswith("lora rank 4")
    (receipt,) = record["datasets"]
    assert (receipt["folder"], len(receipt["clips"]), receipt["held_out"]) == (str(project / "clips"), 2, False)
    assert all(clip["caption"] and clip["seconds"] > 0 and clip["size"] == "64x64" for clip in receipt["clips"])
    assert all((runs[0] / unquote(clip["picture"])).is_file() for clip in receipt["clips"]), "linked from where the page lies"
    assert all(max(clip["outline"]) > 0 for clip in receipt["clips"])
    assert [point[0] for point in run["losses"]["loss_video"]] == [1, 2, 3, 4]
    assert [lora["file"] for lora in run["loras"]] == ["lora-step00000002.safetensors", "lora.safetensors"]
    assert run["best"] is None, "nothing is held out"


def test_the_page_is_there_while_the_run_trains_and_says_how_it_ended(data, tmp_path, monkeypatch):
    seen = []
    real = reporting.Reporting.after_step

    def watched(self, outcome, seconds):
        real(self, outcome, seconds)
        page = data_of(tmp_path / "report.html")["runs"][0]["record"]
        seen.append((outcome.step, page["step"], page["state"]))
        if outcome.step == 3:
            raise RuntimeError("the card has gone")

    monkeypatch.setattr(reporting.Reporting, "after_step", watched)
    monkeypatch.setattr(reporting, "_PATIENCE", 0)
    with pytest.raises(RuntimeError, match="the card has gone"):
        parts_run(data, tmp_path, "--save_every_n_steps", "2")
    assert seen == [(1, 0, "training"), (2, 2, "training"), (3, 3, "training")] or seen[1:2] == [(2, 2, "training")]
    page = data_of(tmp_path / "report.html")["runs"][0]
    assert (page["record"]["state"], page["record"]["step"]) == ("interrupted", 3)
    assert "ltxv2_lora-step00000003.safetensors" in [lora["file"] for lora in page["loras"]], "what the rescue has saved"
    monkeypatch.setattr(reporting.Reporting, "after_step", real)
    parts_run(data, tmp_path, "--autoresume")
    again = data_of(tmp_path / "report.html")["runs"][0]["record"]
    assert (again["state"], again["started"]) == ("done", page["record"]["started"])
    assert [step for step, _, _ in again["pace"]] == [1, 2, 3, 4]
    elapsed = [one for _, one, _ in again["pace"]]
    assert elapsed == sorted(elapsed)


def test_held_out_loss_its_gap_and_the_best_checkpoint_are_named(data, tmp_path):
    parts_run(data, tmp_path, "--save_every_n_steps", "2", "--validate_every_n_steps", "2")
    (run,) = data_of(tmp_path / "report.html")["runs"]
    assert [point[0] for point in run["losses"]["validation/loss_audio"]] == [0, 2, 4]
    assert set(run["gaps"]) <= {"video", "audio"}
    assert run["best"]["file"] in ("ltxv2_lora-step00000002.safetensors", "ltxv2_lora.safetensors")
    labels = [(receipt["label"], receipt["held_out"]) for receipt in run["record"]["datasets"]]
    assert labels == [("datasets[0]", False), ("validation_datasets[0]", True)]
    trimmed = run["record"]["datasets"][0]["sources"]
    assert [(source, what) for source, what, _ in trimmed] == [(f"clip_{number:03d}.mp4", "trimmed") for number in range(3)]
    assert all(why for _, _, why in trimmed), "what the caching programs have left"


def test_a_page_that_cannot_be_written_costs_a_warning(data, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(reporting, "_PATIENCE", 0)
    (tmp_path / "report.html").mkdir()
    left = [tmp_path / ".ltxv2_lora.1-report.json.tmp", tmp_path / ".report.html.1.tmp", tmp_path / ".report.html.2.tmp"]
    for path in left:
        path.write_bytes(b"half")
    os.utime(left[1], (0, 0))
    parts_run(data, tmp_path, "--save_every_n_steps", "1")
    assert caplog.text.count("the run's page is not written") == 1
    assert [path.exists() for path in left] == [False, False, True], "what a killed run has left; another run may be writing the last one"
    plain = tmp_path / "plain"
    parts_run(data, plain, "--save_every_n_steps", "1")
    assert (plain / "ltxv2_lora-loss.jsonl").read_bytes() == (tmp_path / "ltxv2_lora-loss.jsonl").read_bytes()


def test_two_runs_on_one_page(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    assert ltxv2_report.main([*map(str, runs), "--embed", "--output", str(page)]) == 0
    data = data_of(page)
    assert [run["label"] for run in data["runs"]] == ["page one/lora", "page two/lora"]
    assert all(clip["href"].startswith("data:") for clip in data["clips"]) and len(data["clips"]) == 2 * 3 * PROMPTS
    assert len(data["rows"]) == PROMPTS, "a row for a prompt of both"
    seeds = [dict((name, value) for name, value, _ in run["record"]["settings"])["--seed"] for run in data["runs"]]
    assert seeds == ["42", "7"]


def test_the_page_of_a_finished_run_is_made_again_as_it_was(runs: tuple[Path, Path]) -> None:
    page = runs[0] / "report.html"
    before = page.read_bytes()
    page.unlink()
    assert ltxv2_report.main([str(runs[0])]) == 0
    assert page.read_bytes() == before


def test_a_run_of_before_there_were_pages_has_losses_and_previews(runs: tuple[Path, Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "lora-loss.jsonl").write_bytes((runs[0] / "lora-loss.jsonl").read_bytes())
    assert ltxv2_report.main([str(old)]) == 0
    (run,) = data_of(old / "report.html")["runs"]
    assert run["record"] is None and len(run["losses"]["loss_video"]) == 4


def test_folders_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        ltxv2_report.main([str(tmp_path / "nowhere")])
    (tmp_path / "x-report.json").write_text(json.dumps({"ltxv2_report": 2}), encoding="utf-8")
    with pytest.raises(UserError, match="is no record of a run"):
        ltxv2_report.main([str(tmp_path)])


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("held out"), tiny_family, "av")


def parts_run(data: parts.Data, output: Path, *extra: str) -> None:
    from musubi_tuner import ltxv2_train_network

    assert ltxv2_train_network.main(data.arguments("--output_dir", str(output), "--max_train_steps", "4", *extra)) == 0

"""The page of runs: what is drawn of a loss file, what is found in a folder, and that nothing of a user's gets into it unescaped."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from musubi_tuner.cache.index import DatasetIndex, write_index
from musubi_tuner.cache.names import is_cache_name
from musubi_tuner.cache.receipts import SourceReceipt, read_receipts, receipts_path, write_receipts
from musubi_tuner.page.fill import data_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.training import reporting
from musubi_tuner.training.page.losses import MOST_POINTS, best_of, curves, gaps
from musubi_tuner.training.page.record import MOST_POINTS as MOST_PACE
from musubi_tuner.training.page.record import Prompt, Record, read_record, record_path, write_record
from musubi_tuner.training.page.runs import find_runs
from musubi_tuner.training.page.write import facts, write_page
from tests.unit.test_dataset_batches import make_item

NASTY = '</script><script>alert("x")</script> <b> & \u2028 \' "'


def record(name: str = "mila", **values: object) -> Record:
    base = {"name": name, "program": "p 1", "started": "2026-01-01T00:00:00+00:00", "command": "train", "device": "cpu", "total": 10}
    return Record(**{**base, "step": 10, **values})


def folder_of(path: Path, *, losses: list[dict] | None = None, previews: tuple[str, ...] = (), of: Record | None = None) -> Path:
    (path / "sample").mkdir(parents=True)
    (path / "mila-loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in losses or []), encoding="utf-8")
    for name in previews:
        (path / "sample" / name).write_bytes(b"media of " + name.encode())
    if of is not None:
        write_record(path, of)
    return path


def held(step: int, video: float, **more: float) -> dict[str, float]:
    return {"step": step, "validation/loss_video": video, **more}


def test_curves_are_in_order_finite_and_not_too_long():
    rows = [{"step": step, "loss_video": float(step)} for step in range(1, 3 * MOST_POINTS + 2)]
    rows += [{"step": 0, "loss_audio": math.nan}, {"step": -1, "loss_video": math.inf}]
    drawn = curves(rows)
    assert set(drawn) == {"loss_video"} and len(drawn["loss_video"]) <= MOST_POINTS
    assert drawn["loss_video"][0] == (2.5, 2.5), "four steps, and their mean"
    assert curves([{"step": 2, "lr": 1.0}, {"step": 1, "lr": 2.0}])["lr"] == [(1, 2.0), (2, 1.0)]


def test_the_gap_compares_the_same_noise_since_the_last_measurement():
    trained = [{"step": step, "noise_level/loss_video_0.00-0.25": value} for step, value in ((1, 9.0), (3, 2.0), (4, 4.0))]
    trained += [{"step": 4, "noise_level/loss_video_0.50-0.75": 1.0}]
    sigmas = {"validation/loss_video_sigma0.1": 5.0, "validation/loss_video_sigma0.5": 2.0, "validation/loss_video_sigma0.7": 4.0}
    rows = [held(0, 1.0, **sigmas), *trained, held(2, 1.0), held(4, 1.0, **sigmas | {"validation/loss_video_sigma0.9": 99.0})]
    assert gaps(rows) == {"video": [(4, 2.0)]}, "(5 - 3 + 3 - 1) / 2; nothing is trained at 0.9, nothing measured at step 2 by level"


@pytest.mark.parametrize(("kind", "shown"), [("mse", True), ("huber", False)])
def test_no_gap_is_drawn_between_losses_of_two_kinds(tmp_path, kind, shown):
    """Held-out losses are squared errors, whatever is trained on."""
    rows = [{"step": 1, "noise_level/loss_video_0.00-0.25": 1.0}, held(2, 1.0, **{"validation/loss_video_sigma0.1": 3.0})]
    folder_of(tmp_path / kind, losses=rows, of=record(settings=[("loss_type", kind, "mse")]))
    assert facts(find_runs(tmp_path / kind), tmp_path)["runs"][0]["gaps"] == ({"video": [(2, 2.0)]} if shown else {})


def test_the_best_checkpoint_is_the_saved_one_that_was_measured_best():
    rows = [held(0, 4.0), held(10, 2.0), held(20, 1.0), held(30, 3.0)]
    best = best_of(rows, {11: "a", 29: "b"})
    assert (best["step"], best["losses"], best["file"], best["file_step"], best["measured"]) == (20, {"video": 1.0}, "a", 11, 10)
    assert best_of(rows, {})["file"] is None
    assert best_of([{"step": 1, "loss_video": 1.0}], {1: "a"}) is None
    assert best_of([held(0, math.nan), held(5, 2.0)], {5: "a"})["step"] == 5


def test_streams_count_alike_for_the_best():
    rows = [held(0, 1.0, **{"validation/loss_audio": 100.0}), held(1, 0.5, **{"validation/loss_audio": 99.0})]
    rows.append(held(2, 0.8, **{"validation/loss_audio": 50.0}))
    assert best_of(rows, {})["step"] == 2, "0.8 and 0.5 of the first readings against 0.5 and 0.99"


def test_the_pace_stays_short_and_ends_where_the_run_is():
    one = record()
    for step in range(1, 4 * MOST_PACE):
        one.add_pace(step, step * 2.0, 0.5)
    assert len(one.pace) <= MOST_PACE and one.pace[-1] == (4 * MOST_PACE - 1, 2.0 * (4 * MOST_PACE - 1), 0.5)
    assert {seconds for _, _, seconds in one.pace} == {0.5}


def test_a_record_is_read_as_it_was_written_and_a_damaged_one_is_refused(tmp_path):
    one = record(prompts=[Prompt(index=0, prompt=NASTY, negative="", seed=2**63, fps=24.0)], settings=[("--a", "1", "2")])
    write_record(tmp_path, one)
    assert read_record(record_path(tmp_path, "mila")) == one
    assert [path.name for path in tmp_path.iterdir()] == ["mila-report.json"]
    record_path(tmp_path, "mila").write_text('{"name": 3}', encoding="utf-8")
    with pytest.raises(UserError, match=r"mila-report.json: is no record of a run: name: .*Remove it"):
        read_record(record_path(tmp_path, "mila"))


@dataclass(frozen=True)
class Dataset:
    cache_directory: Path
    label: str = "datasets[0]"
    kind: str = "video"

    def settings(self) -> dict:
        return {}


def test_receipts_of_sources_are_read_as_they_were_written(tmp_path):
    dataset = Dataset(tmp_path)
    rows = [SourceReceipt(source="a\udcff.mp4", outcome="trimmed", note=NASTY, clips=1, seconds=2.5)]
    assert read_receipts(dataset) is None
    write_receipts(dataset, rows)
    path, before = receipts_path(dataset), receipts_path(dataset).stat().st_mtime_ns
    write_receipts(dataset, rows)
    assert path.stat().st_mtime_ns == before and is_cache_name(path.name), "it is no source of a dataset whose cache lies among its clips"
    assert read_receipts(dataset) == [dataclasses.replace(rows[0], source="a\\udcff.mp4")]
    path.write_text('[{"source": 1}]', encoding="utf-8")
    assert read_receipts(dataset) is None


def test_previews_of_an_earlier_run_of_the_name_are_left_out(tmp_path):
    names = (
        "mila_s00000000_00_1.mp4",
        "mila_s00000010_00_1.mp4",
        "mila_s00000020_00_1.mp4",
        "mila_s00000010_01_1.mp4",
        "other_s00000000_00_1.mp4",
    )
    folder_of(
        tmp_path,
        previews=(*names, "mila_s00000010_00_1.mp4.tmp"),
        of=record(prompts=[Prompt(index=0, prompt="a", negative="", seed=1, fps=24.0)]),
    )
    (run,) = find_runs(tmp_path)
    assert [(one.step, one.index, one.seed) for one in run.previews] == [(0, 0, 1), (10, 0, 1)]
    record_path(tmp_path, "mila").unlink()
    (run,) = find_runs(tmp_path)
    assert len(run.previews) == 4, "of a run that has left no record, all"


def test_counts_and_lengths_of_a_dataset_are_of_all_its_clips_and_not_of_those_listed(tmp_path, monkeypatch):
    items = [make_item(tmp_path, f"c{frames}", steps=steps, frames=frames) for steps, frames in ((0, 17), (9, 9), (9, 25))]
    own = items[0].spec
    write_index(own, DatasetIndex(settings=own.settings(), clips=tuple(item.clip for item in items)))
    monkeypatch.setattr(reporting, "_MOST_CLIPS", 1)
    receipt = reporting._receipt(own, (*items,), tmp_path / "dataset.toml", held_out=False)
    assert (len(receipt.clips), receipt.more, receipt.heard) == (1, 2, 2)
    assert (receipt.shortest, receipt.longest, receipt.seconds) == (0.375, 1.042, 2.125)
    write_record(tmp_path, record(datasets=[receipt]))
    assert read_record(record_path(tmp_path, "mila")).datasets == [receipt]


def test_runs_of_a_folder_and_folders_without(tmp_path):
    folder_of(tmp_path / "a", losses=[{"step": 1, "loss_video": 1.0}])
    (tmp_path / "a" / "mila-loss-1.jsonl").write_text("", encoding="utf-8")
    write_record(tmp_path / "a", record("other"))
    assert [(run.name, len(run.losses)) for run in find_runs(tmp_path / "a")] == [("mila", 1), ("other", 0)]
    with pytest.raises(UserError, match="no such folder"):
        find_runs(tmp_path / "b")
    with pytest.raises(UserError, match="holds no run"):
        find_runs(tmp_path)


def test_what_users_wrote_is_escaped_and_links_are_relative(tmp_path):
    prompt = Prompt(index=0, prompt=NASTY, negative="", seed=1, fps=12.0)
    folder = folder_of(
        tmp_path / "räume & co", previews=("mila_s00000010_00_1.mp4",), of=record(prompts=[prompt], command=f"train {NASTY}")
    )
    write_page(folder / "report.html", find_runs(folder))
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.count("<script") == text.count("</script>") == 2 and "alert(" in text and "\u2028" not in text
    data = data_of(folder / "report.html")
    (clip,) = data["clips"]
    assert (clip["prompt"], clip["href"], data["fps"]) == (NASTY, "sample/mila_s00000010_00_1.mp4", 12.0)
    assert data["runs"][0]["record"]["command"].endswith(NASTY)
    write_page(tmp_path / "compared.html", find_runs(folder), embed=False)
    assert data_of(tmp_path / "compared.html")["clips"][0]["href"] == "r%C3%A4ume%20%26%20co/sample/mila_s00000010_00_1.mp4"
    write_page(tmp_path / "whole.html", find_runs(folder), embed=True)
    assert data_of(tmp_path / "whole.html")["clips"][0]["href"].startswith("data:video/mp4;base64,bWVkaWEgb2Y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compared.html", "räume & co", "whole.html"]


def test_prompts_that_runs_share_are_one_row_and_picks_know_their_runs(tmp_path):
    prompts = [Prompt(index=0, prompt="a", negative="", seed=1, fps=24.0), Prompt(index=1, prompt="b", negative="", seed=1, fps=24.0)]
    names = tuple(f"mila_s{step:08d}_{index:02d}_1.mp4" for step in (0, 10) for index in (0, 1))
    one = folder_of(tmp_path / "one", previews=names, of=record(prompts=prompts))
    turned = [Prompt(index=0, prompt="b", negative="", seed=1, fps=24.0), Prompt(index=1, prompt="a", negative="", seed=1, fps=24.0)]
    two = folder_of(tmp_path / "two", previews=names, of=record(prompts=turned, started="2026-01-02T00:00:00+00:00"))
    data = facts([*find_runs(one), *find_runs(two)], tmp_path)
    assert [row["prompt"] for row in data["rows"]] == ["a", "b"]
    assert [run["label"] for run in data["runs"]] == ["one/mila", "two/mila"]
    clips = data["clips"]
    assert len({clip["recipe"] for clip in clips}) == len(clips) == 8
    assert all(clip["prompt"] == data["rows"][clip["index"]]["prompt"] for clip in clips)
    assert [clip["loras"] for clip in clips if clip["step"] == 0] == [[]] * 4
    assert {clip["loras"][0]["name"] for clip in clips if clip["step"]} == {"mila-step00000010.safetensors"}

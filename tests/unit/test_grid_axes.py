"""Axes of grids: which files a value stands for, in which order, and how cells are told apart."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from musubi_tuner.config.flags import parse
from musubi_tuner.config.generation import GenerateConfig, GridOptions
from musubi_tuner.generation.axes import by_step, read_axes
from musubi_tuner.generation.grid import make_grid
from musubi_tuner.generation.jobs import LoraUse, chosen_loras, read_prompts
from musubi_tuner.networks.stack import Strength
from musubi_tuner.runtime.errors import UserError


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> None:
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            save_file({"a": torch.zeros(1)}, name)

    return make


def loras(text: str) -> list[str | None]:
    (axis,) = read_axes(GridOptions(grid=(f"lora={text}",)))
    return [None if use is None else use.path.as_posix() for use in axis.values]


def grid(*words: str):
    config = parse(GenerateConfig, ["--ltxv2_model", "m", "--prompt", "a dog", *words], prog="p", description="d")
    return make_grid(config, read_axes(config.grid), read_prompts(config), chosen_loras(config.loras))


def test_saves_of_a_run_follow_each_other_by_their_steps(files):
    names = [
        "b-000002",
        "a-step00000100",
        "a",
        "a-step00000020",
        "a-9",
        "v2_a_10",
        "v10_a_9",
        "style",
        "style-000250",
        "run2-e5",
        "run10-e4",
    ]
    files(*[f"{name}.safetensors" for name in names])
    ordered = [path.stem for path in by_step([Path(f"{name}.safetensors") for name in names])]
    assert ordered == [
        "a-9", "a-step00000020", "a-step00000100", "a", "b-000002", "run2-e5", "run10-e4", "style-000250", "style", "v2_a_10", "v10_a_9",
    ]  # fmt: skip


def test_the_last_save_of_a_run_whose_name_ends_in_a_number_is_behind_its_others(files):
    names = ["mila_v2-step00000100", "mila_v2-step00000500", "mila_v2", "mila_v10-000003", "mila_v10"]
    files(*[f"{name}.safetensors" for name in names])
    assert [path.stem for path in by_step([Path(f"{name}.safetensors") for name in reversed(names)])] == names


def test_saves_of_epochs_and_of_steps_are_sorted_by_time_where_all_tell_it(files):
    steps = {"mila-step00000050": 50, "mila-000001": 100, "mila-step00000150": 150, "mila-000002": 200, "mila": 230}
    for name, count in steps.items():
        save_file({"a": torch.zeros(1)}, f"{name}.safetensors", {"ss_steps": str(count)})
    assert [Path(path).stem for path in loras("mila*.safetensors")] == list(steps)
    files("mila-000002.safetensors")  # says nothing
    assert [Path(path).stem for path in loras("mila*.safetensors")][:2] == ["mila-000001", "mila-000002"]


def test_files_wildcards_folders_and_none(files):
    files("run/a-2.safetensors", "run/a-10.safetensors", "run/a.safetensors", "run/a.connectors.safetensors", "run/x,y [1].safetensors")
    files("run/deep/b.safetensors", "peft/adapter_model.safetensors", "peft/other.safetensors")
    a = ["run/a-2.safetensors", "run/a-10.safetensors", "run/a.safetensors"]
    assert loras("run/a*.safetensors") == a
    assert loras("none,run/a.safetensors,run/a*.safetensors") == [None, a[2], *a[:2]], "in the order of the values, each once"
    assert loras("run/x,y [1].safetensors,none") == ["run/x,y [1].safetensors", None], "a name with commas and brackets"
    assert loras("run") == [*a, "run/x,y [1].safetensors"] and loras("peft") == ["peft/adapter_model.safetensors"]
    assert loras("run/**/b*.safetensors") == ["run/deep/b.safetensors"]
    assert loras(f"{os.getcwd()}/run/a-*.safetensors") == [f"{Path.cwd().as_posix()}/{name}" for name in a[:2]]  # noqa: PTH109
    (axis,) = read_axes(GridOptions(grid=("lora=run/a-*.safetensors:0.8:1:0.5",)))
    assert [use.strength for use in axis.values] == [Strength(0.8, 0.4)] * 2
    Path("broken.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="broken.safetensors: not a readable"):
        loras("broken.safetensors")


def test_a_file_of_axes_has_paths_from_here_or_from_its_folder_and_flags_win(files):
    files("sub/a.safetensors", "b.safetensors")
    Path("sub/g.toml").write_text("lora = ['a.safetensors', 'b.safetensors']\nseed = [1, 2]\nstrength = 0.5\n", encoding="utf-8")
    axes = read_axes(GridOptions(grid_file=Path("sub/g.toml"), grid=("seed=7", "steps=3")))
    assert [(axis.name, axis.values) for axis in axes[1:]] == [("seed", (7,)), ("strength", (0.5,)), ("steps", (3,))]
    assert axes[0].values == (LoraUse(Path("sub/a.safetensors"), Strength(1, 1)), LoraUse(Path("b.safetensors"), Strength(1, 1)))


def test_cells_that_are_the_same_clip_are_made_once(files):
    """Strength 0, `none`, both streams at 0; 1 x 0.5 and 0.5 x 1."""
    files("a.safetensors")
    made = grid(
        "--grid",
        "lora=none,a.safetensors",
        "--grid",
        "strength=0,0.5,1",
        "--grid",
        "video_strength=0,0.5,1",
        "--grid",
        "audio_strength=0,0.5,1",
    )
    strengths = [job.loras[0].strength if job.loras else None for job in made.jobs]
    assert None in strengths and len(strengths) == len(set(strengths)) == 1 + 8 + 8 - 3
    assert [axis.labels for axis in made.axes] == [("a",), ("0.5", "1"), ("0", "0.5", "1"), ("0", "0.5", "1")]
    assert len({cell.at for cell in made.cells}) == len(made.cells) == 1 + 2 * 9
    assert made.layout == (2, 1), "rows that have more than one value"


def test_clips_of_one_file_follow_each_other_in_whatever_order_axes_are_given(files):
    files("a.safetensors", "b.safetensors")
    made = grid("--grid", "seed=1,2", "--grid", "strength=0.5,1", "--grid", "lora=a.safetensors,b.safetensors")
    assert [job.loras[0].path.stem for job in made.jobs] == ["a"] * 4 + ["b"] * 4


def test_names_are_short_and_no_two_clips_share_one(files):
    long = "n" * 180
    files(
        "x/a.safetensors",
        "y/a.safetensors",
        "y/A.safetensors",
        f"{long}1.safetensors",
        f"{long}2.safetensors",
        "ü:é?.safetensors",
        "z/x/a.safetensors",
    )
    names = ["x/a", "y/a", "y/A", "x/a.safetensors:0.5", f"{long}1", f"{long}2", "ü:é?", "z/x/a"]
    values = ",".join(name if ".safetensors" in name else f"{name}.safetensors" for name in names)
    made = grid("--grid", f"lora={values}", "--grid", "steps=8", "--output_name", "o" * 120)
    stems = [job.stem for job in made.jobs]
    assert len({stem.casefold() for stem in stems}) == 8
    assert all(len(stem.encode()) <= 190 and not set(stem) & set('/\\:*?"<>|') for stem in stems)
    assert stems[0].endswith("_a_steps8") and stems[4].endswith("n1_steps8"), "the end of a long name, where the step stands, is kept"

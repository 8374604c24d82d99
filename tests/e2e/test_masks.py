"""Masks: cached as shares of white in each cell; they weigh the loss, or say what is inpainted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from musubi_tuner import ltxv2_cache_latents, ltxv2_train_network
from musubi_tuner.conditioning import recipe as rules
from musubi_tuner.conditioning.recipe import Recipe
from musubi_tuner.config.dataset import load_dataset_config
from musubi_tuner.dataset.collate import make_batch
from musubi_tuner.dataset.items import Draw, Item, list_items
from musubi_tuner.encoding.pictures import cells_of
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.clips import write_clips
from tests import preview_parts, training_parts
from tests.e2e.test_conditioning import draw_rules

TOML = """
[[datasets]]
video_directory = "clips"
cache_directory = "cache"
mask_directory = "masks"
target_frames = [9]
resolution = [96, 64]
"""


def write_mask(path: Path, level: int) -> None:
    """The left third is white, the middle `level`, the right black."""
    picture = Image.new("L", (96, 64))
    picture.paste(255, (0, 0, 32, 64))
    picture.paste(level, (32, 0, 64, 64))
    path.parent.mkdir(exist_ok=True)
    picture.save(path)


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory) -> training_parts.Data:
    folder = tmp_path_factory.mktemp("maskiert ü")
    write_clips(folder / "clips", count=2, frames=9)
    for number in (0, 1):
        write_mask(folder / "masks" / f"clip_{number:03d}.png", 51)
    (folder / "dataset.toml").write_text(TOML, encoding="utf-8")
    made = training_parts.Data(folder, folder / "dataset.toml", tiny_family.ltx23, "video", tiny_family.gemma)
    training_parts.cache(made)
    return made


def items_of(data: training_parts.Data) -> list[Item]:
    return list(list_items(load_dataset_config(data.toml).datasets, "video", data.toml))


def test_cells_are_shares_of_white():
    frames = torch.zeros(9, 64, 32, 3, dtype=torch.uint8)
    frames[0, :32], frames[1:3, 32:] = 255, 255
    assert torch.equal(cells_of(frames), torch.tensor([[[1.0], [0.0]], [[0.0], [0.25]]]))


def test_masks_are_cached_and_weigh_the_loss(data, tiny_family):
    draws = [Draw(item, 0, 0) for item in items_of(data)]
    cached = load_file(draws[0].item.paths["mask"])["video_mask"]
    assert draws[0].item.paths["mask"].name == "clip_000_00000-009_0096x0064_ltxv2_mask.safetensors"
    assert torch.allclose(cached, torch.tensor([1.0, 0.2, 0.0]).expand(2, 2, 3), atol=5e-3)
    batch = make_batch(draws, "video", draw_rules(Recipe()))
    assert torch.equal(batch.conditions.video.weight[0], cached.flatten()) and batch.conditions.video.clean is None
    wrapper = preview_parts.load_wrapper(tiny_family.ltx23, mode="video")
    batch = replace(batch, text=preview_parts.context(wrapper).text.expand(2, -1, -1), text_mask=None)
    outputs = []
    wrapper.transformer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        found = training_parts.item_losses(wrapper, batch).video
    target = batch.video_noise - batch.latents.flatten(2).transpose(1, 2).float()
    error = (outputs[0].video - target).pow(2).mean(-1)
    assert torch.allclose(found, (error * cached.flatten()).sum(1) / cached.sum(), atol=1e-5)


def test_the_rule_gives_what_is_black(data, tmp_path):
    draw = Draw(items_of(data)[0], 0, 0)
    given = make_batch([draw], "video", draw_rules(Recipe(video=(rules.Mask(),)))).conditions.video
    assert given.weight is None
    assert given.clean.tolist() == [[False, True, True] * 4]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[[video]]\nrule = 'mask'\n", encoding="utf-8")
    for extra in ((), ("--conditioning_config", str(recipe))):
        assert ltxv2_train_network.main(data.arguments("--output_dir", str(tmp_path), "--max_train_steps", "2", "--overwrite", *extra)) == 0
    plain = data.folder / "plain.toml"
    plain.write_text(TOML.replace('mask_directory = "masks"\n', ""), encoding="utf-8")
    unmasked = replace(data, toml=plain)
    training_parts.cache(unmasked)
    with pytest.raises(UserError, match="rule 'mask', but no dataset has masks"):
        ltxv2_train_network.main(unmasked.arguments("--output_dir", str(tmp_path / "b"), "--conditioning_config", str(recipe)))


def test_a_black_mask_is_a_failure_that_names_it(data, tmp_path, caplog):
    write_clips(tmp_path / "clips", count=1, frames=9)
    (tmp_path / "masks").mkdir()
    Image.new("L", (96, 64)).save(tmp_path / "masks" / "clip_000.png")
    (tmp_path / "dataset.toml").write_text(TOML, encoding="utf-8")
    argv = ["--dataset_config", str(tmp_path / "dataset.toml"), "--vae", str(data.model), "--device", "cpu"]
    assert ltxv2_cache_latents.main(argv) == 1
    assert "clip_000.png: is black in all of clip_000.mp4" in caplog.text

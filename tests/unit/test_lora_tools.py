"""LoRA files by themselves: forms, parts, strengths, ranks, sums, averages, differences; by what they do to weights."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_checkpoint, ltxv2_lora
from musubi_tuner.conversion.lora.changes import change_of, shares_by_decay, shares_by_width
from musubi_tuner.conversion.lora.contents import read_lora
from musubi_tuner.generation.networks import check_connectors
from musubi_tuner.ltxv2.text.connectors import connector_names
from musubi_tuner.ltxv2.text.pipeline import projection_fingerprint
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.networks.scales import FOLDED
from musubi_tuner.networks.types import TYPES
from musubi_tuner.publishing.card import CardFacts, card_text
from musubi_tuner.runtime.errors import UserError

SIZES = {
    "transformer_blocks.0.attn1.to_q": (8, 6),
    "transformer_blocks.1.ff.net.0.proj": (12, 6),
    "transformer_blocks.1.audio_attn2.to_out.0": (4, 4),
    "transformer_blocks.0.video_to_audio_attn.to_v": (4, 6),
    "adaln_single.linear": (18, 6),
}
VIDEO, AUDIO = "transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_attn2.to_out.0"


def write_lora(path, *, rank=3, seed=0, dtype=torch.bfloat16, sizes=SIZES, alpha=None, metadata=None):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in sizes.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator).to(dtype)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator).to(dtype)
        if alpha is not None:
            tensors[f"diffusion_model.{name}.alpha"] = torch.tensor(float(alpha))
    save_file(tensors, path, metadata=metadata or {"ss_steps": "100", "ss_network_dim": str(rank)})
    return path


def changes(path):
    return {name: change_of(one) for name, one in read_lora(path).adapters.items()}


def lora(*words):
    assert ltxv2_lora.main([str(word) for word in words]) == 0


def same(one, other, tolerance=0.0):
    assert set(one) == set(other)
    assert all((one[name] - other[name]).abs().max() <= tolerance * one[name].abs().max() for name in one)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
@pytest.mark.parametrize("alpha", [None, 6])
def test_every_form_and_back_is_the_same_file(tmp_path, form, alpha, caplog):
    caplog.set_level("INFO")
    source = write_lora(tmp_path / "mine.safetensors", alpha=alpha)
    there = tmp_path / ("folder" if form == "peft" else "there.safetensors")
    lora("convert", source, "--to", form, "--output", there)
    lora("convert", there, "--to", "official", "--output", tmp_path / "back.safetensors")
    same(changes(source), changes(there))
    same(changes(source), changes(tmp_path / "back.safetensors"))
    if alpha is None:
        theirs, ours = load_file(source), load_file(tmp_path / "back.safetensors")
        assert set(theirs) == set(ours) and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert caplog.text.count("nothing lost") == 2


def test_keys_are_those_that_programs_write(tmp_path):
    source = write_lora(tmp_path / "mine.safetensors", sizes={name: SIZES[name] for name in (VIDEO, "adaln_single.linear")})
    for form in ("diffusers", "kohya", "peft"):
        lora("convert", source, "--to", form, "--output", tmp_path / (form if form == "peft" else f"{form}.safetensors"))
    halves = ("lora_A.weight", "lora_B.weight")
    modules = ("transformer_blocks.0.attn1.to_q", "time_embed.linear")
    assert set(load_file(tmp_path / "diffusers.safetensors")) == {f"transformer.{name}.{half}" for name in modules for half in halves}
    kohya = load_file(tmp_path / "kohya.safetensors")
    stems = ("lora_unet_transformer_blocks_0_attn1_to_q", "lora_unet_adaln_single_linear")
    assert set(kohya) == {f"{stem}.{leaf}" for stem in stems for leaf in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert float(kohya[f"{stems[0]}.alpha"]) == 3
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["target_modules"]) == (3, 3, "LORA", sorted(modules))
    keys = set(load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    assert keys == {f"base_model.model.{name}.{half}" for name in modules for half in halves}


def test_a_scale_that_does_not_fit_the_dtype_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    source = write_lora(tmp_path / "mine.safetensors", alpha=1)  # a third
    lora("convert", source, "--to", "official", "--output", tmp_path / "out.safetensors")
    assert "rounded to bfloat16, by at most" in caplog.text
    lora("convert", source, "--to", "official", "--save_precision", "float32", "--output", tmp_path / "exact.safetensors")
    same(changes(source), changes(tmp_path / "exact.safetensors"))


def test_parts_are_taken_out(tmp_path):
    source = write_lora(tmp_path / "mine.safetensors")
    lora("strip", source, "--remove", "audio", "--output", tmp_path / "video.safetensors")
    assert set(changes(tmp_path / "video.safetensors")) == {name for name in SIZES if "audio" not in name}
    lora("strip", source, "--remove", "video", "--output", tmp_path / "sound.safetensors")
    assert set(changes(tmp_path / "sound.safetensors")) == {name for name in SIZES if "audio" in name}
    lora("strip", source, "--remove_pattern", r"blocks\.0\.", "--output", tmp_path / "late.safetensors")
    assert set(changes(tmp_path / "late.safetensors")) == {name for name in SIZES if "blocks.0." not in name}
    with pytest.raises(UserError, match="nothing would be left"):
        lora("strip", source, "--remove", "video", "audio", "--output", tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="has no module of what"):
        lora("strip", source, "--remove", "connectors", "--output", tmp_path / "none.safetensors")


def test_strengths_by_stream(tmp_path):
    source = write_lora(tmp_path / "mine.safetensors", dtype=torch.float32)
    lora("scale", source, "--strength", "0.5", "--audio_strength", "0", "--output", tmp_path / "half.safetensors")
    found, before = changes(tmp_path / "half.safetensors"), changes(source)
    same(found, {name: 0.5 * value for name, value in before.items() if "audio" not in name}, 1e-6)


def test_a_rank_has_the_least_error_and_says_it(tmp_path, caplog):
    caplog.set_level("INFO")
    source = write_lora(tmp_path / "mine.safetensors", rank=5, dtype=torch.float32, sizes={VIDEO: (8, 6)})
    lora("resize", source, "--rank", "2", "--output", tmp_path / "two.safetensors")
    before, after = changes(source)[VIDEO], changes(tmp_path / "two.safetensors")[VIDEO]
    values = torch.linalg.svdvals(before)
    least = float(values[2:].norm() / values.norm())
    assert float((after - before).norm() / before.norm()) == pytest.approx(least, rel=1e-4)
    assert f"{100 * least:.3f} %" in caplog.text
    assert read_lora(tmp_path / "two.safetensors").metadata["ss_network_dim"] == "2"
    lora("resize", source, "--rank", "5", "--output", tmp_path / "five.safetensors")
    same(changes(source), changes(tmp_path / "five.safetensors"), 1e-5)


def test_an_energy_takes_as_low_a_rank_as_does(tmp_path):
    source = write_lora(tmp_path / "mine.safetensors", rank=4, dtype=torch.float32)
    lora("resize", source, "--energy", "0.9", "--output", tmp_path / "some.safetensors")
    for name, one in read_lora(tmp_path / "some.safetensors").adapters.items():
        squares = torch.linalg.svdvals(changes(source)[name]).square()
        kept = squares.cumsum(0) / squares.sum()
        assert kept[one.rank - 1] >= 0.9 - 1e-5 and (one.rank == 1 or kept[one.rank - 2] < 0.9)


@pytest.mark.parametrize("kind", ["lokr", "loha", "full"])
def test_other_types_become_loras(tmp_path, kind):
    generator = torch.Generator().manual_seed(1)
    own = {
        "lokr": {"lokr_w1": (2, 3), "lokr_w2": (4, 2)},
        "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)},
        "full": {"diff": (8, 6)},
    }[kind]
    tensors = {f"diffusion_model.{VIDEO}.{leaf}": torch.randn(shape, generator=generator) for leaf, shape in own.items()}
    save_file(tensors, tmp_path / "mine.safetensors")
    lora("resize", tmp_path / "mine.safetensors", "--rank", "6", "--output", tmp_path / "lora.safetensors")
    (one,) = read_lora(tmp_path / "lora.safetensors").adapters.values()
    assert (one.kind, one.rank) == ("lora", 6)
    before = read_lora(tmp_path / "mine.safetensors").adapters[VIDEO]
    expected = TYPES[kind].merged(torch.zeros(8, 6), before.tensors)
    assert (change_of(one) - expected).norm() < 1e-5 * expected.norm()
    with pytest.raises(UserError, match=f"is a {kind}"):
        lora("convert", tmp_path / "mine.safetensors", "--to", "peft", "--output", tmp_path / "folder")


def test_several_do_together_what_each_does(tmp_path):
    one = write_lora(tmp_path / "one.safetensors", rank=2, dtype=torch.float32)
    other = write_lora(
        tmp_path / "other.safetensors", rank=3, seed=1, dtype=torch.float32, sizes={VIDEO: SIZES[VIDEO], AUDIO: SIZES[AUDIO]}
    )
    lora("merge", f"{one}:0.5", f"{other}:2:1:0.25", "--output", tmp_path / "both.safetensors")
    found, first, second = changes(tmp_path / "both.safetensors"), changes(one), changes(other)
    expected = {name: 0.5 * value for name, value in first.items()}
    expected[VIDEO] = expected[VIDEO] + 2 * second[VIDEO]
    expected[AUDIO] = expected[AUDIO] + 0.5 * second[AUDIO]
    same(found, expected, 1e-6)
    assert read_lora(tmp_path / "both.safetensors").adapters[VIDEO].rank == 5
    assert "one.safetensors x 0.5" in read_lora(tmp_path / "both.safetensors").metadata["ltxv2_made_from"]
    wrong = write_lora(tmp_path / "wrong.safetensors", sizes={VIDEO: (8, 5)})
    with pytest.raises(UserError, match="another size"):
        lora("merge", one, wrong, "--output", tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()


def test_checkpoints_are_averaged_tensor_by_tensor(tmp_path, capsys):
    for step in (9, 10, 20):
        write_lora(tmp_path / f"run-step{step:08d}.safetensors", seed=step, dtype=torch.float32, metadata={"ss_steps": str(step)})
    lora("average", tmp_path / "run-step*.safetensors", "--beta", "0.5", "--output", tmp_path / "mean.safetensors")
    files = [load_file(tmp_path / f"run-step{step:08d}.safetensors") for step in (9, 10, 20)]
    found = load_file(tmp_path / "mean.safetensors")
    for key, value in found.items():
        assert (value - (0.25 * files[0][key] + 0.25 * files[1][key] + 0.5 * files[2][key])).abs().max() < 1e-6
    assert read_lora(tmp_path / "mean.safetensors").metadata["ss_steps"] == "20"
    assert "run-step00000020.safetensors  0.5000" in capsys.readouterr().out


def test_shares_add_up_and_follow_the_papers_formula():
    for shares in (shares_by_decay(5, 0.9, None), shares_by_decay(5, 0.9, 0.99), shares_by_width([10, 20, 30, 40], 0.1)):
        assert math.fsum(shares) == pytest.approx(1) and all(share > 0 for share in shares)
    # As of every step, its weights are the density (g + 1) t^g: mean (g + 1) / (g + 2) of the training, and the width that was asked for.
    steps = list(range(1, 4001))
    shares = shares_by_width(steps, 0.1)
    mean = sum(step * share for step, share in zip(steps, shares, strict=True)) / 4000
    spread = sum((step / 4000 - mean) ** 2 * share for step, share in zip(steps, shares, strict=True)) ** 0.5
    assert spread == pytest.approx(0.1, rel=1e-3)


def test_what_a_file_says_of_itself_changes_and_its_tensors_do_not(tmp_path, capsys):
    from PIL import Image

    source = write_lora(tmp_path / "mine.safetensors", metadata={"ss_steps": "7", "ss_seed": "1", "modelspec.title": "old"})
    Image.new("RGB", (600, 300), "red").save(tmp_path / "red.png")
    flags = ("--set", "modelspec.title=Mila = 2", "--set", "modelspec.author=Ä", "--remove", "ss_*", "--picture", tmp_path / "red.png")
    lora("metadata", source, *flags, "--output", tmp_path / "new.safetensors")
    new = read_lora(tmp_path / "new.safetensors").metadata
    assert (new["modelspec.title"], new["modelspec.author"], len(new)) == ("Mila = 2", "Ä", 3)
    assert new["modelspec.thumbnail"].startswith("data:image/jpeg;base64,")
    before, after = source.read_bytes(), (tmp_path / "new.safetensors").read_bytes()
    start = [8 + int.from_bytes(data[:8], "little") for data in (before, after)]
    assert before[start[0] :] == after[start[1] :]
    with pytest.raises(UserError, match="no such entry"):
        lora("metadata", source, "--remove", "nothing*", "--output", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="is there already"):
        lora("metadata", source, "--set", "a=b", "--output", tmp_path / "new.safetensors")
    lora("metadata", source)
    assert "modelspec.title" in capsys.readouterr().out


def test_nothing_is_overwritten_and_names_say_what_they_are(tmp_path):
    source = write_lora(tmp_path / "mine.safetensors")
    before = source.read_bytes()
    for words, says in (
        (("--to", "kohya", "--output", source), "is there already"),
        (("--to", "peft", "--output", tmp_path / "a.safetensors"), "is a folder, with"),
        (("--to", "kohya", "--output", tmp_path / "a.pt"), "must end in .safetensors"),
        (("--to", "kohya", "--output", tmp_path), "must end in"),
        (("--to", "peft", "--output", tmp_path), "other files in it"),
    ):
        with pytest.raises(UserError, match=says):
            lora("convert", source, *words)
    assert source.read_bytes() == before and list(tmp_path.iterdir()) == [source]
    with pytest.raises(UserError, match="Did you mean 'inspect'"):
        lora("inspekt", source)


def test_doras_keep_their_lengths_and_are_not_scaled(tmp_path):
    source = write_lora(tmp_path / "mine.safetensors", sizes={VIDEO: SIZES[VIDEO]})
    tensors = load_file(source) | {f"diffusion_model.{VIDEO}.lora_magnitude_vector": torch.rand(8) + 1}
    save_file(tensors, source)
    lora("convert", source, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")
    lora("convert", tmp_path / "kohya.safetensors", "--to", "diffusers", "--output", tmp_path / "back.safetensors")
    found, before = read_lora(tmp_path / "back.safetensors").adapters[VIDEO], read_lora(source).adapters[VIDEO]
    assert found.kind == "dora" and all(torch.equal(found.tensors[leaf], before.tensors[leaf]) for leaf in before.tensors)
    for words in (("scale", source, "--strength", "0.5"), ("resize", source, "--rank", "1"), ("merge", source, source)):
        with pytest.raises(UserError, match="DoRA|dora"):
            lora(*words, "--output", tmp_path / "no.safetensors")


def test_json_takes_the_place_of_no_file_unasked(tmp_path):
    source = write_lora(tmp_path / "mine.safetensors")
    before = source.read_bytes()
    for words in ((), ("--overwrite",)):
        with pytest.raises(UserError, match="is the name of a model's file"):
            lora("inspect", source, "--json", source, *words)
    assert source.read_bytes() == before
    lora("inspect", source, "--json", tmp_path / "facts.json")
    with pytest.raises(UserError, match=r"facts.json: is there already"):
        lora("inspect", source, "--json", tmp_path / "facts.json")
    lora("inspect", source, "--json", tmp_path / "facts.json", "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.safetensors", "facts.json"}


def test_a_file_where_a_folder_should_be_is_told(tmp_path):
    source = write_lora(tmp_path / "mine.safetensors")
    for words in (("convert", source, "--to", "kohya"), ("metadata", source, "--set", "a=b")):
        with pytest.raises(UserError, match=r"mine.safetensors is a file, not a folder"):
            lora(*words, "--output", source / "x.safetensors")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_values_whose_products_are_beyond_float32_have_no_other_rank(tmp_path, kind):
    source = tmp_path / "huge.safetensors"
    key = f"diffusion_model.{VIDEO}"
    halves = {f"{key}.lora_A.weight": torch.full((3, 6), 1e38), f"{key}.lora_B.weight": torch.full((8, 3), 1e38)}
    save_file(halves if kind == "lora" else {f"{key}.diff": torch.full((8, 6), 3e38)}, source)
    words = [("resize", source, "--rank", "1")] + ([("merge", source, source, "--rank", "1")] if kind == "lora" else [])
    for one in words:
        with pytest.raises(UserError, match=rf"huge.safetensors: '{VIDEO}' has values of up to [13].0e\+38, whose products are beyond"):
            lora(*one, "--output", tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == [source]


def test_what_to_do_about_a_type_that_is_not_merged_is_something_that_works(tmp_path):
    dora = write_lora(tmp_path / "dora.safetensors", sizes={VIDEO: SIZES[VIDEO]})
    save_file(load_file(dora) | {f"diffusion_model.{VIDEO}.lora_magnitude_vector": torch.rand(8) + 1}, dora)
    save_file({f"diffusion_model.{VIDEO}.diff": torch.ones(8, 6)}, tmp_path / "full.safetensors")
    for file, says, never in (("dora", "bake them", "resize"), ("full", "`resize --rank N` makes one", "bake")):
        with pytest.raises(UserError, match=says) as raised:
            lora("merge", tmp_path / f"{file}.safetensors", dora, "--output", tmp_path / "out.safetensors")
        assert never not in str(raised.value)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("average", "nothing*"), r"average: nothing\*: no such LoRA. Give files, folders or wildcards such as output/\*.safetensors\.$"),
        (("average", "none"), "average: none: no such LoRA"),
        (("average", "--loras", "nothing"), "--loras: nothing: no such LoRA"),
        (("merge", "a:1:2", "b"), "a:1:2: 2 numbers behind the file"),
        (("merge", "--loras", "a:1:2", "b"), "--loras a:1:2: 2 numbers behind the file"),
        (("merge", "a"), "merge: two or more are merged"),
    ],
)
def test_messages_name_what_was_typed(tmp_path, words, says):
    with pytest.raises(UserError, match=f"^{says}"):
        lora(*words, "--output", tmp_path / "out.safetensors")


@pytest.mark.parametrize("name", ["ltx23", "ltx25_vae"])
def test_a_checkpoint_is_called_one(tiny_family, tmp_path, name):
    path = getattr(tiny_family, name)
    for words in (("inspect", path), ("convert", path, "--to", "kohya", "--output", tmp_path / "out.safetensors")):
        with pytest.raises(UserError, match=r"is a checkpoint \(.*\), and no LoRA.*ltxv2 checkpoint inspect"):
            lora(*words)


def test_an_average_takes_no_part_of_itself(tmp_path):
    for step in (1, 2):
        write_lora(tmp_path / f"run-{step}.safetensors", seed=step)
    words = ("average", tmp_path / "*.safetensors", "--output", tmp_path / "run-mean.safetensors", "--overwrite")
    lora(*words)
    before = (tmp_path / "run-mean.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"run-mean.safetensors: is one of the files that are averaged"):
        lora(*words)
    assert (tmp_path / "run-mean.safetensors").read_bytes() == before


def metadata_of(path):
    return dict(read_lora(path).metadata)


TRAINED = {
    "ss_steps": "100", "ss_seed": "1", "ss_base_model_version": "ltx-2.3", "ltxv2_adapted_streams": "video,audio,cross",
    "ltxv2_network_scaling": FOLDED,
}  # fmt: skip


def test_metadata_stay_true_of_what_is_written(tmp_path):
    mine = write_lora(tmp_path / "mine.safetensors", metadata=TRAINED)
    lora("strip", mine, "--remove", "audio", "--output", tmp_path / "silent.safetensors")
    assert metadata_of(tmp_path / "silent.safetensors")["ltxv2_adapted_streams"] == "video"
    lora("convert", mine, "--to", "kohya", "--output", tmp_path / "kohya.safetensors")
    assert metadata_of(tmp_path / "kohya.safetensors")["ltxv2_network_scaling"] != FOLDED
    lora("convert", tmp_path / "kohya.safetensors", "--to", "official", "--output", tmp_path / "back.safetensors")
    assert metadata_of(tmp_path / "back.safetensors")["ltxv2_network_scaling"] == FOLDED


def test_a_sum_says_what_is_true_of_all_of_its_parts(tmp_path):
    one = write_lora(tmp_path / "one.safetensors", metadata=TRAINED | {"modelspec.title": "one"})
    guided = {"ss_seed": "2", "modelspec.title": "two", "reference_downscale_factor": "2"}
    other = write_lora(tmp_path / "two.safetensors", seed=1, metadata=TRAINED | guided)
    lora("merge", one, other, "--output", tmp_path / "sum.safetensors")
    found = metadata_of(tmp_path / "sum.safetensors")
    assert not {"ss_seed", "modelspec.title"} & set(found)
    assert (found["ss_base_model_version"], found["reference_downscale_factor"]) == ("ltx-2.3", "2")
    assert found["ltxv2_made_from"] == "merge one.safetensors x 1 (sound 1), two.safetensors x 1 (sound 1)"


def test_an_earlier_average_is_no_checkpoint_of_the_run(tmp_path):
    for step in (1, 2):
        write_lora(tmp_path / f"run-{step}.safetensors", seed=step)
    lora("average", tmp_path / "run*.safetensors", "--output", tmp_path / "run-a.safetensors")
    for found in (tmp_path / "run*.safetensors", tmp_path):
        with pytest.raises(UserError, match=r"run-a.safetensors: is no checkpoint of a run, but was made of others \(average"):
            lora("average", found, "--output", tmp_path / "run-b.safetensors")
    lora("average", tmp_path / "run-1.safetensors", tmp_path / "run-a.safetensors", "--output", tmp_path / "run-b.safetensors")


def test_a_picture_is_shown_by_its_length(tmp_path, capsys):
    mine = write_lora(tmp_path / "mine.safetensors", metadata={"modelspec.thumbnail": "data:image/jpeg;base64," + 9000 * "A"})
    lora("inspect", mine, "--modules")
    shown = capsys.readouterr().out
    assert "(9,023 characters)" in shown and 100 * "A" not in shown
    assert all(any(line.endswith(f"  {name}") for line in shown.splitlines()) for name in SIZES), "names of modules are whole"


def test_a_rank_above_the_files_own_is_told(tmp_path, caplog):
    caplog.set_level("INFO")
    mine = write_lora(tmp_path / "mine.safetensors")
    lora("resize", mine, "--rank", "16", "--output", tmp_path / "same.safetensors")
    assert "no module has more than rank 3, so all keep theirs at --rank 16" in caplog.text


def test_a_card_says_conditioning_in_words(tmp_path):
    rules = {"video": [{"rule": "Reference", "probability": 1.0}, {"rule": "FirstFrame", "probability": 0.2}], "audio": []}
    mine = write_lora(tmp_path / "mine.safetensors", metadata=TRAINED | {"ltxv2_conditioning": json.dumps(rules)})
    lora("card", mine, "--output", tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| conditioning | video: Reference (probability 1.0), FirstFrame (probability 0.2) |" in text
    assert "| streams | video, audio, cross |" in text


@pytest.mark.parametrize(
    ("kind", "comfy", "diffusers"), [("lora", True, True), ("dora", False, True), ("lokr", True, False), ("full", True, False)]
)
def test_a_card_names_the_programs_that_load_the_type_and_what_was_merged_first(tmp_path, kind, comfy, diffusers):
    said = {"ss_base_model_version": "ltx-2.3", "ltxv2_network_type": kind, "ltxv2_base_weights": '["style.safetensors x 0.7"]'}
    text = card_text(write_lora(tmp_path / "a.safetensors", metadata=said), CardFacts())
    assert (("put `a.safetensors` into" in text), ("load_lora_weights" in text)) == (comfy, diffusers)
    assert "with `style.safetensors x 0.7` merged into it" in text


def test_what_peft_says_beside_a_file_is_not_applied_twice(tmp_path):
    source, folder = write_lora(tmp_path / "one.safetensors", alpha=6), tmp_path / "peft"
    lora("convert", source, "--to", "peft", "--output", folder)
    before = {one.name: one.read_bytes() for one in folder.iterdir()}
    for words in (("convert", folder, "--to", "official"), ("scale", source, "--strength", "0.5"), ("resize", source, "--rank", "2")):
        with pytest.raises(UserError, match="multiply those of the new file again"):
            lora(*words, "--output", folder / "adapter_model.safetensors", "--overwrite")
    assert {one.name: one.read_bytes() for one in folder.iterdir()} == before
    lora("convert", folder, "--to", "official", "--output", tmp_path / "again.safetensors")
    same(changes(source), changes(tmp_path / "again.safetensors"), 1e-2)


def test_metadata_do_not_part_a_file_from_its_scale(tmp_path):
    source, folder = write_lora(tmp_path / "one.safetensors", alpha=6), tmp_path / "peft"
    lora("convert", source, "--to", "peft", "--output", folder)
    with pytest.raises(UserError, match=r"adapter_config.json says by what .* convert --to official"):
        lora("metadata", folder, "--set", "note=mine", "--output", tmp_path / "elsewhere.safetensors")
    header = json.dumps({"r": 3, "lora_alpha": 6})
    plain = write_lora(tmp_path / "header.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(UserError, match="lora_adapter_metadata.*says by what"):
        lora("metadata", plain, "--remove", "lora_adapter_metadata", "--output", tmp_path / "elsewhere.safetensors")
    assert not (tmp_path / "elsewhere.safetensors").exists()
    lora("metadata", folder, "--set", "note=mine", "--output", folder / "adapter_model.safetensors", "--overwrite")
    lora("metadata", plain, "--set", "note=mine", "--output", tmp_path / "noted.safetensors")
    for path in (folder, tmp_path / "noted.safetensors"):
        assert read_lora(path).metadata["note"] == "mine"
        same(changes(source), changes(path), 1e-2)


def test_a_lora_of_which_nothing_is_left_is_not_written(tmp_path, caplog):
    source = write_lora(tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="at strength 1e-60 its values are too small for float32"):
        lora("scale", source, "--strength", "1e-60", "--output", tmp_path / "out.safetensors")
    with pytest.raises(UserError, match=r"all its values are too small for float16. Give --save_precision float32"):
        lora("scale", source, "--strength", "1e-10", "--save_precision", "float16", "--output", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    lora("scale", source, "--audio_strength", "1e-10", "--save_precision", "float16", "--output", tmp_path / "out.safetensors")
    assert "2 of its modules are too small for float16, and change nothing any more: " in caplog.text and AUDIO in caplog.text


def test_what_takes_itself_away_has_no_rank(tmp_path, caplog):
    caplog.set_level("INFO")
    source = write_lora(tmp_path / "one.safetensors")
    lora("merge", f"{source}:1", f"{source}:-1", "--rank", "3", "--output", tmp_path / "none.safetensors")
    assert all(not bool(change.any()) for change in changes(tmp_path / "none.safetensors").values())
    assert "the change differs by 0.000 % of its norm, at most by 0.000 %" in caplog.text
    lora("merge", f"{source}:1", f"{source}:0.5", "--output", tmp_path / "both.safetensors", "--save_precision", "float32")
    lora("resize", tmp_path / "both.safetensors", "--energy", "1", "--output", tmp_path / "small.safetensors")
    assert read_lora(tmp_path / "small.safetensors").ranks == [3]


def test_adapters_of_the_text_connectors_beside_a_file_are_told(tiny_family, tmp_path, caplog):
    """Where they are not read: by the tools, which take that file too, and by what makes clips, until they are baked in."""
    checkpoint, linear = open_checkpoint(tiny_family.ltx23), "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q"
    size = checkpoint.shape(connector_names(checkpoint)[f"{linear}.weight"])
    network = write_lora(tmp_path / "a.safetensors")
    beside = write_lora(tmp_path / "a.connectors.safetensors", sizes={linear: size})
    lora("scale", network, "--strength", "0.5", "--output", tmp_path / "half.safetensors")
    assert "connectors in a.connectors.safetensors are no part of this" in caplog.text
    check_connectors(network, checkpoint)
    assert f"ltxv2 checkpoint bake --lora {beside}" in caplog.text
    caplog.clear()
    lora("scale", beside, "--strength", "0.5", "--output", tmp_path / "half.connectors.safetensors")
    assert list(changes(tmp_path / "half.connectors.safetensors")) == [linear]
    baked = tmp_path / "baked.safetensors"
    assert ltxv2_checkpoint.main(["bake", str(checkpoint.path), "--lora", str(beside), "--output", str(baked)]) == 0
    check_connectors(network, open_checkpoint(baked))
    assert "WARNING" not in caplog.text
    assert projection_fingerprint(open_checkpoint(baked)) != projection_fingerprint(checkpoint)

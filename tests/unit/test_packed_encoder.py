"""The one file of LTX-2.5's text encoder: what is read of it, what it belongs to, and how a damaged one is told of."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load, save_file

from musubi_tuner.ltxv2.text.encoders import encoder_fingerprint, encoder_options, load_encoder, load_tokenizer, read_encoder_config
from musubi_tuner.ltxv2.text.features import load_feature_extractor
from musubi_tuner.ltxv2.text.packed import check_belongs, tokenizer_folder, with_projection
from musubi_tuner.ltxv2.weights import open_checkpoint
from musubi_tuner.runtime.errors import UserError
from musubi_tuner.tiny.encoders import write_gemma4
from tests.unit.test_encoder_files import quantized

PROMPTS = ["A dog barks.", "The rain taps on the roof while an old man waits quietly beside the neon sign."]


def options(path, **changes):
    made = encoder_options(str(path), tokenizer=None, backend="gemma", device=torch.device("cpu"), max_length=16)
    return dataclasses.replace(made, **changes)


def states(path, **changes):
    return load_encoder(options(path, **changes)).encode(PROMPTS).layers


@pytest.fixture
def packed(tiny_family, tmp_path):
    """The packed encoder, to be changed."""
    return shutil.copy(tiny_family.ltx25_gemma, tmp_path / "encoder.safetensors")


def rewrite(path, change=dict, **metadata):
    tensors, kept = load(path.read_bytes()), dict(open_checkpoint(path).metadata)
    kept = {key: value for key, value in (kept | metadata).items() if value is not None}
    path.unlink()
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, path, metadata=kept)


def test_the_files_own_names_are_those_of_the_release(tiny_family):
    names = open_checkpoint(tiny_family.ltx25_gemma).names()
    kinds = {name.partition(".")[0] for name in names}
    assert kinds == {"model", "vision_model", "audio_projector", "text_embedding_projection", "tokenizer_json",
                     "hf_asset__tokenizer_config"}  # fmt: skip
    with tokenizer_folder(tiny_family.ltx25_gemma) as folder:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (tiny_family.gemma4 / name).read_bytes()
    assert not folder.exists()


def rotated(tensors, part="layers"):
    """As ComfyUI's int8 ConvRot files: rows of a linear rotated in groups of 16 inputs, declared beside the codes."""
    step = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    turn = torch.kron(step, step)
    found = {name: value for name, value in tensors.items() if value.ndim != 2 or part not in name}
    for name, value in tensors.items():
        if name not in found:
            found[name] = (value.view(value.shape[0], -1, 16) @ turn).view_as(value)
    declared = json.dumps({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}).encode()
    made = quantized(found, torch.int8, "weight_scale", rows=True, part=part)
    codes = [name for name, value in made.items() if value.dtype == torch.int8]
    return made | {f"{name.removesuffix('weight')}comfy_quant": torch.tensor(list(declared), dtype=torch.uint8) for name in codes}


def test_int8_convrot_is_rotated_back(tiny_family, packed, caplog):
    rewrite(packed, rotated)
    with caplog.at_level("INFO"):
        found, wanted = states(packed)[-1], states(tiny_family.ltx25_gemma)[-1]
    assert 0 < float((found - wanted).norm()) < 0.05 * float(wanted.norm())
    assert "int8 ConvRot (groups of 16), one scale a row, 20 linears" in caplog.text
    with pytest.raises(UserError, match="stored as int8 ConvRot.*Leave the flag out"):
        load_encoder(options(packed, load_in_8bit=True))


def test_the_projection_comes_from_the_encoder_only_where_the_checkpoint_has_none(tiny_family):
    prefix = "text_embedding_projection."
    transformer = open_checkpoint(tiny_family.ltx25_transformer)
    whole = with_projection(transformer, str(tiny_family.ltx25_gemma))
    assert whole.names() == transformer.names() + [
        one for one in open_checkpoint(tiny_family.ltx25_gemma).names() if one.startswith(prefix)
    ]
    assert with_projection(transformer, None) is with_projection(transformer, str(tiny_family.gemma4)) is transformer
    own = open_checkpoint(tiny_family.ltx23)
    assert with_projection(own, str(tiny_family.ltx25_gemma)) is own


def test_a_rotated_projection_is_rotated_back(tiny_family, packed):
    """Declared in the header of the encoder's file, which is not the checkpoint's."""
    transformer, prefix = open_checkpoint(tiny_family.ltx25_transformer), "text_embedding_projection."
    names = [f"{prefix}{stream}_aggregate_embed" for stream in ("video", "audio")]

    def change(tensors):
        chosen = {f"{name}.weight": tensors[f"{name}.weight"] for name in names}
        found = {key: value for key, value in rotated(chosen, part=prefix).items() if not key.endswith("comfy_quant")}
        return tensors | found

    layers = {name: {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16} for name in names}
    rewrite(packed, change, _quantization_metadata=json.dumps({"layers": layers}))
    found, wanted = (
        load_feature_extractor(with_projection(transformer, str(path)), 32, device="cpu", dtype=torch.float32).video_aggregate_embed.weight
        for path in (packed, tiny_family.ltx25_gemma)
    )
    assert 0 < float((found - wanted).norm()) < 0.02 * float(wanted.norm())


def belongs(checkpoint, encoder, **metadata):
    kept = {key: value for key, value in (dict(checkpoint.metadata) | metadata).items() if value is not None}
    check_belongs(dataclasses.replace(checkpoint, metadata=kept), "E", read_encoder_config(options(encoder)))


def test_the_release_of_the_encoder_is_held_against_the_checkpoints(tiny_family, tmp_path):
    checkpoint, source = open_checkpoint(tiny_family.ltx25_transformer), "gemma_source_checkpoint"
    belongs(checkpoint, tiny_family.gemma4)
    belongs(checkpoint, tiny_family.ltx25_gemma)
    with pytest.raises(UserError, match="'gemma_version' of its config is 'gemma4-12b-ltx-v1';.*was trained with 'v2'"):
        belongs(checkpoint, tiny_family.gemma4, **{source: '{"gemma_version": "v2"}'})
    write_gemma4(tmp_path / "stock", version=None)
    with pytest.raises(UserError, match="its config has no 'gemma_version', as the stock model's;.*was trained with 'gemma4-12b-ltx-v1'"):
        belongs(checkpoint, tmp_path / "stock")
    with pytest.raises(UserError, match="a Gemma 3;"):
        belongs(checkpoint, tiny_family.gemma)
    belongs(checkpoint, tmp_path / "stock", **{source: None})  # a checkpoint that names none: the kind alone is known
    with pytest.raises(UserError, match=r"a Gemma 3; .* is LTX-2\.5"):
        belongs(checkpoint, tiny_family.gemma, **{source: None})
    with pytest.raises(UserError, match=f"'{source}' metadata has no 'gemma_version'"):
        belongs(checkpoint, tiny_family.gemma4, **{source: "[]"})


def test_the_fingerprint_is_of_the_content(tiny_family, packed):
    assert encoder_fingerprint(options(packed)) == encoder_fingerprint(options(tiny_family.ltx25_gemma))
    sft = packed.rename(packed.with_suffix(".sft"))
    assert encoder_fingerprint(options(sft)) == encoder_fingerprint(options(tiny_family.ltx25_gemma))
    rewrite(sft, lambda tensors: tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1})
    assert encoder_fingerprint(options(sft)) != encoder_fingerprint(options(tiny_family.ltx25_gemma))


def lacking(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lacking("tokenizer_json"), {}, "holds no 'tokenizer_json'.*--tokenizer"),
        (lacking("hf_asset__tokenizer_config.json"), {}, "holds no 'hf_asset__tokenizer_config.json'.*--tokenizer"),
        (lacking("model.layers.1.layer_scalar"), {}, "do not fit Gemma4UnifiedTextModel: missing 1 tensor.*layers.1.layer_scalar"),
        (lambda tensors: tensors | {"model.layers.9.a": torch.zeros(2)}, {}, "unexpected 1 tensor.*layers.9.a"),
        (lambda tensors: tensors | {"tokenizer_json": torch.zeros(9).byte()}, {}, "holds no tokenizer that transformers can read"),
        (dict, {"gemma_config": "[]"}, "'gemma_config' metadata is no JSON object"),
        (dict, {"gemma_config": "{"}, "'gemma_config' metadata: not valid JSON"),
        (dict, {"gemma_config": "{}"}, "its model type is 'None'; --text_encoder_backend gemma takes gemma3 or"),
        (dict, {"gemma_config": '{"model_type": "llama"}'}, "its model type is 'llama'"),
        (dict, {"gemma_config": '{"model_type": "gemma4_unified", "text_config": 5}'}, "config.json cannot be read|can be built"),
        (dict, {"gemma_config": None}, r"is a file, and not one that carries its config \('gemma_config'"),
    ],
)
def test_files_that_lack_something_are_refused_in_words(packed, change, metadata, message):
    rewrite(packed, change, **metadata)
    with pytest.raises(UserError, match=message) as error:
        states(packed)
    assert str(packed) in str(error.value)


@pytest.mark.parametrize("change", [lacking("model.norm.weight"), lambda tensors: tensors | {"model.layers.9.a": torch.zeros(2)}])
def test_what_bitsandbytes_quantizes_is_as_strict(packed, capfd, change):
    rewrite(packed, change)
    with pytest.raises(UserError, match="its tensors do not fit Gemma4UnifiedTextModel: (missing|unexpected) "):
        load_encoder(options(packed, load_in_8bit=True))
    assert "Loading weights" not in capfd.readouterr().err


def test_a_transformers_that_is_too_old_is_named(tiny_family, monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "CONFIG_MAPPING", {"gemma3": None})
    for path in (tiny_family.ltx25_gemma, tiny_family.gemma4):
        with pytest.raises(UserError, match=r"'gemma4_unified'\), which transformers .* does not know.*pip install --upgrade transformers"):
            read_encoder_config(options(path))


def test_the_packed_tokenizer_is_taken_as_it_is(tiny_family, packed):
    """Gemma's own class builds what stands around the words anew, whatever the file says."""

    def change(tensors):
        blob = "hf_asset__tokenizer_config.json"
        content = json.loads(bytes(tensors[blob].tolist())) | {
            "tokenizer_class": "GemmaTokenizer",
            "processor_class": "Gemma4UnifiedProcessor",
        }
        return tensors | {blob: torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)}

    rewrite(packed, change)
    ids, wanted = (load_tokenizer(options(path))(PROMPTS[0]) for path in (packed, tiny_family.gemma4))
    assert ids == wanted


def test_a_tokenizer_may_be_given_beside_the_file(tiny_family, packed):
    rewrite(packed, lacking("tokenizer_json"))
    for tokenizer in (tiny_family.gemma4, tiny_family.ltx25_gemma):
        found = states(packed, tokenizer=str(tokenizer))
        assert all(torch.equal(one, other) for one, other in zip(found, states(tiny_family.ltx25_gemma), strict=True))

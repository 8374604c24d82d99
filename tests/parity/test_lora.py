"""LoRA against peft on diffusers' model, and our file in diffusers' own loader. float32, CPU."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_lora
from musubi_tuner.conditioning.tokens import TokenStream, noised
from musubi_tuner.ltxv2.geometry import audio_positions, video_positions
from musubi_tuner.networks.lora_ltxv2 import OfficialLTXV2Wrapper, create_network
from musubi_tuner.networks.reading import read_network
from tests.parity import models
from tests.parity.name_maps import to_diffusers

RANK = 4


def random_network(model, alpha=RANK, seed=11):
    network = create_network(model, dim=RANK, alpha=alpha, args={}, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in network.layers.values():
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    return network


def streams(data):
    video = TokenStream(
        clean=data["video"], positions=video_positions(models.FRAMES, models.HEIGHT, models.WIDTH, torch.full((models.BATCH,), models.FPS))
    )
    return video, TokenStream(clean=data["audio"], positions=audio_positions(models.STEPS, models.BATCH))


@pytest.mark.parametrize("style", ["2.0", "2.3"])
def test_gradients_of_a_step_equal_peft_on_diffusers(style):
    from peft import LoraConfig, inject_adapter_in_model

    model = models.ours(style, rule="cross").requires_grad_(False)
    reference = models.diffusers_model(model, style).requires_grad_(False)
    network = random_network(model)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), reference)
    theirs = dict(reference.named_parameters())
    for name, layer in network.layers.items():
        for leaf, value in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            theirs[f"{to_diffusers(name + '.').rstrip('.')}.{leaf}.default.weight"].data = value.detach().clone()
    assert len(network.layers) * 2 == sum("lora_" in name for name in theirs), "the same linears are adapted"

    data = models.inputs(style)
    generator = torch.Generator().manual_seed(5)
    noise = {stream: torch.randn(data[stream].shape, generator=generator) for stream in ("video", "audio")}
    video, audio = streams(data)
    video_input, video_target = noised(video, noise["video"], data["video_sigma"])
    audio_input, audio_target = noised(audio, noise["audio"], data["audio_sigma"])
    text = torch.cat([data["video_context"], data["audio_context"]], dim=-1)
    ours = OfficialLTXV2Wrapper(model, "sd3_0_1")(video_input, audio_input, text, data["mask"])
    loss = (ours.video - video_target).pow(2).mean() + (ours.audio - audio_target).pow(2).mean()
    loss.backward()

    fed = {**data, "video": video_input.latent, "audio": audio_input.latent,
           "video_timesteps": video_input.timesteps, "audio_timesteps": audio_input.timesteps}  # fmt: skip
    predicted = models.run_diffusers(reference, fed)
    their_loss = (predicted[0] - video_target).pow(2).mean() + (predicted[1] - audio_target).pow(2).mean()
    their_loss.backward()

    assert abs(float(loss - their_loss)) < 1e-5
    for name, layer in network.layers.items():
        for leaf, value in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            expected = theirs[f"{to_diffusers(name + '.').rstrip('.')}.{leaf}.default.weight"].grad
            assert float(expected.norm()) > 0
            assert float((value.grad - expected).norm()) < 1e-4 * float(expected.norm()), f"{name}.{leaf}"


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK])
def test_our_file_changes_diffusers_model_as_it_changes_ours(tmp_path, alpha):
    from diffusers import LTX2Pipeline

    model = models.ours("2.3")
    reference = models.diffusers_model(model, "2.3")
    data = models.uniform(models.inputs("2.3"))
    with torch.no_grad():
        base = models.run_diffusers(reference, data)
        network = random_network(model, alpha=alpha)
        tensors = network.file_tensors(torch.float32)
        path = tmp_path / "a lora ü.safetensors"
        save_file(tensors, path)

        loaded = LTX2Pipeline.lora_state_dict(load_file(path))
        LTX2Pipeline.load_lora_into_transformer(loaded, transformer=reference)
        adapted = [name for name, _ in reference.named_modules() if name.endswith("lora_A")]
        assert len(adapted) == len(network.layers), "diffusers loaded every adapter"
        theirs = models.run_diffusers(reference, data)

        fresh = models.ours("2.3")
        read = create_network(fresh, dim=RANK, alpha=alpha, args={}, seed=0)
        read.load(read_network(path, dict.fromkeys(read.names)))
        ours = fresh(*models.modalities(data))
        live = model(*models.modalities(data))
    assert models.difference(theirs, base) > 0.1, "the LoRA does something"
    assert models.difference(ours, theirs) < 1e-5
    assert models.difference(live, ours) < 1e-5


@pytest.mark.parametrize("form", ["official", "diffusers", "kohya", "peft"])
@pytest.mark.parametrize("alpha", [RANK, 2 * RANK])
def test_converted_files_change_diffusers_model_as_they_change_ours(tmp_path, form, alpha):
    """By diffusers' own loader, and PEFT's of folders; kohya's naming, which neither reads for this model, by way of the official one."""
    from diffusers import LTX2Pipeline
    from peft import PeftModel

    model = models.ours("2.3")
    reference = models.diffusers_model(model, "2.3")
    data = models.uniform(models.inputs("2.3"))
    path = tmp_path / ("a folder" if form == "peft" else f"{form}.safetensors")
    with torch.no_grad():
        base = models.run_diffusers(reference, data)
        network = random_network(model, alpha=alpha)
        save_file(network.file_tensors(torch.float32), tmp_path / "ours.safetensors")
        live = model(*models.modalities(data))
        ltxv2_lora.main(["convert", str(tmp_path / "ours.safetensors"), "--to", form, "--output", str(path)])
        if form == "kohya":
            ltxv2_lora.main(["convert", str(path), "--to", "official", "--output", str(tmp_path / "back.safetensors")])
            path = tmp_path / "back.safetensors"
        if form == "peft":
            reference = PeftModel.from_pretrained(reference, path)
        else:
            LTX2Pipeline.load_lora_into_transformer(LTX2Pipeline.lora_state_dict(load_file(path)), transformer=reference)
        adapted = [name for name, _ in reference.named_modules() if name.endswith("lora_A")]
        theirs = models.run_diffusers(reference, data)
    assert len(adapted) == len(network.layers)
    assert models.difference(theirs, base) > 0.1 and models.difference(live, theirs) < 1e-5


def test_disabled_network_is_the_base_model():
    model = models.ours("2.3")
    data = models.inputs("2.3")
    with torch.no_grad():
        base = model(*models.modalities(data))
        network = random_network(model)
        assert models.difference(model(*models.modalities(data)), base) > 0.1
        with network.disabled():
            assert models.difference(model(*models.modalities(data)), base) == 0

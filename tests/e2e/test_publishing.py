"""LoRAs, cards and previews on the hub, against a stand-in of its HTTP interface: while training, after it, and where it fails."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from musubi_tuner import ltxv2_lora, ltxv2_train_network
from musubi_tuner.publishing import card, uploads
from musubi_tuner.runtime.errors import UserError
from tests import hub_stand_in
from tests import training_parts as parts
from tests.hub_stand_in import TOKEN

REPO = "mila/ltx-rain"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tiny_family, tmp_path_factory):
    return parts.make_data(tmp_path_factory.mktemp("data"), tiny_family, "av")


@pytest.fixture
def hub(monkeypatch):
    """What `huggingface_hub` takes for the hub."""
    with hub_stand_in.running() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(uploads, "_PAUSE", 0.01)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found
        assert not found.unknown


def train(data, folder, *flags, code=0):
    (folder / "prompts.txt").write_text("A disc <b>|</b> --w 64 --h 64 --f 9 --s 1\n", encoding="utf-8")
    words = ["--output_dir", str(folder / "out"), "--output_name", "mila", "--max_train_steps", "2", "--save_every_n_steps", "1"]
    words += ["--text_encoder", str(data.encoder), "--sample_prompts", str(folder / "prompts.txt"), "--sample_every_n_steps", "1"]
    assert ltxv2_train_network.main(data.arguments(*words, *flags)) == code


def lora(*words):
    assert ltxv2_lora.main([str(word) for word in words]) == 0


def test_a_run_is_on_the_hub_when_it_ends(data, tmp_path, hub, caplog):
    caplog.set_level(logging.INFO)
    train(data, tmp_path, "--huggingface_repo_id", REPO, "--huggingface_token", TOKEN, "--save_state", "--save_state_to_huggingface")
    there, out = hub.repositories[REPO], tmp_path / "out"
    assert hub.private[REPO]
    previews = sorted(path.name for path in (out / "sample").iterdir())
    expected = {"README.md", "mila.safetensors", "mila-step00000001.safetensors", *(f"sample/{name}" for name in previews)}
    states = {name for name in there if name.startswith("mila-step") and "-state/" in name or "state" in name}
    assert len(previews) == 2 and set(there) - states == expected and len(states) >= 6
    for name in set(there) - {"README.md"}:
        assert there[name] == (out / name).read_bytes(), name
    read = ModelCard(there["README.md"].decode()).data
    assert read.base_model == "Lightricks/LTX-2.3" and read.license == "other"
    assert read.to_dict()["widget"][0]["text"] == "A disc <b>|</b>"
    assert read.to_dict()["widget"][0]["output"]["url"].startswith("sample/mila_s00000002_00_1")
    assert re.search(rf"uploaded +{len(there)} file\(s\) to {hub.url}/{REPO}", caplog.text)


def test_the_token_is_in_no_file_and_no_message(data, tmp_path, hub, caplog, capfd, monkeypatch):
    caplog.set_level(logging.DEBUG, logger="musubi_tuner")
    hub.failures = 1
    words = ["--huggingface_repo_id", REPO, f"--huggingface_token={TOKEN}", "--log_with", "tensorboard", "--save_state"]
    monkeypatch.setattr(sys, "argv", ["ltxv2_train_network.py", "--huggingface_token", TOKEN, *words])
    train(data, tmp_path, *words)
    assert sys.argv[1:4] == ["--huggingface_token", "(hidden)", "--huggingface_repo_id"]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert all(TOKEN.encode() not in content for content in hub.repositories[REPO].values())
    captured = capfd.readouterr()
    assert TOKEN not in caplog.text + captured.out + captured.err
    assert "the stand-in fails; it heard Bearer (hidden)" in caplog.text
    report = json.loads((tmp_path / "out" / "mila-report.json").read_text())
    assert "(hidden)" in report["command"] and ["huggingface_token", "(hidden)"] in [
        [row[0].strip("-"), row[1]] for row in report["settings"]
    ]


def test_an_upload_that_fails_is_told_of_once_and_made_up_for(data, tmp_path, hub, caplog):
    hub.failures = 2
    train(data, tmp_path, "--huggingface_repo_id", REPO, "--huggingface_token", TOKEN)
    assert {"README.md", "mila.safetensors", "mila-step00000001.safetensors"} <= set(hub.repositories[REPO])
    assert caplog.text.count("not uploaded, and tried again at the end") == 1


def test_a_hub_that_is_down_costs_the_upload_and_not_the_run(data, tmp_path, hub, caplog):
    caplog.set_level(logging.INFO)
    hub.down = True
    train(data, tmp_path, "--huggingface_repo_id", REPO, "--huggingface_token", TOKEN, code=1)
    assert (tmp_path / "out" / "mila.safetensors").is_file() and "training goes on, and uploads are tried again" in caplog.text
    said = " ".join(caplog.text.split())
    assert re.search(r"NOT uploaded mila-step00000001.safetensors.*, mila.safetensors.*: HTTP 500", said)
    assert f"ltxv2 lora publish {tmp_path / 'out'} --huggingface_repo_id {REPO}" in said
    hub.down = False
    lora("publish", tmp_path / "out", "--huggingface_repo_id", REPO, "--huggingface_token", TOKEN, "--steps")
    expected = {"README.md", "mila.safetensors", "mila-step00000001.safetensors"}
    assert expected | {f"sample/{path.name}" for path in (tmp_path / "out" / "sample").glob("*s00000002*")} == set(hub.repositories[REPO])


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--huggingface_repo_id", REPO, "--huggingface_token", "hf_wrong"], "HTTP 401.*hf auth login"),
        (["--huggingface_repo_id", "no name/at all/x", "--huggingface_token", TOKEN], "is no name of a repository"),
        (["--huggingface_repo_id", REPO, "--huggingface_path_in_repo", "../up"], "must be a folder in the repository"),
        (["--huggingface_token", TOKEN], "--huggingface_repo_id is missing"),
        (["--save_state_to_huggingface"], "give --huggingface_repo_id too"),
        (["--resume_from_huggingface"], "hf download, and give --resume"),
    ],
)
def test_what_the_hub_refuses_is_known_before_anything_is_loaded(data, tmp_path, hub, flags, match):
    with pytest.raises(UserError, match=match) as raised:
        train(data, tmp_path, *flags)
    assert "hf_wrong" not in str(raised.value) and TOKEN not in str(raised.value)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_lora_that_is_removed_before_its_turn_is_no_failure(data, tmp_path, hub, monkeypatch, caplog):
    """`--save_last_n` here, and an upload that takes its time."""
    caplog.set_level(logging.INFO)
    hub.slow = 3.0
    words = ["--max_train_steps", "4", "--save_last_n", "1", "--huggingface_repo_id", REPO, "--huggingface_token", TOKEN]
    train(data, tmp_path, *words)
    assert "mila.safetensors" in hub.repositories[REPO] and "NOT uploaded" not in caplog.text
    assert len(list((tmp_path / "out").glob("mila*.safetensors"))) == 2


def test_offline_it_says_so(data, tmp_path, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        train(data, tmp_path, "--huggingface_repo_id", REPO, "--huggingface_token", TOKEN)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run that nothing was uploaded of."""
    folder = tmp_path_factory.mktemp("a finished run")
    train(data, folder)
    return folder / "out"


def test_nothing_is_asked_of_the_hub_unless_it_is_named(data, tmp_path, hub):
    train(data, tmp_path)
    assert not hub.requests


def test_a_card_that_someone_wrote_on_the_hub_stays(run, hub, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = ("publish", run, "--huggingface_repo_id", REPO, "--trigger", "mila", "--huggingface_repo_visibility", "public")
    lora(*words)
    assert not hub.private[REPO] and "mila-step00000001.safetensors" not in hub.repositories[REPO]
    ours = hub.repositories[REPO]["README.md"].decode()
    assert card.MARK in ours and f'load_lora_weights("{REPO}", weight_name="mila.safetensors")' in ours
    lora(*words, "--title", "Another")
    assert "# Another" in hub.repositories[REPO]["README.md"].decode(), "one of ours is written anew"
    hub.repositories[REPO]["README.md"] = b"# My own words"
    capsys.readouterr()
    lora(*words)
    assert hub.repositories[REPO]["README.md"] == b"# My own words" and "left as it is" in capsys.readouterr().out


def test_a_folder_in_a_repository_of_another_kind(run, hub, tmp_path):
    other = tmp_path / "other place, é.png"
    shutil.copy(next((run / "sample").glob("*.mp4")), other.with_suffix(".mp4"))
    words = ["--huggingface_repo_id", REPO, "--huggingface_token", TOKEN, "--huggingface_repo_type", "dataset"]
    lora("publish", run / "mila.safetensors", *words, "--huggingface_path_in_repo", "loras/mila", "--previews", other.with_suffix(".mp4"))
    assert set(hub.repositories[REPO]) == {"loras/mila/README.md", "loras/mila/mila.safetensors", "loras/mila/previews/other place, é.mp4"}
    assert "previews/other%20place%2C%20%C3%A9.mp4" in hub.repositories[REPO]["loras/mila/README.md"].decode()


def test_what_cannot_be_published_is_named(run, hub, tmp_path):
    shutil.copy(run / "mila.safetensors", tmp_path / "a.safetensors")
    shutil.copy(run / "mila.safetensors", tmp_path / "b-step00000002.safetensors")
    named = ["--huggingface_repo_id", REPO, "--huggingface_token", TOKEN]
    for place, more, match in (
        (tmp_path, named, r"LoRAs of 2 runs \(a, b\)"),
        (tmp_path / "none.safetensors", named, "is no file and no folder"),
        (tmp_path / "a.safetensors", [], "--huggingface_repo_id is missing"),
        (tmp_path / "a.safetensors", [*named, "--previews", tmp_path / "none.mp4"], "none.mp4: no such file"),
        (tmp_path / "a.safetensors", [*named, "--previews", tmp_path / "a.safetensors"], "is no clip"),
    ):
        with pytest.raises(UserError, match=match):
            ltxv2_lora.main(["publish", str(place), *map(str, more)])
    hub.failures = 100
    with pytest.raises(UserError, match="a.safetensors: was not uploaded.*Run the same command again"):
        lora("publish", tmp_path / "a.safetensors", *named)


def test_a_card_beside_the_file(run, tmp_path, capsys):
    folder = tmp_path / "to upload"
    shutil.copytree(run, folder)
    lora("card", folder / "mila.safetensors", "--output", folder / "README.md", "--trigger", 'mila "the: dog"', "--tags", "rain", "a: b")
    text = (folder / "README.md").read_text(encoding="utf-8")
    found = ModelCard(text).data.to_dict()
    assert found["instance_prompt"] == 'mila "the: dog"' and {"rain", "a: b", "lora", "ltx-2.3", "text-to-video"} <= set(found["tags"])
    assert (found["license_name"], found["pipeline_tag"]) == ("ltx-2-community-license-agreement", "text-to-video")
    assert found["base_model"] == "Lightricks/LTX-2.3" and found["base_model_relation"] == "adapter"
    (widget,) = found["widget"]
    assert (folder / widget["output"]["url"]).is_file() and widget["output"]["url"].startswith("sample/mila_s00000002")
    assert "| rank | 4 |" in text and "| steps | 2 |" in text and "Community License Agreement](https://" in text and "derivative" in text
    assert "A disc &lt;b>\\|&lt;/b>" in text, "a prompt is no markup"
    settings = text.partition("## Settings")[2]
    assert "(EMA)" not in settings and "| modules |" not in settings and "{" not in settings, "nothing twice, nothing that was off, no JSON"
    assert str(tmp_path) not in text
    with pytest.raises(UserError, match="is there already"):
        lora("card", folder / "mila.safetensors", "--output", folder / "README.md")
    with pytest.raises(UserError, match="--base_model a: must be a repository"):
        lora("card", folder / "mila.safetensors", "--output", folder / "other.md", "--base_model", "a")
    with pytest.raises(UserError, match="lies outside of"):
        lora("card", folder / "mila.safetensors", "--output", tmp_path / "elsewhere" / "README.md")
    lora("card", folder / "mila-step00000001.safetensors", "--output", folder / "README.md", "--overwrite", "--base_model", "me/mine")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "sample/mila_s00000001" in text and 'base_model: "me/mine"' in text


def test_a_file_of_an_unknown_release_wants_its_base_named(tiny_family, tmp_path):
    shutil.copy(tiny_family.distilled_lora, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="which release of LTX-2.*--base_model"):
        lora("card", tmp_path / "other.safetensors", "--output", tmp_path / "README.md")
    lora("card", tmp_path / "other.safetensors", "--output", tmp_path / "README.md", "--base_model", "Lightricks/LTX-2")
    found = ModelCard((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert found.data.base_model == "Lightricks/LTX-2" and "widget" not in found.data.to_dict() and "Settings" not in found.content


def test_a_card_takes_no_models_name(run, tmp_path):
    path = shutil.copy(run / "mila.safetensors", tmp_path / "mila.safetensors")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"--output .*mila.safetensors: must end in .md"):
        lora("card", path, "--output", path, "--overwrite")
    assert path.read_bytes() == before


def test_a_whole_checkpoint_is_called_one(tiny_family, tmp_path):
    path = shutil.copy(tiny_family.ltx23, tmp_path / "mine.safetensors")
    lora("card", path, "--output", tmp_path / "README.md", "--base_model", "Lightricks/LTX-2.3")
    found = ModelCard((tmp_path / "README.md").read_text(encoding="utf-8"))
    assert found.data.to_dict()["base_model_relation"] == "finetune" and "lora" not in found.data.tags
    assert "A fine-tuned checkpoint (full weights) of" in found.content and "LoRA" not in found.content
    assert "--ltxv2_model mine.safetensors" in found.content and "load_lora_weights" not in found.content


def test_a_lora_that_diverged_is_not_uploaded(run, tmp_path, hub):
    tensors = load_file(run / "mila.safetensors")
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "bad.safetensors", metadata={"ss_base_model_version": "ltx-2.3"})
    with pytest.raises(UserError, match=rf"bad.safetensors: '{re.escape(name)}' holds NaN or infinity"):
        lora("publish", tmp_path / "bad.safetensors", "--huggingface_repo_id", REPO, "--huggingface_token", TOKEN)
    assert REPO not in hub.repositories


def environment(hub):
    """Of a program that is run as people run it, but for where the hub is."""
    own = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    own["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    return own | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}


def test_the_program_itself_uploads_though_it_fetches_nothing(data, tmp_path):
    """`run_program` switches the hub off for libraries; a token in a config file is as secret as one that is typed."""
    config = tmp_path / "with a token.toml"
    config.write_text(f'huggingface_token = "{TOKEN}"\nhuggingface_repo_id = "{REPO}"\n', encoding="utf-8")
    words = data.arguments("--output_dir", str(tmp_path / "out"), "--max_train_steps", "1", "--config_file", str(config), "--save_state")
    with hub_stand_in.running() as hub:
        command = [sys.executable, str(ROOT / "ltxv2_train_network.py"), *words]
        answer = subprocess.run(command, env=environment(hub), capture_output=True, text=True, cwd=tmp_path)
        assert answer.returncode == 0, answer.stderr
        assert set(hub.repositories[REPO]) == {"README.md", "ltxv2_lora.safetensors"} and not hub.unknown
    assert TOKEN not in answer.stdout + answer.stderr and "HTTP Request" not in answer.stderr
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to another process")
def test_ctrl_c_does_not_wait_for_a_slow_upload(data, tmp_path):
    words = ["--output_dir", str(tmp_path / "out"), "--max_train_steps", "500", "--save_every_n_steps", "2"]
    words += ["--huggingface_repo_id", REPO, "--huggingface_token", TOKEN]
    with hub_stand_in.running() as hub:
        hub.slow = 120
        command = [sys.executable, str(ROOT / "ltxv2_train_network.py"), *data.arguments(*words)]
        program = subprocess.Popen(command, env=environment(hub), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)
        while not any(path.startswith("/objects/") for _, path in list(hub.requests)) and program.poll() is None:
            time.sleep(0.1)
        program.send_signal(signal.SIGINT)
        asked = time.monotonic()
        said = " ".join(program.communicate(timeout=100)[0].split())
        assert program.returncode == 130 and time.monotonic() - asked < 60
        hub.slow = 0
    assert "NOT uploaded" in said and "there was no time for it" in said and "Go on with:" in said and TOKEN not in said
    assert list((tmp_path / "out").glob("*-state"))


def test_two_previews_of_one_name_and_the_folder_of_peft(run, hub, tmp_path):
    clip = next((run / "sample").glob("*.mp4"))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(clip, tmp_path / name / "same.mp4")
    named = ["--huggingface_repo_id", REPO, "--huggingface_token", TOKEN, "--base_model", "Lightricks/LTX-2.3"]
    with pytest.raises(UserError, match="two files would be previews/same.mp4"):
        lora("publish", run / "mila.safetensors", *named, "--previews", tmp_path / "a" / "same.mp4", tmp_path / "b" / "same.mp4")
    lora("convert", run / "mila.safetensors", "--to", "peft", "--output", tmp_path / "adapter")
    lora("publish", tmp_path / "adapter", *named)
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} == set(hub.repositories[REPO])

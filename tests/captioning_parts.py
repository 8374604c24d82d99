"""What the captioning tests share: tiny models with real processors, and a server of the chat protocol that checks what it is sent."""

import base64
import io
import json
import threading
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from PIL import Image

from musubi_tuner.tiny.encoders import corpus

_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<boi>{% elif c['type'] == 'audio' %}<|AUDIO|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]


def _tokenizer(**extra: str):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", padding_side="left",
        extra_special_tokens=extra,
    )  # fmt: skip


def write_seeing_model(folder: Path) -> Path:
    """A Gemma 3 with a SigLIP that sees several pictures, random weights."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessorPil, Gemma3Processor

    tokenizer = _tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>")
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    Gemma3Processor(pictures, tokenizer, chat_template=_TEMPLATE, image_seq_length=4).save_pretrained(folder)
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id, image_token_index=tokenizer.image_token_id,
    )  # fmt: skip
    _save(Gemma3ForConditionalGeneration, config, folder, tokenizer)
    return folder


def write_hearing_model(folder: Path) -> Path:
    """A Qwen2-Audio that hears, random weights."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor, WhisperFeatureExtractor

    tokenizer = _tokenizer(audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")
    ear = WhisperFeatureExtractor(feature_size=16, chunk_length=4)
    Qwen2AudioProcessor(ear, tokenizer, chat_template=_TEMPLATE).save_pretrained(folder)
    text = {
        "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    audio = {
        "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
        "num_mel_bins": 16, "max_source_positions": 200,
    }  # fmt: skip
    config = Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"))
    _save(Qwen2AudioForConditionalGeneration, config, folder, tokenizer)
    return folder


def write_omni_model(folder: Path) -> Path:
    """A Qwen2.5-Omni that sees and hears, without the part that speaks; needs torchvision."""
    from transformers import (
        Qwen2_5OmniConfig,
        Qwen2_5OmniForConditionalGeneration,
        Qwen2_5OmniProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    signs = {
        "image": "<|IMAGE|>", "audio": "<|AUDIO|>", "video": "<|VIDEO|>", "vision_bos": "<|vision_bos|>", "vision_eos": "<|vision_eos|>",
        "audio_bos": "<|audio_bos|>", "audio_eos": "<|audio_eos|>",
    }  # fmt: skip
    tokenizer = _tokenizer(**{f"{name}_token": sign for name, sign in signs.items()})
    template = _TEMPLATE.replace("<boi>", "<|vision_bos|><|IMAGE|><|vision_eos|>").replace(
        "<|AUDIO|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"
    )
    pictures, ear = Qwen2VLImageProcessor(min_pixels=784, max_pixels=3136), WhisperFeatureExtractor(feature_size=16, chunk_length=4)
    Qwen2_5OmniProcessor(pictures, Qwen2VLVideoProcessor(), ear, tokenizer, chat_template=template).save_pretrained(folder)
    ids = {name: tokenizer.convert_tokens_to_ids(sign) for name, sign in signs.items()}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    thinker = {
        "audio_config": {
            "num_mel_bins": 16, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "output_dim": 32,
            "max_source_positions": 200, "n_window": 20,
        },
        "vision_config": {
            "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "patch_size": 14,
            "fullatt_block_indexes": [0], "window_size": 56,
        },
        "text_config": {
            "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 1, "rope_parameters": rope,
        },
        "image_token_id": ids["image"], "audio_token_id": ids["audio"], "video_token_id": ids["video"], "pad_token_id": 0,
        "vision_start_token_id": ids["vision_bos"], "vision_end_token_id": ids["vision_eos"], "audio_start_token_id": ids["audio_bos"],
        "audio_end_token_id": ids["audio_eos"],
    }  # fmt: skip
    _save(Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniConfig(thinker_config=thinker, enable_audio_output=False), folder, tokenizer)
    return folder


def _save(kind, config, folder: Path, tokenizer) -> None:
    """With a generation config by which it says words alone: random weights would end at once, or say what is not shown."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    words = {number for number in range(len(tokenizer)) if tokenizer.decode([number]).strip().isalpha()} - set(tokenizer.all_special_ids)
    model.generation_config.suppress_tokens = sorted(set(range(len(tokenizer))) - words)
    model.save_pretrained(folder)


@dataclass
class Server:
    """A server of the chat protocol in a thread of this process."""

    url: str = ""
    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """What of the requests is not as the protocol has it."""
    most_at_once: int = 0
    models: list[str] = field(default_factory=lambda: ["toy-vlm"])
    gone: threading.Event = field(default_factory=threading.Event)
    """When it is set, connections are closed without an answer."""


@dataclass
class Reply:
    """What it answers."""

    status: int = 200
    text: str | None = "A disc moves over a ground. A tone rises."
    finish: str = "stop"
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    hold: float = 0.0


@contextmanager
def serving(reply: Callable[[dict, int], Reply] = lambda body, number: Reply()) -> Iterator[Server]:
    """
    Args:
        reply: from a request and its number to what is answered.
    """
    state, lock, at_once = Server(), threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path != "/v1/models":
                state.faults.append(f"GET {self.path}")
            self._send(200, json.dumps({"object": "list", "data": [{"id": name, "object": "model"} for name in state.models]}).encode())

        def do_POST(self):
            if state.gone.is_set():
                return self.connection.close()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                at_once[0] += 1
                state.most_at_once = max(state.most_at_once, at_once[0])
                number = len(state.requests)
                state.requests.append(body)
                state.headers.append(dict(self.headers))
            state.faults += faults_of(self.path, self.headers, body)
            try:
                answer = reply(body, number)
                threading.Event().wait(answer.hold)
                choices = [{"index": 0, "message": {"role": "assistant", "content": answer.text}, "finish_reason": answer.finish}]
                usual = {"choices": choices} if answer.status == 200 else {"error": {"message": answer.text, "type": "x"}}
                raw = json.dumps(usual).encode() if answer.raw is None else answer.raw
                self._send(answer.status, raw, answer.headers)
            finally:
                with lock:
                    at_once[0] -= 1

        def _send(self, status, data, headers=None):
            try:
                self.send_response(status)
                for key, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client has gone
                pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def faults_of(path: str, headers, body: dict) -> list[str]:
    """What the chat protocol would not take."""
    found = [] if path == "/v1/chat/completions" else [f"POST {path}"]
    found += [] if headers["Content-Type"] == "application/json" else ["no JSON"]
    if not isinstance(body.get("model"), str) or body.get("stream") is not False or not isinstance(body.get("max_tokens"), int):
        found.append("model, stream or max_tokens")
    (message,) = body["messages"]
    if message["role"] != "user" or message["content"][-1]["type"] != "text" or not message["content"][-1]["text"]:
        found.append("no text at the end")
    pictures(body), sounds(body)
    return found + [part["type"] for part in message["content"] if part["type"] not in ("text", "image_url", "input_audio")]


def pictures(body: dict) -> list[Image.Image]:
    """Those of a request, decoded."""
    found = [part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url"]
    assert all(url.startswith("data:image/jpeg;base64,") for url in found)
    opened = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2], validate=True))) for url in found]
    for one in opened:
        one.load()
    return opened


def sounds(body: dict) -> list[tuple[int, int, int]]:
    """(channels, rate, samples) of those of a request."""
    found = []
    for part in body["messages"][0]["content"]:
        if part["type"] == "input_audio":
            assert part["input_audio"]["format"] == "wav"
            with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"], validate=True))) as file:
                found.append((file.getnchannels(), file.getframerate(), file.getnframes()))
    return found


def said(body: dict) -> str:
    """The instruction of a request."""
    return body["messages"][0]["content"][-1]["text"]

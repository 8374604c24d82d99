"""Pictures, sound and video that are damaged, empty, of another kind than their name says, or of sizes, rates and times that no one has."""

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path

import torch

from tests.malformed.base import LATENTS, SOUND, TRAIN, Malformed, put

Make = Callable[[Path], bytes]
"""The malformed file, made in the scratch folder of the input."""
_AGAIN = "--no-skip_existing"
_BROKEN = frozenset({"empty", "one byte", "zeros", "text", "first kilobyte"})
_VIDEO, _STILL, _SOUND = "clips/clip_000.mp4", "stills/still_000.png", "sounds/sound_000.wav"
_SOUNDS = ("--dataset_config", "sounds.toml", "--ltx_mode", "audio")
USERS = {
    "picture": (_STILL, ((LATENTS, (_AGAIN,)), (LATENTS, ("--dry_run",)), (TRAIN, ("--sample_prompts", "prompts.txt")))),
    "video": (_VIDEO, ((LATENTS, (_AGAIN,)), (SOUND, (_AGAIN,)), (LATENTS, ("--dry_run",)))),
    "sound": (_SOUND, ((SOUND, (*_SOUNDS, _AGAIN)), (SOUND, (*_SOUNDS, "--dry_run")))),
}
"""By family: the file in the world, and (program, flags) that read it."""


def systematic() -> Iterator[Malformed]:
    kinds = {"picture": _pictures(), "video": _videos(), "sound": _sounds()}
    for family, makes in kinds.items():
        name, users = USERS[family]
        for label, make in {**any_file(name), **makes}.items():
            for program, more in users:
                yield of_media(family, name, label, program, more, make)
    for name, other in ((_VIDEO, _STILL), (_VIDEO, _SOUND), (_STILL, _VIDEO), (_STILL, _SOUND), (_SOUND, _VIDEO), (_SOUND, _STILL)):
        family = {_VIDEO: "video", _STILL: "picture", _SOUND: "sound"}[name]
        for program, more in USERS[family][1]:
            yield of_media(family, name, f"is {Path(other).stem}", program, more, lambda folder, other=other: (folder / other).read_bytes())
    for ending in (".jpg", ".webp", ".bmp", ".jpeg", ".PNG"):
        yield _renamed("picture", _STILL, ending)
    for ending in (".mkv", ".avi", ".webm", ".mov", ".m4v", ".MP4"):
        yield _renamed("video", _VIDEO, ending)
    for ending in (".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac"):
        yield _renamed("sound", _SOUND, ending)


def of_media(family: str, name: str, label: str, program: str, more: tuple[str, ...], make: Make) -> Malformed:
    """An input with another file under the name; one that nobody can read is told of by its name."""
    is_dry = "--dry_run" in more
    told = label in _BROKEN and program != TRAIN
    return Malformed(
        id=f"{family}/{label} in {program}{' dry' if is_dry else ''}", program=program, more=more,
        prepare=lambda folder: put(folder, name, make(folder)), expect="told" if told else "any", names=(Path(name).stem,) if told else (),
    )  # fmt: skip


def _renamed(family: str, name: str, ending: str) -> Malformed:
    def prepare(folder: Path) -> None:
        path = folder / name
        path.rename(path.with_suffix(ending))

    program, more = USERS[family][1][0]
    return Malformed(id=f"{family}/named {ending}", program=program, more=more, prepare=prepare)


def any_file(name: str) -> Mapping[str, Make]:
    def read(folder: Path) -> bytes:
        return (folder / name).read_bytes()

    return {
        "empty": lambda folder: b"",
        "one byte": lambda folder: b"\0",
        "zeros": lambda folder: bytes(10_000),
        "text": lambda folder: b"this is no media\n" * 50,
        "first kilobyte": lambda folder: read(folder)[:200],
        "half": lambda folder: read(folder)[: len(read(folder)) // 2],
        "second half": lambda folder: read(folder)[len(read(folder)) // 2 :],
        "a byte short": lambda folder: read(folder)[:-1],
        "more after it": lambda folder: read(folder) + b"more" * 100,
        "twice": lambda folder: read(folder) * 2,
        "zeros in the middle": lambda folder: _overwritten(read(folder), 0.5, bytes(500)),
        "zeros at the end": lambda folder: _overwritten(read(folder), 0.9, bytes(100)),
        "ones at the front": lambda folder: b"\xff" * 16 + read(folder)[16:],
        "a playlist": lambda folder: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\nfile:///etc/hostname\n",
        "a list of files": lambda folder: b"ffconcat version 1.0\nfile /etc/hostname\n",
        "markup": lambda folder: b'<svg xmlns="http://www.w3.org/2000/svg" width="96" height="64"/>',
    }


def _overwritten(data: bytes, where: float, other: bytes) -> bytes:
    start = int(len(data) * where)
    return (data[:start] + other + data[start + len(other) :])[: len(data)]


def _pictures() -> Mapping[str, Make]:
    def saved(mode: str, size: tuple[int, int], kind: str = "PNG", **options: object) -> Make:
        def make(folder: Path) -> bytes:
            from PIL import Image

            file = io.BytesIO()
            Image.new(mode, size).save(file, kind, **options)
            return file.getvalue()

        return make

    def animated(kind: str) -> Make:
        def make(folder: Path) -> bytes:
            from PIL import Image

            file = io.BytesIO()
            frames = [Image.new("RGB", (96, 64), color) for color in ("red", "blue", "green")]
            frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=100)
            return file.getvalue()

        return make

    makes = {
        f"PNG of {w}x{h}": _png(w, h) for w, h in ((0, 0), (0, 64), (2**31 - 1, 1), (100_000, 100_000), (2**32 - 1, 2**32 - 1), (20_000, 1))
    }
    makes |= {f"mode {mode}": saved(mode, (96, 64)) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")}
    makes |= {f"size {w}x{h}": saved("RGB", (w, h)) for w, h in ((1, 1), (1, 5000), (5000, 1), (31, 33), (97, 65))}
    makes |= {
        f"{kind} in {mode}": saved(mode, (96, 64), kind) for kind, mode in (("JPEG", "CMYK"), ("TIFF", "F"), ("TIFF", "RGB"), ("GIF", "P"))
    }
    makes |= {f"animated {kind}": animated(kind) for kind in ("GIF", "PNG", "WEBP")}
    makes |= {
        "orientation 99": saved("RGB", (96, 64), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0")
    }
    makes |= {"profile of junk": saved("RGB", (96, 64), icc_profile=b"junk" * 10), "PNG of depth 3": _png(96, 64, depth=3)}
    return makes


def _png(width: int, height: int, depth: int = 8) -> Make:
    """A PNG that says it has this size, with a right checksum and next to no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return lambda folder: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def _wav(
    *, rate: int = 48000, channels: int = 2, bits: int = 16, kind: int = 1, data: bytes = bytes(40_000), said: int | None = None
) -> Make:
    block = channels * bits // 8
    head = struct.pack("<HHIIHH", kind, channels, rate, (rate * block) % 2**32, block % 2**16, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + b"data" + struct.pack("<I", len(data) if said is None else said) + data
    return lambda folder: b"RIFF" + struct.pack("<I", len(body)) + body


def _sounds() -> Mapping[str, Make]:
    nan, inf, huge = (struct.pack("<f", value) * 20_000 for value in (float("nan"), float("inf"), 3e38))
    makes = {f"rate {rate}": _wav(rate=rate, data=bytes(40)) for rate in (0, 1, 7, 384_000, 2**31 - 1, 2**32 - 1)}
    makes |= {f"channels {count}": _wav(channels=count) for count in (0, 1, 3, 8, 255, 65535)}
    makes |= {f"bits {bits}": _wav(bits=bits) for bits in (0, 1, 7, 8, 24, 64, 65535)}
    makes |= {f"codec {kind}": _wav(kind=kind) for kind in (0, 2, 85, 65534, 65535)}
    makes |= {f"float {name}": _wav(bits=32, kind=3, data=data) for name, data in (("nan", nan), ("inf", inf), ("huge", huge))}
    makes |= {
        "no sample": _wav(data=b""),
        "one sample": _wav(data=bytes(4)),
        "says 4 GB": _wav(said=2**32 - 1),
        "says nothing": _wav(said=0),
    }
    return makes


def _videos() -> Mapping[str, Make]:
    makes = {f"{frames} frame(s)": _clip(frames=frames) for frames in (1, 2, 8)}
    makes |= {f"rate {rate}": _clip(rate=rate) for rate in (Fraction(1, 100), Fraction(1), Fraction(1000), Fraction(60000))}
    makes |= {f"size {w}x{h}": _clip(width=w, height=h) for w, h in ((2, 2), (2, 2000), (2000, 2), (34, 30))}
    makes |= {f"times {label}": _clip(step=step) for label, step in (("an hour apart", 3600 * 90000), ("seven hours apart", 2**31))}
    fields = ((b"mvhd", 12), (b"mdhd", 12), (b"mvhd", 16), (b"mdhd", 16), (b"tkhd", 76), (b"tkhd", 80), (b"stts", 4), (b"stts", 8),
              (b"stts", 12),
              (b"stsz", 4), (b"stsz", 8), (b"stco", 4), (b"stco", 8), (b"stsd", 32), (b"stsd", 40), (b"elst", 4), (b"elst", 8),
              (b"elst", 12))  # fmt: skip
    for box, offset in fields:
        for number in (0, 1, 2**31 - 1, 2**32 - 1):
            makes[f"{box.decode()}+{offset} = {number}"] = _patched(box, offset, number)
    return makes


def _patched(box: bytes, offset: int, number: int) -> Make:
    """The world's clip with a number of a box of its container replaced, in every track."""

    def make(folder: Path) -> bytes:
        data = bytearray((folder / _VIDEO).read_bytes())
        place = data.find(box)
        while place >= 0:
            struct.pack_into(">I", data, place + 4 + offset, number) if place + 8 + offset <= len(data) else None
            place = data.find(box, place + 4)
        return bytes(data)

    return make


def _clip(*, frames: int = 9, rate: Fraction = Fraction(24), width: int = 96, height: int = 64, step: int | None = None) -> Make:
    """An mp4 by a real codec; `step` = ticks of 1/90000 s between frames."""

    def make(folder: Path) -> bytes:
        import av

        path = folder / "made.mp4"
        with av.open(str(path), mode="w") as container:
            stream = container.add_stream("mpeg4", rate=rate if rate.numerator < 65536 else Fraction(24))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            tick = Fraction(1, 90000) if step is not None else 1 / rate
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(torch.zeros(height, width, 3, dtype=torch.uint8).numpy(), format="rgb24")
                frame.time_base, frame.pts = tick, number * (1 if step is None else step)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        data = path.read_bytes()
        path.unlink()
        return data

    return make

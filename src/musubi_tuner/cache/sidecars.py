"""The metadata that cache files must carry: stated once, for the programs that write them and for training that reads them."""

from musubi_tuner.cache.index import Clip, audio_window, latents_window, reference_audio_window, reference_window

LATENT_KEYS = ("latents",)
AUDIO_KEYS = ("audio_latents", "audio_lengths")
REFERENCE_KEYS = ("ref_latents",)
REFERENCE_AUDIO_KEYS = ("ref_audio_latents", "ref_audio_lengths")
MASK_KEYS = ("video_mask",)
TEXT_KEYS = ("text", "text_mask")


def latents_of(clip: Clip) -> dict[str, str]:
    """Of a clip's video or image latents, as far as the plan decides it."""
    return {"kind": f"{clip.kind}_latents", "source_fingerprint": clip.source_fingerprint, "window": latents_window(clip)}


def reference_of(clip: Clip) -> dict[str, str]:
    """Of what is shown beside a clip."""
    return {"kind": "reference_latents", "source_fingerprint": clip.reference_fingerprint, "window": reference_window(clip)}


def mask_of(clip: Clip) -> dict[str, str]:
    """Of a clip's mask: cut and resized as the clip itself."""
    return {"kind": "mask", "source_fingerprint": clip.mask_fingerprint, "window": latents_window(clip)}


def reference_audio_of(clip: Clip) -> dict[str, str]:
    """Of what is played beside a clip's sound."""
    return {
        "kind": "reference_audio_latents",
        "source_fingerprint": clip.reference_sound_fingerprint,
        "window": reference_audio_window(clip),
    }


def audio_of(clip: Clip) -> dict[str, str]:
    """Of a clip's sound, as far as the plan decides it.

    The entry `audio` is left out: it is `absent` too where a stream ends before the window begins, which decoding tells.
    """
    return {"kind": "audio_latents", "source_fingerprint": clip.sound_fingerprint or clip.source_fingerprint, "window": audio_window(clip)}

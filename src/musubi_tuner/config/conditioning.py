"""Flags of conditioning; what a recipe can hold is in `conditioning.recipe`."""

from musubi_tuner.config.flags import flag
from musubi_tuner.config.validation import AnyPath, Share, options


@options
class ConditioningOptions:
    """Conditioning."""

    conditioning_config: AnyPath | None = flag("recipe TOML: what of a clip is conditioning and what is generated", default=None)
    first_frame_conditioning_p: Share = flag(
        "share of items whose first frame is conditioning (image to video), added to the recipe",
        default=0.0,
    )

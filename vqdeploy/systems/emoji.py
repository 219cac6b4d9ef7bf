"""Shared by the `emoji` presets: pictures of 64x64 pixels, as `examples/emoji.py` sorts them."""

from vqdeploy.models.conv import ConvConfig
from vqdeploy.systems.recipe import Recipe

LABELS = ("activities", "animals", "faces", "flags", "food", "hands", "objects", "people", "places", "symbols")

CONV = ConvConfig(
    resolution=64,
    channels=16,
    channel_multipliers=(1, 2, 4, 4),
    res_blocks=1,
    attention_resolutions=(),
    latent_channels=32,
    norm_groups=8,
)

RECIPE = Recipe(
    steps=3000,
    prior_steps=8500,
    classifier_steps=2500,
    batch_size=16,
    learning_rate=1.5e-3,
    prior_learning_rate=7e-4,
    soft_temperature=0.03,
    stored_dtype="float16",
    smallest_crop=0.9,
    mirror=False,  # of flags and letters
    balanced=True,  # half of the images are people, with their skin tones
)

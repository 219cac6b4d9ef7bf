"""Shared by the `tiny` presets: digits of 32x32 pixels."""

from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.gpt import GPTConfig
from vqdeploy.systems.recipe import Recipe

LABELS = tuple("0123456789")

CONV = ConvConfig(
    resolution=32,
    channels=32,
    channel_multipliers=(1, 1, 1),
    res_blocks=1,
    attention_resolutions=(),
    latent_channels=32,
    norm_groups=8,
)

GPT = GPTConfig((8, 8, 1), 256, width=128, layers=6, heads=4, classes=10)

RECIPE = Recipe(
    steps=800,
    prior_steps=1500,
    classifier_steps=500,
    batch_size=64,
    learning_rate=2e-3,
    prior_learning_rate=2e-3,
    soft_temperature=0.03,
    stored_dtype="float16",
)

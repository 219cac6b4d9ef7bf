"""MaskGIT as it was published: its own VQGAN and a BERT."""

from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from vqdeploy.systems import tiny
from vqdeploy.systems.losses import masked_loss
from vqdeploy.systems.movq import make_prior, stages
from vqdeploy.systems.system import Definition, MaskedSampling, SystemConfig

_TINY = SystemConfig(
    "maskgit",
    "tiny",
    MaskGITVQGANConfig(32, 32, (1, 1, 1), 1, codebook_size=128, code_dim=32, norm_groups=8),
    MaskGITConfig((8, 8, 1), 128, width=128, layers=6, heads=4, classes=10, network="bert"),
    tiny.LABELS,
    MaskedSampling(steps=8),
)

# Sizes of google-research/maskgit. The paper takes 8 steps at 256 pixels and 12 at 512.
_PRESETS = [
    _TINY,
    *(
        SystemConfig(
            "maskgit",
            f"imagenet-{side}",
            MaskGITVQGANConfig(side),
            MaskGITConfig((side // 16, side // 16, 1), 1024, 768, 24, 16, network="bert"),
            sampling=MaskedSampling(steps=steps),
        )
        for side, steps in ((256, 8), (512, 12))
    ),
]

SYSTEM = Definition(
    name="maskgit",
    kind="masked",
    tokenizer=MaskGITVQGAN,
    tokenizer_config=MaskGITVQGANConfig,
    prior=make_prior,
    prior_config=MaskGITConfig,
    sampling=MaskedSampling,
    loss=masked_loss,
    stages=stages,
    presets={config.preset: config for config in _PRESETS},
    recipes={"tiny": tiny.RECIPE},
)

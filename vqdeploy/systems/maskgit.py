"""MaskGIT as it was published: its own VQGAN and a BERT."""

from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from vqdeploy.systems.losses import masked_loss
from vqdeploy.systems.movq import make_prior, stages
from vqdeploy.systems.system import Definition, MaskedSampling, SystemConfig

# Sizes of google-research/maskgit. The paper takes 8 steps at 256 pixels and 12 at 512.
_PRESETS = [
    SystemConfig(
        "maskgit",
        f"imagenet-{side}",
        MaskGITVQGANConfig(side),
        MaskGITConfig((side // 16, side // 16, 1), 1024, 768, 24, 16, network="bert"),
        sampling=MaskedSampling(steps=steps),
    )
    for side, steps in ((256, 8), (512, 12))
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
)

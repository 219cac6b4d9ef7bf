"""Emu3's vision tokenizer. Its own prior is a language model; a MaskGIT can be trained on its codes."""

from vqdeploy.models.emu3 import Emu3, Emu3Config
from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.systems.losses import masked_loss
from vqdeploy.systems.movq import make_prior, stages
from vqdeploy.systems.system import Definition, MaskedSampling, SystemConfig

SYSTEM = Definition(
    name="emu3",
    kind="masked",
    tokenizer=Emu3,
    tokenizer_config=Emu3Config,
    prior=make_prior,
    prior_config=MaskGITConfig,
    sampling=MaskedSampling,
    loss=masked_loss,
    stages=stages,
    presets={"vision": SystemConfig("emu3", "vision", Emu3Config(), sampling=MaskedSampling())},
)

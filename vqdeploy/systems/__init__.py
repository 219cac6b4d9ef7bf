"""Systems: what is behind one value of `--model`, one file each."""

from vqdeploy.systems import emu3, maskgit, movq, rqvae, vitvqgan, vqgan, vqvae2
from vqdeploy.systems.recipe import Recipe
from vqdeploy.systems.system import (
    SYSTEMS,
    Definition,
    GuidedSampling,
    MaskedSampling,
    Sampling,
    System,
    SystemConfig,
    create,
    definition,
    preset,
)

SYSTEMS |= {module.SYSTEM.name: module.SYSTEM for module in (rqvae, movq, vitvqgan, vqgan, vqvae2, maskgit, emu3)}

__all__ = [
    "SYSTEMS",
    "Definition",
    "GuidedSampling",
    "MaskedSampling",
    "Recipe",
    "Sampling",
    "System",
    "SystemConfig",
    "create",
    "definition",
    "preset",
]

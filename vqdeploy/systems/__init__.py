"""Systems, the values of `--model`: one definition per file."""

from vqdeploy.systems import emu3, maskgit, movq, rqvae, var, vitvqgan, vqgan, vqvae2
from vqdeploy.systems.recipe import Recipe
from vqdeploy.systems.system import (
    SYSTEMS,
    Definition,
    GuidedSampling,
    MaskedSampling,
    NextScaleSampling,
    Sampling,
    System,
    SystemConfig,
    create,
    definition,
    preset,
)

SYSTEMS |= {module.SYSTEM.name: module.SYSTEM for module in (rqvae, movq, vitvqgan, vqgan, vqvae2, maskgit, emu3, var)}

__all__ = [
    "SYSTEMS",
    "Definition",
    "GuidedSampling",
    "MaskedSampling",
    "NextScaleSampling",
    "Recipe",
    "Sampling",
    "System",
    "SystemConfig",
    "create",
    "definition",
    "preset",
]

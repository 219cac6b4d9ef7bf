"""Systems, the values of `--model`: one definition per file."""

from vqdeploy.systems import emu3, llamagen, maskgit, movq, rqvae, var, vitvqgan, vqgan, vqvae2
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

_MODULES = (rqvae, movq, vitvqgan, vqgan, vqvae2, llamagen, var, maskgit, emu3)

SYSTEMS |= {module.SYSTEM.name: module.SYSTEM for module in _MODULES}

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

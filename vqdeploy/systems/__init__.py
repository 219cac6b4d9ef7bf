"""Systems, the values of `--model`: one definition per file."""

from vqdeploy.systems import emu3, llamagen, maskgit, movq, rqvae, vitvqgan, vqgan, vqvae2
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

SYSTEMS |= {
    module.SYSTEM.name: module.SYSTEM for module in (rqvae, movq, vitvqgan, vqgan, vqvae2, maskgit, emu3, llamagen)
}

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

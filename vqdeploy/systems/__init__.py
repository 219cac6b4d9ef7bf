"""Systems: what is behind one value of `--model`, one file each."""

from vqdeploy.systems import movq, rqvae, vitvqgan, vqgan, vqvae2
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

SYSTEMS |= {each.name: each for each in (rqvae.SYSTEM, movq.SYSTEM, vitvqgan.SYSTEM, vqgan.SYSTEM, vqvae2.SYSTEM)}

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

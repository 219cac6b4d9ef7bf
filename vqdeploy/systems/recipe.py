"""Training recipes."""

import math
from dataclasses import dataclass

from vqdeploy.config import Config
from vqdeploy.errors import VqdeployError

_MOST = 10**9  # steps, or images of a batch


@dataclass(frozen=True)
class Recipe(Config):
    """Hyperparameters of a training run; the defaults are those of the RQ-VAE paper and its public code.

    `soft_temperature` divides the squared distances for soft targets, so it depends on the scale of the latents.
    `label_smoothing` is for masked priors, `label_dropout`, the fraction of dropped labels, for all priors with
    guidance. `logit_laplace_weight` belongs to ViT-VQGAN (section 3.4). `classifier_steps` trains the classifier that
    judges samples. `stored_dtype` is the type of the saved weights. Images of a folder are cropped to squares of
    `smallest_crop` to 1 of their shorter side, and every other one is mirrored if `mirror`. If `balanced`, they are
    drawn as often of a small class as of a large one.
    """

    steps: int = 400_000
    prior_steps: int = 62_500
    classifier_steps: int = 5_000
    batch_size: int = 128
    learning_rate: float = 4e-5
    prior_learning_rate: float = 5e-4
    classifier_learning_rate: float = 1e-3
    soft_temperature: float = 0.5
    label_smoothing: float = 0.1
    label_dropout: float = 0.1
    logit_laplace_weight: float = 0.0
    perceptual_weight: float = 0.0
    adversarial_weight: float = 0.0
    stored_dtype: str = "float32"
    smallest_crop: float = 0.75
    mirror: bool = True
    balanced: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "prior_steps", "classifier_steps", "batch_size"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise VqdeployError(f"{name} is out of range", expected=f"1..{_MOST}", found=getattr(self, name))
        for name, value in self.to_dict().items():
            if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
                raise VqdeployError(f"{name} is out of range", expected="a finite number, 0 or more", found=value)
        if not 0 < self.smallest_crop <= 1:
            raise VqdeployError(
                "smallest_crop is out of range", expected="above 0, at most 1", found=self.smallest_crop
            )

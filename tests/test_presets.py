"""Published parameter counts, on the meta device."""

import pytest
import torch

from vqdeploy.errors import VqdeployError
from vqdeploy.models import System
from vqdeploy.presets import PRESETS, preset

# Millions of parameters: tokenizer (codebook included, as published), prior.
COUNTS = {
    "ffhq-350m": (100.732, 355.394),
    "church-350m": (104.402, 370.088),
    "cat-600m": (104.402, 612.061),
    "bedroom-600m": (104.402, 612.061),
    "imagenet-480m": (104.402, 480.921),
    "imagenet-800m": (104.402, 820.899),
    "imagenet-1400m": (104.402, 1387.530),
    "imagenet-3800m": (104.402, 3822.488),
    "cc3m-650m": (104.402, 654.062),
    "f16": (76.074, None),
    "f8": (74.301, None),
}


def test_every_published_preset_is_counted():
    assert set(PRESETS["rqvae"]) == {*COUNTS, "tiny", "bench"}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    with torch.device("meta"):
        system = System(preset("rqvae", name))
    parameters = sum(p.numel() for p in system.tokenizer.parameters()) + system.tokenizer.quantizer.codebook.numel()
    prior = system.prior and sum(p.numel() for p in system.prior.parameters())
    expected_tokenizer, expected_prior = COUNTS[name]
    # The published totals count one padding row of the codebook.
    padding = system.tokenizer.config.code_dim
    assert (parameters + padding) / 1e6 == pytest.approx(expected_tokenizer, abs=6e-4)
    assert (prior and prior / 1e6) == (expected_prior and pytest.approx(expected_prior, abs=6e-4))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(VqdeployError, match="expected movq or rqvae"):
        preset("rqvea", "tiny")
    with pytest.raises(VqdeployError, match="imagenet-480m"):
        preset("rqvae", "huge")

"""A system of one's own, by public names alone: one definition takes it through every verb, with no edit elsewhere."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from torch import Tensor, nn
from typer.testing import CliRunner

from vqdeploy import checkpoint
from vqdeploy.cli import app
from vqdeploy.config import Config
from vqdeploy.models.gpt import GPT, GPTConfig
from vqdeploy.models.quantizers import MultichannelQuantizer
from vqdeploy.models.tokenizer import Tokenizer
from vqdeploy.runtime import load
from vqdeploy.systems import SYSTEMS, Definition, GuidedSampling, Recipe, SystemConfig
from vqdeploy.systems.losses import next_code_loss

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class PatchesConfig(Config):
    resolution: int = 16
    patch: int = 4
    codebook_size: int = 32
    code_dim: int = 8
    commitment_weight: float = 0.25
    pixel_range: tuple[float, ...] = (-1.0, 1.0)

    @property
    def grid(self):
        side = self.resolution // self.patch
        return (side, side, 1)


class Patches(Tokenizer):
    """A linear map of each patch, and back."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.inner = nn.Conv2d(3, config.code_dim, config.patch, config.patch)
        self.outer = nn.ConvTranspose2d(config.code_dim, 3, config.patch, config.patch)
        self.quantizer = MultichannelQuantizer(config.codebook_size, config.code_dim, groups=1)

    @property
    def last_weight(self):
        return self.outer.weight

    def latents(self, x: Tensor) -> Tensor:
        return self.inner(x).permute(0, 2, 3, 1)

    def reconstruct(self, vectors: Tensor) -> Tensor:
        return self.outer(vectors.permute(0, 3, 1, 2))


def stages(prior, floats):
    from vqdeploy.export import gpt

    return gpt.stages(prior)


TOY = Definition(
    name="toy",
    kind="autoregressive",
    tokenizer=Patches,
    tokenizer_config=PatchesConfig,
    prior=lambda config, tokenizer: GPT(config),
    prior_config=GPTConfig,
    sampling=GuidedSampling,
    loss=next_code_loss,
    stages=stages,
    presets={
        "tiny": SystemConfig(
            "toy",
            "tiny",
            PatchesConfig(),
            GPTConfig((4, 4, 1), 32, width=32, layers=1, heads=2, classes=3, dropout=0.0),
            ("ant", "bee", "cow"),
            GuidedSampling(guidance_scale=2.0),
        )
    },
    recipes={"tiny": Recipe(steps=3, prior_steps=3, classifier_steps=3, batch_size=8, stored_dtype="float16")},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "toy", TOY)
        patch.chdir(tmp_path_factory.mktemp("toy"))
        yield


def vqdeploy(*arguments):
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_it_goes_through_every_verb(folder):
    assert vqdeploy("models")["toy"] == {"tiny": "random"}
    assert vqdeploy("export", "--model", "toy")["verify"]["passed"]
    assert vqdeploy("build", "toy-onnx")["plan"] == "toy.plan"
    run = vqdeploy("run", "--engine", "toy.plan", "--label", "bee", "--num-images", "3", "--seed", "4")
    assert run["output"] == "toy-generate.png"
    assert run["options"]["guidance_scale"] == 2.0
    assert (
        vqdeploy("run", "--engine", "toy.plan", "--task", "reconstruct", "--input", "toy-generate.png")["images"] == 2
    )
    assert vqdeploy("verify", "--engine", "toy.plan")["passed"]
    bench = vqdeploy("bench", "--engine", "toy.plan", "--baseline", "eager", "--iterations", "1")
    assert {result["task"] for result in bench["results"]} == {"generate", "encode", "decode"}
    assert vqdeploy("inspect", "toy.plan")["tokenizer"]["maps"] == [[4, 4, 1]]


def test_its_recipe_trains_it(folder):
    training = vqdeploy("train", "--model", "toy", "-o", "trained")
    assert training["recipe"]["prior_steps"] == 3
    assert checkpoint.load("trained").config.prior.classes == 10
    vqdeploy("export", "--checkpoint", "trained", "--no-verify", "-o", "trained-onnx")
    vqdeploy("build", "trained-onnx", "-o", "trained.plan")
    with load("trained.plan", threads=1) as pipeline:
        assert pipeline.generate([9], seed=1).images.shape == (1, 16, 16, 3)
        assert np.ptp(pipeline.generate([9], seed=1).codes) > 0

"""Small systems with random weights, their packages and plans, exported once a session."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings

from vqdeploy import checkpoint
from vqdeploy.engines.build import build
from vqdeploy.export.package import export
from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.gpt import GPTConfig
from vqdeploy.models.maskgit import MaskGITConfig
from vqdeploy.models.movq import MoVQConfig
from vqdeploy.models.pixelsnail import PixelSNAILConfig, VQVAE2PriorConfig
from vqdeploy.models.quantizers import AveragedCodebook
from vqdeploy.models.rqtransformer import RQTransformerConfig
from vqdeploy.models.rqvae import RQVAEConfig
from vqdeploy.models.vitvqgan import ViTConfig, ViTVQGANConfig
from vqdeploy.models.vqvae2 import VQVAE2Config
from vqdeploy.runtime import load
from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.systems import System, SystemConfig, create
from vqdeploy.systems.system import GuidedSampling, MaskedSampling, Sampling

# Read when Triton is imported: the tests run its kernels on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
settings.register_profile("suite", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("suite")
torch.set_num_threads(1)  # its waiting threads and those of ONNX Runtime would take the cores from each other

CONV = ConvConfig(
    resolution=16,
    channels=16,
    channel_multipliers=(1, 1, 1),
    res_blocks=1,
    attention_resolutions=(),
    latent_channels=16,
    norm_groups=4,
)
SMALL = SystemConfig(
    model="rqvae",
    preset="small",
    tokenizer=RQVAEConfig(conv=CONV, codebook_size=64, code_dim=16),
    prior=RQTransformerConfig(
        grid=(4, 4, 4), codebook_size=64, code_dim=16, width=64, body_layers=2, head_layers=1, heads=4, classes=3
    ),
    labels=("cat", "dog", "eel"),
    sampling=Sampling(temperature=0.9, top_k=40, top_p=0.95),
)
SMALL_MOVQ = SystemConfig(
    model="movq",
    preset="small",
    tokenizer=MoVQConfig(conv=CONV, codebook_size=32, code_dim=16, groups=4),
    prior=MaskGITConfig(grid=(4, 4, 4), codebook_size=32, width=64, layers=2, heads=4, classes=3, dropout=0.0),
    labels=("cat", "dog", "eel"),
    sampling=MaskedSampling(
        temperature=0.9, top_k=20, top_p=0.95, steps=5, schedule="linear", guidance_scale=1.5, choice_temperature=3.0
    ),
)
SMALL_ADAPTIVE = replace(
    SMALL_MOVQ,
    tokenizer=replace(SMALL_MOVQ.tokenizer, groups=1, metric="cosine", modulation=False),
    prior=replace(SMALL_MOVQ.prior, grid=(4, 4, 1), network="adaptive"),
)


SMALL_VIT = SystemConfig(
    model="vitvqgan",
    preset="small",
    tokenizer=ViTVQGANConfig(16, 4, ViTConfig(32, 1, 2, 64), ViTConfig(32, 2, 1, 64), codebook_size=64, code_dim=8),
    prior=GPTConfig((4, 4, 1), 64, width=64, layers=3, heads=4, classes=3, dropout=0.0),
    labels=("cat", "dog", "eel"),
    sampling=GuidedSampling(temperature=0.9, guidance_scale=1.5),
)
SMALL_VQGAN = SystemConfig(
    model="vqgan",
    preset="small",
    tokenizer=replace(SMALL_ADAPTIVE.tokenizer, metric="l2"),
    prior=replace(SMALL_VIT.prior, codebook_size=32, token_shift=True, squared_relu=True),
    labels=SMALL_VIT.labels,
    sampling=GuidedSampling(),
)

_SNAIL = PixelSNAILConfig((3, 3), 16, 3, 2, 2, 24, True, 4, 1, 12, 3, 1, dropout=0.0)
SMALL_VQVAE2 = SystemConfig(
    model="vqvae2",
    preset="small",
    tokenizer=VQVAE2Config(24, channels=16, res_blocks=1, res_channels=8, codebook_size=32, code_dim=8),
    prior=VQVAE2PriorConfig((_SNAIL, replace(_SNAIL, grid=(6, 6), kernel=5, attention=False)), 32, classes=3),
    labels=SMALL_VIT.labels,
    sampling=Sampling(temperature=0.9),
)
_THIN = replace(_SNAIL, grid=(2, 2), kernel=5, res_blocks=1, heads=1, out_res_blocks=0, condition_res_blocks=0)
SMALL_THREE = replace(
    SMALL_VQVAE2,
    tokenizer=VQVAE2Config(32, levels=3, channels=8, res_blocks=1, res_channels=8, codebook_size=32, code_dim=8),
    prior=VQVAE2PriorConfig(
        (
            replace(_THIN, channels=32, heads=2),
            replace(_THIN, grid=(4, 4), kernel=3, blocks=1, out_res_blocks=1),
            replace(_THIN, grid=(8, 8), kernel=7, blocks=1, attention=False, condition_res_blocks=1),
        ),
        codebook_size=32,
        classes=1,
    ),
    labels=(),
)


def lively(config: SystemConfig, seed: int = 0) -> System:
    """Random weights as large as trained ones, so that what a layer gets wrong is seen in the output."""
    system = create(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in system.tokenizer.modules():
            if isinstance(module, AveragedCodebook):
                module.codebook.normal_(std=0.5, generator=generator)
        for weight in system.prior.parameters() if system.prior else ():
            if weight.ndim > 1:
                inputs = weight[0].numel() if weight.ndim == 4 else weight.shape[-1]
                weight.normal_(std=inputs**-0.5, generator=generator)
        for weight in system.parameters():
            if weight.ndim == 1:  # biases, and the scales of norms
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return system


def exported(system: System, tmp_path_factory, name: str, dtype: str = "fp32") -> Path:
    """The ONNX package of a system."""
    folder = tmp_path_factory.mktemp("package") / f"{name}-onnx"
    export(system, folder, dtype)
    return folder


def built(package: Path, tmp_path_factory, **options) -> Path:
    """A plan for ONNX Runtime."""
    file = tmp_path_factory.mktemp("plan") / f"{package.name.removesuffix('-onnx')}.plan"
    build(package, file, **options)
    return file


@pytest.fixture(scope="session")
def system():
    return lively(SMALL)


@pytest.fixture(scope="session")
def checkpoint_folder(system, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    checkpoint.save(system, folder)
    return folder


@pytest.fixture(scope="session")
def package(system, tmp_path_factory):
    """The ONNX package of `system`. Tests that change it work on a copy."""
    return exported(system, tmp_path_factory, "small")


@pytest.fixture(scope="session")
def plan(package, tmp_path_factory):
    """For ONNX Runtime, with its own function bodies."""
    return built(package, tmp_path_factory)


@pytest.fixture(scope="session")
def portable_plan(package, tmp_path_factory):
    """For ONNX Runtime, with the function bodies of the package."""
    return built(package, tmp_path_factory, portable=True)


@pytest.fixture(scope="session")
def pipeline(plan):
    return load(plan, threads=1)


@pytest.fixture(scope="session")
def splitting_pipeline(package, tmp_path_factory):
    """Splits every request into calls of at most two images."""
    return load(built(package, tmp_path_factory, batch=SizeRange(1, 1, 2)), threads=1)


@pytest.fixture(scope="session")
def movq_system():
    return lively(SMALL_MOVQ)


@pytest.fixture(scope="session")
def movq_package(movq_system, tmp_path_factory):
    """The ONNX package of `movq_system`."""
    return exported(movq_system, tmp_path_factory, "small-movq")


@pytest.fixture(scope="session")
def movq_plan(movq_package, tmp_path_factory):
    return built(movq_package, tmp_path_factory)


@pytest.fixture(scope="session")
def movq_portable_plan(movq_package, tmp_path_factory):
    return built(movq_package, tmp_path_factory, portable=True)


@pytest.fixture(scope="session")
def movq_pipeline(movq_plan):
    return load(movq_plan, threads=1)


@pytest.fixture(scope="session")
def movq_splitting_pipeline(movq_package, tmp_path_factory):
    """Splits every request into calls of at most two images."""
    return load(built(movq_package, tmp_path_factory, batch=SizeRange(1, 1, 2)), threads=1)


@pytest.fixture(scope="session")
def adaptive_system():
    """One code a position, an adaptive prior, and the other variants of the tokenizer."""
    return lively(SMALL_ADAPTIVE)


@pytest.fixture(scope="session")
def adaptive_package(adaptive_system, tmp_path_factory):
    return exported(adaptive_system, tmp_path_factory, "small-adaptive")


@pytest.fixture(scope="session")
def adaptive_pipeline(adaptive_package, tmp_path_factory):
    return load(built(adaptive_package, tmp_path_factory), threads=1)


@pytest.fixture(scope="session")
def vit_system():
    return lively(SMALL_VIT)


@pytest.fixture(scope="session")
def vqgan_system():
    """A GPT with token shift and squared ReLU."""
    return lively(SMALL_VQGAN)


def lively_vqvae2(config: SystemConfig) -> System:
    """As `lively`, with codebooks that lie among the latents."""
    system, side = lively(config), config.tokenizer.resolution
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in system.tokenizer.parameters():
            if weight.ndim == 4:  # there are no norms that would bring small outputs back to size
                torch.nn.init.kaiming_normal_(weight)
        system.tokenizer.train()(torch.rand(8, 3, side, side) * 2 - 1)
    return system.eval()


@pytest.fixture(scope="session")
def vqvae2_system():
    """Two levels with networks of different kernels, one with attention of heads that no operator takes."""
    return lively_vqvae2(SMALL_VQVAE2)


@pytest.fixture(scope="session")
def vqvae2_checkpoint(vqvae2_system, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "small-vqvae2"
    checkpoint.save(vqvae2_system, folder)
    return folder


@pytest.fixture(scope="session")
def vqvae2_package(vqvae2_system, tmp_path_factory):
    """The ONNX package of `vqvae2_system`. Tests that change it work on a copy."""
    return exported(vqvae2_system, tmp_path_factory, "small-vqvae2")


@pytest.fixture(scope="session")
def vqvae2_plan(vqvae2_package, tmp_path_factory):
    return built(vqvae2_package, tmp_path_factory)


@pytest.fixture(scope="session")
def vqvae2_portable_plan(vqvae2_package, tmp_path_factory):
    return built(vqvae2_package, tmp_path_factory, portable=True)


@pytest.fixture(scope="session")
def vqvae2_pipeline(vqvae2_plan):
    return load(vqvae2_plan, threads=1)


@pytest.fixture(scope="session")
def vqvae2_splitting_pipeline(vqvae2_package, tmp_path_factory):
    """Splits every request into calls of at most two images."""
    return load(built(vqvae2_package, tmp_path_factory, batch=SizeRange(1, 1, 2)), threads=1)


@pytest.fixture(scope="session")
def three_system():
    """Three levels without labels, the upper two with attention of a head that ONNX Runtime's operator takes."""
    return lively_vqvae2(SMALL_THREE)


@pytest.fixture(scope="session")
def three_package(three_system, tmp_path_factory):
    return exported(three_system, tmp_path_factory, "small-three")


@pytest.fixture(scope="session")
def three_plan(three_package, tmp_path_factory):
    return built(three_package, tmp_path_factory)


@pytest.fixture(scope="session")
def three_pipeline(three_plan):
    return load(three_plan, threads=1)


@pytest.fixture(scope="session")
def vit_package(vit_system, tmp_path_factory):
    return exported(vit_system, tmp_path_factory, "small-vit")


@pytest.fixture(scope="session")
def vqgan_package(vqgan_system, tmp_path_factory):
    return exported(vqgan_system, tmp_path_factory, "small-vqgan")


@pytest.fixture(scope="session")
def vit_plan(vit_package, tmp_path_factory):
    return built(vit_package, tmp_path_factory)


@pytest.fixture(scope="session")
def vqgan_plan(vqgan_package, tmp_path_factory):
    """With the function bodies of the package."""
    return built(vqgan_package, tmp_path_factory, portable=True)


@pytest.fixture(scope="session")
def vit_pipeline(vit_plan):
    return load(vit_plan, threads=1)


@pytest.fixture(scope="session")
def vqgan_pipeline(vqgan_plan):
    return load(vqgan_plan, threads=1)


@pytest.fixture(scope="session")
def half_package(system, tmp_path_factory):
    """The package of `system` in fp16. Tests that change it work on a copy."""
    return exported(system, tmp_path_factory, "small-half", "fp16")


@pytest.fixture(scope="session")
def movq_half_package(movq_system, tmp_path_factory):
    return exported(movq_system, tmp_path_factory, "small-movq-half", "fp16")


@pytest.fixture(scope="session")
def vit_half_package(vit_system, tmp_path_factory):
    return exported(vit_system, tmp_path_factory, "small-vit-half", "fp16")


@pytest.fixture(scope="session")
def vqgan_half_package(vqgan_system, tmp_path_factory):
    return exported(vqgan_system, tmp_path_factory, "small-vqgan-half", "fp16")


@pytest.fixture(scope="session")
def vqvae2_half_package(vqvae2_system, tmp_path_factory):
    return exported(vqvae2_system, tmp_path_factory, "small-vqvae2-half", "fp16")


@pytest.fixture(scope="session")
def command():
    """Runs the installed console script: `command("run", "--engine", file, cwd=folder)`."""
    script = Path(sys.executable).with_name("vqdeploy")

    def run(*arguments: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603
            [script, *map(str, arguments)],
            cwd=cwd,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    run.script = script
    return run


@pytest.fixture(scope="session")
def tiny(command, tmp_path_factory):
    """The two commands of the user as typed, with the build between them; nothing but their output is kept."""
    folder = tmp_path_factory.mktemp("tiny")
    steps = {
        name: command(*line.split(), cwd=folder)
        for name, line in (
            ("export", "export --model rqvae"),
            ("build", "build"),
            ("run", "run --engine rqvae.plan"),
        )
    }
    return SimpleNamespace(folder=folder, package=folder / "rqvae-onnx", plan=folder / "rqvae.plan", **steps)


@pytest.fixture
def python():
    """Runs a script in a fresh interpreter and returns what it printed."""

    def run(script: str, *arguments: object, cwd: Path | None = None) -> str:
        process = subprocess.run(  # noqa: S603
            [sys.executable, "-c", script, *map(str, arguments)],
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run

"""VQGAN against MoVQ: what do multichannel codes and the modulated decoder bring?

Trains tokenizers that differ in their configuration alone, on the same batches of photo crops with the same optimizer
and loss, and measures them on held-out crops. It writes `results.json`, and the picture `reconstructions.png` with a
row of originals above one row a tokenizer. Six trainings of 500 steps take 15 to 30 minutes on two cores.

    python examples/compare_tokenizers.py --steps 500 --seed 0 --output comparison

docs/movq-claim.md shows and discusses the outcome.
"""

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer
from lightning.pytorch import seed_everything
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from vqdeploy.files import write_json
from vqdeploy.models.conv import ConvConfig
from vqdeploy.models.movq import MoVQ, MoVQConfig
from vqdeploy.runtime.images import write_grid
from vqdeploy.systems import Recipe
from vqdeploy.training.data import Data, images_of, open_data
from vqdeploy.training.metrics import codebook_use, psnr, reconstruct
from vqdeploy.training.stage import run_stage
from vqdeploy.training.tokenizer import TokenizerTraining

CONV = ConvConfig(
    resolution=64,
    channels=16,
    channel_multipliers=(1, 2, 2, 4),
    res_blocks=1,
    attention_resolutions=(8,),
    latent_channels=64,
    norm_groups=8,
)
FINER = replace(CONV, channel_multipliers=(1, 2, 4), attention_resolutions=(16,))
VQGAN = MoVQConfig(CONV, codebook_size=256, code_dim=64, groups=1, modulation=False)

TOKENIZERS = {
    "VQGAN": VQGAN,
    "VQGAN + modulation": replace(VQGAN, modulation=True),
    "VQGAN + multichannel": replace(VQGAN, groups=4),
    "MoVQ": replace(VQGAN, groups=4, modulation=True),
    # Multichannel codes cost four times the bits. One control has as many bits without them, one as few with them.
    "VQGAN, finer grid": replace(VQGAN, conv=FINER),
    "VQGAN + multichannel, as few bits": replace(VQGAN, groups=2, codebook_size=16),
}

HEADER = """| tokenizer | codes | bits | parameters | PSNR | SSIM | usage | perplexity |
|---|---|---|---|---|---|---|---|"""
COLUMNS, ZOOM = 8, 2  # of the picture


def main(steps: int = 500, seed: int = 0, batch_size: int = 16, output: Path = Path("comparison")) -> None:
    """Trains one tokenizer after the other. Each adds a row to the printed table, to the results and to the picture."""
    output.mkdir(parents=True, exist_ok=True)
    data = open_data("photos", CONV.resolution)
    recipe = Recipe(steps=steps, batch_size=batch_size, learning_rate=2e-3)
    images, _ = images_of(data.held_out)
    results, rows = {}, [images[:COLUMNS]]
    typer.echo(HEADER)
    for name, config in TOKENIZERS.items():
        tokenizer = train(config, recipe, data, seed)
        reconstructions, codes = reconstruct(tokenizer, images)
        results[name] = measure(tokenizer, images, reconstructions, codes)
        rows.append(reconstructions[:COLUMNS])
        typer.echo(table_row(name, results[name]))
        note = {"seed": seed, "recipe": recipe.to_dict(), "results": results}
        write_json(output / "results.json", note)
        pixels = torch.cat(rows).repeat_interleave(ZOOM, 2).repeat_interleave(ZOOM, 3)
        write_grid(output / "reconstructions.png", pixels.permute(0, 2, 3, 1).numpy(), COLUMNS, note)


def train(config: MoVQConfig, recipe: Recipe, data: Data, seed: int) -> MoVQ:
    """A tokenizer after its training."""
    seed_everything(seed, verbose=False)
    tokenizer = MoVQ(config)
    seed_everything(seed, verbose=False)  # again, because each configuration draws its own number of weights
    with tempfile.TemporaryDirectory() as folder:
        module, state = TokenizerTraining(tokenizer, recipe), Path(folder) / "tokenizer.ckpt"
        run_stage(module, data, recipe.steps, recipe.batch_size, state, seed, limit_val_batches=0)
    return tokenizer.eval()


def measure(tokenizer: MoVQ, images: Tensor, reconstructions: Tensor, codes: Tensor) -> dict[str, Any]:
    """What a tokenizer costs, and what it reaches. Groups share a codebook, so their codes are counted together."""
    config = tokenizer.config
    pair = reconstructions.float(), images.float()
    use = codebook_use([codes], config.codebook_size)
    return {
        "config": config.to_dict(),
        "parameters": sum(p.numel() for p in tokenizer.parameters()) + tokenizer.quantizer.codebook.numel(),
        "bits": math.prod(config.grid) * round(math.log2(config.codebook_size)),
        "psnr": psnr(reconstructions, images),
        "ssim": float(structural_similarity_index_measure(*pair, data_range=255.0)),
        "usage": use["usage"][0],
        "perplexity": use["perplexity"][0],
    }


def table_row(name: str, result: dict[str, Any]) -> str:
    """One tokenizer in Markdown."""
    cells = (
        name,
        f"{'x'.join(map(str, TOKENIZERS[name].grid))} of {TOKENIZERS[name].codebook_size}",
        result["bits"],
        f"{result['parameters']:,}",
        f"{result['psnr']:.2f}",
        f"{result['ssim']:.3f}",
        f"{result['usage']:.0%}",
        f"{result['perplexity']:.0f}",
    )
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    typer.run(main)

"""Checkpoints as public code writes them, made of the golden files."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import torch

from support.golden import read_golden

State = dict[str, torch.Tensor]


def bare(state: State) -> Any:
    return state


def lightning(state: State) -> Any:
    """What Lightning leaves in a file beside the weights, classes of callbacks as keys among it."""
    return {
        "epoch": 3,
        "global_step": 100,
        "pytorch-lightning_version": "1.0.8",
        "callbacks": {argparse.ArgumentParser: {"best": 0.5}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "state_dict": state | {"loss.discriminator.main.0.weight": torch.ones(2, 3)},
    }


def llamagen(state: State) -> Any:
    return {"model": {k: w + 1 for k, w in state.items()}, "ema": state, "steps": 5, "args": argparse.Namespace(lr=1)}


def fsdp(state: State) -> Any:
    """A bare dictionary, with the table of rotations that older files have."""
    return state | {"freqs_cis": torch.zeros(65, 8, 2)}


def kakaobrain(state: State) -> Any:
    return {"state_dict": {k: w + 1 for k, w in state.items()}, "state_dict_ema": state, "epoch": 10}


def valeo(state: State) -> Any:
    return {
        "iter": 7,
        "global_epoch": 1,
        "model_state_dict": {f"module.{key}": weight for key, weight in state.items()},
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }


def halton(state: State) -> Any:
    compiled = {f"_orig_mod.{key}": weight for key, weight in state.items() if key != "head.weight"}
    return valeo(compiled)


def rosinality(state: State) -> Any:
    return {"model": state, "args": argparse.Namespace(hier="top", channel=32)}


def save(state: State, file: Path, wrap: Callable[[State], Any] = bare) -> Path:
    torch.save(wrap(state), file)
    return file


def save_flax(state: State, file: Path) -> Path:
    """What flax.serialization.to_bytes makes of a tree of arrays."""
    tree: dict[str, Any] = {}
    for key, weight in state.items():
        *path, last = key.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        array = (list(weight.shape), str(weight.dtype).removeprefix("torch."), weight.numpy().tobytes())
        node[last] = msgpack.ExtType(1, msgpack.packb(array, use_bin_type=True))
    file.write_bytes(msgpack.packb(tree, use_bin_type=True))
    return file


def write_config(config: Any, file: Path) -> Path:
    file.write_text(json.dumps(config))
    return file


def model_section(config: Any) -> Any:
    """The `model` section that a YAML of taming has."""
    return {"model": {"base_learning_rate": "4.5e-6", "target": "taming.models.vqgan.VQModel", "params": config}}


TOKENIZERS: dict[str, tuple[str, str, Callable[[State], Any], Callable[[Any], Any]]] = {
    # golden file: format, system, how its file holds the weights, its configuration
    "movq": ("movqgan", "movq", bare, model_section),
    "movqgan_ema": ("movqgan", "movq", lightning, model_section),
    "vqgan": ("taming", "vqgan", lightning, model_section),
    "taming_vqgan_f8_attn": ("taming", "vqgan", lightning, model_section),
    "taming_vqgan_gumbel": ("taming", "vqgan", lightning, model_section),
    "diffusers_movq": ("diffusers", "movq", bare, bare),
    "diffusers_vq": ("diffusers", "vqgan", bare, bare),
    "diffusers_amused": ("diffusers", "vqgan", bare, bare),
    "llamagen_vq": ("llamagen", "vqgan", llamagen, lambda config: {"image_size": 32, **config}),
    "emu3_vq": ("emu3", "emu3", bare, bare),
    "rqvae": ("rq-vae-transformer", "rqvae", kakaobrain, lambda config: {"arch": {"hparams": config}}),
    "vitvq": ("enhancing-transformers", "vitvqgan", lightning, lambda config: {"model": {"params": config}}),
    "vqvae2": ("vq-vae-2", "vqvae2", bare, lambda config: {"resolution": 64}),
    "maskgit_jax_tokenizer": ("maskgit-jax", "maskgit", bare, lambda config: {"image_size": 16}),
    "var_vae": ("var", "var", bare, bare),
}


def write_tokenizer(name: str, folder: Path, changes: dict[str, Any] | None = None) -> list[Any]:
    """Writes the public files of a tokenizer; the arguments of `vqdeploy import` for them."""
    _, _, wrap, configure = TOKENIZERS[name]
    config, _, state = read_golden(name)
    if changes and "ddconfig" in config:
        config = config | {"ddconfig": config["ddconfig"] | changes}
    elif changes:
        config = config | changes
    folder.mkdir(exist_ok=True)
    file = save_flax(state, folder / name) if "jax" in name else save(state, folder / f"{name}.ckpt", wrap)
    return ["--tokenizer", file, "--tokenizer-config", write_config(configure(config), folder / f"{name}.json")]


def write_system(name: str, folder: Path) -> list[Any]:
    """The same for a whole system, by the name of its prior's golden file."""
    folder.mkdir(exist_ok=True)
    if name == "pixelsnail":
        priors = [save(read_golden(f"pixelsnail_{n}")[2], folder / n, rosinality) for n in ("bottom", "top")]
        return [*write_tokenizer("vqvae2", folder), "--prior", priors[0], "--prior", priors[1]]
    config, _, state = read_golden(name)
    if name == "taming_gpt":
        options = write_config(model_section(config), folder / "net2net.json")
        return ["--prior", save(state, folder / "net2net.ckpt", lightning), "--prior-config", options]
    if name == "maskgit_jax_transformer":
        return [*write_tokenizer("maskgit_jax_tokenizer", folder), "--prior", save_flax(state, folder / "transformer")]
    if name == "var_shared":  # what its training writes: both networks in one file
        trained = {"config": {}, "var_wo_ddp": state, "vae_local": read_golden("var_vae")[2]}
        trained["var_opt"] = {"state": {0: {"exp_avg": torch.zeros(3)}}}
        file = save(
            state, folder / "ar-ckpt-last.pth", lambda _: {"epoch": 3, "iter": 0, "trainer": trained, "args": {}}
        )
        return ["--prior", file]
    if name == "var":
        _, _, tokenizer_state = read_golden("var_vae")
        tokenizer_state["quantize.ema_vocab_hit_SV"] = torch.zeros(10, 64)  # statistics of other scales
        files = save(tokenizer_state, folder / "vae.pth"), save(state, folder / "var.pth")
        return ["--tokenizer", files[0], "--prior", files[1]]
    tokenizer, wrap, changes = {
        "rqtransformer": ("rqvae", kakaobrain, None),
        "vitvq_gpt": ("vitvq", lambda s: lightning({f"transformer.{k}": w for k, w in s.items()}), None),
        "llamagen_gpt": ("llamagen_vq", fsdp, {"image_size": 16}),
        "llamagen_gpt_text": ("llamagen_vq", lambda s: {"model": s, "optimizer": {}, "steps": 3}, {"image_size": 12}),
        "maskgit_v1": ("vqgan", valeo, {"resolution": 16, "attn_resolutions": [8]}),
        "maskgit": ("vqgan", halton, {"resolution": 16, "attn_resolutions": [8]}),
    }[name]
    options = write_config({"arch": config}, folder / "prior.json")
    prior = save(state, folder / "prior.pt", wrap)
    return [*write_tokenizer(tokenizer, folder, changes), "--prior", prior, "--prior-config", options]

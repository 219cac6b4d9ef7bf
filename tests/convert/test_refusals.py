"""What does not fit is refused in one sentence that names it, and nothing is left behind."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from support.golden import read_golden
from support.public import TOKENIZERS, save, write_config, write_system, write_tokenizer

from vqdeploy.convert.importer import TOKENIZERS as READERS
from vqdeploy.convert.importer import import_checkpoint
from vqdeploy.errors import ArtifactError, VqdeployError


def refused(message, folder, *, error=ArtifactError, **arguments):
    with pytest.raises(VqdeployError, match=message) as caught:
        import_checkpoint(folder / "out", **arguments)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def changed(name, folder, edit, configure=lambda config: None):
    """A golden tokenizer whose weights and configuration are edited."""
    config, _, state = read_golden(name)
    edit(state)
    configure(config)
    file = save(state, folder / "file", TOKENIZERS[name][2])
    return {"tokenizer": file, "tokenizer_config": write_config(TOKENIZERS[name][3](config), folder / "c.json")}


def test_missing_weights_are_listed(tmp_path):
    def edit(state):
        for key in [key for key in state if key.startswith("decoder.mid")]:
            del state[key]

    refused(
        r"lacks decoder\.mid\.block_1\.norm1\.weight, decoder\.mid.* and \d+ more\.$",
        tmp_path,
        **changed("vqgan", tmp_path, edit),
    )


def test_weights_that_nothing_asks_for_are_listed(tmp_path):
    def edit(state):
        state["encoder.extra.weight"] = state["other"] = torch.ones(2)

    refused(
        r"has encoder\.extra\.weight, other, which are unused\.$",
        tmp_path,
        **changed("vqgan", tmp_path, edit),
    )


def test_both_are(tmp_path):
    def edit(state):
        state["encoder.mid.block_1.conv9.weight"] = state.pop("encoder.mid.block_1.conv1.weight")

    refused("lacks .*conv1.weight and has .*conv9", tmp_path, **changed("diffusers_vq", tmp_path, _diffusers_edit))
    refused("lacks .*conv1.weight and has .*conv9", tmp_path, **changed("vqgan", tmp_path, edit))


def _diffusers_edit(state):
    name = "encoder.mid_block.resnets.0.conv{}.weight"
    state[name.format(9)] = state.pop(name.format(1))


def test_wrong_shapes(tmp_path):
    def edit(state):
        state["quant_conv.weight"] = state["quant_conv.weight"][:, :-1].contiguous()

    refused(
        r"quant_conv\.weight in .* has the wrong shape; expected \[16, 32, 1, 1\], found \[16, 31, 1, 1\]",
        tmp_path,
        **changed("vqgan", tmp_path, edit),
    )


def test_numbers_that_are_none(tmp_path):
    def edit(state):
        state["quant_conv.weight"][0, 0] = torch.nan

    refused(r"quant_conv\.weight is not finite", tmp_path, **changed("vqgan", tmp_path, edit))


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("n_embed", 128, 64),
        ("embed_dim", 3, 16),
        ("ch", 64, 32),
        ("ch_mult", [1, 1, 2], r"\[1, 2\]"),
        ("num_res_blocks", 2, 1),
        ("attn_resolutions", [32], r"\[16\]"),
        ("z_channels", 8, 32),
    ],
)
def test_the_configuration_of_another_model(tmp_path, key, value, found):
    def configure(config):
        (config if key in config else config["ddconfig"])[key] = value

    arguments = changed("vqgan", tmp_path, lambda state: None, configure)
    refused(rf"configuration is not that of .*: {key} differs; expected {found}, found", tmp_path, **arguments)


def test_the_configuration_of_another_diffusers_model(tmp_path):
    for key, value, message in (
        ("num_vq_embeddings", 128, "num_vq_embeddings differs"),
        ("norm_type", "spatial", "norm_type differs"),
        ("norm_num_groups", 16, "norm_num_groups .* is not supported"),
        ("down_block_types", ["AttnDownBlock3D"], "blocks in .* are not supported"),
        ("act_fn", "gelu", "activation .* is not supported"),
        ("_class_name", "AutoencoderKL", "AutoencoderKL, which is not a VQ model"),
    ):
        arguments = changed(
            "diffusers_vq", tmp_path, lambda state: None, lambda config, k=key, v=value: config.update({k: v})
        )
        refused(message, tmp_path, **arguments)


def test_numbers_of_a_yaml_may_be_text(tmp_path):
    def configure(config):
        config["n_embed"], config["ddconfig"]["ch"] = "64", "32.0"

    import_checkpoint(tmp_path / "out", **changed("vqgan", tmp_path, lambda state: None, configure))
    arguments = changed("vqgan", tmp_path, lambda state: None, lambda config: config.update({"n_embed": "many"}))
    with pytest.raises(ArtifactError, match="n_embed of the configuration is malformed; expected an integer"):
        import_checkpoint(tmp_path / "out", **arguments)


# What it is, and what it is not


def test_the_format_that_fits_is_suggested(tmp_path):
    arguments = write_tokenizer("llamagen_vq", tmp_path)
    for name in READERS:
        if name != "llamagen":
            refused("Fix: --format llamagen", tmp_path, tokenizer=arguments[1], name=name)


def test_a_format_that_does_not_exist(tmp_path):
    refused("no such format; expected .*taming.*, found 'tamin'", tmp_path, error=VqdeployError, name="tamin")


def test_nothing_that_is_known(tmp_path):
    save({"codebook.a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "file")
    refused(
        "is not a tokenizer of a known format; expected .*found codebook.a, b", tmp_path, tokenizer=tmp_path / "file"
    )


def test_what_has_no_codes_is_named(tmp_path):
    for golden, message in (("vqgan", "a KL autoencoder"), ("movq", "as in Kandinsky 3"), ("diffusers_vq", "KL")):
        _, _, state = read_golden(golden)
        del state["quantize.embedding.weight"]
        save(state, tmp_path / "file")
        refused(rf"{message}.*makes no codes", tmp_path, tokenizer=tmp_path / "file")


def test_moving_averages_of_some_weights(tmp_path):
    def edit(state):
        del state["ema_decoder.conv_inweight"]

    refused(
        r"moving averages of some weights, and not of decoder\.conv_in\.weight\. Fix: add --raw",
        tmp_path,
        **changed("movqgan_ema", tmp_path, edit),
    )
    import_checkpoint(tmp_path / "out", raw=True, **changed("movqgan_ema", tmp_path, edit))


def test_moving_averages_of_latent_diffusion(tmp_path):
    """Its LitEma has one module for the whole model, and the averages of the loss too."""
    _, _, state = read_golden("vqgan")
    averages = {f"model_ema.{key.replace('.', '')}": weight * 2 for key, weight in state.items()}
    averages["model_ema.lossdiscriminatormain0weight"] = averages["model_ema.decay"] = torch.ones(2)
    save({"state_dict": state | averages}, tmp_path / "file")
    for raw, factor in ((False, 2), (True, 1)):
        import_checkpoint(tmp_path / "out", tmp_path / "file", raw=raw)
        from vqdeploy import checkpoint

        weight = checkpoint.load(tmp_path / "out").tokenizer.encoder.conv_in.weight
        assert torch.equal(weight, factor * state["encoder.conv_in.weight"])


def test_codes_that_a_file_renumbers(tmp_path):
    def edit(state):
        state["quantize.used"] = torch.arange(3)

    refused("numbers its codes by a `remap` file", tmp_path, **changed("vqgan", tmp_path, edit))


def test_codebooks_that_differ_by_depth(tmp_path):
    def edit(state):
        state["quantizer.codebooks.1.weight"] = state["quantizer.codebooks.1.weight"] + 1

    refused("codebooks of their own", tmp_path, **changed("rqvae", tmp_path, edit))


# Parts of a system


def test_missing_requirements_of_a_prior_are_named(tmp_path):
    arguments = write_system("rqtransformer", tmp_path)
    prior = arguments[arguments.index("--prior") + 1]
    refused("a system needs a tokenizer. Fix: add --tokenizer", tmp_path, error=VqdeployError, priors=[prior])
    refused("a system needs a tokenizer", tmp_path, error=VqdeployError)


def test_a_prior_of_another_tokenizer(tmp_path):
    arguments = write_system("rqtransformer", tmp_path)
    other = write_tokenizer("vqgan", tmp_path)
    prior = arguments[arguments.index("--prior") + 1]
    refused(
        "does not fit the tokenizer; expected one of a RQVAE, found a MoVQ",
        tmp_path,
        tokenizer=other[1],
        tokenizer_config=other[3],
        priors=[prior],
    )


def test_one_level_of_two(tmp_path):
    arguments = write_system("pixelsnail", tmp_path)
    named = {"tokenizer": arguments[1], "tokenizer_config": arguments[3]}
    refused("has two levels; expected --prior TOP", tmp_path, error=VqdeployError, priors=[arguments[5]], **named)
    refused(
        "maps of the priors are not those of images of 256 pixels.*resolution",
        tmp_path,
        tokenizer=arguments[1],
        tokenizer_config=write_config({}, tmp_path / "none.json"),
        priors=[arguments[5], arguments[7]],
    )


def test_what_weights_do_not_tell_is_asked_for(tmp_path):
    arguments = write_system("taming_gpt", tmp_path)
    for lost in ("n_head", "n_classes"):
        config = json.loads(arguments[3].read_text())
        params = config["model"]["params"]
        (params["transformer_config"] if lost == "n_head" else params["cond_stage_config"])["params"].pop(lost)
        write_config(config, tmp_path / "c.json")
        refused(
            f"{lost} cannot be read off the weights.*Fix: add --prior-config FILE, a YAML that gives {lost}",
            tmp_path,
            error=VqdeployError,
            priors=[arguments[1]],
            prior_config=tmp_path / "c.json",
        )


def test_a_prior_whose_condition_is_an_image(tmp_path):
    _, _, state = read_golden("taming_gpt")
    save(state | {"cond_stage_model.encoder.conv_in.weight": torch.ones(2)}, tmp_path / "file")
    config = write_config({"n_head": 4, "n_classes": 10}, tmp_path / "c.json")
    refused("conditioned on images", tmp_path, priors=[tmp_path / "file"], prior_config=config)


def test_labels_of_another_prior(tmp_path):
    arguments = write_system("taming_gpt", tmp_path)
    named = {"priors": [arguments[1]], "prior_config": arguments[3]}
    for text, message in (
        ("a\nb", "labels are not those of the prior; expected 10, found 2"),
        ("[1]", "class names"),
    ):
        file = tmp_path / ("labels.txt" if "a" in text else "labels.json")
        file.write_text(text)
        error = ArtifactError if "class names" in message else VqdeployError
        refused(message, tmp_path, error=error, labels=file, **named)
    refused("does not exist", tmp_path, error=VqdeployError, labels=tmp_path / "none.txt", **named)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.txt", "é".encode("latin-1"), "has no class names"),
        ("labels.txt", b"\n\n", "has no class names"),
        ("labels.txt", b"a\nb\x1b[31m", "printable characters"),
        ("labels.json", b'["a", ""]', "printable characters"),
        ("labels.json", b'{"' + b"1" * 5000 + b'": "a"}', "has no class names"),
        ("labels.json", b'{"one": "a"}', "has no class names"),
        ("labels.json", b'["a", "a", "a (0)"]', "gives two classes one name"),
        ("labels.txt", None, "not a regular file"),
    ],
)
def test_malformed_labels(tmp_path, name, content, message):
    arguments = write_system("taming_gpt", tmp_path)
    file = tmp_path / name
    os.mkfifo(file) if content is None else file.write_bytes(content)
    refused(message, tmp_path, labels=file, priors=[arguments[1]], prior_config=arguments[3])


def test_a_folder_that_holds_an_input_is_not_replaced(tmp_path):
    arguments = write_system("taming_gpt", tmp_path)
    (tmp_path / "own").mkdir()
    source = shutil.copy(arguments[1], tmp_path / "own" / "model.safetensors")
    before = source.read_bytes()
    with pytest.raises(VqdeployError, match="holds the input"):
        import_checkpoint(tmp_path / "own", priors=[source], prior_config=arguments[3])
    assert source.read_bytes() == before


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    arguments = write_tokenizer("vqgan", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    with pytest.raises(VqdeployError, match="holds something else"):
        import_checkpoint(tmp_path / "mine", arguments[1], tokenizer_config=arguments[3])
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "all of it"


@pytest.mark.parametrize("name", ["movq", "diffusers_vq", "llamagen_vq", "emu3_vq", "rqvae", "vitvq", "vqvae2"])
def test_weights_of_odd_shapes_end_in_a_sentence(tmp_path, name):
    """Each weight in turn without an axis, with one more, empty, or gone: it is refused, and never in a traceback."""
    _, _, state = read_golden(name)
    file = write_config(TOKENIZERS[name][3](read_golden(name)[0]), tmp_path / "c.json")
    rng = np.random.default_rng(0)
    for key in rng.permutation(sorted(key for key, weight in state.items() if weight.ndim))[:5]:
        weight = state[key]
        for odd in (weight[:0], weight[None], weight.flatten()[0], weight.repeat_interleave(2, -1)):
            save(state | {key: odd.contiguous()}, tmp_path / "file")
            with contextlib.suppress(VqdeployError):
                import_checkpoint(tmp_path / "out", tmp_path / "file", tokenizer_config=file)


@pytest.mark.parametrize("value", [None, {}, "text", -1, float("nan"), [[]]])
def test_odd_configurations_end_in_a_sentence(tmp_path, value):
    for name in ("vqgan", "diffusers_vq", "emu3_vq", "vitvq"):
        config, _, state = read_golden(name)
        save(state, tmp_path / "file")
        for key in config:
            file = write_config(TOKENIZERS[name][3](config | {key: value}), tmp_path / "c.json")
            with contextlib.suppress(VqdeployError):
                import_checkpoint(tmp_path / "out", tmp_path / "file", tokenizer_config=file)

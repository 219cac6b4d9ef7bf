"""Files of VAR that need more than a mapping of names."""

import pytest
import torch
from support.golden import read_golden
from support.public import save, write_config

from vqdeploy import checkpoint
from vqdeploy.convert.importer import import_checkpoint
from vqdeploy.errors import ArtifactError, VqdeployError

SIDES = (1, 2, 3, 4)


@pytest.fixture
def tokenizer():
    return read_golden("var_vae")[2]


@pytest.fixture
def prior():
    return read_golden("var")[2]


def test_the_prior_decides_the_scales_and_so_the_size(tokenizer, prior, tmp_path):
    files = save(tokenizer, tmp_path / "vae.pth"), save(prior, tmp_path / "var.pth")
    report = import_checkpoint(tmp_path / "out", files[0], [files[1]])
    assert not any("256 pixels" in note for note in report["notes"])
    config = checkpoint.load(tmp_path / "out").config
    assert config.tokenizer.sides == config.prior.sides == SIDES
    assert config.tokenizer.resolution == 64
    assert config.tokenizer.conv.attention_resolutions == (4,)
    assert (config.sampling.top_k, config.sampling.top_p, config.sampling.guidance_scale) == (0, 0.96, 2.5)


def test_a_tokenizer_alone_has_the_published_scales(tokenizer, tmp_path):
    tokenizer["quantize.ema_vocab_hit_SV"] = torch.zeros(10, 64)
    report = import_checkpoint(tmp_path / "out", save(tokenizer, tmp_path / "vae.pth"))
    assert "256 pixels" in report["notes"][0]
    assert checkpoint.load(tmp_path / "out").config.tokenizer.sides == (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)


def test_other_scales_are_asked_for(tokenizer, tmp_path):
    file = save(tokenizer, tmp_path / "vae.pth")
    with pytest.raises(VqdeployError, match=r"the sides of the 4 code maps cannot be read .* gives v_patch_nums"):
        import_checkpoint(tmp_path / "out", file)
    config = write_config({"v_patch_nums": SIDES}, tmp_path / "vae.json")
    import_checkpoint(tmp_path / "out", file, tokenizer_config=config)
    assert checkpoint.load(tmp_path / "out").config.tokenizer.sides == SIDES
    write_config({"v_patch_nums": ["1", 4]}, config)
    with pytest.raises(ArtifactError, match=r"v_patch_nums of .* is malformed"):
        import_checkpoint(tmp_path / "again", file, tokenizer_config=config)


def test_an_early_file_without_scales_of_attention_is_refused(tokenizer, prior, tmp_path):
    early = {key: weight for key, weight in prior.items() if "scale_mul" not in key}
    files = save(tokenizer, tmp_path / "vae.pth"), save(early, tmp_path / "var.pth")
    config = write_config({"v_patch_nums": SIDES}, tmp_path / "vae.json")
    with pytest.raises(ArtifactError, match=r"has no scale_mul_1H11: .* before April 2024"):
        import_checkpoint(tmp_path / "out", files[0], [files[1]], tokenizer_config=config)


def test_a_prior_of_another_codebook_is_refused(tokenizer, prior, tmp_path):
    prior["head.weight"], prior["head.bias"] = torch.zeros(32, 64), torch.zeros(32)
    files = save(tokenizer, tmp_path / "vae.pth"), save(prior, tmp_path / "var.pth")
    config = write_config({"v_patch_nums": SIDES}, tmp_path / "vae.json")
    with pytest.raises(ArtifactError, match=r"head.weight in .* has the wrong shape"):
        import_checkpoint(tmp_path / "out", files[0], [files[1]], tokenizer_config=config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_patch_nums": (1, 2, 4)}, r"v_patch_nums differs; expected \(1, 2, 3, 4\), found \(1, 2, 4\)"),
        ({"v_patch_nums": ()}, "v_patch_nums of .* is malformed"),
        ({"v_patch_nums": (4, 2, 1)}, "v_patch_nums of .* is malformed; expected ascending integers"),
        ({"v_patch_nums": SIDES, "quant_resi": -0.5}, "quant_resi differs"),
        ({"v_patch_nums": SIDES, "using_znorm": True}, "using_znorm differs"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(tokenizer, prior, tmp_path, changes, message):
    files = save(tokenizer, tmp_path / "vae.pth"), save(prior, tmp_path / "var.pth")
    config = write_config(changes, tmp_path / "vae.json")
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(tmp_path / "out", files[0], [files[1]], tokenizer_config=config)


def test_scales_in_another_order_are_refused(tokenizer, prior, tmp_path):
    prior["lvl_1L"] = prior["lvl_1L"].flip(-1)
    files = save(tokenizer, tmp_path / "vae.pth"), save(prior, tmp_path / "var.pth")
    with pytest.raises(ArtifactError, match=r"lvl_1L of .* is malformed"):
        import_checkpoint(tmp_path / "out", files[0], [files[1]])


def test_a_compiled_prior_in_a_file_of_the_training(tokenizer, prior, tmp_path):
    trainer = {"var_wo_ddp": {f"_orig_mod.{key}": weight for key, weight in prior.items()}, "vae_local": tokenizer}
    file = save({}, tmp_path / "ar-ckpt-last.pth", lambda _: {"epoch": 3, "trainer": trainer, "args": {}})
    report = import_checkpoint(tmp_path / "out", priors=[file])
    assert report["formats"] == ["var", "var"]
    assert checkpoint.load(tmp_path / "out").config.prior.sides == SIDES

"""VAR: the public implementation's outputs from the same weights, and its constant matrices."""

import pytest
import torch
import torch.nn.functional as F
from support.golden import assert_close, read_golden

from vqdeploy.convert import var as importer
from vqdeploy.convert.containers import Source
from vqdeploy.convert.parts import Part
from vqdeploy.models.ops import truncate
from vqdeploy.models.quantizers import MultiScaleQuantizer, area_average, bicubic, shared_convolution
from vqdeploy.models.var import VAR
from vqdeploy.models.var_tokenizer import SIDES, MultiScaleTokenizer
from vqdeploy.reference.next_scale import generate
from vqdeploy.systems import NextScaleSampling


@pytest.fixture(scope="module")
def tokenizer_part() -> Part:
    config, _, state = read_golden("var_vae")
    return importer.tokenizer(Source("var_vae", state, "", config))


@pytest.fixture(scope="module")
def tokenizer(tokenizer_part):
    model = MultiScaleTokenizer(tokenizer_part.config).eval()
    model.load_state_dict(tokenizer_part.weights)
    return model


@pytest.fixture(scope="module", params=["var", "var_shared"])
def prior(request, tokenizer_part, tokenizer):
    _, tensors, state = read_golden(request.param)
    part = importer.prior([Source(request.param, state, "", None)], tokenizer_part)
    model = VAR(part.config, tokenizer.quantizer).eval()
    model.load_state_dict(part.weights)
    return model, tensors


@torch.no_grad()
def test_tokenizer(tokenizer):
    _, tensors, _ = read_golden("var_vae")
    latents = tokenizer.latents(tensors["in/image"])
    assert_close(latents.permute(0, 3, 1, 2), tensors["out/f"])
    codes, total = tokenizer.quantizer.encode(latents)
    for own, expected in zip(tokenizer.depths(codes), tokenizer.depths(tensors["out/codes"]), strict=True):
        assert torch.equal(own, expected)
    sums = torch.stack(tokenizer.quantizer.sums(codes), 1)
    assert_close(sums.mT.unflatten(-1, (4, 4)), tensors["out/f_hat"])
    assert_close(total.flatten(1, 2), sums[:, -1])
    assert_close(tokenizer.quantizer.inputs(codes), tensors["out/teacher_inputs"])
    assert_close(tokenizer.decode(codes).clamp(-1, 1), tensors["out/reconstruction"])
    assert_close(tokenizer.decode(tensors["in/decode_codes"]).clamp(-1, 1), tensors["out/decode_code"])


@torch.no_grad()
def test_logits(prior):
    model, tensors = prior
    codes, labels = tensors["in/codes"], tensors["in/class"]
    assert_close(model.quantizer.inputs(codes), tensors["out/teacher_inputs"])
    assert_close(model.logits(codes, labels), tensors["out/logits"])
    none = torch.full_like(labels, model.config.classes)
    assert_close(model.logits(codes, none), tensors["out/logits_unconditional"])


def test_what_top_k_and_top_p_keep(prior):
    _, tensors = prior
    logits = tensors["in/filter_logits"]
    rows, size = logits.shape
    for name, k in (("kept", int(tensors["in/filter_top_k"])), ("kept_top_p_only", size)):
        options = torch.ones(rows), torch.full((rows,), k), tensors["in/filter_top_p"].expand(rows).float()
        assert torch.equal(truncate(logits, *options) > -1e29, tensors[f"out/filter_{name}"].bool())


@torch.no_grad()
def test_distances_are_smallest_at_the_codes(tokenizer):
    _, tensors, _ = read_golden("var_vae")
    x, codes = tensors["in/image"], tensors["out/codes"]
    assert torch.equal(tokenizer.distances(x, codes).argmin(-1), codes)


@torch.no_grad()
def test_a_scale_that_is_left_out_adds_nothing(tokenizer):
    _, tensors, _ = read_golden("var_vae")
    codes = tensors["out/codes"].clone()
    codes[:, 5:] = -1
    expected = tensors["out/f_hat"][:, 1].permute(0, 2, 3, 1)
    assert_close(tokenizer.quantizer.decode(codes), expected)


@pytest.mark.parametrize("size", [*SIDES, 9, 18, 24])
def test_matrices_are_the_resizing_of_pytorch(size):
    whole = 16 if size <= 16 else 32
    x = torch.randn(1, 3, whole, whole, dtype=torch.float64)
    average = area_average(size, whole)
    torch.testing.assert_close(average @ x @ average.T, F.interpolate(x, (size, size), mode="area"))
    small = torch.randn(1, 3, size, size, dtype=torch.float64)
    enlarge = bicubic(size, whole)
    torch.testing.assert_close(
        enlarge @ small @ enlarge.T, F.interpolate(small, (whole, whole), mode="bicubic"), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "table",
    [
        "0 0 1 1 1 2 2 3 3 3",
        "0 0 0 1 1 1 1 2 2 2 2 3 3 3",
        "0 2 3",
        "0 1 2 3",
        "0 1 2 2 3",
        "0 0 1 2 3 3",
        "0 0 1 1 2 2 3 3",
    ],
)
def test_the_convolution_of_each_scale(table):
    """The table as the public code computes it, ties at two of ten scales included."""
    expected = [int(number) for number in table.split()]
    assert [shared_convolution(scale, len(expected)) for scale in range(len(expected))] == expected


@torch.no_grad()
def test_ten_scales_by_the_functions_of_pytorch():
    """The published scales, against the loop written with `interpolate` and the table of convolutions."""
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(64, 8, SIDES)
    z = torch.randn(2, 8, 16, 16)
    codes, total = quantizer.encode(z.permute(0, 2, 3, 1))
    rest, done, inputs = z.clone(), torch.zeros_like(z), []
    for scale, (side, own) in enumerate(zip(SIDES, codes.split(quantizer.sizes, 1), strict=True)):
        small = F.interpolate(rest, (side, side), mode="area") if side < 16 else rest
        if scale:
            entry = F.interpolate(done, (side, side), mode="area") if side < 16 else done
            inputs.append(entry.flatten(2).mT)
        distances = torch.cdist(small.flatten(2).mT, quantizer.codebook)
        assert torch.equal(distances.argmin(-1), own)
        vectors = quantizer.codebook[own].mT.unflatten(-1, (side, side))
        large = F.interpolate(vectors, (16, 16), mode="bicubic") if side < 16 else vectors
        convolution = quantizer.convolutions[(0, 0, 1, 1, 1, 2, 2, 3, 3, 3)[scale]]
        change = large * 0.5 + convolution(large) * 0.5
        rest, done = rest - change, done + change
    assert_close(total.permute(0, 3, 1, 2), done)
    assert_close(quantizer.inputs(codes), torch.cat(inputs, 1))


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_greedy_codes(prior, guided):
    model, tensors = prior
    labels, scales = tensors["in/class"], model.config.depth
    sampling = NextScaleSampling(guidance_scale=1 + float(tensors["in/cfg"]) if guided else 1.0)
    ones = torch.ones(len(labels), scales)
    codes, total = generate(model, sampling, labels, lambda _, shape: torch.zeros(shape), [ones, ones.long(), ones])
    assert torch.equal(codes, tensors["out/greedy_codes_cfg" if guided else "out/greedy_codes"])
    if guided:
        assert_close(total.permute(0, 3, 1, 2), tensors["out/greedy_f_hat"])


@torch.no_grad()
def test_image_of_greedy_codes(tokenizer):
    _, tensors, _ = read_golden("var")
    image = tokenizer.decode(tensors["out/greedy_codes_cfg"][:1]).clamp(-1, 1)
    assert_close((image + 1) / 2, tensors["out/greedy_image"])


@torch.no_grad()
def test_more_smooth(prior):
    model, tensors = prior
    if "out/smooth_f_hat" not in tensors:
        pytest.skip("the golden file has none")
    labels, ones = tensors["in/class"], torch.ones(2, model.config.depth)
    gumbel = tensors["in/smooth_gumbel"].split(model.quantizer.sizes, 1)
    options = [ones, ones.long() * tensors["in/smooth_top_k"], ones * tensors["in/smooth_top_p"]]
    sampling = NextScaleSampling(guidance_scale=1 + float(tensors["in/cfg"]), more_smooth=1)
    _, total = generate(model, sampling, labels, lambda scale, _: gumbel[scale], options)
    assert_close(total.permute(0, 3, 1, 2), tensors["out/smooth_f_hat"])

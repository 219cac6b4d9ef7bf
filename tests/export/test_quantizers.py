"""What stands in for the quantizers of vector-quantize-pytorch, against the library itself."""

import copy
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vqdeploy.errors import VqdeployError
from vqdeploy.export import quantizers
from vqdeploy.export.quantizers import copied, look_alikes, register_quantizer, replace_quantizers

library = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (pip install vqdeploy[dev])"
)
D = 8


def case(kind, layout="btd", *, back=True, **options):
    """A quantizer of the library: class, layout of its input, whether it has a way back from codes, options."""
    shown = ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())
    return pytest.param((kind, layout, back, tuple(options.items())), id=f"{kind}-{shown}")


class Bridge(nn.Module):
    """A network that maps a codebook."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, codebook):
        return codebook + self.layer(codebook).tanh()


class Transform(nn.Sequential):
    """A network that makes a codebook of a frozen one."""

    def __init__(self):
        super().__init__(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, D))


VQ = {"dim": D, "codebook_size": 20}
RVQ = VQ | {"num_quantizers": 3}
CASES = [
    case("VectorQuantize", **VQ),
    case("VectorQuantize", "bd", **VQ),
    case("VectorQuantize", **VQ, codebook_dim=4),
    case("VectorQuantize", **VQ, codebook_dim=4, layernorm_after_project_in=True),
    case("VectorQuantize", **VQ, use_cosine_sim=True),
    case("VectorQuantize", **VQ, codebook_dim=4, use_cosine_sim=True),
    case("VectorQuantize", **VQ, heads=2, codebook_dim=4, back=False),
    case("VectorQuantize", **VQ, heads=2, codebook_dim=4, separate_codebook_per_head=True),
    case("VectorQuantize", **VQ, heads=3, codebook_dim=4, separate_codebook_per_head=True, use_cosine_sim=True),
    case("VectorQuantize", **VQ, separate_codebook_per_head=True, back=False),
    case("VectorQuantize", "bdt", **VQ, channel_last=False),
    case("VectorQuantize", "bdt", **VQ, channel_last=False, codebook_dim=4, back=False),
    case("VectorQuantize", "bd", **VQ, channel_last=False, back=False),
    case("VectorQuantize", "bdhw", **VQ, accept_image_fmap=True),
    case("VectorQuantize", "bdhw", **VQ, accept_image_fmap=True, heads=2, codebook_dim=4, back=False),
    case("VectorQuantize", "bdzhw", **VQ, accept_3d_fmap=True),
    case("VectorQuantize", **VQ, learnable_codebook=True, ema_update=False),
    case("VectorQuantize", **VQ, rotation_trick=False, stochastic_sample_codes=True, sample_codebook_temp=2.0),
    case("VectorQuantize", **VQ, orthogonal_reg_weight=1.0, ema_update=False),
    case("VectorQuantize", **VQ, directional_reparam=True, threshold_ema_dead_code=2),
    case("VectorQuantize", **VQ, vq_bridge=Bridge),
    case("ResidualVQ", **RVQ),
    case("ResidualVQ", "bd", **RVQ),
    case("ResidualVQ", **RVQ, codebook_dim=4),
    case("ResidualVQ", **RVQ, shared_codebook=True),
    case("ResidualVQ", **RVQ, use_cosine_sim=True),
    case("ResidualVQ", **RVQ, use_cosine_sim=True, shared_codebook=True, codebook_dim=4),
    case("ResidualVQ", **RVQ, quantize_dropout=True),
    case("ResidualVQ", dim=D, codebook_size=(20, 12, 16)),
    case("ResidualVQ", dim=D, codebook_size=(20, 12, 16), use_cosine_sim=True),
    case("ResidualVQ", **(RVQ | {"num_quantizers": 1})),
    case("ResidualVQ", "bd88", **RVQ, accept_image_fmap=True),
    case("ResidualVQ", "bd88", **RVQ, accept_image_fmap=True, codebook_dim=8),
    case("GroupedResidualVQ", **RVQ, groups=2),
    case("GroupedResidualVQ", **RVQ, groups=2, shared_codebook=True, codebook_dim=3),
    case("SimVQ", **VQ),
    case("SimVQ", **VQ, rotation_trick=False),
    case("SimVQ", "bdhw", **VQ, channel_first=True),
    case("SimVQ", **VQ, codebook_transform=Transform, frozen_codebook_dim=4),
    case("ResidualSimVQ", **RVQ),
    case("ResidualSimVQ", **RVQ, rotation_trick=False, quantize_dropout=True),
    case("ResidualSimVQ", "bdhw", **RVQ, channel_first=True),
    case("FSQ", levels=(8, 5, 5), dim=D),
    case("FSQ", "bt3", levels=(8, 5, 5)),
    case("FSQ", "bdhw", levels=(8, 5, 5), dim=D),
    case("FSQ", "bdt", levels=(4, 3), dim=D, channel_first=True),
    case("FSQ", levels=(8, 5, 5), dim=D, num_codebooks=2),
    case("FSQ", levels=(5, 5), dim=D, keep_num_codebooks_dim=True),
    case("FSQ", levels=(2, 4, 5), dim=D, preserve_symmetry=True),
    case("FSQ", levels=(5, 4), dim=D, preserve_symmetry=True, bound_hard_clamp=True, noise_dropout=0.5),
    case("FSQ", levels=(5, 5, 5), dim=D, orthogonal_rotation=True, projection_has_bias=False),
    case("FSQ", "bdhw", levels=(5, 5, 5), dim=D, orthogonal_rotation=True, num_codebooks=2),
    case("ResidualFSQ", levels=(8, 5, 5), num_quantizers=3, dim=D),
    case("ResidualFSQ", "bt3", levels=(5, 5, 5), num_quantizers=2, quantize_dropout=True),
    case("ResidualFSQ", levels=(8, 5, 3), num_quantizers=2, dim=D, bound_hard_clamp=False, soft_clamp_input_value=2.0),
    case("ResidualFSQ", levels=(5, 5), num_quantizers=2, dim=D, bound_hard_clamp=False),
    case("ResidualFSQ", "bdhw", levels=(8, 5, 5), num_quantizers=3, dim=D, is_channel_first=True),
    case("GroupedResidualFSQ", levels=(8, 5, 5), num_quantizers=2, dim=D, groups=2),
    case("LFQ", dim=D, codebook_size=64),
    case("LFQ", dim=D),
    case("LFQ", "bdhw", dim=D, codebook_size=64),
    case("LFQ", "bdt", dim=D, channel_first=True),
    case("LFQ", dim=D, codebook_size=8, num_codebooks=2),
    case("LFQ", dim=D, spherical=True, codebook_scale=0.5),
    case("LFQ", dim=D, codebook_size=64, cosine_sim_project_in=True, cosine_sim_project_in_scale=3.0),
    case("LFQ", dim=D, soft_clamp_input_value=1.5, orthogonal_rotation=True),
    case("LFQ", dim=D, codebook_size=64, has_projections=True, projection_has_bias=False),
    case("ResidualLFQ", dim=D, codebook_size=64, num_quantizers=3),
    case("ResidualLFQ", dim=D, codebook_size=256, num_quantizers=3, quantize_dropout=True, soft_clamp_input_value=2.0),
    case("ResidualLFQ", dim=D, codebook_size=64, num_quantizers=2, spherical=True),
    case("GroupedResidualLFQ", dim=D, codebook_size=16, num_quantizers=2, groups=2),
    case("LatentQuantize", "bdhw", levels=(5, 5, 8), dim=D),
    case("LatentQuantize", "bdt", levels=(5, 5, 8), dim=D, num_codebooks=2),
    case("LatentQuantize", "bdt", levels=5, dim=D, codebook_dim=3, optimize_values=False),
    case("RandomProjectionQuantizer", dim=D, codebook_size=20, codebook_dim=6, num_codebooks=4, back=False),
    case("RandomProjectionQuantizer", dim=D, codebook_size=20, codebook_dim=6, norm=False, back=False),
]


@cache
def original(kind, options):
    """A trained-looking quantizer of the library."""
    torch.manual_seed(0)
    built = {
        key: value()
        if isinstance(value, type)
        else list(value)
        if key == "levels" and isinstance(value, tuple)
        else value
        for key, value in options
    }
    module = getattr(library, kind)(**built).eval().requires_grad_(False)
    for buffer in (b for name, b in module.named_buffers() if name.endswith("_codebook.embed")):
        buffer.copy_(torch.randn_like(buffer))
        if built.get("use_cosine_sim"):
            buffer.copy_(nn.functional.normalize(buffer, dim=-1))
    return module


def vectors(layout, batch, length, seed, scale=1.0):
    sizes = {"b": batch, "t": length, "h": length, "w": 3, "z": 2, "d": D, "8": 8, "3": 3}
    generator = torch.Generator().manual_seed(seed)
    return torch.randn([sizes[axis] for axis in layout], generator=generator) * scale


def way_back(module):
    return getattr(module, "get_output_from_indices", None) or module.indices_to_codes


def alike(found, expected):
    """Codes equal, losses by shape, numbers up to rounding."""
    found, expected = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (found, expected))
    assert len(found) == len(expected)
    for own, theirs in zip(found, expected, strict=True):
        assert own.shape == theirs.shape
        assert own.dtype == theirs.dtype
    for own, theirs in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)


@cache
def stand_in(kind, options):
    return replace_quantizers(original(kind, options))[0]


EVERY = pytest.mark.parametrize("quantizer", CASES)


@EVERY
@settings(max_examples=5)
@given(
    batch=st.integers(1, 5), length=st.integers(1, 9), seed=st.integers(0, 2**31), scale=st.sampled_from([0.1, 1, 4])
)
def test_codes_and_vectors_are_those_of_the_library(quantizer, batch, length, seed, scale):
    kind, layout, back, options = quantizer
    theirs, own = original(kind, options), stand_in(kind, options)
    x = vectors(layout, batch, length, seed, scale)
    expected = theirs(x)
    alike(own(x), expected)
    if back:
        codes = expected[1].movedim(1, -1) if getattr(theirs, "is_channel_first", False) else expected[1]
        torch.testing.assert_close(way_back(own)(codes), way_back(theirs)(codes), rtol=1e-5, atol=1e-5)


@EVERY
def test_half_vectors_are_quantized_in_fp32(quantizer):
    kind, layout, _, options = quantizer
    x = vectors(layout, 2, 4, 0).half()
    expected, found = original(kind, options)(x.float()), stand_in(kind, options)(x)
    if not isinstance(found, torch.Tensor):
        assert found[0].dtype == torch.float16
        torch.testing.assert_close(found[0], expected[0].half(), rtol=1e-3, atol=1e-3)
        expected, found = expected[1], found[1]
    assert torch.equal(found, expected)


@EVERY
def test_a_code_is_far_when_another_is_clearly_nearer(quantizer):
    kind, layout, _, options = quantizer
    own, x = stand_in(kind, options), vectors(layout, 3, 8, 1)
    result = own(x)
    codes = result if isinstance(result, torch.Tensor) else result[1]
    assert not own.far(x, codes, 1e-4).any()
    other = codes.flip(0)
    different = codes != other
    assert own.far(x, other, 1e-4)[different].float().mean() > 0.5
    assert not own.far(x, other, 10.0).any()


def test_a_close_call_is_not_far():
    own = replace_quantizers(library.VectorQuantize(2, 4).eval())[0]
    own.tables.copy_(torch.tensor([[[0.0, 0.0], [2.0, 0.0], [9.0, 0.0], [0.0, 9.0]]]))
    x = torch.tensor([[[1.0, 0.0], [1.01, 0.0], [1.5, 0.0]]])
    assert own.far(x, torch.tensor([[0, 0, 0]]), 1e-3).tolist() == [[False, False, True]]


def test_later_codes_are_judged_by_the_earlier_ones():
    own = replace_quantizers(library.ResidualVQ(dim=1, codebook_size=4, num_quantizers=2).eval())[0]
    own.books.copy_(torch.tensor([[0.0, 4.0, 8.0, 12.0], [0.0, 1.0, 2.0, -2.0]])[..., None])
    x = torch.tensor([[[2.0]]])  # halfway between the first two codes
    far = {codes: own.far(x, torch.tensor([[list(codes)]]), 1e-3)[0, 0].tolist() for codes in ((0, 2), (1, 3), (1, 2))}
    assert far == {(0, 2): [False, False], (1, 3): [False, False], (1, 2): [False, True]}


@pytest.mark.parametrize("options", [{}, {"shared_codebook": True}, {"codebook_size": (20, 12, 16)}])
def test_codes_that_quantize_dropout_leaves_out(options):
    theirs = library.ResidualVQ(**(RVQ | options | {"num_quantizers": 3}), quantize_dropout=True).eval()
    own = replace_quantizers(theirs)[0]
    codes = torch.randint(-1, 12, (2, 5, 3), generator=torch.Generator().manual_seed(0))
    for part in (codes, codes[..., :2], codes[..., :1], codes.int()):
        torch.testing.assert_close(own.get_output_from_indices(part), theirs.get_output_from_indices(part))
        torch.testing.assert_close(own.get_codes_from_indices(part), theirs.get_codes_from_indices(part))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("VectorQuantize", VQ),
        ("VectorQuantize", VQ | {"heads": 2, "codebook_dim": 4}),
        ("VectorQuantize", VQ | {"return_zeros_for_masked_padding": False}),
        ("ResidualVQ", RVQ),
        ("ResidualVQ", RVQ | {"return_zeros_for_masked_padding": False}),
        ("GroupedResidualVQ", RVQ | {"groups": 2}),
    ],
)
def test_masks(kind, options):
    theirs = original(kind, tuple(options.items()))
    own, x = replace_quantizers(theirs)[0], vectors("btd", 3, 6, 0)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    alike(own(x, mask=mask), theirs(x, mask=mask))
    if kind == "VectorQuantize":
        lens = torch.tensor([6, 2, 0])
        alike(own(x, lens=lens), theirs(x, lens=lens))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ResidualVQ", RVQ),
        ("ResidualSimVQ", RVQ),
        ("ResidualFSQ", {"levels": (5, 5), "num_quantizers": 2, "dim": D}),
        ("GroupedResidualVQ", RVQ | {"groups": 2}),
    ],
)
def test_all_codes(kind, options):
    theirs = original(kind, tuple(options.items()))
    x = vectors("btd", 2, 5, 0)
    found, expected = (module(x, return_all_codes=True) for module in (replace_quantizers(theirs)[0], theirs))
    alike(found[:-1], expected[:-1])
    assert isinstance(found[-1], type(expected[-1]))
    for own, vectors_of_library in zip(found[-1], expected[-1], strict=True):
        torch.testing.assert_close(own, vectors_of_library)


@pytest.mark.parametrize("kind", ["SimVQ", "ResidualSimVQ"])
def test_a_zero_vector_is_rotated_onto_itself(kind):
    theirs = original(kind, tuple((VQ if kind == "SimVQ" else RVQ).items()))
    x = vectors("btd", 2, 5, 0)
    x[1, 2:4] = 0
    alike(replace_quantizers(theirs)[0](x), theirs(x))


def test_a_codebook_of_any_lengths_is_searched_as_the_library_does():
    """By product with the stored vectors, which need not have length 1."""
    options = VQ | {"use_cosine_sim": True}
    theirs = library.VectorQuantize(**options).eval()
    theirs._codebook.embed.mul_(torch.rand(1, 20, 1) * 3)
    residual = library.ResidualVQ(**RVQ, use_cosine_sim=True).eval()
    for layer in residual.layers:
        layer._codebook.embed.mul_(torch.rand(1, 20, 1) * 3)
    for module in (theirs, residual):
        x = vectors("btd", 4, 16, 0)
        alike(replace_quantizers(module)[0](x), module(x))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: library.VectorQuantize(**VQ, affine_param=True, learnable_codebook=True, ema_update=False), "affine"),
        (lambda: library.VectorQuantize(**VQ, kmeans_init=True), "untrained codebook"),
        (lambda: library.ResidualVQ(**RVQ, kmeans_init=True), "ResidualVQ has an untrained codebook"),
        (lambda: library.ResidualVQ(**RVQ, implicit_neural_codebook=True), "implicit_neural_codebook"),
        (lambda: library.ResidualVQ(**RVQ, beam_size=2), "beam search.*eval_beam_size"),
        (lambda: library.ResidualVQ(**RVQ, diveq=True), "diveq"),
        (lambda: library.GroupedResidualVQ(**RVQ, groups=2, beam_size=2), "beam search"),
        (lambda: library.RandomProjectionQuantizer(**VQ, codebook_dim=4, kmeans_init=True), "untrained"),
        (lambda: library.HierarchicalVQ(dim=D, codebook_size=16, scales=(1, 2)), "HierarchicalVQ is not supported"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_by_name(make, expected):
    model = nn.ModuleDict({"tokens": make()})
    with pytest.raises(VqdeployError, match=rf"^tokens: .*{expected}"):
        replace_quantizers(model)


def test_beam_search_that_evaluation_does_not_use_is_no_hindrance():
    theirs = library.ResidualVQ(**RVQ, beam_size=4, eval_beam_size=1).eval()
    x = vectors("btd", 2, 5, 0)
    alike(replace_quantizers(theirs)[0](x), theirs(x))


@pytest.mark.parametrize(
    "options", [{"topk": 2}, {"return_loss_breakdown": True}, {"indices": torch.zeros(2, 5).long()}]
)
def test_calls_that_cannot_be_served_are_refused(options):
    own = replace_quantizers(original("VectorQuantize", tuple(VQ.items())))[0]
    with pytest.raises(VqdeployError, match=f"VectorQuantize is called with {next(iter(options))}"):
        own(vectors("btd", 2, 5, 0), **options)
    alike(own(vectors("btd", 2, 5, 0), freeze_codebook=True, topk=None), own(vectors("btd", 2, 5, 0)))


class Model(nn.Module):
    """Two names for one quantizer, a quantizer deep inside, and a layer whose weight has a history."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Linear(D, D))
        with pytest.warns(FutureWarning):
            self.old = nn.utils.weight_norm(nn.Linear(D, D))
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(D, D), library.VectorQuantize(**VQ)) for _ in range(2)])
        self.rvq = library.GroupedResidualVQ(**RVQ, groups=2)
        self.alias = self.rvq

    def forward(self, x):
        x = self.old(self.first(x))
        for layer, quantizer in self.blocks:
            x = quantizer(layer(x))[0]
        return self.rvq(x)


def test_the_model_stays_as_it_is():
    model = Model()
    model(vectors("btd", 2, 5, 0))  # leaves weights with a history
    before = copy.deepcopy(model.state_dict())
    kinds = {name: type(module) for name, module in model.named_modules()}
    copied_model, served = replace_quantizers(model)
    assert sorted(served) == ["blocks.0.1", "blocks.1.1", "rvq"]
    assert all(module.training for module in model.modules())
    assert not any(module.training for module in copied_model.modules())
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert copied_model.rvq is copied_model.alias is served["rvq"]
    model.eval()
    x = vectors("btd", 3, 4, 1)
    with torch.no_grad():
        alike(copied_model(x), model(x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in copied_model.state_dict().values()}


def test_a_copy_is_in_fp32_and_shares_no_tensor():
    model = nn.Sequential(nn.Linear(4, 4).double(), nn.BatchNorm1d(4))
    found = copied(model)
    assert found[0].weight.dtype == torch.float32
    assert isinstance(found[0].weight, nn.Parameter)
    assert model[0].weight.dtype == torch.float64
    found[1].running_mean += 1
    assert not model[1].running_mean.any()


class Vendored(nn.Module):
    """A copy of the library's class in another project."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.num_quantizers = 1


class Derived(library.ResidualVQ):
    """May do anything."""


def test_look_alikes_are_said_to_be(monkeypatch):
    monkeypatch.setattr(quantizers, "_registered", {})
    model = nn.ModuleDict({"rvq": Vendored(), "own": Derived(**RVQ), "fine": nn.Linear(2, 2)})
    first, second = look_alikes(model)
    assert first.startswith("rvq (")
    assert "Vendored) looks like ResidualVQ" in first
    assert "register_quantizer(Vendored, vqdeploy.export.quantizers.ResidualVQ)" in first
    assert "own" in second
    assert replace_quantizers(model)[1].keys() == {"own.layers.0", "own.layers.1", "own.layers.2"}
    register_quantizer(Derived, quantizers.ResidualVQ)
    assert replace_quantizers(model)[1].keys() == {"own"}
    assert len(look_alikes(model)) == 1
    assert look_alikes(replace_quantizers(model)[0]) == [first]


def test_plain_attributes_are_kept():
    own = replace_quantizers(original("ResidualVQ", tuple(RVQ.items())))[0]
    assert (own.num_quantizers, own.codebook_size, own.codebook_dim) == (3, 20, D)
    assert own.codebooks.shape == (3, 20, D)

"""The incremental sampler of PixelSNAIL against the full forward pass, and the package of its stages."""

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from vqdeploy.engines.package import read
from vqdeploy.export.pixelsnail import Condition, Pixel, Row
from vqdeploy.models.pixelsnail import PixelSNAIL, PixelSNAILConfig
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.manifest import WEIGHTS

CODES = 7


def incremental(network, row_stage, batch, choose, labels, coarser):
    """Logits [B, h, w, K] by one call a row and one call a place.

    `choose` gives the codes of a place from its row, its column and its logits; -1 stands for codes until then.
    """
    config = network.config
    pixel_stage = Pixel(network)
    height, width = config.grid
    layers, side = config.blocks * config.res_blocks, config.kernel // 2
    zeros = network.background.new_zeros
    rows = [zeros(batch, layers, width, n) for n in (config.channels, config.res_channels)]
    spread = row_stage.first.spread(rows[0]).clone(), row_stage.second.spread(rows[1]).clone()
    above = [[nothing] * (config.kernel - 2) for nothing in spread]
    caches = [[], [], []]
    if config.attention:
        dim = config.channels // 2 // config.heads
        shapes = [(batch, config.heads, height * width, dim)] * 2 + [(batch, config.channels // 2 * 2)]
        caches = [[zeros(shape) for _ in range(config.blocks)] for shape in shapes]
    condition = None if network.above is None else Condition(network.above)(coarser)
    labels = None if network.label is None and network.above is None else labels
    padded = torch.full((batch, height + side, width + side), -1)
    logits = zeros(batch, height, width, CODES)
    for r in range(height):
        left = [zeros(batch, layers * side * n) for n in (config.channels, config.res_channels)]
        index = torch.full((batch,), r)
        known = padded[:, r : r + side, side:]
        *contributions, new_x, new_y = row_stage(index, known, *rows, *above, labels, condition)
        above = [[*above[0][1:], new_x.clone()], [*above[1][1:], new_y.clone()]]
        for c in range(width):
            column, previous = torch.full((batch,), c), padded[:, r + side, c : c + side]
            found, new_x, new_y, left[0], left[1], *flat = pixel_stage.logits(
                previous, index, column, *contributions, *left, *caches
            )
            for row, activations in zip(rows, (new_x, new_y), strict=True):
                row[:, :, c] = activations
            caches = [flat[i * config.blocks : (i + 1) * config.blocks] for i in range(3)] if flat else caches
            logits[:, r, c] = found
            padded[:, r + side, side + c] = choose(r, c, found)
    return logits


@st.composite
def configs(draw, finer):
    heads = draw(st.integers(1, 2))
    sides = st.integers(1, 4).map(lambda n: 2 * n) if finer else st.integers(1, 8)
    return PixelSNAILConfig(
        grid=(draw(sides), draw(sides)),
        channels=2 * heads * draw(st.integers(1, 3)),
        kernel=draw(st.sampled_from([3, 5, 7, 9, 13])),
        blocks=draw(st.integers(1, 3)),
        res_blocks=draw(st.integers(1, 3)),
        res_channels=draw(st.integers(1, 5)),
        attention=draw(st.booleans()),
        heads=heads,
        out_res_blocks=draw(st.integers(0, 1)),
        condition_channels=draw(st.integers(1, 4)),
        condition_kernel=draw(st.sampled_from([1, 3, 5])),
        condition_res_blocks=draw(st.integers(0, 1)),
    )


def network_of(config, classes, finer, dtype, seed):
    """A network with random weights and biases."""
    torch.manual_seed(seed)
    network = PixelSNAIL(config, CODES, classes, finer)
    for weight in network.parameters():
        few = weight.ndim < 2 or weight[0].numel() == 1
        torch.nn.init.normal_(weight, std=0.5 if few else weight[0].numel() ** -0.5)
    return network.to(dtype).eval()


@torch.no_grad()
@settings(max_examples=60)
@given(
    st.data(),
    st.sampled_from([1, 4]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from([8, None]),
)
def test_row_by_row_and_place_by_place_is_the_full_pass(data, classes, finer, dtype, products):
    config, seed = data.draw(configs(finer)), data.draw(st.integers(0, 2**31))
    network = network_of(config, classes, finer, dtype, seed)
    codes = torch.randint(CODES, (2, *config.grid))
    labels, coarser = torch.randint(classes, (2,)), torch.randint(CODES, (2, *(side // 2 for side in config.grid)))
    expected = network(codes, network.embed_condition(labels, coarser))
    stage = Row(network, products)
    found = incremental(network, stage, 2, lambda row, column, logits: codes[:, row, column], labels, coarser)
    tolerance = (1e-10 if dtype == torch.float64 else 1e-4) * max(float(expected.abs().max()), 1.0)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@torch.no_grad()
@settings(max_examples=20)
@given(st.data(), st.sampled_from([1, 4]), st.booleans())
def test_greedy_codes_of_whole_images_are_those_of_the_whole_network_for_each_place(data, classes, finer):
    config, seed = data.draw(configs(finer)), data.draw(st.integers(0, 2**31))
    network = network_of(config, classes, finer, torch.float64, seed)
    labels, coarser = torch.randint(classes, (2,)), torch.randint(CODES, (2, *(side // 2 for side in config.grid)))
    condition = network.embed_condition(labels, coarser)
    expected = network.generate(2, condition, lambda position, logits: logits.argmax(1))
    found = torch.zeros_like(expected)

    def likeliest(row, column, logits):
        found[:, row, column] = logits.argmax(1)
        return found[:, row, column]

    incremental(network, Row(network), 2, likeliest, labels, coarser)
    assert found.equal(expected)


STAGES = ("encode", "decode", "top_row", "top_pixel", "bottom_condition", "bottom_row", "bottom_pixel")


def test_the_package_of_two_levels(vqvae2_package):
    manifest = read(vqvae2_package)
    assert tuple(stage.name for stage in manifest.stages) == STAGES
    weights = load_file(vqvae2_package / WEIGHTS)
    assert {name for stage in manifest.stages for name in stage.weights} == set(weights)
    assert len({(w.shape, w.tobytes()) for w in weights.values()}) == len(weights)


@pytest.mark.parametrize("stage", STAGES)
def test_the_checker_accepts_every_graph(vqvae2_package, stage):
    onnx.checker.check_model(vqvae2_package / f"{stage}.onnx", full_check=True)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("encode", ["VQLookup"] + ["VQNearest"] * 2),  # the bottom latents see the top vectors
        ("decode", ["VQLookup"] * 2),
        ("top_row", []),
        ("top_pixel", ["CachedAttention"] * 2 + ["GumbelSample"] + ["WriteCache"] * 2),
        ("bottom_condition", []),
        ("bottom_row", []),
        ("bottom_pixel", ["GumbelSample"] + ["WriteCache"] * 2),
    ],
)
def test_operators_stay_single_nodes(vqvae2_package, stage, expected):
    model = onnx.load(vqvae2_package / f"{stage}.onnx", load_external_data=False)
    assert sorted(node.op_type for node in model.graph.node if node.domain == "vqdeploy") == expected
    assert {function.name for function in model.functions} == set(expected)


def test_attention_runs_on_onnxruntimes_operator_where_its_heads_fit(vqvae2_plan, three_plan):
    """Its kernel wants widths that are multiples of 8."""
    for plan, stage, expected in (
        (vqvae2_plan, "top_pixel", {"CachedAttention"}),
        (three_plan, "top_pixel", {"GroupQueryAttention"}),
        (three_plan, "middle1_pixel", {"GroupQueryAttention"}),
    ):
        graph = onnx.load_from_string(bytes(Bundle(plan).member(f"{stage}.onnx"))).graph
        kinds = {"CachedAttention", "GroupQueryAttention"}
        assert {node.op_type for node in graph.node} & kinds == expected

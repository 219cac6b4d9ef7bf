"""Own modules as packages and plans: small models in the manner of real users, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import nn
from typer.testing import CliRunner

from vqdeploy.cli import app
from vqdeploy.engines.build import build
from vqdeploy.errors import ArtifactError, VqdeployError
from vqdeploy.export import Stage, export_module, quantizer_stages, quantizers, register_quantizer
from vqdeploy.runtime import load
from vqdeploy.runtime.manifest import SizeRange
from vqdeploy.runtime.pipeline import Pipeline
from vqdeploy.verify.modules import verify

library = pytest.importorskip(
    "vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed (pip install vqdeploy[dev])"
)


class AudioCodec(nn.Module):
    """Strided convolutions with weight norm around a residual quantizer."""

    def __init__(self):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.encoder = nn.Sequential(
            norm(nn.Conv1d(1, 16, 7, padding=3)),
            nn.ELU(),
            norm(nn.Conv1d(16, 32, 8, stride=4, padding=2)),
            nn.ELU(),
            norm(nn.Conv1d(32, 16, 4, stride=2, padding=1)),
        )
        self.quantizer = library.ResidualVQ(dim=16, codebook_size=32, num_quantizers=4, quantize_dropout=True)
        self.decoder = nn.Sequential(
            norm(nn.ConvTranspose1d(16, 32, 4, stride=2, padding=1)),
            nn.ELU(),
            norm(nn.ConvTranspose1d(32, 16, 8, stride=4, padding=2)),
            nn.ELU(),
            norm(nn.Conv1d(16, 1, 7, padding=3)),
        )

    def encode(self, audio):
        return self.quantizer(self.encoder(audio).transpose(1, 2))[1]

    def decode(self, codes):
        return self.decoder(self.quantizer.get_output_from_indices(codes).transpose(1, 2))


class ActionTokenizer(nn.Module):
    """Chunks of a robot's actions as a few codes of one sum."""

    def __init__(self, horizon=10, actions=7):
        super().__init__()
        self.horizon, self.actions = horizon, actions
        self.encoder = nn.Sequential(nn.Linear(horizon * actions, 64), nn.ReLU(), nn.Linear(64, 16))
        self.rvq = library.ResidualVQ(dim=16, codebook_size=16, num_quantizers=2, codebook_dim=8, use_cosine_sim=True)
        self.decoder = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, horizon * actions))

    def forward(self, chunk):
        latent = self.encoder(chunk.flatten(1))
        quantized, codes, _ = self.rvq(latent)
        return self.decoder(quantized).unflatten(1, (self.horizon, self.actions)), codes

    def actions_of(self, codes):
        return self.decoder(self.rvq.get_output_from_indices(codes)).unflatten(1, (self.horizon, self.actions))


class ImageTokenizer(nn.Module):
    """Maps of finite scalar codes."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 4, stride=4), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 1))
        self.fsq = library.FSQ([8, 5, 5])
        self.up = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.ConvTranspose2d(16, 3, 4, stride=4))

    def tokens(self, image):
        return self.fsq(self.down(image))[1]

    def images(self, tokens):
        return self.up(self.fsq.indices_to_codes(tokens)).clamp(-1, 1)


class StraightThrough(nn.Module):
    """A quantizer written by hand, of torch.nn alone."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(6, 4)
        self.codebook = nn.Embedding(12, 4)

    def forward(self, x):
        z = self.project(x)
        distances = z.square().sum(-1, keepdim=True) - 2 * z @ self.codebook.weight.T
        codes = (distances + self.codebook.weight.square().sum(-1)).argmin(-1)
        return z + (self.codebook(codes) - z).detach(), codes


class Zoo(nn.Module):
    """Quantizers of every kind that becomes nodes of ours, several of one operator with other attributes."""

    def __init__(self):
        super().__init__()
        options = {"dim": 8, "codebook_size": 20}
        residual = options | {"num_quantizers": 3}
        self.kinds = nn.ModuleDict(
            {
                "plain": library.VectorQuantize(**options),
                "angle": library.VectorQuantize(**options, use_cosine_sim=True, codebook_dim=4),
                "heads": library.VectorQuantize(**options, heads=2, codebook_dim=4, separate_codebook_per_head=True),
                "own": library.ResidualVQ(**residual),
                "shared": library.ResidualVQ(**residual | {"num_quantizers": 2}, shared_codebook=True),
                "sizes": library.ResidualVQ(dim=8, codebook_size=(20, 9)),
                "groups": library.GroupedResidualVQ(**residual, groups=2),
                "linear": library.ResidualSimVQ(**residual),
                "scalar": library.ResidualFSQ(levels=[5, 4, 3], num_quantizers=2, dim=8),
                "signs": library.ResidualLFQ(dim=8, codebook_size=16, num_quantizers=2),
            }
        )

    def forward(self, x):
        return tuple(quantizer(x)[1] for quantizer in self.kinds.values())

    def back(self, *codes):
        return sum(
            (getattr(quantizer, "get_output_from_indices", None) or quantizer.indices_to_codes)(own)
            for quantizer, own in zip(self.kinds.values(), codes, strict=True)
        )


def made(kind, seed=0):
    """A model with random weights and codebooks that lie among the latents."""
    torch.manual_seed(seed)
    model = kind()
    for name, buffer in model.named_buffers():
        if name.endswith("_codebook.embed") and buffer.norm(dim=-1).std() > 1e-3:
            buffer.copy_(torch.randn_like(buffer) * 0.3)
    return model


def audio_stages():
    model = made(AudioCodec).eval()
    audio = torch.randn(1, 1, 160, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = model.encode(audio)
    codes[0, -3:, 2:] = -1  # what dropout leaves out
    return {
        "encode": Stage(lambda m, audio: m.encode(audio), inputs={"audio": audio}, outputs=["codes"]),
        "decode": Stage(lambda m, codes: m.decode(codes), inputs={"codes": codes}, outputs=["audio"]),
    }


AUDIO = {"audio": {0: "batch", 2: "length"}, "codes": {0: "batch", 1: "frames"}}


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def codec(request, tmp_path_factory):
    """A codec in training mode, its stages, its package, and plans with both bodies."""
    model, stages = made(AudioCodec), audio_stages()
    folder = tmp_path_factory.mktemp("codec") / "codec-onnx"
    export_module(model, stages, folder, dynamic=AUDIO, dtype=request.param)
    build(folder, folder.with_name("codec.plan"))
    return model, stages, folder, folder.with_name("codec.plan"), request.param


class TestAudioCodec:
    def test_the_plan_does_what_the_module_does_at_sizes_that_were_not_traced(self, codec):
        model, _, _, plan, dtype = codec
        assert model.training
        model.eval()
        pipe = load(plan, threads=1)
        for batch, length in ((1, 160), (2, 320), (5, 40), (7, 168)):
            audio = np.random.default_rng(length).standard_normal((batch, 1, length), dtype=np.float32)
            codes = pipe.run("encode", audio=audio)["codes"]
            with torch.no_grad():
                expected = model.encode(torch.from_numpy(audio)).numpy()
                decoded = model.decode(torch.from_numpy(codes)).numpy()
            assert codes.shape == expected.shape == (batch, length // 8, 4)
            assert (codes != expected).mean() <= (0.1 if dtype == "fp16" else 0)
            found = pipe.run("decode", codes=codes)["audio"]
            np.testing.assert_allclose(found, decoded, atol=(1e-2 if dtype == "fp16" else 1e-5) * abs(decoded).max())
        model.train()

    def test_the_manifest_knows_its_sizes_and_needs_no_system(self, codec):
        manifest = load(codec[3]).manifest
        assert manifest.tokenizer is manifest.sampling is None
        assert manifest.name == "codec-onnx"
        encode, decode = manifest.stages
        assert [(i.name, i.dtype, i.shape) for i in encode.inputs] == [("audio", "float32", ("batch", 1, "length"))]
        assert [(i.name, i.dtype, i.shape) for i in encode.outputs] == [("codes", "int64", ("batch", "frames", 4))]
        assert [i.shape for i in decode.outputs] == [("batch", 1, "length")]
        assert encode.dims["frames"] == decode.dims["frames"] == SizeRange(1, 20, 80)
        assert encode.dims["length"].usual == 160
        assert encode.dims["length"].max == 640

    def test_the_quantizer_is_one_node_and_its_tables_are_stored_once_in_fp32(self, codec):
        _, _, folder, _, dtype = codec
        graphs = [onnx.load(folder / f"{stage}.onnx", load_external_data=False) for stage in ("encode", "decode")]
        ours = [[node.op_type for node in graph.graph.node if node.domain == "vqdeploy"] for graph in graphs]
        assert ours == [["VQResidual"], ["VQLookup"]]
        weights = load_file(folder / "weights.safetensors")
        tables = [w for w in weights.values() if w.shape in ((4, 32, 16), (128, 16))]
        assert {w.dtype for w in tables} == {np.dtype("float32")}
        convolutions = {w.dtype for w in weights.values() if w.ndim == 3 and w.shape != (4, 32, 16)}
        assert convolutions == {np.dtype("float16" if dtype == "fp16" else "float32")}
        assert len(tables) == 1

    def test_the_command_line_runs_a_stage(self, codec, tmp_path):
        plan, out = codec[3], tmp_path / "out.npz"
        audio = np.random.default_rng(0).standard_normal((2, 1, 80), dtype=np.float32)
        np.savez(tmp_path / "in.npz", audio=audio, unused=audio)
        run = ["run", "--engine", str(plan), "--stage", "encode", "--input", str(tmp_path / "in.npz"), "--json"]
        result = CliRunner().invoke(app, [*run, "-o", str(out)])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["shapes"] == {"codes": [2, 10, 4]}
        with np.load(out) as written:
            np.testing.assert_array_equal(written["codes"], load(plan).run("encode", audio=audio)["codes"])
        for arguments, message in (
            ([*run[:4], "decode", *run[5:]], "does not hold the arrays"),
            ([*run, "--label", "3"], "--label is not an option of this task"),
            ([*run, "--task", "decode"], "--stage is not an option of this task"),
            (run[:3], "this plan has no images and codes"),
            (["run", "--engine", str(plan), "--stage", "encode"], "takes one file of arrays"),
            (["verify", "--engine", str(plan)], "made from a module, not from a checkpoint"),
        ):
            with pytest.raises(VqdeployError, match=message):
                CliRunner().invoke(app, arguments, catch_exceptions=False)

    def test_verify_can_be_repeated(self, codec):
        model, stages, _, plan, dtype = codec
        report = verify(plan, model, stages)
        assert report["passed"]
        assert report["precision"] == dtype
        assert {(c["stage"], c["metric"]) for c in report["checks"]} >= {
            ("encode", "codes: codes outside the margin rule"),
            ("decode", "audio: largest difference"),
        }

    def test_the_plan_of_other_weights_is_known(self, codec):
        _, stages, _, plan, _ = codec
        with pytest.raises(VqdeployError, match="other weights"):
            verify(plan, made(AudioCodec, seed=1), stages)

    @pytest.mark.parametrize("depth", [0, 3])
    def test_a_code_that_is_clearly_wrong_is_found(self, codec, monkeypatch, depth):
        model, stages, _, plan, _ = codec
        right = Pipeline.run

        def wrong(self, stage, **arrays):
            outputs = right(self, stage, **arrays)
            if stage == "encode":
                codes = outputs["codes"].copy()
                codes[-1, 0, depth] = (codes[-1, 0, depth] + 7) % 32
                outputs["codes"] = codes
            return outputs

        monkeypatch.setattr(Pipeline, "run", wrong)
        failed = [check for check in verify(plan, model, stages)["checks"] if not check["passed"]]
        assert ("encode", "codes: codes outside the margin rule") in {(c["stage"], c["metric"]) for c in failed}

    @pytest.mark.parametrize("value", [0.5, np.nan])
    def test_numbers_that_are_wrong_are_found(self, codec, monkeypatch, value):
        model, stages, _, plan, _ = codec
        right = Pipeline.run

        def wrong(self, stage, **arrays):
            outputs = right(self, stage, **arrays)
            if stage == "decode":
                outputs["audio"][-1, 0, -1] += value
            return outputs

        monkeypatch.setattr(Pipeline, "run", wrong)
        failed = [(c["stage"], c["metric"]) for c in verify(plan, model, stages)["checks"] if not c["passed"]]
        assert failed == [("decode", "audio: largest difference")]


def exported(model, stages, folder, **options):
    """A plan of a module in evaluation mode; the export itself has verified it, unless told not to."""
    export_module(model, stages, folder / "own-onnx", **options)
    build(folder / "own-onnx", folder / "own.plan")
    return load(folder / "own.plan", threads=1)


def test_an_action_tokenizer(tmp_path):
    model = made(ActionTokenizer).eval()
    chunk = torch.randn(4, 10, 7)
    stages = {
        "forward": Stage(lambda m, chunk: m(chunk), inputs={"chunk": chunk}, outputs=["actions", "codes"]),
        "decode": Stage(lambda m, c: m.actions_of(c), inputs={"codes": model(chunk)[1]}, outputs=["actions"]),
    }
    pipe = exported(model, stages, tmp_path, dynamic={"chunk": {0: "batch"}, "codes": {0: "batch"}})
    chunk = torch.randn(9, 10, 7)
    found = pipe.run("forward", chunk=chunk.numpy())
    actions, codes = model(chunk)
    np.testing.assert_array_equal(found["codes"], codes)
    np.testing.assert_allclose(found["actions"], actions.detach(), atol=1e-5)
    again = pipe.run("decode", codes=found["codes"])["actions"]
    np.testing.assert_allclose(again, found["actions"], atol=1e-5)


def test_an_image_tokenizer_of_any_height_and_width(tmp_path):
    model = made(ImageTokenizer).eval()
    image = torch.randn(1, 3, 16, 24)
    stages = {
        "tokens": Stage(lambda m, image: m.tokens(image), inputs={"image": image}, outputs=["tokens"]),
        "images": Stage(lambda m, t: m.images(t), inputs={"tokens": model.tokens(image)}, outputs=["image"]),
    }
    pipe = exported(
        model,
        stages,
        tmp_path,
        dynamic={
            "image": {0: "batch", 2: "height", 3: "width"},
            "tokens": {0: "batch", 1: "rows", 2: "columns"},
        },
        sizes={"height": (4, 16, 64), "width": (4, 24, 64)},
    )
    image = torch.randn(3, 3, 32, 12)
    tokens = pipe.run("tokens", image=image.numpy())["tokens"]
    np.testing.assert_array_equal(tokens, model.tokens(image))
    back = pipe.run("images", tokens=tokens)["image"]
    np.testing.assert_allclose(back, model.images(torch.from_numpy(tokens)).detach(), atol=1e-5)
    assert pipe.manifest.stage("tokens").dims["rows"] == SizeRange(1, 4, 16)
    with pytest.raises(VqdeployError, match="height of 4 to 64"):
        pipe.run("tokens", image=np.zeros((1, 3, 128, 8), np.float32))


def test_a_module_of_torch_alone_is_exported_as_it_is(tmp_path):
    model = made(StraightThrough)
    stage = Stage(lambda m, x: m(x), inputs={"x": torch.randn(2, 5, 6)}, outputs=["vectors", "codes"])
    pipe = exported(model, {"quantize": stage}, tmp_path, dynamic={"x": {0: "batch", 1: "length"}})
    x = torch.randn(3, 11, 6)
    found = pipe.run("quantize", x=x.numpy())
    vectors, codes = model(x)
    np.testing.assert_array_equal(found["codes"], codes)
    np.testing.assert_allclose(found["vectors"], vectors.detach(), atol=1e-6)
    graph = onnx.load(tmp_path / "own-onnx" / "quantize.onnx", load_external_data=False)
    assert not [node for node in graph.graph.node if node.domain == "vqdeploy"]


@pytest.mark.slow
def test_every_kind_of_quantizer_in_one_graph(tmp_path):
    """Operators of one name with other attributes get bodies of their own."""
    model = made(Zoo).eval()
    x = torch.randn(2, 6, 8)
    codes = dict(zip(model.kinds, model(x), strict=True))
    open_ = {name: {0: "batch", 1: "length"} for name in ("x", *codes)} | {"groups": {1: "batch", 2: "length"}}
    stages = {
        "codes": Stage(lambda m, x: m(x), inputs={"x": x}, outputs=list(codes)),
        "vectors": Stage(lambda m, *codes: m.back(*codes), inputs=codes, outputs=["x"]),
    }
    pipe = exported(model, stages, tmp_path, dynamic=open_, verify=False)
    x = torch.randn(5, 9, 8)
    found = pipe.run("codes", x=x.numpy())
    for name, expected in zip(model.kinds, model(x), strict=True):
        np.testing.assert_array_equal(found[name], expected, name)
    expected = model.back(*map(torch.from_numpy, found.values())).detach()
    np.testing.assert_allclose(pipe.run("vectors", **found)["x"], expected, atol=1e-5)
    graph = onnx.load(tmp_path / "own-onnx" / "codes.onnx", load_external_data=False)
    used = [node.op_type for node in graph.graph.node if node.domain == "vqdeploy"]
    assert {"VQNearest", "VQNearest_1", "VQResidual", "VQResidual_1", "VQLookup"} >= set(used) > {"VQResidual_1"}
    assert used.count("VQResidual") + used.count("VQResidual_1") == 5


def test_a_norm_without_weights_in_half(tmp_path):
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.Linear(8, 4))
    stage = Stage(lambda m, x: m(x), inputs={"x": torch.randn(2, 6)}, outputs=["y"])
    pipe = exported(model, {"forward": stage}, tmp_path, dynamic={"x": {0: "batch"}}, dtype="fp16")
    x = torch.randn(3, 6)
    np.testing.assert_allclose(pipe.run("forward", x=x.numpy())["y"], model(x).detach(), atol=1e-2)


def test_a_batch_is_no_larger_than_the_module_takes(tmp_path):
    stage = Stage(lambda m, x: m(x), inputs={"x": torch.randn(2, 6)}, outputs=["y"])
    options = {"dynamic": {"x": {0: "batch"}}, "sizes": {"batch": (1, 2, 3)}}
    pipe = exported(nn.Linear(6, 2), {"forward": stage}, tmp_path, **options)
    assert pipe.manifest.stage("forward").dims["batch"] == SizeRange(1, 1, 3)
    build(tmp_path / "own-onnx", tmp_path / "b.plan", batch=SizeRange(1, 1, 2))
    assert load(tmp_path / "b.plan").manifest.stage("forward").dims["batch"] == SizeRange(1, 1, 2)


def test_recurrent_layers_have_the_length_of_the_example(tmp_path):
    model = nn.LSTM(4, 6, batch_first=True).eval()
    stage = Stage(lambda m, x: m(x)[0], inputs={"x": torch.randn(2, 5, 4)}, outputs=["y"])
    pipe = exported(model, {"forward": stage}, tmp_path, dynamic={"x": {0: "batch"}})
    x = torch.randn(3, 5, 4)
    np.testing.assert_allclose(pipe.run("forward", x=x.numpy())["y"], model(x)[0].detach(), atol=1e-6)
    with pytest.raises(VqdeployError, match=r"length of x has one size only.*recurrent layers"):
        export_module(model, {"forward": stage}, tmp_path / "a-onnx", dynamic={"x": {0: "batch", 1: "length"}})


def test_a_quantizer_alone(tmp_path):
    quantizer = library.VectorQuantize(dim=8, codebook_size=16).eval()
    stages = quantizer_stages(quantizer, torch.randn(1, 4, 8))
    pipe = exported(quantizer, stages, tmp_path, dynamic={"vectors": {0: "batch"}, "codes": {0: "batch"}})
    x = torch.randn(3, 4, 8)
    codes = pipe.run("encode", vectors=x.numpy())["codes"]
    np.testing.assert_array_equal(codes, quantizer(x)[1])
    np.testing.assert_allclose(pipe.run("decode", codes=codes)["vectors"], quantizer(x)[0], atol=1e-6)


class Masked(nn.Module):
    """Gives -inf where it is masked, counts its calls and works in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))

    def forward(self, x):
        self.calls += 1
        return self.layer(x.add_(1))[:, :3] + self.mask


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    model, x = Masked(), torch.randn(2, 4)
    stages = {"forward": Stage(lambda m, x: m(x), inputs={"x": x}, outputs=["y"])}
    before = x.clone()
    exported(model, stages, folder := tmp_path_factory.mktemp("masked"), dynamic={"x": {0: "batch"}})
    return model, stages, folder / "own.plan", before


def test_the_module_and_its_examples_stay_as_they_are(masked):
    model, stages, plan, before = masked
    assert verify(plan, model, stages)["passed"]
    assert model.calls == 0
    assert torch.equal(stages["forward"].inputs["x"], before)


@pytest.mark.parametrize(("column", "value"), [(0, 100), (0, -np.inf), (2, np.inf), (2, np.nan)])
def test_infinities_hide_no_difference(masked, monkeypatch, column, value):
    model, stages, plan, _ = masked
    right = Pipeline.run

    def wrong(self, stage, **arrays):
        outputs = right(self, stage, **arrays)
        outputs["y"][0, column] = value
        return outputs

    monkeypatch.setattr(Pipeline, "run", wrong)
    assert not verify(plan, model, stages)["passed"]


@pytest.mark.parametrize(
    ("dtype", "folder", "name"),
    [(torch.float16, "模型-onnx", "onnx"), (torch.bfloat16, ".hid", "hid"), (torch.float64, "模型", "module")],
)
def test_modules_and_examples_of_every_type_in_folders_of_every_name(tmp_path, dtype, folder, name):
    model = nn.Linear(4, 2).to(dtype)
    stage = Stage(lambda m, x: m(x).sum(), inputs={"x": torch.randn(2, 4).to(dtype)}, outputs=["y"])
    manifest = export_module(model, {"forward": stage}, tmp_path / folder)
    assert manifest.name == name
    assert [tensor.dtype for tensor in (*manifest.stages[0].inputs, *manifest.stages[0].outputs)] == ["float32"] * 2


class Gate(nn.Module):
    """Decides by what it sees."""

    def forward(self, x):
        if x.sum() > 0:  # this line is named
            return x
        return -x


class Noisy(nn.Module):
    """Adds noise of its own."""

    def forward(self, x):
        return x + torch.randn_like(x)


class Gated(nn.Module):
    def __init__(self, gate):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), gate)

    def forward(self, x):
        return self.inner(x)


class Reshaped(nn.Module):
    """Was written for batches of two."""

    def forward(self, x):
        return x.reshape(2, -1) if x.shape[0] == 2 else x.flatten(1)[:, :4] * 2


X = {"x": torch.randn(2, 4)}


class TestRefusals:
    def refused(self, model, folder, match, error=VqdeployError, stage=None, **options):
        options.setdefault("dynamic", {"x": {0: "batch"}})
        stage = stage or Stage(lambda m, x: m(x), inputs=X, outputs=["y"])
        with pytest.raises(error, match=match):
            export_module(model, {"forward": stage}, folder / "own-onnx", **options)
        assert not list(folder.iterdir())

    def test_the_error_names_the_part_the_line_and_a_fix(self, tmp_path):
        lines = Path(__file__).read_text().splitlines()
        line = 1 + next(i for i, text in enumerate(lines) if text.endswith("# this line is named"))
        where = rf"in inner.1 \({re.escape(__file__)}, line {line}\)"
        helps = "branches on the value of a tensor: use torch.where.*quantizer_stages"
        self.refused(Gated(Gate()), tmp_path, f"{where}.*{helps}")

    def test_an_operator_that_plans_do_not_have(self, tmp_path):
        expected = rf"in inner.1 \({re.escape(__file__)}, line \d+\): plans have no Random.*Fix: take random numbers as"
        self.refused(Gated(Noisy()), tmp_path, expected)

    def test_a_dimension_that_is_not_open(self, tmp_path):
        self.refused(Reshaped(), tmp_path, "stage forward cannot be exported.*batch of x has one size only")

    def test_a_quantizer_that_cannot_be_served(self, tmp_path):
        beam = library.ResidualVQ(dim=4, codebook_size=4, num_quantizers=2, beam_size=2)
        self.refused(Gated(beam), tmp_path, "^inner.1: ResidualVQ with beam search is not supported")

    def test_a_module_that_fails_by_itself(self, tmp_path):
        stage = Stage(lambda m, x: m(x[:, :3]), inputs=X, outputs=["y"])
        self.refused(Gated(nn.Identity()), tmp_path, "stage forward fails in PyTorch: mat1 and mat2", stage=stage)

    def test_other_outputs_than_named(self, tmp_path):
        stage = Stage(lambda m, x: m(x), inputs=X, outputs=["y", "z"])
        self.refused(nn.Identity(), tmp_path, "returns other outputs", stage=stage)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"dynamic": {"q": {0: "batch"}}}, "dynamic names a tensor that no stage has"),
            ({"dynamic": {"x": {7: "batch"}}}, "lacks the axis batch"),
            ({"sizes": {"length": (1, 2, 3)}}, "sizes names a dimension that is not dynamic"),
            ({"dynamic": ["x"]}, "dynamic cannot be of this type.*found list"),
            ({"dynamic": {"x": ["batch"]}}, "dynamic of x cannot be of this type.*found list"),
            ({"dynamic": {"x": {"0": "batch"}}}, "an invalid axis; expected integers, found '0'"),
            ({"dynamic": {"x": {0: None}}}, "a name is invalid.*found None"),
            ({"dynamic": {"x": {0: "a b+1"}}}, "a name is invalid.*found 'a b.1'"),
            ({"dynamic": {"x": {0: "\ud800"}}}, r"a name is invalid.*found '\\ud800'"),
            *(
                ({"sizes": {"batch": own}}, "the sizes of batch are malformed; expected three ascending integers")
                for own in ((3, 2, 4), (1, 2), 5, ("a", "b", "c"), (1, 2.5, 3.5))
            ),
            ({"dtype": "int3"}, "precision"),
            ({"dtype": ["fp16"]}, "precision"),
            ({"stage": 3}, "stage forward cannot be of this type.*found int"),
            ({"stage": Stage(3, inputs=X, outputs=["y"])}, "the function of stage forward cannot be called"),
            ({"stage": Stage(lambda m, x: m(x), inputs={"x": 3}, outputs=["y"])}, "the example x.*a tensor, found int"),
            ({"stage": Stage(lambda m, x: m(x), inputs={"x": X["x"] / 0 * 0}, outputs=["y"])}, "example x.*found NaN"),
            ({"stage": Stage(lambda m, x: m(x), inputs=X, outputs="y")}, "a list of names, found str"),
            ({"stage": Stage(lambda m, x: m(x), inputs=X, outputs=[])}, "stage forward has no outputs"),
            ({"stage": Stage(lambda m, x: None, inputs=X, outputs=["y"])}, "returns other outputs.*NoneType"),
            ({"stage": Stage(lambda m, x: m(x) * 1j, inputs=X, outputs=["y"])}, "cannot hold complex numbers"),
            ({"stage": Stage(lambda m, x: m(x).half() @ x.T, inputs=X, outputs=["y"])}, "from a copy in fp32"),
            ({"stage": Stage(lambda m, x: m(x), inputs=X, outputs=["../y"])}, "a name is invalid"),
            ({"stage": Stage(lambda m, x: m(x), inputs=X, outputs=["x"])}, "have one name"),
        ],
    )
    def test_wrong_arguments(self, tmp_path, options, match):
        self.refused(nn.Identity(), tmp_path, match, **options)

    @pytest.mark.parametrize(("name", "value"), [("layer.bias", np.nan), ("layer.bias", np.inf), ("mask", np.nan)])
    def test_weights_that_are_not_finite(self, tmp_path, name, value):
        model = Masked()
        model.state_dict()[name][0] = value
        self.refused(model, tmp_path, f"the (parameter|buffer) {name} is not finite")

    def test_what_is_no_stage_and_no_module(self, tmp_path):
        stage = Stage(lambda m, x: m(x), inputs=X, outputs=["y"])
        with pytest.raises(VqdeployError, match=r"a name is invalid.*found 3"):
            export_module(nn.Identity(), {3: stage}, tmp_path / "own-onnx")
        with pytest.raises(VqdeployError, match=r"stages cannot be of this type.*found list"):
            export_module(nn.Identity(), [stage], tmp_path / "own-onnx")
        self.refused(3, tmp_path, "the model cannot be of this type.*found int")

    def test_graphs_that_do_something_else_are_not_kept(self, tmp_path, monkeypatch):
        """A stand-in that somebody registered is held to the module."""

        class Vendored(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Parameter(torch.randn(8, 4))

            def forward(self, x):
                codes = torch.cdist(x, self.table).argmin(-1)
                return F.embedding(codes, self.table), codes

        class Wrong(nn.Module):
            def __init__(self, theirs):
                super().__init__()
                self.table = theirs.table

            def forward(self, x):
                codes = (x @ self.table.T).argmax(-1)
                return self.table[codes], codes

        monkeypatch.setattr(quantizers, "_registered", {})
        register_quantizer(Vendored, Wrong)
        stage = Stage(lambda m, x: m(x)[1], inputs={"x": torch.randn(20, 4)}, outputs=["y"])
        self.refused(
            Gated(Vendored()), tmp_path, "stage forward does not match the module: y", ArtifactError, stage=stage
        )

    def test_a_failed_export_keeps_the_old_package(self, tmp_path):
        stage = Stage(lambda m, x: m(x), inputs=X, outputs=["y"])
        folder = tmp_path / "own-onnx"
        export_module(nn.Linear(4, 2), {"forward": stage}, folder, verify=False)
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        with pytest.raises(VqdeployError, match="cannot be exported"):
            export_module(Gated(Gate()), {"forward": stage}, folder)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

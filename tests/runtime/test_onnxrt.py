"""Sessions on ONNX Runtime: what is bound, and that caches are updated in place."""

import dataclasses

import numpy as np
import onnxruntime as ort
import pytest

from vqdeploy.errors import ArtifactError
from vqdeploy.runtime.bundle import Bundle
from vqdeploy.runtime.onnxrt import OnnxrtSession

DIMS = {"batch": 2, "length": 1}
COPIES = "in-place optimization not activated"


@pytest.fixture(params=["plan", "portable_plan"])
def step(request):
    bundle = Bundle(request.getfixturevalue(request.param))
    return OnnxrtSession(bundle, bundle.manifest.stage("step"), threads=1)


def fill(binding):
    rng = np.random.default_rng(0)
    for buffer in binding.inputs.values():
        if buffer.dtype == np.float32:
            buffer[:] = rng.random(buffer.shape) + 0.1
    binding.inputs["top_k"][:] = 64
    binding.inputs["position"][:] = 3


def test_a_graph_reads_no_file_beside_the_plan(plan, package, monkeypatch):
    """The graphs name the package's weights file, which lies in the working folder here."""
    monkeypatch.chdir(package)
    bundle = Bundle(plan)
    stage = bundle.manifest.stage("decode")
    OnnxrtSession(bundle, stage)
    with pytest.raises(ArtifactError, match="the graph is refused"):
        OnnxrtSession(bundle, dataclasses.replace(stage, weights=stage.weights[1:]))


def test_present_caches_are_the_past_caches(step):
    caches = step.buffers(DIMS, *step.stage.aliases.values())
    binding = step.bind(DIMS, caches)
    fill(binding)
    before = {name: cache.copy() for name, cache in caches.items()}
    binding.run()
    results = dict(zip([o.name for o in step.stage.outputs], binding._io.get_outputs(), strict=True))
    assert step.stage.aliases
    for output, name in step.stage.aliases.items():
        assert results[output].data_ptr() == caches[name].ctypes.data
        changed = np.flatnonzero((caches[name] != before[name]).any((0, 1, 3)))
        assert changed.tolist() == [3]  # the one place that was written


def test_onnxruntime_makes_no_copy_of_a_cache(portable_plan, monkeypatch, capfd):
    """ONNX Runtime warns when TensorScatter has to copy; with a second buffer for the result it does."""
    options = ort.SessionOptions

    def talkative():
        made = options()
        monkeypatch.setattr(type(made), "log_severity_level", property(lambda _: 2, lambda *_: None), raising=False)
        return made

    bundle = Bundle(portable_plan)
    monkeypatch.setattr(ort, "SessionOptions", talkative)
    session = OnnxrtSession(bundle, bundle.manifest.stage("step"), threads=1)
    binding = session.bind(DIMS)
    fill(binding)
    binding.run()
    assert COPIES not in capfd.readouterr().err

    for output in session.stage.aliases:
        binding._io.bind_output(output, "cpu")
    binding.run()
    assert COPIES in capfd.readouterr().err


def test_bindings_of_other_lengths_share_the_caches(step):
    caches = step.buffers(DIMS, *step.stage.aliases.values())
    prefix, single = step.bind(DIMS | {"length": 3}, caches), step.bind(DIMS, caches)
    assert prefix.inputs["codes"].shape == (2, 3, 4)
    for name in caches:
        assert prefix.inputs[name] is single.inputs[name] is caches[name]


def test_a_prefix_in_one_call_gives_what_single_calls_give(step):
    codes = np.random.default_rng(0).integers(0, 64, (2, 5, 4))
    whole = step.bind(DIMS | {"length": 5})
    single = step.bind(DIMS)
    for binding in (whole, single):
        fill(binding)
        for name in step.stage.aliases.values():
            binding.inputs[name][:] = 0
    whole.inputs["position"][:] = 0
    whole.inputs["codes"][:] = codes
    whole.run()
    for position in range(5):
        single.inputs["position"][:] = position
        single.inputs["codes"][:] = codes[:, position : position + 1]
        single.run()
    np.testing.assert_allclose(whole.outputs["logits"], single.outputs["logits"], atol=1e-4)
    for name in step.stage.aliases.values():
        np.testing.assert_allclose(whole.inputs[name][:, :, :5], single.inputs[name][:, :, :5], atol=1e-4)


def test_samples_of_a_batch_may_stand_at_different_positions(step):
    """A server joins requests that are at different places."""
    codes = np.random.default_rng(0).integers(0, 64, (2, 6, 4))

    def logits(positions, rows):
        dims = {"batch": len(rows), "length": 1}
        binding = step.bind(dims)
        fill(binding)
        binding.inputs["noise"][:] = 0
        for name in step.stage.aliases.values():
            binding.inputs[name][:] = 0
        for step_ in range(max(positions) + 1):
            at = np.minimum(step_, positions)
            binding.inputs["position"][:] = at
            binding.inputs["codes"][:, 0] = codes[rows, at]
            binding.run()
        return binding.outputs["logits"].copy()

    together = logits(np.array([2, 5]), [0, 1])
    np.testing.assert_allclose(together[0], logits(np.array([2]), [0])[0], atol=1e-4)
    np.testing.assert_allclose(together[1], logits(np.array([5]), [1])[0], atol=1e-4)


def test_an_engine_that_fails_is_reported_in_one_sentence(step):
    binding = step.bind(DIMS)
    fill(binding)
    binding.inputs["position"][:] = 10**6
    with pytest.raises(ArtifactError, match="stage step failed") as caught:
        binding.run()
    assert "\n" not in str(caught.value)

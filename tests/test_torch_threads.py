"""PyTorch, too, computes with the threads that were asked for."""

import pytest
import torch

from vqdeploy import bench
from vqdeploy.reference import torch_threads
from vqdeploy.runtime import onnxrt
from vqdeploy.verify import verify


@pytest.fixture
def engine_threads(monkeypatch):
    seen = []
    session = onnxrt.ort.InferenceSession

    def opened(graph, options, **rest):
        seen.append(options.intra_op_num_threads)
        return session(graph, options, **rest)

    monkeypatch.setattr(onnxrt.ort, "InferenceSession", opened)
    return seen


@pytest.fixture
def torch_seen(system, monkeypatch):
    """Threads of PyTorch in each forward pass of a convolution."""
    seen = []
    forward = torch.nn.Conv2d.forward
    monkeypatch.setattr(
        torch.nn.Conv2d, "forward", lambda self, x: seen.append(torch.get_num_threads()) or forward(self, x)
    )
    return seen


def test_bench_compares_equal_numbers_of_threads(plan, checkpoint_folder, engine_threads, torch_seen, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "_measure_apart", lambda call, threads: asked.append((call, threads)) or 50.0)
    request = {"tasks": ["generate", "decode"], "iterations": 1, "baselines": ["eager"], "profile": True, "threads": 3}
    report = bench.bench(plan, checkpoint=checkpoint_folder, **request)
    assert set(engine_threads) == set(torch_seen) == {3}
    assert asked == [("read_bandwidth(3)", 3)]
    assert report["environment"]["threads"] == 3
    assert torch.get_num_threads() == 1


def test_verify_limits_its_reference(plan, system, torch_seen):
    verify(plan, system, threads=3)
    assert set(torch_seen) == {3}
    assert torch.get_num_threads() == 1


def test_the_roofline_is_measured_with_these_threads():
    call = "os.environ['OMP_NUM_THREADS'] + bench.os.environ['OPENBLAS_NUM_THREADS']"
    assert bench._measure_apart(call, threads=3) == 33


def test_threads_are_given_back_after_an_error():
    with pytest.raises(ZeroDivisionError), torch_threads(2):
        1 / (torch.get_num_threads() - 2)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("call", ["matmul_rate(10**9)", "TASKS", "os.abort()"])
def test_bench_goes_on_without_a_roofline(plan, monkeypatch, caplog, call):
    monkeypatch.setitem(bench._RATES, "read_bandwidth_gb_s", call)
    report = bench.bench(plan, tasks=["generate"], iterations=1)
    assert "the roofline of this machine is left out" in caplog.text
    assert "read_bandwidth_gb_s" not in report["environment"]
    assert "step_ms" in report["results"][0]
    assert "ms a step" in bench.table(report)

"""One pipeline in several threads, in its own callbacks and behind a fork; opening and closing."""

import gc
import os
import signal
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from vqdeploy.errors import VqdeployError
from vqdeploy.runtime import load, onnxrt, threads
from vqdeploy.runtime.noise import ThreadedNoise
from vqdeploy.runtime.sampler import Item

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def drawn(pipeline, seed):
    return pipeline.generate([seed % 3, 1], seed=seed)


@pytest.mark.parametrize("name", ["", "movq", "vqgan", "vqvae2"])
def test_threads_share_a_pipeline(name, request):
    pipeline = request.getfixturevalue(f"{name}_pipeline".lstrip("_"))
    expected = [drawn(pipeline, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2):
            found = list(pool.map(lambda seed: drawn(pipeline, seed), range(4)))
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a.codes, b.codes)
                np.testing.assert_array_equal(a.images, b.images)


def test_a_callback_may_use_its_own_pipeline(pipeline):
    expected, other = drawn(pipeline, 1), drawn(pipeline, 2)
    inner = []

    def ask(step):
        if step.step in (2, 5):
            inner.append(drawn(pipeline, 2))

    found = pipeline.generate([1, 1], seed=1, callback=ask)
    np.testing.assert_array_equal(found.codes, expected.codes)
    assert len(inner) == 2
    assert all((each.codes == other.codes).all() for each in inner)


def test_samplers_of_several_threads_take_turns(plan, monkeypatch):
    """Contexts of TensorRT share memory: two calls at once would corrupt each other."""
    inside, together = [], []
    original = onnxrt.Binding.run

    def run(self):
        inside.append(self)
        together.append(len(inside))
        original(self)
        inside.pop()

    monkeypatch.setattr(onnxrt.Binding, "run", run)

    def draw(seed):
        with pipeline.sampler(1) as sampler:
            sampler.admit(0, Item(np.full(pipeline.grid, -1), 0, seed, 0, pipeline.options()))
            while not sampler.step():
                pass
            return sampler.codes(0)

    with load(plan, threads=1) as pipeline:
        expected = [pipeline.generate([0], seed=seed).codes[0] for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            np.testing.assert_array_equal(list(pool.map(draw, range(4))), expected)
    assert set(together) == {1}


def in_a_fork(work):
    """Whether a forked child answers True within half a minute."""
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # nothing of the parent's ends it
        os._exit(0 if work() else 3)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) == 0


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", ["", "movq"])
def test_a_forked_child_uses_the_parents_pipeline_and_its_own(name, request):
    file = request.getfixturevalue(f"{name}_plan".lstrip("_"))
    pipeline = load(file, threads=2)
    expected = drawn(pipeline, 5).codes
    assert in_a_fork(lambda: (drawn(pipeline, 5).codes == expected).all())
    assert in_a_fork(lambda: (drawn(load(file, threads=2), 5).codes == expected).all())
    np.testing.assert_array_equal(drawn(pipeline, 5).codes, expected)


_WORKERS = """
import gc, os, signal, sys
from vqdeploy.runtime import load

os.register_at_fork(after_in_child=lambda: signal.alarm(30))  # ends what hangs
pipeline = load(sys.argv[1], threads=2)
expected = pipeline.generate([1], seed=5).codes


def worker(work):
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def draw():
    assert (pipeline.generate([1], seed=5).codes == expected).all()


def replace():
    global pipeline
    pipeline = load(sys.argv[1], threads=2)
    gc.collect()
    draw()


def drop():
    global pipeline
    draw()
    del pipeline
    gc.collect()


def close():
    draw()
    pipeline.close()
    gc.collect()


def in_a_sampler():
    with pipeline.sampler(1):
        ends = [worker(draw)]
    return ends[0] == 0 or sys.exit(1)


def of_a_worker():
    assert worker(draw) == 0
    draw()


def leave_a_sampler():
    with pipeline.sampler(1):
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
    draw()


def hold_a_session():
    global pipeline
    held = pipeline.session("decode"), load(sys.argv[1], threads=2).session("decode")
    pipeline.close()
    del pipeline
    gc.collect()
    assert worker(gc.collect) == 0


def hold_a_sampler():
    with pipeline.sampler(1):
        pipeline.close()
        assert worker(gc.collect) == 0


of_sessions = hold_a_session, hold_a_sampler, in_a_sampler, leave_a_sampler
for work in (bool, draw, replace, drop, close, of_a_worker, *of_sessions):
    print(work.__name__, worker(work))
draw()
"""


@needs_fork
def test_workers_of_a_server_that_forks_end(plan, python):
    """An interpreter that ends destroys what is left of the parent's, and the threads of its sessions are not there."""
    ends = dict(line.split() for line in python(_WORKERS, plan).splitlines())
    assert len(ends) == 10
    assert set(ends.values()) == {"0"}, ends


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_in_the_middle_of_another_threads_step(pipeline):
    expected = drawn(pipeline, 5).codes
    going, stop = threading.Event(), threading.Event()

    def work():
        while not stop.is_set():
            drawn(pipeline, 4)
            going.set()

    thread = threading.Thread(target=work)
    thread.start()
    going.wait()
    try:
        assert all(in_a_fork(lambda: (drawn(pipeline, 5).codes == expected).all()) for _ in range(3))
    finally:
        stop.set()
        thread.join()


def _draw_many(rows):
    noise = ThreadedNoise(4)
    out = np.empty((rows, 2**17), np.float32)
    noise([(1, row, 0) for row in range(rows)], out)
    return float(out.sum())


@needs_fork
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_threads_of_the_noise_start_again_in_a_child():
    noise = ThreadedNoise(4)
    keys, out = [(1, row, 0) for row in range(3)], np.empty((3, 2**17), np.float32)
    noise(keys, out)
    expected = out.copy()

    def again():
        noise(keys, out)
        return (out == expected).all()

    assert in_a_fork(again)


class TestOpening:
    @pytest.fixture
    def opened(self, monkeypatch):
        names = []
        original = onnxrt.OnnxrtSession.__init__

        def note(self, bundle, stage, *arguments, **options):
            names.append(stage.name)
            original(self, bundle, stage, *arguments, **options)

        monkeypatch.setattr(onnxrt.OnnxrtSession, "__init__", note)
        return names

    def test_stages_open_when_they_are_used(self, plan, opened):
        pipeline = load(plan, threads=1)
        assert opened == []
        codes = pipeline.generate([0], seed=1).codes
        assert sorted(opened) == ["decode", "step"]
        pipeline.decode(codes)
        assert sorted(opened) == ["decode", "step"]

    def test_to_decode_opens_no_prior(self, plan, opened):
        load(plan, threads=1).decode(np.zeros((1, 4, 4, 4), np.int64))
        assert opened == ["decode"]

    def test_digests_are_compared_unless_it_is_told_otherwise(self, plan, tmp_path):
        damaged = bytearray(plan.read_bytes())
        damaged[-70_000] ^= 1
        file = tmp_path / "damaged.plan"
        file.write_bytes(damaged)
        with pytest.raises(VqdeployError):
            load(file)
        load(file, verify=False)

    @pytest.mark.parametrize("count", [1, 2])
    def test_threads_are_those_asked_for(self, plan, count, monkeypatch):
        seen = []
        original = onnxrt.ort.InferenceSession

        def note(graph, options, **rest):
            seen.append(options.intra_op_num_threads)
            return original(graph, options, **rest)

        monkeypatch.setattr(onnxrt.ort, "InferenceSession", note)
        pipeline = load(plan, threads=count)
        pipeline.generate([0], seed=1)
        assert seen == [count, count]
        assert pipeline._noise._threads == count

    def test_threads_by_default_are_what_the_process_may_use(self, monkeypatch, tmp_path):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
        quota = tmp_path / "cpu.max"
        monkeypatch.setattr(threads, "_MOUNT", tmp_path)
        monkeypatch.setattr(threads, "_SELF", tmp_path / "none")
        assert threads.cores() == 3
        for text, expected in (("max 100000", 3), ("150000 100000", 2), ("20000 100000", 1), ("junk", 3)):
            quota.write_text(text)
            assert threads.cores() == expected
        assert ThreadedNoise()._threads == 3

    @pytest.mark.parametrize(
        ("own", "files", "expected"),
        [
            ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 2),  # CPUQuota of a systemd slice
            ("0::/a/b", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "100000 100000"}, 1),
            ("0::/a/b", {"cpu.max": "200000 100000"}, 2),  # a container that mounts its own cgroup as the root
            ("0::/a", {"b/cpu.max": "100000 100000"}, 4),
            ("5:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"}, 2),
            ("5:cpu:/a/b", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
            ("5:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 4),
            ("5:memory:/a", {"a/cpu.max": "100000 100000"}, 4),
            ("junk", {}, 4),
        ],
    )
    def test_quotas_of_all_cgroups_above_count(self, monkeypatch, tmp_path, own, files, expected):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)), raising=False)
        monkeypatch.setattr(threads, "_MOUNT", tmp_path / "mount")
        monkeypatch.setattr(threads, "_SELF", tmp_path / "self")
        (tmp_path / "self").write_text(f"1:name=systemd:/x\n{own}\n")
        for name, text in files.items():
            (tmp_path / "mount" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "mount" / name).write_text(text + "\n")
        assert threads.cores() == expected

    @pytest.mark.parametrize("wrong", [None, 5, ["a.plan"]])
    def test_a_plan_is_a_path(self, wrong):
        with pytest.raises(VqdeployError, match="the plan is not a path"):
            load(wrong)

    def test_a_callback_is_a_function(self, pipeline):
        with pytest.raises(VqdeployError, match="the callback cannot be called"):
            pipeline.generate([0], callback=5)

    @pytest.mark.parametrize("wrong", [-1, 1.5, True, "2", 4097, 2**40])
    def test_a_wrong_number_of_threads_is_refused(self, plan, wrong):
        with pytest.raises(VqdeployError, match="threads is out of range"):
            load(plan, threads=wrong)


class TestClosing:
    def test_a_closed_pipeline_refuses_everything(self, plan):
        with load(plan, threads=1) as pipeline:
            codes = pipeline.generate([0], seed=1).codes
        pipeline.close()
        for call in (lambda: pipeline.generate([0]), lambda: pipeline.decode(codes), lambda: pipeline.session("step")):
            with pytest.raises(VqdeployError, match="this pipeline is closed"):
                call()

    def test_a_sampler_that_was_in_use_is_freed(self, plan):
        pipeline = load(plan, threads=1)
        with pipeline.sampler(1) as sampler:
            pipeline.close()
            gone = weakref.ref(sampler)
        del sampler
        gc.collect()
        assert gone() is None
        with pytest.raises(VqdeployError, match="this pipeline is closed"), pipeline.sampler(1):
            pass

    def test_it_is_closed_after_an_error_too(self, plan):
        with pytest.raises(ZeroDivisionError), load(plan, threads=1) as pipeline:
            raise ZeroDivisionError
        with pytest.raises(VqdeployError, match="closed"):
            pipeline.decode(np.zeros((1, 4, 4, 4), np.int64))

    @pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="handles are counted in /proc")
    def test_nothing_is_left_open(self, plan):
        def handles():
            return len(os.listdir("/proc/self/fd")), threading.active_count()

        before = None
        for _ in range(4):
            with load(plan, threads=2) as pipeline:
                pipeline.generate([0], seed=1)
            before = before or handles()
        assert handles() == before

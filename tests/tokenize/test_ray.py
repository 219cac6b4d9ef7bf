"""Tokenizing on Ray's own test cluster: processes and machines die, and every image has its row all the same."""

import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.data import png, rows

from vqdeploy.errors import VqdeployError
from vqdeploy.tokenize import tokenize

ray = pytest.importorskip("ray", reason="Ray is not installed")
from ray.cluster_utils import Cluster  # noqa: E402 (after the skip)

pytestmark = pytest.mark.slow
NODES = 3


@pytest.fixture(scope="module")
def cluster():
    """A cluster of three nodes of one core, all on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        cluster = started()
    except Exception:  # Ray gives a node 30 seconds, which a busy machine may exceed
        cluster = started()
    yield cluster
    cluster.shutdown()


def started():
    cluster = Cluster()
    try:
        for _ in range(NODES):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20, include_dashboard=False)
        cluster.wait_for_nodes()
    except BaseException:
        cluster.shutdown()
        raise
    return cluster


def working(cluster):
    """The processes of the cluster that run a part."""
    raylets = {entry.process.pid for node in cluster.list_all_nodes() for entry in node.all_processes["raylet"]}
    found = []
    for process in Path("/proc").iterdir():
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            title = (process / "cmdline").read_bytes()
        except (OSError, ValueError, IndexError):
            continue
        if parent in raylets and b"tokenize_part" in title:
            found.append(int(process.name))
    return found


def test_an_error_there_is_one_sentence(cluster, plan, folder, tmp_path):
    with pytest.raises(VqdeployError, match=r"^this plan was built for the CPU\. Fix: vqdeploy build .* cuda$"):
        tokenize(plan, str(folder), tmp_path / "out", device="cuda", ray=cluster.address)


def test_processes_and_machines_die(cluster, plan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # processes of the cluster run elsewhere
    (tmp_path / "in").mkdir()
    for i in range(150):
        (tmp_path / "in" / f"{i:03}.png").write_bytes(png(i))
    killed = []

    def disturb(done, number, total):
        assert total == 50
        if number in (5, 10) and (found := working(cluster)):
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])
        if number == 15:
            cluster.remove_node(cluster.list_all_nodes()[-1], allow_graceful=False)

    options = {"shard_size": 3, "report": disturb}
    summary = tokenize(plan, "in", Path("out"), ray=cluster.address, **options)
    assert killed
    assert len(cluster.list_all_nodes()) == NODES - 1
    assert (summary.images, summary.shards, summary.errors) == (150, 50, 0)
    assert len(rows(tmp_path / "out")) == 150
    tokenize(plan, "in", Path("alone"), shard_size=3, workers=1)
    assert pq.read_table(tmp_path / "out").equals(pq.read_table(tmp_path / "alone"))
    assert not list((tmp_path / "out").glob(".vqdeploy-*"))


def test_no_cluster(plan, folder, tmp_path):
    with pytest.raises(VqdeployError, match=r"the Ray cluster cannot be reached; expected its address, found 127"):
        tokenize(plan, str(folder), tmp_path / "out", ray="127.0.0.1:1")

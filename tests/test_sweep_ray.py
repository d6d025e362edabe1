"""A sweep on a real Ray cluster of two nodes on this machine, one of which is killed on the way."""

from pathlib import Path

import pytest
from test_sweep import planned_keys, settings, tiny, write_words

from evaluation.row_file import read_rows
from evaluation.sweep import run
from evaluation.sweep_plan import load, plan
from evaluation.sweep_spec import SweepSpec

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'icl-compiler[ray]'")
pytestmark = pytest.mark.models
__all__ = ["tiny"]  # the fixture


def test_a_node_that_dies_costs_no_row(tiny: str, tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    from evaluation.sweep_ray import on_cluster

    words = write_words(tmp_path / "words")
    spec = SweepSpec.from_mapping(settings(tiny, words, sizes=[4, 8, 16, 32, "all"]), root=Path())
    data = {dataset.name: load(spec, dataset) for dataset in spec.datasets}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        assert ray.cluster_resources()["CPU"] == 2
        dead: list[int] = []

        def notify(what: str, done: int, of: int) -> None:
            if done == 3 and not dead:
                dead.append(done)
                cluster.remove_node(second, allow_graceful=False)

        rows = run(spec, tmp_path / "out", plan(spec, data), engine=on_cluster(), notify=notify)
        assert dead
        assert not second.any_processes_alive()
    finally:
        ray.shutdown()
        cluster.shutdown()
    lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
    assert len(lines) == len(read_rows(tmp_path / "out" / "rows.jsonl")) == len(rows)
    assert [row["key"] for row in rows] == planned_keys(spec)

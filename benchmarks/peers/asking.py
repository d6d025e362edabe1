"""Asks a peer, in a process and an environment of its own; and a retriever that finds what a peer chose."""

import json
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from benchmarks.peers.environments import peers_python, selection_python
from icl_compiler import encoders
from icl_compiler.data import Dataset
from icl_compiler.models import locate
from icl_compiler.selection import Order, candidates
from retrievers.retriever import Hits

HERE = Path(__file__).parent


class Peer(NamedTuple):
    """A way to choose rows: which script has it, by which name, and the interpreter that runs it."""

    script: str
    method: str
    python: Callable[[], Path]


PEERS: dict[str, Peer] = {
    "openicl-random": Peer("selection_openicl.py", "random", peers_python),
    "openicl-topk": Peer("selection_openicl.py", "topk", peers_python),
    "openicl-bm25": Peer("selection_openicl.py", "bm25", peers_python),
    "openicl-votek": Peer("selection_openicl.py", "votek", peers_python),
    "langchain-mmr": Peer("selection_langchain.py", "mmr", selection_python),
    "dspy-knn": Peer("selection_dspy.py", "knn", selection_python),
    "skorch-few-shot": Peer("selection_skorch.py", "few-shot", peers_python),
}


class Choice(NamedTuple):
    """What a peer chose: see `Chosen` in `lookup`."""

    rows: list[list[int]]
    order: Order
    version: str
    seconds: float


def choose(
    peer: Peer, pool: Dataset, texts: Sequence[str], path: Path, *, model: str, encoder: str, shots: int, seed: int
) -> Choice:
    """The rows of `pool` that a peer shows with each of `texts`: more than `shots`, in case some do not fit.

    Args:
        path: of the job, which is written there.
        model: whose tokenizer a peer may use, by its name.
        encoder: whose vectors all peers share.

    Raises:
        CalledProcessError: if the peer fails.
        RuntimeError: if it does not give as many rows of the pool for each text.
    """
    vectors = encoders.named_encoder(encoder).encode([*pool.texts, *texts])
    asked = candidates(shots, len(pool))
    write_job(path, pool, texts, vectors, shots=asked, model=locate(model), method=peer.method, seed=seed)
    found = Choice(**ask(peer.script, peer.python(), path, path.with_suffix(".answer.json")))
    lengths = {len(each) for each in found.rows}
    known = all(row in range(len(pool)) for each in found.rows for row in each)
    if len(found.rows) != len(texts) or len(lengths) > 1 or not known:
        raise RuntimeError(
            f"{peer.script} gave {len(found.rows)} lists of {sorted(lengths)} rows for {len(texts)} texts; expected "
            f"as many for each, {asked} of the pool's {len(pool)}"
        )
    return found


def write_job(
    path: Path, pool: Dataset, texts: Sequence[str], vectors: Float32[np.ndarray, "texts width"], **more: object
) -> None:
    """Write a `lookup.Job`, its vectors beside it."""
    path.parent.mkdir(exist_ok=True)
    fields = {"texts": pool.texts, "labels": pool.answers, "queries": texts, **more}
    path.write_text(json.dumps(fields), encoding="utf-8")
    np.save(path.with_suffix(".npy"), vectors)


def ask(script: str, python: Path, path: Path, result: Path) -> dict[str, Any]:
    """What a script says to the job at `path`, on one thread."""
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    subprocess.run([str(python), str(HERE / script), str(path), str(result)], check=True, env=one_thread)
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


class Recorded:
    """A retriever that finds for each text what was recorded for it."""

    score_meaning = "none: a peer chose it"

    def __init__(self, rows_of: Mapping[str, Sequence[int]]) -> None:
        self._rows_of = rows_of

    def fit(self, texts: Sequence[str]) -> None:
        """Nothing to index."""

    def search(self, texts: Sequence[str], k: int) -> Hits:
        """The first `k` rows recorded for each of `texts`."""
        ids = np.array([self._rows_of[text] for text in texts], dtype=np.int64)[:, :k]
        return Hits(ids, np.zeros(ids.shape, dtype=np.float32))

    def save(self, folder: Path) -> None:
        """Refuse: it is never kept."""
        raise NotImplementedError("what peers chose is kept in the job's answer")

    def load(self, folder: Path) -> None:
        """Refuse: it is never kept."""
        raise NotImplementedError("what peers chose is kept in the job's answer")

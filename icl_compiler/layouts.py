"""Fixed blocks of shots at the beginning of prompts, so that an engine with a prefix cache computes them once.

    per-query   instruction | shots of the query                | query
    shared      instruction | one block for all queries         | query
    clustered   instruction | the block of the query's cluster  | query
    mixed       instruction | the block of the query's cluster  | shots of the query | query

- The pool is put into clusters by k-means on its sentence embeddings; a query goes to the nearest centre. `shared` is
  the same with one cluster, for which no query is encoded.
- A block holds what is typical in its cluster: the cluster is divided into as many parts as shots fit, and of each the
  row nearest to its centre is taken, the largest part first. Rows nearest to the cluster's centre fill what is left.
- An engine keeps whole cache blocks of tokens only. So one shot is exchanged for another, such that instruction and
  block end where a cache block ends, or as few tokens as possible behind: those are computed again for every query.
- A block leaves room for the query, for that of 99 in 100 rows of the pool. For a longer query the block is shortened
  by whole shots, from its end; the beginning stays the same. A row with the query's own text is left out, and what
  follows it is then computed anew, for this query only.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from icl_compiler.tokenizer import TokenIds
from retrievers.cluster import k_means
from retrievers.encoder import unit
from retrievers.retriever import Encoder

Layout = Literal["per-query", "shared", "clustered", "mixed"]

_EXCHANGED, _TRIED = 16, 256
_MORE = 2048  # rows beyond the typical ones that may fill a block


@dataclass(frozen=True, eq=False)
class Blocks:
    """The fixed blocks of a program.

    Attributes:
        encoder: of the queries.
        centres: of the clusters, each of length 1.
        rows: of the pool, block after block, in the order of the prompt.
        offsets: where the rows of each block begin, and the end of the last.
    """

    encoder: Encoder
    centres: Float32[np.ndarray, "blocks width"]
    rows: Int64[np.ndarray, " shots"]
    offsets: Int64[np.ndarray, " blocks_and_end"]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.centres)

    def __getitem__(self, block: int) -> Int64[np.ndarray, " shots"]:
        """The rows of a block."""
        return self.rows[self.offsets[block] : self.offsets[block + 1]]

    @property
    def sizes(self) -> Int64[np.ndarray, " blocks"]:
        """How many shots each block has."""
        return np.diff(self.offsets)

    def nearest(self, texts: Sequence[str]) -> Int64[np.ndarray, " texts"]:
        """The block of each text."""
        if len(self) == 1:
            return np.zeros(len(texts), dtype=np.int64)
        found: Int64[np.ndarray, " texts"] = np.array(
            [np.vecdot(self.centres, vector).argmax() for vector in unit(self.encoder.encode(texts))], dtype=np.int64
        )
        return found


def make_blocks(
    texts: Sequence[str],
    tokens: Int64[np.ndarray, " rows"],
    *,
    encoder: Encoder,
    clusters: int,
    head: int,
    room: int,
    shots: int,
    cache_block: int,
    seed: int,
) -> Blocks:
    """Blocks of the rows with these `texts`, one for each cluster.

    Args:
        tokens: of each row as a shot.
        clusters: how many; fewer where there are fewer rows.
        head: tokens of the instruction.
        room: most tokens of a block.
        shots: most shots of a block.
        cache_block: tokens of a block of the engine's prefix cache.
    """
    vectors = unit(encoder.encode(texts))
    centres, cluster_of = k_means(vectors, seed=seed, clusters=min(clusters, len(texts)))
    blocks = []
    for cluster, centre in enumerate(centres):
        members = np.flatnonzero(cluster_of == cluster)
        nearness = np.vecdot(vectors, centre)
        parts = min(len(members), shots, max(1, math.ceil(room / tokens.mean())))
        nearest = np.argsort(-nearness, kind="stable")[:_MORE]
        typical = members[_typical(vectors[members], parts, seed=seed)]
        order = np.concatenate([typical, nearest[~np.isin(nearest, typical)]])
        rows = np.array(fill(order, tokens, head=head, room=room, shots=shots, cache_block=cache_block), dtype=np.int64)
        blocks.append(rows[np.lexsort((rows, nearness[rows]))])  # the most typical stands last
    offsets = np.cumsum([0, *map(len, blocks)], dtype=np.int64)
    return Blocks(encoder, centres, np.concatenate(blocks), offsets)


def fill(
    order: Int64[np.ndarray, " candidates"],
    tokens: Int64[np.ndarray, " rows"],
    *,
    head: int,
    room: int,
    shots: int,
    cache_block: int,
) -> list[int]:
    """The rows of a block: the first of `order` that fit, at most one of them exchanged or added.

    After that `head` and the block are as few tokens as possible longer than a multiple of `cache_block`, and the block
    as long as possible.

    >>> fill(np.array([0, 1, 2, 3]), np.array([10, 11, 12, 13]), head=8, room=30, shots=9, cache_block=16)
    [3, 1]
    """
    goal = max(0, (head + room) // cache_block * cache_block - head)
    taken: list[int] = []
    used = 0
    for row in order.tolist():
        if len(taken) == shots:
            break
        if used + tokens[row] <= (goal or room):
            taken.append(row)
            used += int(tokens[row])
    others = order[~np.isin(order, taken)][:_TRIED]
    # Each way to change one shot: place of the one that goes (or none), the one that comes, and the tokens then.
    ways = [(len(taken), row, used + int(tokens[row])) for row in others.tolist()] if len(taken) < shots else []
    for place in range(max(0, len(taken) - _EXCHANGED), len(taken)):
        less = used - int(tokens[taken[place]])
        ways += [(place, row, less + int(tokens[row])) for row in others.tolist()]
    possible = [way for way in ways if way[2] <= room]
    place, row, total = min(
        possible, key=lambda way: ((head + way[2]) % cache_block, -way[2], -way[0]), default=(0, 0, 0)
    )
    if possible and ((head + total) % cache_block, -total) < ((head + used) % cache_block, -used):
        taken[place : place + 1] = [row]
    return taken


def _typical(vectors: Float32[np.ndarray, "rows width"], parts: int, *, seed: int) -> Int64[np.ndarray, " parts"]:
    """The row nearest to the centre of each part of these rows, the largest part first."""
    if not parts:
        return np.empty(0, dtype=np.int64)
    centres, part_of = k_means(vectors, seed=seed, clusters=parts)
    nearness = np.vecdot(vectors, centres[part_of])
    first = np.lexsort((-nearness, part_of))
    _, begins, sizes = np.unique(part_of[first], return_index=True, return_counts=True)
    typical: Int64[np.ndarray, " parts"] = first[begins][np.argsort(-sizes, kind="stable")]
    return typical


class Expected(NamedTuple):
    """What a prompt of a program costs, on average; all prompts of a text together, where it has several.

    Attributes:
        prompt_tokens: its tokens.
        computed_tokens: those of them that an engine with a prefix cache computes, once it holds the instruction and
            all blocks.
    """

    prompt_tokens: float
    computed_tokens: float


def computed_tokens(
    prompts: Sequence[TokenIds], *, cache_block: int, held: Sequence[TokenIds] = ()
) -> Int64[np.ndarray, " prompts"]:
    """Tokens of each of `prompts` that an engine computes which never forgets a whole block of `cache_block` tokens.

    As vLLM does it: a block is known by all tokens up to its end, and the last token of a prompt is always computed.

    Args:
        held: what was computed before.

    >>> computed_tokens([[1, 2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 9, 4, 5]], cache_block=2).tolist()
    [5, 2, 3]
    """
    known: set[bytes] = set()
    for tokens in held:
        known.update(_whole_blocks(tokens, cache_block))
    computed = np.empty(len(prompts), dtype=np.int64)
    for number, tokens in enumerate(prompts):
        blocks = list(_whole_blocks(tokens, cache_block))
        usable = blocks[: (len(tokens) - 1) // cache_block]
        cached = next((place for place, block in enumerate(usable) if block not in known), len(usable))
        computed[number] = len(tokens) - cached * cache_block
        known.update(blocks)
    return computed


def _whole_blocks(tokens: TokenIds, size: int) -> Iterator[bytes]:
    whole = np.asarray(tokens, dtype=np.int64).tobytes()
    key = b""
    for end in range(8 * size, len(whole) + 1, 8 * size):
        key = sha256(key + whole[end - 8 * size : end]).digest()
        yield key

"""The gap of models that write texts: what they write is sampled, and each scores what the other wrote.

- An answer is the tokens up to the terminator, or the first `max_new_tokens`: the gap is the total variation between
  the two laws of such answers at temperature 1, a lower bound on that of whole texts.
- Of each query every model draws `samples` answers. A pair of them gives an unbiased value for the total variation
  (`tv.paired_mixture`); the values are averaged within the query, and the interval is over queries: samples of one
  query are no further queries.
- The law of a sampled token is the one that the engine drew it from; what the other model wrote is scored by reading
  it.
- Where queries are asked until a decision, all intervals are those of the confidence sequence (`anytime`).
- Token by token: of a token drawn from one law, (1 - other / own)+ is an unbiased value for the total variation of the
  two laws of the next token, so that no law over the vocabulary is ever asked for, and every engine will do. The mean
  is over all tokens that the reference writes.
- The total variation of long answers is close to 1 and says little; the one of tokens does not wear out.
"""

import time
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from evaluation.gap import Gap, gap_of_distances
from evaluation.intervals import Interval
from evaluation.tv import Sandwich, chain_upper, coupling_upper, one_sided, paired_mixture
from icl_compiler.backends.backend import Generation, Progress, Usage
from icl_compiler.predictor import PromptedPredictor, answer_text
from icl_compiler.program import Prompt


class Lengths(NamedTuple):
    """How much is written: `samples` answers to each query, of at most `max_new_tokens` tokens each."""

    samples: int
    max_new_tokens: int


class Written(NamedTuple):
    """What a model wrote.

    Attributes:
        samples: of each text, the answers drawn at temperature 1.
        greedy: of each text, the answer of likeliest tokens.
        outputs: the greedy answers as texts.
        usage: of the greedy answers, as are the seconds: what an application would pay.
    """

    writer: PromptedPredictor
    prompts: list[Prompt]
    samples: list[list[Generation]]
    greedy: list[Generation]
    outputs: list[str]
    usage: Usage
    seconds: float

    @staticmethod
    def joined(parts: "Sequence[Written]") -> "Written":
        """What one model wrote to several lists of texts, one after the other; at least one list."""
        first = parts[0]
        return first._replace(
            prompts=[prompt for part in parts for prompt in part.prompts],
            samples=[items for part in parts for items in part.samples],
            greedy=[item for part in parts for item in part.greedy],
            outputs=[output for part in parts for output in part.outputs],
            usage=reduce(Usage.plus, [part.usage for part in parts]),
            seconds=sum(part.seconds for part in parts),
        )


class Ratios(NamedTuple):
    """log P - log Q of each token that two models wrote, 0 behind the end of an answer.

    Attributes:
        at_first: of what the first wrote.
        at_second: of what the second wrote.
    """

    at_first: Float[np.ndarray, "texts samples tokens"]
    at_second: Float[np.ndarray, "texts samples tokens"]

    @property
    def per_query(self) -> Float[np.ndarray, " texts"]:
        """An unbiased value for the total variation of the answers to each text, in [0, 1]."""
        values: Float[np.ndarray, " texts"]
        values = paired_mixture(self.at_first.sum(axis=2), self.at_second.sum(axis=2)).mean(axis=1)
        return values

    @staticmethod
    def joined(parts: "Sequence[Ratios]") -> "Ratios":
        """Of several lists of texts, one after the other."""
        return Ratios(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class TextGap(NamedTuple):
    """How far two models are apart that write.

    Attributes:
        gap: the total variation of answers, with its interval over queries.
        coupling: an upper bound on it: how often coupling them token by token parts somewhere.
        chain: a larger one, at most 1: the sum of the total variations of tokens.
        token: the mean total variation of the next token along what the second model writes, with its interval.
        finished: share of the first model's samples that came to their end.
    """

    gap: Gap
    coupling: float
    chain: float
    token: float
    token_interval: Interval
    finished: float


def write(
    writer: PromptedPredictor,
    texts: Sequence[str],
    lengths: Lengths,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Written:
    """Draw answers to each text, and the greedy one. Models that are compared need different seeds."""
    program, backend = writer.program, writer.backend
    end, most = program.template.terminator_ids, lengths.max_new_tokens
    started = time.perf_counter()
    prompts = program.prompts(texts)
    tokens = [prompt.tokens for prompt in prompts]
    greedy = backend.generate(tokens, end, max_new_tokens=most, temperature=0.0)
    seconds = time.perf_counter() - started
    drawn = backend.generate(tokens, end, max_new_tokens=most, samples=lengths.samples, seed=seed, progress=progress)
    places = range(0, len(drawn.items), lengths.samples)
    return Written(
        writer,
        prompts,
        [drawn.items[place : place + lengths.samples] for place in places],
        greedy.items,
        [answer_text(program.template, item) for item in greedy.items],
        greedy.usage.plus(program.reading_cost(texts)),
        seconds,
    )


def ratios_of(first: Written, second: Written, lengths: Lengths) -> Ratios:
    """Have each of two models read what the other wrote to the same texts, with the same lengths."""
    most = lengths.max_new_tokens
    return Ratios(-_log_ratios(second, first, most), _log_ratios(first, second, most))


def text_gap(
    first: Written,
    second: Written,
    lengths: Lengths,
    *,
    level: float = 0.95,
    ratios: Ratios | None = None,
    anytime: bool = False,
) -> TextGap:
    """The gap between two models from what each wrote to the same texts, with the same lengths.

    Args:
        ratios: `ratios_of` these two, where they are known already.
        anytime: whether the number of texts was chosen by what they showed; they are then in the order asked.

    Source: the paired mixture and the chain rule of `evaluation.tv`; Leviathan, Kalman and Matias 2023, theorem 3.5.
    """
    ratios = ratios or ratios_of(first, second, lengths)
    at_first, at_second, values = *ratios, ratios.per_query
    written = np.array([[len(item.tokens) for item in items] for items in second.samples])
    apart = one_sided(-at_second).sum(axis=2)
    most = lengths.max_new_tokens
    # Each of the two means is held with half of the risk; of their ratio the ends are those of a fraction.
    above, below = (
        gap_of_distances(Sandwich(part, part), level=(1 + level) / 2, anytime=anytime).interval
        for part in (apart.mean(axis=1) / most, written.mean(axis=1) / most)
    )
    token = Interval(above.low / below.high, min(1.0, above.high / max(below.low, 1e-12)))
    return TextGap(
        gap_of_distances(Sandwich(values, values), level=level, anytime=anytime),
        float(coupling_upper(at_first).mean()),
        min(1.0, float(chain_upper(one_sided(at_first)).mean())),
        float(apart.sum() / written.sum()),
        token,
        float(np.mean([item.finished for items in first.samples for item in items])),
    )


def point_gap(
    laws: Sequence[Sequence[tuple[tuple[int, ...], float]]],
    second: Written,
    *,
    level: float = 0.95,
    anytime: bool = False,
) -> Gap:
    """The gap between laws that give a few answers known probabilities, which sum to 1, and a model; exact per query.

    TV = sum of (P - Q)+ over the answers of P: no sample is needed.
    """
    prompts = [prompt.tokens for prompt, law in zip(second.prompts, laws, strict=True) for _ in law]
    answers = [tokens for law in laws for tokens, _ in law]
    scores = iter(second.writer.backend.sequence_logprobs(prompts, answers).logprobs)
    tvs = np.array([sum(max(0.0, p - float(np.exp(next(scores).sum()))) for _, p in law) for law in laws])
    tvs = np.clip(tvs, 0.0, 1.0)
    return gap_of_distances(Sandwich(tvs, tvs), level=level, anytime=anytime)


def reading_noise(written: Written, count: int, lengths: Lengths, *, level: float = 0.95, anytime: bool = False) -> Gap:
    """How far the law that drew the samples is from the same model's when it reads them; of the first `count` texts."""
    own = written._replace(prompts=written.prompts[:count], samples=written.samples[:count])
    ratios = -_log_ratios(own, own, lengths.max_new_tokens)
    values = one_sided(ratios.sum(axis=2)).mean(axis=1)
    return gap_of_distances(Sandwich(values, values), level=level, anytime=anytime)


def _log_ratios(reader: Written, writer: Written, most: int) -> Float[np.ndarray, "texts samples tokens"]:
    """log reader - log writer of each token of the writer's samples, 0 behind their end."""
    prompts = [prompt.tokens for prompt, items in zip(reader.prompts, writer.samples, strict=True) for _ in items]
    items = [item for found in writer.samples for item in found]
    read = reader.writer.backend.sequence_logprobs(prompts, [item.tokens for item in items]).logprobs
    ratios = np.zeros((len(items), most))
    for row, item, scores in zip(ratios, items, read, strict=True):
        row[: len(scores)] = scores - np.array(item.logprobs)
    return ratios.reshape(len(writer.samples), -1, most)

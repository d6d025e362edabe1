"""The frozen model in this process, through `vllm.LLM`.

- One token is generated per question, and the log-probabilities of chosen tokens come with it (`logprob_token_ids`);
  `label_walk.py` says which questions score label words of any length. Never `prompt_logprobs`: with it vLLM leaves
  its prefix cache aside and computes every prompt anew.
- The questions about a prompt stand together, so that all but the first find it in the cache.
- The engine starts with the settings of `icl vllm` (`vllm_launch.py`): the output layer in float32, and on a
  processor blocks of 32 tokens without compilation.
- A vLLM that does not know `logprob_token_ids` gives its 20 likeliest tokens; scores are then bounds.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from icl_compiler.backends.backend import (
    Generations,
    LabelScores,
    Progress,
    SequenceScores,
    Usage,
    require_fit,
    require_pairs,
)
from icl_compiler.backends.continuations import seed_of, until
from icl_compiler.backends.label_walk import Answer, LabelWalk, Question, answer_from_top
from icl_compiler.errors import BackendError, ModelError
from icl_compiler.models import locate
from icl_compiler.tokenizer import TokenIds

_MOST_IDS = 128  # that vLLM takes for one question
_MOST_TOP = 20  # that vLLM gives by default
_TO_END_S = 30.0
_AT_ONCE = 512
"""Questions handed over at a time: memory grows with them, not with the number of prompts."""


class VLLMOfflineBackend:
    """A causal language model on a vLLM engine of its own.

    Args:
        model: an embedded model (`icl models list`), a folder, or a name on the model hub.
        dtype: `auto` is what the model was saved in, and bfloat16 on a processor.
        settings: further arguments of `vllm.LLM`, such as `tensor_parallel_size`.

    `close()` ends the engine; so does the end of this process.

    Raises:
        MissingDependencyError: if vLLM is not installed.
        ModelError: if there is no such model, or vLLM cannot run it.
    """

    def __init__(self, model: str, dtype: str = "auto", **settings: Any) -> None:
        from icl_compiler.vllm_launch import KVCACHE_GIB, engine_arguments, require_vllm

        require_vllm()
        self.model = model
        folder = locate(model, kind="language model")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", KVCACHE_GIB)
        arguments = (
            engine_arguments() | {"max_logprobs": _MOST_IDS} | ({} if dtype == "auto" else {"dtype": dtype}) | settings
        )
        import vllm

        try:
            self._llm: Any = vllm.LLM(model=folder, **arguments)
        except (ValueError, RuntimeError, OSError) as error:
            raise ModelError(f"vLLM cannot run the model {model!r}: {str(error).splitlines()[0]}") from error
        self._vllm = vllm
        # Before vLLM's own clean-up at exit, which gives the engine five seconds and complains.
        self.close = weakref.finalize(self, _stop, self._llm.llm_engine.engine_core)
        config = self._llm.llm_engine.model_config
        self.max_prompt_tokens = int(config.max_model_len)
        self.device = f"vLLM {vllm.__version__} in this process, {str(config.dtype).removeprefix('torch.')}"
        self._exact = hasattr(vllm.SamplingParams(), "logprob_token_ids")

    def label_logprobs(
        self,
        prompts: Sequence[TokenIds],
        label_words: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> LabelScores:
        """Exact log-probability of every label word after every prompt, in nats; bounds where vLLM is old.

        Raises:
            ContextLengthError: if a prompt with its longest label word does not fit the model's context.
            BackendError: if the engine's numbers are not finite.
        """
        walk = LabelWalk.build(label_words, ids_per_question=_MOST_IDS)
        self._require_fit(prompts, max(len(word) for word in label_words))
        keys = [tuple(int(token) for token in prompt) for prompt in prompts]
        counts: dict[tuple[int, ...], int] = {}
        for key in keys:
            counts[key] = counts.get(key, 0) + 1
        distinct = sorted(counts)
        lower, upper = np.empty((2, len(distinct), len(label_words)))
        usage = Usage(sum(len(key) for key in keys), 0, 0)
        for row, (answers, cost) in enumerate(self._answers(distinct, [walk] * len(distinct))):
            lower[row], upper[row] = walk.scores(dict(enumerate(answers)))
            usage = usage.plus(cost)
            if progress is not None:
                progress(counts[distinct[row]])
        place = {key: row for row, key in enumerate(distinct)}
        rows = np.array([place[key] for key in keys], dtype=np.int64)
        return LabelScores(lower[rows], usage, None if self._exact else upper[rows])

    def sequence_logprobs(
        self,
        prompts: Sequence[TokenIds],
        continuations: Sequence[TokenIds],
        *,
        progress: Progress | None = None,
    ) -> SequenceScores:
        """Log-probability of each token of `continuations[i]` after `prompts[i]`, in nats: a question per token.

        Raises:
            ContextLengthError: if a prompt with its continuation does not fit the model's context.
            BackendError: if a continuation is empty, or vLLM is too old to answer for every token.
        """
        require_pairs(prompts, continuations)
        for prompt, continuation in zip(prompts, continuations, strict=True):
            self._require_fit([prompt], len(continuation))
        walks = [LabelWalk.build([continuation], ids_per_question=1) for continuation in continuations]
        usage = Usage(sum(len(prompt) for prompt in prompts), 0, 0)
        scores = []
        for answers, cost in self._answers([tuple(map(int, prompt)) for prompt in prompts], walks):
            lower, upper = (np.concatenate(side) for side in zip(*answers, strict=True))
            if not np.array_equal(lower, upper):
                raise BackendError(
                    f"vLLM {self._vllm.__version__} tells its {_MOST_TOP} likeliest tokens only, and a text to score "
                    "holds others; install a newer one, which knows logprob_token_ids"
                )
            scores.append(lower)
            usage = usage.plus(cost)
            if progress is not None:
                progress(1)
        return SequenceScores(scores, usage)

    def generate(
        self,
        prompts: Sequence[TokenIds],
        terminator: TokenIds,
        *,
        max_new_tokens: int,
        samples: int = 1,
        temperature: float = 1.0,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Generations:
        """`samples` continuations of every prompt, up to `terminator`; temperature 0 takes the likeliest token.

        Each prompt has a seed of its own, so that its samples do not depend on its neighbours. vLLM stops at a
        terminator of one token; one of several tokens is found here, after `max_new_tokens`.

        Raises:
            ContextLengthError: if a prompt with `max_new_tokens` more does not fit the model's context.
        """
        self._require_fit(prompts, max_new_tokens)
        end = [int(token) for token in terminator]
        drawn = samples if temperature > 0 else 1  # the likeliest token is always the same
        items = []
        usage = Usage(sum(len(prompt) for prompt in prompts), 0, 0)
        for first in range(0, len(prompts), _AT_ONCE):
            part = [[int(token) for token in prompt] for prompt in prompts[first : first + _AT_ONCE]]
            settings = [
                self._vllm.SamplingParams(
                    n=drawn, max_tokens=max_new_tokens, temperature=temperature, seed=seed_of(seed, first + row),
                    logprobs=0, ignore_eos=True, stop_token_ids=end if len(end) == 1 else [], detokenize=False,
                )
                for row in range(len(part))
            ]  # fmt: skip
            for reply in self._run(part, settings):
                found = []
                for output in reply.outputs:
                    tokens = list(output.token_ids)
                    told = [law[token].logprob for law, token in zip(output.logprobs, tokens, strict=True)]
                    found.append(until(end, tokens, told))
                    # The last token is drawn, but never read.
                    usage = usage.plus(Usage(0, len(tokens) - 1, 1))
                usage = usage.plus(Usage(0, _computed(reply), 0))
                items += found * (samples // drawn)
            if progress is not None:
                progress(len(part))
        return Generations(items, usage)

    def _answers(
        self, prompts: Sequence[tuple[int, ...]], walks: Sequence[LabelWalk]
    ) -> Iterator[tuple[list[Answer], Usage]]:
        """The answers to all questions about each prompt, in order, and what they cost."""
        first = 0
        while first < len(prompts):
            last, asked = first, 0
            while last < len(prompts) and (last == first or asked + len(walks[last].questions) <= _AT_ONCE):
                asked += len(walks[last].questions)
                last += 1
            texts, settings = [], []
            for prompt, walk in zip(prompts[first:last], walks[first:last], strict=True):
                texts += [[*prompt, *question.suffix] for question in walk.questions]
                settings += [self._settings(question) for question in walk.questions]
            replies = iter(self._run(texts, settings))
            for walk in walks[first:last]:
                answers, computed = [], 0
                for question in walk.questions:
                    reply = next(replies)
                    answers.append(self._answer(question, reply.outputs[0].logprobs[0]))
                    computed += _computed(reply)
                yield answers, Usage(0, computed, len(walk.questions))
            first = last

    def _settings(self, question: Question) -> Any:
        count = len(question.ids)
        wanted = (
            {"logprobs": count, "logprob_token_ids": list(question.ids)} if self._exact else {"logprobs": _MOST_TOP}
        )
        return self._vllm.SamplingParams(max_tokens=1, temperature=0, detokenize=False, **wanted)

    def _answer(self, question: Question, law: dict[int, Any]) -> Answer:
        told = {token: float(found.logprob) for token, found in law.items()}
        if any(np.isnan(value) for value in told.values()):
            raise BackendError(
                f"the model {self.model!r} gave log-probabilities that are not numbers; "
                "check that the weights are complete"
            )
        if not self._exact:
            return answer_from_top(question.ids, told, _MOST_TOP)
        found = np.array([told[token] for token in question.ids])
        return Answer(found, found)

    def _run(self, prompts: list[list[int]], settings: list[Any]) -> list[Any]:
        inputs = [self._vllm.TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        found: list[Any] = self._llm.generate(inputs, settings, use_tqdm=False)
        return found

    def _require_fit(self, prompts: Sequence[TokenIds], more: int) -> None:
        require_fit(prompts, more, model=self.model, max_prompt_tokens=self.max_prompt_tokens)


def _stop(core: Any) -> None:
    core.shutdown(timeout=_TO_END_S)


def _computed(reply: Any) -> int:
    """Tokens of the prompt that did not come from the cache."""
    return len(reply.prompt_token_ids) - (reply.num_cached_tokens or 0)

"""How many examples suffice, or do not: bounds with constants, and the four orders of arXiv 2506.08060.

- TV is total variation. `outcomes` (K) counts what can be answered: the vocabulary for one token, labels and
  "other" for a classification, vocabulary**length for whole answers. `delta` is the probability of failure.
- All of it is about a learner without prior: it sees samples of the law and nothing else. A frozen language
  model has a prior. It may need far fewer examples, or stay at a positive TV for ever. So these are
  yardsticks, neither upper nor lower bounds on its curve.
- The functions `sharma_*` are orders with the unknown constant set to 1: to be drawn, never to be promised.
- Counts are Python integers up to 1e100, so vocabulary**length may be given as it is. Beyond 1e15 the bound
  is vacuous in practice, beyond 1e100 it is refused.
- All raise EvaluationError, with the name, for a count out of range and an epsilon or delta outside (0, 1).
"""

import math

from scipy.optimize import minimize_scalar

from icl_compiler.errors import EvaluationError


def n_tv(outcomes: int, *, epsilon: float, delta: float) -> int:
    """Samples with which the empirical law is within TV `epsilon` of the law, with probability 1 - `delta`.

    The smaller of two sufficient counts. Over all events: ln((2^K - 2) / delta) / 2 eps^2 (Bretagnolle-Huber-
    Carol; Hoeffding's for K = 2). Mean plus deviation, smaller from about K = 150 on: (sqrt(K - 1) / 2 +
    sqrt(ln(1/delta) / 2))^2 / eps^2 (McDiarmid). For i.i.d. samples. Sources: van der Vaart and Wellner 1996,
    A.6.6; Canonne 2020 (arXiv 2002.11457), theorem 1.

    >>> n_tv(77, epsilon=0.1, delta=0.05), n_tv(50_000, epsilon=0.1, delta=0.05)
    (2819, 1277492)
    """
    _check(outcomes=(outcomes, 2))
    _check_parts(epsilon=epsilon, delta=delta)
    all_events = _log_events(outcomes, delta) / (2 * epsilon**2)
    return _ceil(min(all_events, (_mean_term(outcomes) + _deviation_term(delta)) ** 2 / epsilon**2))


def eps_tv(n: int, outcomes: int, *, delta: float) -> float:
    """TV within which `n` samples place the empirical law with probability 1 - `delta`, in (0, 1].

    Inverse of `n_tv`, with its conditions and sources.

    >>> round(eps_tv(2819, 77, delta=0.05), 4)
    0.1
    """
    _check(n=(n, 1), outcomes=(outcomes, 2))
    _check_parts(delta=delta)
    all_events = math.sqrt(_log_events(outcomes, delta) / (2 * n))
    return min(1.0, all_events, (_mean_term(outcomes) + _deviation_term(delta)) / math.sqrt(n))


def n_all(contexts: int, outcomes: int, *, epsilon: float, delta: float) -> int:
    """Samples, the same number in each context, with which all contexts are within `epsilon` at once.

    m times `n_tv` at delta / m (union bound): what the order `sharma_s1` becomes with constants. It adds
    outcomes and ln(m/delta) where S1 multiplies them. Conditions of `n_tv` in each context.

    >>> n_all(100, 2, epsilon=0.1, delta=0.05)
    41500
    """
    _check(contexts=(contexts, 1))
    _check_parts(delta=delta)
    return contexts * n_tv(outcomes, epsilon=epsilon, delta=delta / contexts)


def n_avg(contexts: int, outcomes: int, *, epsilon: float, delta: float) -> int:
    """Samples with which the average TV over contexts is within `epsilon`, with probability 1 - `delta`.

    (sqrt(m (K - 1)) / 2 + sqrt(ln(1/delta) / 2))^2 / eps^2. The average weighs a context by its share of the
    samples, which is fixed beforehand; samples are independent. This is the mean TV that the evaluator
    measures. Source: `n_tv`'s second bound, Cauchy-Schwarz over contexts, McDiarmid.

    >>> n_avg(100, 2, epsilon=0.1, delta=0.05)
    3874
    """
    _check(contexts=(contexts, 1), outcomes=(outcomes, 2))
    _check_parts(epsilon=epsilon, delta=delta)
    return _ceil((_mean_term(outcomes, contexts) + _deviation_term(delta)) ** 2 / epsilon**2)


def eps_avg(n: int, contexts: int, outcomes: int, *, delta: float) -> float:
    """Average TV over contexts that `n` samples in all ensure with probability 1 - `delta`, in (0, 1].

    Inverse of `n_avg`, with its conditions.

    >>> round(eps_avg(3874, 100, 2, delta=0.05), 4)
    0.1
    """
    _check(n=(n, 1), contexts=(contexts, 1), outcomes=(outcomes, 2))
    _check_parts(delta=delta)
    return min(1.0, (_mean_term(outcomes, contexts) + _deviation_term(delta)) / math.sqrt(n))


def n_iid_contexts(contexts: int, samples_per_context: int, *, delta: float) -> int:
    """Draws after which each of `contexts` equally likely contexts came up often enough.

    m (a + L + sqrt(L^2 + 2 a L)) with L = ln(m/delta): at least a = `samples_per_context` in each, with
    probability 1 - `delta`. For i.i.d. uniform contexts; a = 1 is the coupon collector.
    Source: Chernoff's lower tail exp(-(mu - a)^2 / 2 mu), union bound.

    >>> n_iid_contexts(50, 185, delta=0.05)
    12147
    """
    _check(contexts=(contexts, 1), samples_per_context=(samples_per_context, 1))
    _check_parts(delta=delta)
    log_term = math.log(contexts / delta)
    extra = log_term + math.sqrt(log_term**2 + 2 * samples_per_context * log_term)
    return _ceil(contexts * (samples_per_context + extra))


def mean_tv(n: int, outcomes: int, *, contexts: int = 1) -> float:
    """Upper bound on the expected TV of the empirical law (of its average over contexts), in (0, 1].

    sqrt(m (K - 1) / n) / 2 for `n` samples in all: the upper edge of the band whose lower edge is
    `assouad_lower`. Conditions of `n_avg`. Source: Jensen and Cauchy-Schwarz.

    >>> mean_tv(400, 5)
    0.05
    """
    _check(n=(n, 1), contexts=(contexts, 1), outcomes=(outcomes, 2))
    return min(1.0, _mean_term(outcomes, contexts) / math.sqrt(n))


def minimax_tv(n: int, outcomes: int) -> float:
    """Asymptotic expected TV of the best estimator in the worst case, sqrt((K - 1) / (2 pi n)), capped at 1.

    A limit, not a bound: n much larger than `outcomes`. The empirical law has it where all outcomes are
    equally likely. For i.i.d. samples. Source: Kamath, Orlitsky, Pichapati and Suresh 2015.

    >>> round(minimax_tv(2000, 77), 4)
    0.0778
    """
    _check(n=(n, 1), outcomes=(outcomes, 2))
    return min(1.0, math.sqrt((outcomes - 1) / (2 * math.pi * n)))


def laplace_tv(n: int, outcomes: int) -> float:
    """Upper bound on the expected TV of the estimate (count + 1) / (n + K), in [0, 1): never vacuous.

    sqrt((K - 1) / (n + K)): the learner with a flat prior, also without any sample. For i.i.d. samples.
    Source: E KL <= ln(1 + (K - 1) / (n + 1)) by Jensen, then Bretagnolle-Huber.

    >>> round(laplace_tv(100, 6), 4)
    0.2172
    """
    _check(n=(n, 0), outcomes=(outcomes, 2))
    return math.sqrt((outcomes - 1) / (n + outcomes))


def laplace_avg(n: int, contexts: int, outcomes: int) -> float:
    """Upper bound on the expected average TV when contexts arrive i.i.d., unseen ones included, in (0, 1].

    sqrt(m (K - 1) / (n + 1)) for `laplace_tv`'s estimate in each of m contexts, weighted by their
    probabilities w, whatever these are. Source: `laplace_tv`, Jensen, E 1/(N + 1) <= 1 / ((n + 1) w).

    >>> round(laplace_avg(9999, 100, 2), 4)
    0.1
    """
    _check(n=(n, 0), contexts=(contexts, 1), outcomes=(outcomes, 2))
    return min(1.0, math.sqrt(contexts * (outcomes - 1) / (n + 1)))


def laplace_sequence(n: int, vocabulary: int, length: int) -> float:
    """Upper bound on the expected TV between whole answers, each prefix learned from `n` samples, in [0, 1].

    sqrt(1 - ((n + 1) / (n + V))^l): Laplace estimates of the next token in every prefix state, each of which
    has `n` i.i.d. samples. The need grows with l, not l^2. Source: chain rule of KL, Bretagnolle-Huber.

    >>> round(laplace_sequence(40, 3, 5), 3)
    0.46
    """
    _check(n=(n, 0), vocabulary=(vocabulary, 2), length=(length, 1))
    return math.sqrt(-math.expm1(length * math.log1p(-(vocabulary - 1) / (n + vocabulary))))


def n_laplace_sequence(vocabulary: int, length: int, *, epsilon: float) -> int:
    """Samples per prefix state with which the expected TV between whole answers is at most `epsilon`.

    Inverse of `laplace_sequence`, with its conditions; about l (V - 1) / eps^2.

    >>> n_laplace_sequence(3, 5, epsilon=0.1)
    993
    """
    _check(vocabulary=(vocabulary, 2), length=(length, 1))
    _check_parts(epsilon=epsilon)
    # 1 - (n + 1) / (n + V) may be at most `share`.
    share = -math.expm1(math.log1p(-(epsilon**2)) / length)
    return max(0, _ceil((vocabulary - 1) / share - vocabulary))


def prefix_states(contexts: int, vocabulary: int, length: int) -> int:
    """Number of states in which a next token has to be known: m (V^l - 1) / (V - 1), exact.

    What `contexts` has to count where answers of `length` tokens are meant, unless few states are reached.

    >>> prefix_states(2, 3, 4)
    80
    """
    _check(contexts=(contexts, 1), vocabulary=(vocabulary, 2), length=(length, 1))
    states: int = contexts * (vocabulary**length - 1) // (vocabulary - 1)
    return states


def n_hybrid(contexts: int, vocabulary: int, length: int, *, epsilon: float, delta: float) -> int:
    """Samples, balanced over prefix states, with which the laws of whole answers are within `epsilon`.

    `n_all` over `prefix_states` at epsilon / l each. Grows with the number of states, V^(l-1): mostly a proof
    that tables do not learn text. Conditions of `n_all`. Source: chain rule of TV (hybrid argument).

    >>> n_hybrid(1, 2, 3, epsilon=0.3, delta=0.05)
    1974
    """
    _check_parts(epsilon=epsilon)
    states = prefix_states(contexts, vocabulary, length)
    return n_all(states, vocabulary, epsilon=epsilon / length, delta=delta)


def unseen_mass(n: int, contexts: int) -> float:
    """Upper bound on the expected share of queries whose context never came up in `n` draws, in (0, 1].

    max over weights of sum w (1 - w)^n, at most m / (n + 1) * (n / (n + 1))^n, which is below m / (e n). For
    i.i.d. contexts of any weights. Source: maximum of w (1 - w)^n.

    >>> round(unseen_mass(1000, 77), 4)
    0.0283
    """
    _check(n=(n, 0), contexts=(contexts, 1))
    return min(1.0, contexts / (n + 1) * (n / (n + 1)) ** n)


def assouad_lower(n: int, outcomes: int, *, contexts: int = 1) -> float:
    """Expected TV that every estimator has on some law, in [0, 1/2): the lower edge of the band.

    max over g of g/2 (1 - sqrt(1 - b^(2n))), b = 1 - 2/K' (1 - sqrt(1 - g^2)), K' = 2 floor(K / 2): about
    0.095 sqrt(K / n), and near 1/2 where n is far below K. For i.i.d. samples; with m contexts, ceil(n / m)
    in each. A model with a prior may be better on the law at hand. `outcomes` has no upper limit.
    Source: Assouad's lemma on paired outcomes (Canonne 2020, arXiv 2002.11457), TV^2 <= 1 - BC^2.

    >>> round(assouad_lower(3242, 50_000), 2)
    0.28
    """
    _check(n=(n, 0), contexts=(contexts, 1))
    if outcomes < 2:
        raise EvaluationError(f"outcomes should be >= 2, is {outcomes}")
    # The bound rises with K: numbers beyond a float may be taken for smaller ones.
    paired = float(2 * min(outcomes // 2, 10**100))
    samples = float(-(-n // contexts))

    def at(gap: float) -> float:
        shift = 2 / paired * gap**2 / (1 + math.sqrt(1 - gap**2))
        log_overlap = 2 * samples * math.log1p(-shift) if shift < 1 else (-math.inf if n else 0.0)
        return gap / 2 * (1 - math.sqrt(-math.expm1(log_overlap)))

    # Every gap gives a valid bound. The best is near sqrt(K / n), so search on its logarithm, up to 1.
    best = minimize_scalar(
        lambda log_gap: -at(math.exp(log_gap)),
        bounds=(min(-3.0, 0.5 * math.log(paired / max(samples, 1)) - 3), 0.0),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return max(at(1.0), -float(best.fun))


def eps_selection(n: int, *, candidates: int, delta: float) -> float:
    """Largest distance between a measured and a true mean loss over `candidates` prompts at once, in (0, 1].

    sqrt(ln(2 C / delta) / 2n) for `n` held-out i.i.d. queries and any loss in [0, 1]. Candidates are fixed
    before these queries are seen: the list that was tried, vocabulary**tokens for all prompts of so many
    tokens, or pool**shots for all ordered choices. Source: Hoeffding, union bound.

    >>> round(eps_selection(200, candidates=16, delta=0.05), 4)
    0.1271
    """
    _check(n=(n, 1))
    return min(1.0, math.sqrt(_log_candidates(candidates, delta) / (2 * n)))


def n_selection(*, candidates: int, epsilon: float, delta: float) -> int:
    """Queries with which all `candidates` are measured within `epsilon` at once: inverse of `eps_selection`.

    ceil(ln(2 C / delta) / 2 eps^2). With candidates = vocabulary**length it has the shape of `sharma_s2`, and
    bounds the probabilities of single answers (or the means of so many fixed tests), which is weaker than TV.

    >>> n_selection(candidates=50_000**8, epsilon=0.1, delta=0.05)
    4513
    """
    _check_parts(epsilon=epsilon)
    return _ceil(_log_candidates(candidates, delta) / (2 * epsilon**2))


def n_fixed_context(*, epsilon: float, delta: float) -> int:
    """Samples that place one probability (two outcomes, one context) within `epsilon`.

    ceil(ln(2/delta) / 2 eps^2): `sharma_s4` with a constant; here TV = |p - estimate|. For i.i.d. samples.
    Source: Hoeffding.

    >>> n_fixed_context(epsilon=0.1, delta=0.05)
    185
    """
    return n_selection(candidates=1, epsilon=epsilon, delta=delta)


def n_queries(true_tv: float, *, epsilon: float, delta: float) -> int:
    """Queries to certify a gap of at most `epsilon` when it is `true_tv`: ln(1/delta) / 2 (eps - tv)^2.

    With so many the one-sided Hoeffding bound succeeds about every second time; betting needs fewer.
    For i.i.d. queries and 0 <= `true_tv` < `epsilon`.

    >>> n_queries(0.05, epsilon=0.1, delta=0.05)
    600
    """
    _check_parts(epsilon=epsilon, delta=delta)
    if not 0 <= true_tv < epsilon:
        raise EvaluationError(f"true_tv should be in [0, epsilon), is {true_tv} with epsilon {epsilon}")
    return _ceil(math.log(1 / delta) / (2 * (epsilon - true_tv) ** 2))


# Linear classification. Errors are shares of wrong labels, not TV; but for `n_agnostic` a noiseless rule of
# the class gave the labels. The VC dimension D is d for rules through the origin in d dimensions, else d + 1.


def n_loo(vc_dimension: int, *, epsilon: float, delta: float | None = None) -> int:
    """Examples with which the max-margin rule errs at most `epsilon`, in expectation or with probability.

    ceil(D / eps) - 1 in expectation; with `delta`, by Markov, ceil(D / (eps delta)) - 1. For i.i.d. examples
    of a linear rule: the true form of `sharma_s3`. Source: leave-one-out, at most D essential support vectors
    (Vapnik; Haussler, Littlestone and Warmuth 1994 for any class).

    >>> n_loo(11, epsilon=0.1)
    109
    """
    _check(vc_dimension=(vc_dimension, 1))
    _check_parts(epsilon=epsilon, delta=1 / 2 if delta is None else delta)
    return _ceil(vc_dimension / (epsilon * (1 if delta is None else delta))) - 1


def n_svm(vc_dimension: int, *, epsilon: float, delta: float) -> int:
    """Examples with which the max-margin rule errs at most `epsilon`, with high probability.

    (2/eps) (D ln 4 + ln(1/delta)) + 2 D. For i.i.d. examples of a linear rule. Source: stable compression of
    size D over 2 D blocks; the rate is that of Bousquet, Hanneke, Moran and Zhivotovskiy 2020.

    >>> n_svm(11, epsilon=0.1, delta=0.05)
    387
    """
    _check(vc_dimension=(vc_dimension, 1))
    _check_parts(epsilon=epsilon, delta=delta)
    log_term = vc_dimension * math.log(4) - math.log(delta)
    return _ceil(2 / epsilon * log_term + 2 * vc_dimension)


def n_blumer(vc_dimension: int, *, epsilon: float, delta: float) -> int:
    """Examples with which any rule without training errors errs at most `epsilon`, with high probability.

    (4 log2(2/delta) + 8 D log2(13/eps)) / eps: the sum, which is never smaller than the maximum that is also
    found. For i.i.d. examples of a rule of the class. Source: Blumer, Ehrenfeucht, Haussler and Warmuth 1989.

    >>> n_blumer(11, epsilon=0.1, delta=0.05)
    6393
    """
    _check(vc_dimension=(vc_dimension, 1))
    _check_parts(epsilon=epsilon, delta=delta)
    return _ceil((4 * math.log2(2 / delta) + 8 * vc_dimension * math.log2(13 / epsilon)) / epsilon)


def n_ehkv(vc_dimension: int, *, epsilon: float) -> int:
    """Examples that every learner needs on some rule and law to err at most `epsilon`: (D - 1) / (32 eps).

    With fewer it fails with probability at least 1/100. For D >= 2, `epsilon` up to 1/8, and i.i.d. examples
    of a rule of the class. Source: Ehrenfeucht, Haussler, Kearns and Valiant 1989.

    >>> n_ehkv(11, epsilon=0.01)
    32
    """
    _check(vc_dimension=(vc_dimension, 2))
    if not 0 < epsilon <= 1 / 8:
        raise EvaluationError(f"epsilon should be in (0, 1/8] for this lower bound, is {epsilon}")
    return _ceil((vc_dimension - 1) / (32 * epsilon))


def n_agnostic(vc_dimension: int, *, epsilon: float, delta: float) -> int:
    """Examples with which the rule of fewest training errors is within `epsilon` of the best of its class.

    The smallest n >= D with 2 (sqrt(2 D ln(e n / D) / n) + sqrt(ln(2/delta) / 2n)) <= eps, with probability
    1 - `delta`, for any i.i.d. examples: labels may be noisy. Source: Mohri, Rostamizadeh and Talwalkar 2018,
    corollary 3.19, twice.

    >>> n_agnostic(11, epsilon=0.1, delta=0.05)
    106569
    """
    _check(vc_dimension=(vc_dimension, 1))
    _check_parts(epsilon=epsilon, delta=delta)

    def excess(n: int) -> float:
        complexity = math.sqrt(2 * vc_dimension * math.log(math.e * n / vc_dimension) / n)
        return 2 * (complexity + math.sqrt(math.log(2 / delta) / (2 * n)))

    # Falls with n from n = D on: double, then halve.
    low, high = vc_dimension, 2 * vc_dimension
    while excess(high) > epsilon:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if excess(middle) > epsilon else (low, middle)
    return high


# The four dataset sizes in the abstract of arXiv 2506.08060. That its epsilon is a TV per context is our
# reading.


def sharma_s1(contexts: int, vocabulary: int, *, epsilon: float, delta: float) -> float:
    """ORDER ONLY, constant unknown and set to 1, never a guarantee: m V / eps^2 ln(m / delta).

    Text generation over m contexts, outputs of fixed length (arXiv 2506.08060). See `n_all` for constants.

    >>> round(sharma_s1(100, 77, epsilon=0.1, delta=0.05))
    5852695
    """
    _check(contexts=(contexts, 1), vocabulary=(vocabulary, 1))
    _check_parts(epsilon=epsilon, delta=delta)
    return contexts * vocabulary / epsilon**2 * math.log(contexts / delta)


def sharma_s2(length: int, vocabulary: int, *, epsilon: float, delta: float) -> float:
    """ORDER ONLY, constant unknown and set to 1, never a guarantee: l ln V / eps^2 ln(1 / delta).

    Text generation with bounded context (arXiv 2506.08060). With no constant is it a TV guarantee for whole
    answers without structure: see `assouad_lower` at vocabulary**length outcomes.

    >>> round(sharma_s2(1, 50_000, epsilon=0.1, delta=0.05))
    3241
    """
    _check(length=(length, 1), vocabulary=(vocabulary, 1))
    _check_parts(epsilon=epsilon, delta=delta)
    return length * math.log(vocabulary) / epsilon**2 * math.log(1 / delta)


def sharma_s3(dimension: int, *, epsilon: float) -> float:
    """ORDER ONLY, constant unknown and set to 1, never a guarantee: d / eps.

    Linear classification in d dimensions (arXiv 2506.08060). See `n_loo` and `n_svm` for constants.

    >>> sharma_s3(10, epsilon=0.1)
    100.0
    """
    _check(dimension=(dimension, 1))
    _check_parts(epsilon=epsilon)
    return dimension / epsilon


def sharma_s4(*, epsilon: float, delta: float) -> float:
    """ORDER ONLY, constant unknown and set to 1, never a guarantee: ln(1 / delta) / eps^2.

    Linear classification with fixed context (arXiv 2506.08060). See `n_fixed_context` for the constant.

    >>> round(sharma_s4(epsilon=0.1, delta=0.05))
    300
    """
    _check_parts(epsilon=epsilon, delta=delta)
    return math.log(1 / delta) / epsilon**2


def _log_events(outcomes: int, delta: float) -> float:
    # ln((2^K - 2) / delta)
    return outcomes * math.log(2) + math.log1p(-(2.0 ** (1 - outcomes))) - math.log(delta)


def _mean_term(outcomes: int, contexts: int = 1) -> float:
    return math.sqrt(contexts) * math.sqrt(outcomes - 1) / 2


def _deviation_term(delta: float) -> float:
    return math.sqrt(math.log(1 / delta) / 2)


def _log_candidates(candidates: int, delta: float) -> float:
    _check_parts(delta=delta)
    if candidates < 1:
        raise EvaluationError(f"candidates should be >= 1, is {candidates}")
    return math.log(2) + math.log(candidates) - math.log(delta)


def _ceil(x: float) -> int:
    # 3 / 0.1 is 30, whatever the last digit says.
    return math.ceil(x * (1 - 1e-12))


def _check(**counts: tuple[int, int]) -> None:
    for name, (count, least) in counts.items():
        if not least <= count <= 10**100:
            found = count if count < least else "larger: the bound says nothing"
            raise EvaluationError(f"{name} should be between {least} and 1e100, is {found}")


def _check_parts(**parts: float) -> None:
    for name, part in parts.items():
        if not 0 < part < 1:
            raise EvaluationError(f"{name} should be between 0 and 1, both excluded, is {part}")

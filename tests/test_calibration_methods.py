"""Methods of calibration on answers whose true law is known."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import logsumexp

from icl_compiler.calibration.choosing import LEAST_QUERIES, fit_and_choose
from icl_compiler.calibration.held_out import HeldOut, log_loss
from icl_compiler.calibration.law import Anchors, Calibration, Evidence, Law, nearest_answers
from icl_compiler.calibration.methods import (
    batch,
    bias,
    contextual,
    knn,
    mixture,
    normalise,
    pmi,
    product,
    temperature,
)
from icl_compiler.calibration.votes import Vote, Voters, law_of_votes
from icl_compiler.errors import CalibrationError, RegistryError
from icl_compiler.registry import CALIBRATIONS, resolve


def normalised(scores):
    return scores - logsumexp(scores, axis=1, keepdims=True)


def drawn(law, rng):
    return (law.cumsum(axis=1) < rng.random((len(law), 1))).sum(axis=1).clip(max=law.shape[1] - 1)


def truth(queries, labels, rng, strength=2.0):
    """The log of a law, and labels drawn from it."""
    logs = normalised(strength * rng.normal(size=(queries, labels)))
    return logs, drawn(np.exp(logs), rng)


def answered(logprobs, labels, *, voters=None, **more):
    return HeldOut(np.arange(len(labels)), labels, Evidence(logprobs, None, voters), **more)


def voting(labels, classes, share, rng, k=72):
    """Voters who have the query's label with probability `share`, else any; the nearer ones no more than the others."""
    right = rng.random((len(labels), k)) < share
    scores = np.sort(rng.random((len(labels), k)))[:, ::-1]
    return Voters(np.where(right, labels[:, None], rng.integers(classes, size=(len(labels), k))), scores)


def brier(law, labels):
    return ((law - np.eye(law.shape[1])[labels]) ** 2).sum(axis=1).mean()


# Single methods


@pytest.mark.parametrize("t", [0.5, 2.0, 4.0])
def test_a_known_temperature_is_found(t):
    rng = np.random.default_rng(1)
    true, labels = truth(4000, 5, rng)
    mass = np.log(rng.uniform(0.2, 1, size=(4000, 1)))  # the share of "other" does not matter
    [found] = temperature(answered(normalised(true / t) + mass, labels))
    assert 1 / found.scale == pytest.approx(1 / t, rel=0.08)
    assert found.offsets is None


def test_temperature_by_brute_force():
    rng = np.random.default_rng(2)
    logs, labels = truth(60, 4, rng)
    held_out = answered(3 * logs - 0.1, labels)
    [found] = temperature(held_out)
    grid = np.linspace(0.01, 3, 3000)
    losses = [
        -normalised(scale * held_out.evidence.logprobs)[range(60), labels].mean() + (scale - 1) ** 2 / (2 * 9 * 60)
        for scale in grid
    ]
    assert found.scale == pytest.approx(grid[np.argmin(losses)], abs=2e-3)


def test_batch_calibration_takes_a_planted_bias_away():
    rng = np.random.default_rng(3)
    true, labels = truth(2000, 4, rng, strength=3.0)
    planted = np.array([4.0, 0.0, -2.0, 1.0])
    held_out = answered(normalised(true + planted), labels)
    [found] = batch(held_out)
    before = normalise(held_out)[0].law(held_out.evidence).probabilities
    after = found.law(held_out.evidence).probabilities
    skew = np.abs(before.mean(axis=0) - 0.25).sum()
    assert skew > 0.4
    assert np.abs(after.mean(axis=0) - 0.25).sum() < 0.7 * skew
    assert (after.argmax(axis=1) == labels).mean() > (before.argmax(axis=1) == labels).mean() + 0.05
    by_hand = before / before.mean(axis=0)
    np.testing.assert_allclose(after, by_hand / by_hand.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("method", "name"), [(contextual, "contextual"), (pmi, "pmi")])
def test_a_prior_is_divided_out(method, name):
    held_out = answered(np.log([[0.4, 0.4], [0.1, 0.3]]), np.array([0, 1]), priors={name: np.array([0.25, 0.75])})
    [found] = method(held_out)
    np.testing.assert_allclose(found.law(held_out.evidence).probabilities, [[0.75, 0.25], [0.5, 0.5]])
    assert method(replace(held_out, priors={})) == []


def test_a_planted_bias_is_found_and_shrinks_where_data_is_scarce():
    rng = np.random.default_rng(4)
    true, labels = truth(4000, 3, rng)
    planted = np.array([1.0, 0.0, -1.0])
    found = bias(answered(normalised(true - planted), labels))[-1]
    np.testing.assert_allclose(found.offsets - found.offsets.mean(), planted, atol=0.15)
    many, few = truth(200, 150, rng)
    for narrow, wide in zip(bias(answered(many, few)), bias(answered(many, few))[1:], strict=False):
        assert np.abs(narrow.offsets).sum() < np.abs(wide.offsets).sum()
    strengths = [np.abs(each.offsets).max() for each in bias(answered(many, few))]
    assert strengths[0] < 0.05


def test_votes_that_are_noise_get_no_weight():
    rng = np.random.default_rng(5)
    true, labels = truth(600, 4, rng)
    held_out = answered(true, labels, voters=voting(labels, 4, 0.0, rng))
    assert mixture(held_out)[0].weight < 0.08
    pooled = product(held_out)[0]
    alone = temperature(held_out)[0].law(held_out.evidence).probabilities
    np.testing.assert_allclose(pooled.law(held_out.evidence).probabilities, alone, atol=0.15)
    assert pooled.scale == pytest.approx(1, abs=0.15)


def test_a_model_that_is_noise_gets_no_weight():
    rng = np.random.default_rng(6)
    labels = rng.integers(4, size=600)
    held_out = answered(normalised(2 * rng.normal(size=(600, 4))), labels, voters=voting(labels, 4, 0.6, rng))
    [linear], [pooled, *_] = mixture(held_out), product(held_out)
    assert linear.scale < 0.3 or linear.weight > 0.9
    assert pooled.scale < 0.15
    assert pooled.weight > 0.5
    for found in (linear, pooled):
        assert (found.law(held_out.evidence).probabilities.argmax(axis=1) == labels).mean() > 0.98


def test_the_weight_of_a_mixture_by_brute_force():
    rng = np.random.default_rng(7)
    logs, labels = truth(80, 3, rng)
    held_out = answered(normalised(logs / 2), labels, voters=voting(labels, 3, 0.3, rng))
    [found] = mixture(held_out)
    votes = law_of_votes(held_out.evidence.voters, found.vote, 3)

    def loss(scale, weight):
        pooled = (1 - weight) * np.exp(normalised(scale * held_out.evidence.logprobs)) + weight * votes
        return -np.log(pooled[range(80), labels]).mean() + (scale - 1) ** 2 / (2 * 9 * 80)

    grid = min(loss(scale, weight) for scale in np.linspace(0, 6, 121) for weight in np.linspace(0, 1, 101))
    assert loss(found.scale, found.weight) <= grid + 1e-4


def test_knn_prompting_learns_what_a_biased_law_hides():
    """The model always prefers one label, but how much tells the labels apart; no rescaling of single answers does."""
    rng = np.random.default_rng(8)
    labels = rng.integers(2, size=300)
    first = np.where(labels == 0, 0.7, rng.choice([0.55, 0.85], size=300)) + rng.normal(size=300) * 0.02
    held_out = answered(np.log(np.stack([first, 1 - first], axis=1)), labels)
    [found] = knn(held_out)
    choice = fit_and_choose(held_out)
    by_name = {candidate.name: candidate for candidate in choice.candidates}
    assert choice.calibration.method == "knn"
    assert by_name["knn"].accuracy > 0.95 > 0.7 > by_name["bias"].accuracy
    # by hand: the label of the nearest anchor in Kullback-Leibler divergence, which for two labels is on a line
    asked = np.array([[0.551, 0.449], [0.7, 0.3]])
    everyone = np.broadcast_to(labels, (2, 300))
    law = found.law(Evidence(np.log(asked), None, Voters(everyone, np.zeros((2, 300)))))
    assert law.probabilities.argmax(axis=1).tolist() == [1, 0]


# Choosing


def test_the_risk_is_that_of_queries_that_a_candidate_was_not_fitted_to():
    """Labels are noise, so that whatever was learned from 60 of them is wrong for others; only constants help."""
    rng = np.random.default_rng(9)
    logs, labels = truth(60, 30, rng)
    labels = rng.integers(30, size=60)
    choice = fit_and_choose(answered(normalised(3 * logs), labels, voters=voting(labels, 30, 0.0, rng)))
    assert all(candidate.risk > np.log(30) - 0.2 for candidate in choice.candidates)


def test_chosen_is_never_much_worse_than_none():
    rng = np.random.default_rng(10)
    worse = []
    for trial in range(16):
        true, labels = truth(60, 3 + trial % 4, rng)
        classes = true.shape[1]
        mass = np.log(1 - 0.02 * (trial % 2))
        choice = fit_and_choose(answered(true[:40] + mass, labels[:40], voters=voting(labels[:40], classes, 0.1, rng)))
        fresh, right = truth(2000, classes, rng)
        evidence = Evidence(fresh + mass, None, voting(right, classes, 0.1, rng))
        if choice.calibration.anchors is not None:
            everyone = np.broadcast_to(labels[choice.calibration.anchors.rows], (2000, 40))
            evidence = evidence._replace(voters=Voters(everyone, np.zeros(everyone.shape)))
        targets = np.eye(classes)[right]
        after = log_loss(choice.calibration.law(evidence).probabilities, targets).mean()
        worse.append(after - log_loss(np.exp(fresh + mass), targets).mean())
    assert np.mean(worse) < 0.01
    assert max(worse) < 0.15


def test_ties_go_to_the_simpler_one():
    rng = np.random.default_rng(11)
    true, labels = truth(300, 3, rng)
    held_out = answered(true + np.log(0.6), labels, priors={"pmi": np.full(3, 1 / 3)})
    choice = fit_and_choose(held_out, ["normalise", "pmi"])  # of a flat prior nothing is left
    assert choice.calibration.method == "normalise"
    assert choice.why == "normalise has the lowest risk"
    [saved] = [candidate.saved for candidate in choice.candidates if candidate.name == "normalise"]
    assert saved == pytest.approx(-np.log(0.6))


def test_the_lowest_risk_is_chosen_by_however_little():
    rng = np.random.default_rng(15)
    true, labels = truth(40, 3, rng)
    choice = fit_and_choose(answered(normalised(1.3 * true), labels))
    chosen = next(each for each in choice.candidates if each.calibration is choice.calibration)
    assert chosen.risk == min(each.risk for each in choice.candidates)


@pytest.mark.parametrize("name", ["temperature", "bias", "mixture", "product", "knn"])
def test_towards_a_reference_numbers_are_those_of_least_total_variation_and_a_little_log_loss(name: str):
    """The reference is sure, and right where the votes are; log-loss pays for every error, total variation once."""
    rng = np.random.default_rng(16)
    true, labels = truth(150, 3, rng)
    reference = np.eye(3)[labels] * 0.97 + 0.01
    held_out = answered(true, labels, voters=voting(labels, 3, 0.02, rng), reference=reference)
    cautious = replace(held_out, reference=None)
    near, far = (resolve("calibration", CALIBRATIONS, name)(each) for each in (held_out, cautious))
    for nearer, fitted in zip(near, far, strict=True):
        votes = None
        if nearer.vote is not None:
            heard = held_out.evidence.voters
            if nearer.anchors is not None:
                others = np.where(np.eye(150, dtype=bool), -1, labels[None, :])
                heard = nearest_answers(held_out.evidence.middle, held_out.evidence.middle, others)
            votes = law_of_votes(heard, nearer.vote, 3)
        laws = [each.combined(true, votes) for each in (nearer, fitted)]
        at = [cost(held_out, law) for law in laws]
        assert at[0] <= at[1]
        for factor in (0.8, 1.25):  # it is a minimum
            weights = [nearer.weight * factor] * (nearer.vote is not None and (factor < 1 or nearer.pooling == "log"))
            every = [replace(nearer, scale=nearer.scale * factor), *(replace(nearer, weight=w) for w in weights)]
            assert min(cost(held_out, each.combined(true, votes)) for each in every) >= at[0] - 1e-3
        distance = [held_out.risks(Law(law)).mean() for law in laws]
        assert name != "product" or distance[0] < distance[1] - 0.01


def cost(held_out, law):
    """By hand: total variation to the reference, and 0.03 for each nat of log-loss."""
    theirs = held_out.reference
    distance = (np.abs(law - theirs).sum(axis=1) + np.abs(law.sum(axis=1) - theirs.sum(axis=1))) / 2
    return (distance - 0.03 * (theirs * np.log(np.maximum(law, 1e-9))).sum(axis=1)).mean()


def test_answers_are_not_surer_than_the_distance_pays_for():
    """Sure references, and votes that are wrong on one text in five: total variation alone would bet everything."""
    rng = np.random.default_rng(4)
    _, labels = truth(200, 2, rng)
    flat = np.full((200, 2), np.log(0.5))
    held_out = answered(flat, labels, voters=voting(labels, 2, 0.2, rng), reference=np.eye(2)[labels])
    chosen = fit_and_choose(held_out, ["product"]).calibration
    said = chosen.law(held_out.evidence).probabilities
    right = said[np.arange(200), labels]
    assert held_out.risks(Law(said)).mean() < (said.argmax(axis=1) != labels).mean() + 0.05
    assert -np.log(right).mean() < 0.8


@pytest.mark.parametrize("name", ["temperature", "bias", "mixture", "product", "knn"])
def test_what_a_reference_leaves_to_other_is_left_to_it(name: str):
    """The reference gives "other" most where it is unsure of the label; the labels' shares are the model's."""
    rng = np.random.default_rng(21)
    true, labels = truth(300, 4, rng, strength=3.0)
    with_other = normalised(np.hstack([true - true.max(axis=1, keepdims=True), np.full((300, 1), -1.0)]))
    theirs = np.exp(with_other[:, :4])
    left = 1 - theirs.sum(axis=1)
    assert 0.1 < left.mean() < 0.4
    scores = true - true.max(axis=1, keepdims=True) - 0.5  # as a model says it, up to what it leaves to "other" itself
    held_out = answered(scores - 3, labels, voters=voting(labels, 4, 0.05, rng), reference=theirs)
    fitted = resolve("calibration", CALIBRATIONS, name)(held_out)[-1]
    votes = None
    if name == "knn":
        others = np.where(np.eye(300, dtype=bool), -1, labels[None, :])
        heard = nearest_answers(held_out.evidence.middle, held_out.evidence.middle, others)
        votes = law_of_votes(heard, fitted.vote, 4)
    elif fitted.vote is not None:
        votes = law_of_votes(held_out.evidence.voters, fitted.vote, 4)
    said = fitted.combined(held_out.evidence.middle, votes)
    full = replace(fitted, other=None).combined(held_out.evidence.middle, votes)
    assert held_out.risks(Law(said)).mean() < 0.5 * held_out.risks(Law(full)).mean()
    assert np.corrcoef(1 - said.sum(axis=1), left)[0, 1] > 0.9
    assert "a share for what is no label" in fitted.describe()


def test_nothing_is_left_to_other_without_a_reference_that_does():
    rng = np.random.default_rng(3)
    true, labels = truth(100, 3, rng)
    for reference in (None, np.exp(true)):
        held_out = answered(true - 0.7, labels, voters=voting(labels, 3, 0.3, rng), reference=reference)
        for each in fit_and_choose(held_out).candidates:
            assert each.calibration.other is None


def test_a_reference_is_approximated_in_total_variation():
    rng = np.random.default_rng(12)
    true, labels = truth(200, 3, rng)
    reference = np.exp(normalised(2 * true))  # surer than the labels are
    held_out = answered(true + np.log(0.7), labels, reference=reference)
    choice = fit_and_choose(held_out, ["normalise", "temperature"])
    assert choice.risk == "TV to the reference"
    assert choice.calibration.method == "temperature"
    assert choice.calibration.scale == pytest.approx(2, rel=0.05)
    by_hand = [0.5 * (abs(0.7 * np.exp(a) - b).sum() + 0.3) for a, b in zip(true, reference, strict=True)]
    assert choice.candidates[0].risk == pytest.approx(np.mean(by_hand))


def test_the_same_queries_give_the_same_choice_whatever_the_candidates():
    rng = np.random.default_rng(13)
    true, labels = truth(100, 5, rng)
    held_out = answered(normalised(true * 2), labels)
    every = {each.name: each for each in fit_and_choose(held_out).candidates}
    few = fit_and_choose(held_out, ["bias", "temperature"])
    assert [each.name for each in few.candidates] == ["none", "temperature", "bias"]
    for each in few.candidates:
        assert each[1:] == every[each.name][1:]
    assert few.forced("bias").calibration.method == "bias"
    with pytest.raises(CalibrationError, match="'mixture' could not be fitted"):
        few.forced("mixture")


def test_few_queries_and_unknown_names_are_refused():
    rng = np.random.default_rng(14)
    true, labels = truth(LEAST_QUERIES, 2, rng)
    assert fit_and_choose(answered(true, labels)).queries == LEAST_QUERIES
    with pytest.raises(CalibrationError, match="9 held-out queries are too few"):
        fit_and_choose(answered(true[:9], labels[:9]))
    with pytest.raises(RegistryError, match=r"unknown calibration 'temprature'\. Did you mean 'temperature'"):
        fit_and_choose(answered(true, labels), ["temprature"])


# Awkward evidence


@pytest.mark.parametrize("name", list(CALIBRATIONS))
def test_minus_infinity_and_labels_never_seen(name):
    rng = np.random.default_rng(15)
    true, labels = truth(40, 6, rng)
    labels = labels % 4  # two labels are never right
    true[rng.random((40, 6)) < 0.3] = -np.inf
    true[0] = -np.inf
    priors = {each: np.array([0.5, 0.5, 0, 0, 0, 0.0]) for each in ("pmi", "contextual", "domain-context")}
    choice = fit_and_choose(answered(true, labels, voters=voting(labels, 6, 0.2, rng), priors=priors), [name])
    assert all(np.isfinite(each[1:]).all() for each in choice.candidates)
    found = choice.forced(name).calibration
    shown = np.broadcast_to(labels, (40, 40)) if found.anchors is not None else voting(labels, 6, 0.2, rng).labels
    law = found.law(Evidence(true, None, Voters(shown, np.zeros(shown.shape)))).probabilities
    assert (law >= 0).all()
    if name != "none":
        np.testing.assert_allclose(law.sum(axis=1), 1)


def test_nobody_votes():
    evidence = Evidence(np.log([[0.2, 0.6]]), None, Voters(np.full((1, 3), -1), np.zeros((1, 3))))
    for pooling in ("linear", "log"):
        found = Calibration("mixture", vote=Vote(3), pooling=pooling, weight=0.8)
        np.testing.assert_allclose(found.law(evidence).probabilities, [[0.25, 0.75]])
    with pytest.raises(ValueError, match="has no voters"):
        found.law(evidence._replace(voters=None))


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration("normalise"),
        Calibration("bias", scale=0.4, offsets=np.array([1.0, 0.0, -1.0])),
        Calibration("mixture", scale=2.0, vote=Vote(2), weight=0.4),
        Calibration("product", scale=0.7, vote=Vote(2, 0.0, 0.1), pooling="log", weight=1.5),
        Calibration("temperature", scale=1.5, other=-2.0),
        Calibration("knn", vote=Vote(1), weight=0.3, anchors=Anchors(np.arange(2), np.log([[0.9, 0.05, 0.05]] * 2))),
    ],
    ids=lambda each: each.method,
)
def test_bounds_hold_for_every_law_between_them(calibration):
    rng = np.random.default_rng(16)
    voters = Voters(np.array([[2, 1]]), np.array([[0.5, 0.4]]))
    low, high = np.log([[0.3, 1e-300, 0.05]]), np.log([[0.3, 0.2, 0.1]])
    low[0, 1] = -np.inf
    bounds = calibration.law(Evidence(low, high, voters))
    assert isinstance(bounds, Law)
    laws = []
    for share in [*rng.random((300, 3)), *np.eye(3), np.zeros(3), np.ones(3)]:
        between = np.log(np.maximum((1 - share) * np.exp(low) + share * np.exp(high), 1e-300))
        laws.append(calibration.law(Evidence(between, None, voters)).probabilities)
    assert (np.array(laws) >= bounds.probabilities - 1e-9).all()
    assert (np.array(laws) <= bounds.upper + 1e-9).all()
    if calibration.anchors is None:  # and are attained
        np.testing.assert_allclose(np.min(laws, axis=0), bounds.probabilities, atol=1e-9)
        np.testing.assert_allclose(np.max(laws, axis=0), bounds.upper, atol=1e-9)


def test_a_share_for_other_by_hand():
    evidence = Evidence(np.log([[0.1, 0.3], [0.1, 0.1]]), None, Voters(np.array([[0], [1]]), np.zeros((2, 1))))
    law = Calibration("temperature", other=np.log(0.2)).law(evidence)
    np.testing.assert_allclose(law.probabilities, [[1 / 6, 1 / 2], [1 / 4, 1 / 4]])
    law = Calibration("mixture", vote=Vote(1), weight=0.25, other=np.log(0.2)).law(evidence)
    np.testing.assert_allclose(law.probabilities, [[0.375, 0.375], [0.1875, 0.4375]])


def test_votes_by_hand():
    voters = Voters(np.array([[0, -1, 1, 0]]), np.array([[0.9, 0.9, 0.5, 0.1]], dtype=np.float32))
    np.testing.assert_allclose(law_of_votes(voters, Vote(2), 2), [[0.5, 0.5]])
    np.testing.assert_allclose(law_of_votes(voters, Vote(9), 2), [[2 / 3, 1 / 3]])
    e = np.exp(np.array([9.0, 5.0, 1.0]))
    np.testing.assert_allclose(law_of_votes(voters, Vote(9, 10.0), 2)[0, 1], e[1] / e.sum(), rtol=1e-6)
    assert brier(law_of_votes(voters, Vote(9), 2), [0]) < brier(law_of_votes(voters, Vote(2), 2), [0])

import numpy as np
import pytest
from measured_rows import VOTE, row

from evaluation.sentences import verdict_sentence


def says(*rows):
    return " ".join(verdict_sentence(rows))


def test_first_sentence_says_what_was_measured():
    assert verdict_sentence([row(), row("floor", 0.09, 0.02)])[0] == (
        "With 512 examples the prompted smollm2-135m is 0.21 [0.18, 0.24] in total variation from the "
        "fine-tuned reference (full fine-tuning, seed 0, 1000 examples), on 217 queries; two fine-tunings "
        "with different seeds are 0.09 [0.07, 0.11] apart (the floor)."
    )


def test_above_the_floor_only_when_the_intervals_are_apart():
    assert "The gap is above the floor: its whole interval" in says(row(), row("floor", 0.09))
    overlapping = says(row(), row("floor", 0.16))
    assert "The gap is not above the floor as far as 217 queries can tell" in overlapping
    assert "That does not show that the two are equal" in overlapping
    assert "is above the floor" not in overlapping


def test_intervals_that_touch_overlap():
    assert "as far as 217 queries can tell" in says(row(), row("floor", 0.15))  # [0.12, 0.18], [0.18, 0.24]


def test_fewest_queries_are_named():
    assert "as far as 50 queries can tell" in says(row(), row("floor", 0.16, n_queries=50))


def test_below_the_floor():
    assert "closer to the reference than a second fine-tuning is" in says(row(), row("floor", 0.5))


def test_floor_without_interval_leaves_it_open():
    assert "Whether the gap is above the floor is open" in says(row(), row("floor", 0.01, None))


def test_floor_not_measured_says_how_to():
    assert "The floor is not measured" in says(row())
    assert "pass a second --reference, trained with another seed" in says(row())


def test_judge_is_half_of_one_plus_the_gap():
    assert "in 60 % of cases (between 59 % and 62 %); guessing gives 50 %" in says(row())
    assert "in 60 % of cases; guessing" in says(row(margin=None))


def test_vote_that_is_clearly_closer():
    sentences = says(row(), row(VOTE, 0.12))
    assert (
        "The vote of the neighbours without a language model is closer to the reference (0.12 [0.09, 0.15]) "
        "than the prompt (0.21 [0.18, 0.24]). As an approximation of the reference, the language model "
        "brings no gain here." in sentences
    )


def test_vote_that_is_closer_by_a_point_only():
    sentences = says(row(), row(VOTE, 0.18))
    assert "The vote of the neighbours without a language model has the smaller measured gap" in sentences
    assert "the intervals overlap: 217 queries cannot tell which is closer" in sentences
    assert "no gain" not in sentences


def test_prompt_that_is_clearly_closer_than_the_vote():
    assert "The prompt is closer to the reference (0.21 [0.18, 0.24]) than the vote" in says(row(), row(VOTE, 0.4))


def test_prompt_that_is_closer_than_the_vote_by_a_point_only():
    assert "The prompt has the smaller measured gap" in says(row(), row(VOTE, 0.23))


def test_prompt_and_vote_with_the_same_gap():
    assert "have the same measured gap (0.21" in says(row(), row(VOTE, 0.21))


def test_vote_without_interval():
    assert "an interval is not measured, so which is closer is open" in says(row(), row(VOTE, 0.05, None))


def test_vote_not_measured():
    assert "The vote of the neighbours without a language model is not measured" in says(row())


def test_vote_that_is_right_more_often():
    assert "On these queries the vote is also right more often: 0.94 against 0.83." in says(
        row(), row(VOTE, 0.12, accuracy=0.94)
    )
    assert "right more often" not in says(row(), row(VOTE, 0.12, accuracy=0.7))


def test_vote_says_how_it_was_counted():
    said = says(row(), row(VOTE, 0.2, neighbours=12, vote_sharpness=20.0))
    assert "It counts 12 rows, the nearer the more: what serves rows of the pool best, left out." in said


def test_vote_with_another_number_of_examples_says_so():
    assert "language model (with 64 examples)" in says(row(), row(VOTE, 0.4, n_examples=64))


def test_accuracy_above_that_of_the_reference():
    sure = says(row(accuracy=0.95, accuracy_low=0.9, accuracy_high=0.98))
    assert "right more often than the reference, 0.95 [0.90, 0.98] against 0.88." in sure
    assert "a distance from the reference, not from the truth" in sure
    chance = says(row(accuracy=0.9, accuracy_low=0.85, accuracy_high=0.94))
    assert "(which may be chance: the interval does not exclude it)" in chance


def test_accuracy_below_that_of_the_reference_names_the_theorem():
    assert "The prompt's accuracy is 0.83 [0.77, 0.89], the reference's 0.88. For answers drawn" in says(row())


def test_accuracy_not_measured_is_left_out():
    assert "accurac" not in says(row(accuracy=None))


def test_random_and_zero_shots_are_compared():
    sentences = says(row(), row("random shots", 0.5), row("zero shots", 0.22, n_examples=0))
    assert "The prompt is closer to the reference (0.21 [0.18, 0.24]) than the prompt with random" in sentences
    assert "against 0.22 [0.19, 0.25] for the prompt with zero shots), but the intervals overlap" in sentences


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (0.5, "The gap falls from 0.50 [0.47, 0.53] with 16 examples to 0.21 [0.18, 0.24] with 512."),
        (0.1, "The gap grows from"),
        (0.22, "the intervals overlap, so no change is shown"),
    ],
)
def test_trend_over_examples(first, words):
    assert words in says(row(), row(gap=first, n_examples=16))


def of_queries(series="program", *, more=0.0, wide=0.0, **changes):
    """A row with the gaps of 200 queries, which vary widely, but alike in every row."""
    gaps = np.linspace(0.02, 0.4, 200) + more + wide * np.where(np.arange(200) % 2, 1, -1)
    return row(series, float(gaps.mean()), gaps=gaps.tolist(), n_queries=200, **changes)


def test_rows_of_the_same_queries_are_compared_query_by_query():
    """Side by side all these intervals overlap."""
    said = says(
        of_queries(more=0.05),
        of_queries("floor"),
        of_queries(VOTE, more=0.02),
        of_queries("random shots", more=0.09),
        of_queries(more=0.11, n_examples=16),
        of_queries(more=0.04, max_prompt_tokens=256),
    )
    assert "The gap is above the floor, by 0.05 [0.02, 0.08] query by query." in said
    assert "is closer to the reference (0.23 [0.20, 0.26]) than the prompt (0.26 [0.23, 0.29]), by 0.03 [" in said
    assert "than the prompt with random shots (0.30 [0.27, 0.33]), by 0.04 [" in said
    assert "to 0.26 [0.23, 0.29] with 512, by 0.06 [" in said
    assert "0.25 [0.22, 0.28] with a budget of 256 tokens, smaller by 0.01 [-0.02, 0.04]" in said
    assert "overlap" not in said


def test_differences_that_may_be_chance():
    said = says(of_queries(), of_queries("floor", wide=0.01), of_queries(VOTE, more=0.01, wide=0.01))
    assert "as far as 200 queries can tell: the difference, 0.00 [" in said
    assert "but the difference, 0.01 [" in said
    assert "may be chance: 200 queries cannot tell which is closer" in said


@pytest.mark.parametrize("change", [{"gaps": [0.1] * 100}, {"data_sha256": "other"}, {"gap_truncation": 0.01}])
def test_rows_of_other_queries_are_compared_by_their_intervals(change):
    said = says(of_queries(more=0.05), of_queries("floor") | change)
    assert "queries can tell: the intervals overlap" in said


def test_trend_survives_a_reference_trained_on_the_same_examples():
    assert "The gap falls from" in says(row(), row(gap=0.5, n_examples=16, reference="full, 16 examples"))


def test_verdict_takes_most_examples_and_largest_budget_never_the_smallest_gap():
    rows = [row(gap=0.1, n_examples=64), row(gap=0.3), row(gap=0.2, max_prompt_tokens=512)]
    assert verdict_sentence(rows)[0].startswith("With 512 examples the prompted smollm2-135m is 0.30 ")
    assert "the gap is 0.20 [0.17, 0.23] with a budget of 512 tokens" in says(*rows)


def test_other_retrievers_and_seeds_are_told():
    sentences = says(row(), row(gap=0.4, retriever="bm25"), row(gap=0.23, seed=1))
    assert "the gap is 0.40 [0.37, 0.43] with the retriever bm25" in sentences
    assert "Over 2 seeds the gap goes from 0.21 to 0.23; the other figures are those of seed 0." in sentences


def test_label_mass_is_told_when_low():
    assert "puts 0.62 of its probability on the label words" in says(row(label_mass=0.62))
    assert "label words" not in says(row())


def test_scoring_noise_is_told_when_it_matters():
    assert (
        "The scoring noise is not clearly below the gap: the same prompts, scored in other batches, differ by "
        "0.200 [0.170, 0.230], on 32 queries."
    ) in says(row(), row("scoring noise", 0.2, n_queries=32))
    assert (
        "Differences between gaps that are below the scoring noise mean nothing: the same prompts, scored in float32, "
        "differ by 0.012 [0.007, 0.017], on 1 query."
    ) in says(row(), row("scoring noise", 0.012, 0.005, noise_against="float32", n_queries=1))
    assert "noise" not in says(row(), row("scoring noise", 0.004, 0.003, noise_against="float32"))


def test_the_larger_scoring_noise_is_told():
    batches = row("scoring noise", 0.0001, 0.0001, noise_against="other batches")
    rounding = row("scoring noise", 0.03, 0.01, noise_against="float32")
    for noises in ([batches, rounding], [rounding, batches]):
        assert "scored in float32, differ by 0.030 [0.020, 0.040]" in says(row(), *noises)
        assert "batches" not in says(row(), *noises)


def test_a_gap_known_within_bounds_says_so():
    assert "the gap is known within bounds on these queries: they are 0.04 apart" in says(row(gap_truncation=0.04))
    assert "bounds" not in says(row(), row("zero shots", gap_truncation=0.04))


def test_one_of_a_kind_is_no_plural():
    sentences = says(row(n_examples=1, n_queries=1), row("floor", 0.2, n_queries=1), row(VOTE, 0.22, n_examples=1))
    assert sentences.startswith("With 1 example the prompted")
    assert "on 1 query;" in sentences
    assert "as far as 1 query can tell" in sentences
    assert "with 1 example to 0.21" in says(row(), row(gap=0.5, n_examples=1))


def test_no_program_no_verdict():
    assert says(row("floor", 0.1)).startswith("The gap of the program is not measured")
    assert "0.000" not in says(row(gap=None))


def test_small_gaps_keep_their_digits_and_intervals_are_rounded_outwards():
    assert "is 0.004 [0.001, 0.008] in total" in says(row(gap=0.0041, gap_low=0.0019, gap_high=0.0071))
    assert "is 0.21 [0.17, 0.25] in total" in says(row(gap_low=0.1799, gap_high=0.2401))


def test_several_datasets_have_their_names_in_front():
    lines = verdict_sentence([row(), row("floor", 0.09), row(dataset="mr", gap=0.4)])
    assert {line.split(":")[0] for line in lines} == {"banking77", "mr"}
    assert [line for line in lines if "floor is not measured" in line] == [
        line for line in lines if line.startswith("mr: The floor")
    ]


def test_several_models_are_told_apart_and_share_the_vote():
    rows = [row(), row(gap=0.5, model="big"), row(VOTE, 0.3, model=None)]
    lines = verdict_sentence(rows)
    assert lines[0].startswith("banking77, smollm2-135m: With 512 examples the prompted smollm2-135m is 0.21")
    assert [line for line in lines if line.startswith("banking77, big: The vote")]


def test_the_terminal_gets_no_control_characters():
    rows = [row(dataset="a\x1b[2J\n"), row(dataset="b")]
    assert all(character.isprintable() for line in verdict_sentence(rows) for character in line)

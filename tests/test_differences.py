"""How two programs differ: each difference is named, and none is where there is none."""

from dataclasses import replace

from toys import customers, plain_template

from icl_compiler.compile import compile_program, with_pool
from icl_compiler.data import Dataset
from icl_compiler.differences import differences, facts
from icl_compiler.templates import EncodedTemplate


def compiled(data=None, **settings):
    wanted = {"retriever": "bm25", "shots": 4, "budget": 2000, **settings}
    return compile_program(data or customers(), model="echo", **wanted)


def test_the_same_program_does_not_differ():
    found = differences(compiled(), compiled())
    assert (found.differ, found.facts, found.sentences) == (False, {}, [])


def test_facts_are_the_settings_and_the_sizes():
    told = facts(compiled())
    assert (told["retriever"], told["shots"], told["rows"], told["labels"]) == ("bm25", 4, 12, 3)


def test_settings_and_shots():
    found = differences(compiled(), compiled(retriever="uniform", shots=2))
    assert found.facts == {
        "retriever": ("bm25", "uniform"), "shots": (4, 2), "order": ("best-last", "best-first")
    }  # fmt: skip
    [sentence] = found.sentences
    # By hand: every text has other shots; how many are common is counted over the rows of both.
    shared = total = 0
    one, other = compiled(), compiled(retriever="uniform", shots=2)
    for text in customers().texts:
        rows = [set(program.prompts([text])[0].selection.rows) for program in (one, other)]
        shared, total = shared + len(rows[0] & rows[1]), total + len(rows[0] | rows[1])
    assert (
        sentence
        == f"0 of 12 texts have the same prompt; of all shots that either takes, both take {shared / total:.0%}"
    )


def test_pools():
    data = customers()
    fewer = with_pool(compiled(), data.take(range(11)))
    [rows] = [each for each in differences(compiled(), fewer).sentences if "pool" in each]
    assert rows == "1 of 12 texts stand in A's pool only, such as 'a refund was promised'"
    changed = Dataset(data.texts, ("refund", *data.answers[1:]), "classification", "x")
    [told] = [each for each in differences(compiled(), compiled(changed)).sentences if "answer" in each]
    assert told == "1 texts have another answer, such as 'my card was stolen': card in A, refund in B"


def test_labels_and_templates():
    data = customers()
    without = Dataset(data.texts[:8], data.answers[:8], "classification", "x")
    assert "labels of A only: refund" in differences(compiled(), compiled(without)).sentences
    one = compiled()
    other = replace(one, template=EncodedTemplate.build(plain_template("Else.\n"), one.template.tokenizer, one.labels))
    assert differences(one, other, ["x"]).facts["template"] == ("classify", "plain")
    same_name = replace(plain_template(), name="classify")
    third = replace(one, template=EncodedTemplate.build(same_name, one.template.tokenizer, one.labels))
    assert "the template 'classify' has another text" in differences(one, third, ["x"]).sentences


def test_a_text_that_one_of_them_cannot_take():
    found = differences(compiled(), compiled(budget=120), ["y" * 300])
    assert found.sentences[0].startswith("their shots cannot be compared: the prompt for 'yyy")

"""Templates against texts written by hand; their tokens against the tokenisation of the whole rendered prompt."""

import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NASTY, plain_template, real_texts, smollm2

from icl_compiler.compile import compile_program
from icl_compiler.data import Dataset
from icl_compiler.errors import DataError, LabelError, TemplateError
from icl_compiler.models import locate
from icl_compiler.templates import EncodedTemplate, Template
from icl_compiler.tokenizer import ByteTokenizer, HFTokenizer

LABELS = ("no_such card", "parcel", "")
LINE = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co", "Zl", "Zp"]), max_size=12)
bundled = pytest.mark.parametrize("name", ["classify", "classify_chat", "generate"])


def rendered(template, labels, pairs, query):
    """A plain prompt as text."""
    shots = "".join(template.query(text) + template.answer(label) + template.terminator for text, label in pairs)
    return template.instruction(labels) + shots + template.query(query)


def concatenated(encoded, pairs, query):
    """The same prompt from the parts of an encoded template."""
    answers = encoded.answers([label for _, label in pairs])
    ids = list(encoded.head)
    for shot, answer in zip(encoded.queries([text for text, _ in pairs]), answers, strict=True):
        ids += [*shot, *answer, *encoded.separator]
    return ids + encoded.queries([query])[0]


def conversation(template, labels, pairs, query):
    """The messages that a chat prompt stands for."""
    turns = [{"role": "system", "content": template.instruction(labels)}]
    for text, label in pairs:
        turns.append({"role": "user", "content": template.query(text)})
        turns.append({"role": "assistant", "content": template.answer(label)})
    return [*turns, {"role": "user", "content": template.query(query)}]


# As text


def test_the_plain_template_writes_what_it_says():
    template = Template.from_name("classify")
    assert rendered(template, ["a_b", "c"], [("Is  it\nhere?", "a_b")], "and now") == (
        "Say which label fits the text. Labels: a b, c.\nText: Is it here?\nLabel: a b\nText: and now\nLabel:"
    )
    assert template.instruction([str(i) for i in range(21)]) == "Say which label fits the text.\n"
    assert (template.chat, template.terminator) == (False, "\n")


def test_the_chat_template_writes_what_it_says():
    template = Template.from_name("classify_chat")
    said = conversation(template, ["a_b", "c"], [("Is  it\nhere?", "a_b")], "and now")
    assert [turn["content"] for turn in said] == [
        "Say which label fits the text. Answer with the label only. Labels: a b, c.",
        "Is it here?",
        "a b",
        "and now",
    ]
    assert template.chat


def test_the_generating_template_writes_what_it_says():
    template = Template.from_name("generate")
    assert rendered(template, [], [("name\nX", "X is  a\nplace")], "Y") == (
        "Write the output for each input.\nInput: name X\nOutput: X is a place\nInput: Y\nOutput:"
    )


@bundled
def test_jinja_in_a_text_stays_as_it_is(name):
    template = Template.from_name(name)
    text = "{{ 7*7 }} {% raw %} {# note #} {{ self }}"
    assert text in template.query(text)
    assert text in template.answer(text)
    assert "{{ 7*7 }}" in Template.from_name("classify").instruction(["{{ 7*7 }}", "other"])


def test_a_file_is_a_template_too(tmp_path):
    (tmp_path / "mine.jinja").write_text(plain_template(end=" ;").source, encoding="utf-8")
    template = Template.from_name(str(tmp_path / "mine.jinja"))
    assert (template.name, template.terminator) == ("mine", " ;")


def test_a_template_that_is_nowhere():
    with pytest.raises(
        TemplateError, match="no template 'clasify': expected a file, or one of classify, classify_chat"
    ):
        Template.from_name("clasify")


GOOD = plain_template().source


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (GOOD.replace("macro answer", "macro anser"), "defines no macro 'answer'"),
        (GOOD.replace("set terminator", "set end"), "has no terminator; add a line like"),
        (GOOD.replace("{{ text }}", ""), "does not write its text"),
        (GOOD.replace("query(text)", "query()"), "macro 'query' of template 'bad' failed"),
        (GOOD + "{% endif %}", "'bad', line 7 does not render"),
        (GOOD + "{{ 1 / 0 }}", "does not render: division by zero"),
        (GOOD + "{{ missing.attribute }}", "does not render: 'missing' is undefined"),
        (GOOD + "{{ range(999999999) | list }}", "does not render: Range too big"),
        (GOOD + "{{ 9 ** 9 ** 9 }}", "does not render"),
        (
            GOOD + "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "must come to an end",
        ),
        (GOOD + "{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__' of 'str' object is unsafe"),
        (GOOD + "{% include 'other' %}", "does not render"),
        (GOOD.replace("{{ text }}", "{{ text[1/0] }}"), "macro 'query' of template 'bad' failed: division by zero"),
        ("", "defines no macro 'instruction'"),
    ],
)
def test_bad_templates_are_refused_in_words(source, said, tmp_path):
    (tmp_path / "bad.jinja").write_text("\n\n\n\n" + source, encoding="utf-8")
    with pytest.raises(TemplateError) as caught:
        Template.from_name(str(tmp_path / "bad.jinja"))
    assert said in str(caught.value)


def test_a_template_that_is_not_utf_8(tmp_path):
    (tmp_path / "bad.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(TemplateError, match="not UTF-8"):
        Template.from_name(str(tmp_path / "bad.jinja"))


# As tokens


@pytest.mark.models
@pytest.mark.parametrize("name", ["classify", "generate"])
def test_a_plain_prompt_is_the_tokenisation_of_its_text(name, shared_data):
    template = Template.from_name(name)
    encoded = EncodedTemplate.build(template, smollm2(), LABELS)
    pairs = [*real_texts(shared_data, 40), *((text, LABELS[i % 3]) for i, text in enumerate(NASTY) if "<" not in text)]
    for first in range(0, len(pairs), 5):
        shots, (query, _) = pairs[first : first + 5], pairs[first - 1]
        text = rendered(template, LABELS, shots, query)
        assert [concatenated(encoded, shots, query)] == smollm2().encode([text], special=True)


@pytest.mark.models
def test_a_chat_prompt_is_that_of_the_models_own_template(shared_data):
    template = Template.from_name("classify_chat")
    encoded = EncodedTemplate.build(template, smollm2(), LABELS)
    pairs = [*real_texts(shared_data, 40), *((text, LABELS[i % 3]) for i, text in enumerate(NASTY) if "<" not in text)]
    for first in range(0, len(pairs), 5):
        shots, (query, _) = pairs[first : first + 5], pairs[first - 1]
        own = smollm2()._tokenizer.apply_chat_template(
            conversation(template, LABELS, shots, query), add_generation_prompt=True, return_dict=False
        )
        assert concatenated(encoded, shots, query) == own


@pytest.mark.models
@bundled
@pytest.mark.parametrize("text", [text for text in NASTY if "<" in text])
def test_markup_in_a_text_stays_plain_text(name, text):
    template = Template.from_name(name)
    encoded = EncodedTemplate.build(template, smollm2(), ("yes", "no"))
    with_markup = concatenated(encoded, [(text, "yes")], text)
    without = concatenated(encoded, [("harmless", "yes")], "harmless")

    def special(ids):
        return [i for i in ids if i in smollm2()._tokenizer.added_tokens_decoder]

    assert special(with_markup) == special(without)
    assert smollm2().decode(with_markup).count(" ".join(text.split())) == 2


JOINED = [
    {},
    {"instruction": "Say it.\n\n"},
    {"instruction": "Say it"},
    {"instruction": ""},
    {"end": "\n\n"},
    {"end": "\n\n\n", "instruction": "Say it.\n\n\n"},
    {"end": "END"},
    {"end": " ###\n"},
    {"end": ";", "instruction": "Say it.\n\n"},
    {"query": "{{ text }} =>"},
    {"query": "Text: {{ text }}\nLabel:\n", "answer": "{{ label }}"},
    {"query": "Text: {{ text }}\nLabel", "answer": "{{ label }}"},
]
REFUSED = [
    ({"instruction": "Say it. "}, "merges 'Say it. ' with the text after it, 'Text: x"),
    ({"query": "  Text: {{ text }}\n  Label:"}, "merges '\n' with the text after it, '  Text: x"),
    ({"query": "Text: {{ text }}\nLabel: ", "answer": "{{ label }}"}, "merges 'Text: x\nLabel: ' with the text after"),
    ({"query": "{{ text }}\n\n", "answer": "{{ label }}"}, "merges 'x\n\n' with the text after it, 'good"),
    ({"end": "(", "query": "(Text: {{ text }}\nLabel:"}, "merges ' good(' with the query after it; end that part"),
    ({"end": " "}, "the answer 'good' contains the terminator ' '"),
]


@pytest.mark.models
@pytest.mark.parametrize("labels", [("good", "bad"), ("", "x y")], ids=["words", "empty"])
@pytest.mark.parametrize("parts", JOINED, ids=repr)
def test_parts_of_any_plain_template_are_joined_right(parts, labels):
    template = plain_template(**parts)
    encoded = EncodedTemplate.build(template, smollm2(), labels)
    pairs = [("one text", labels[0]), ("Another?", labels[1])]
    ids = concatenated(encoded, pairs, "last")
    assert [ids] == smollm2().encode([rendered(template, labels, pairs, "last")])
    [word] = encoded.answers(["good"])
    assert word[-len(encoded.terminator_ids) :] == encoded.terminator_ids


@pytest.mark.models
@pytest.mark.parametrize(("parts", "said"), REFUSED, ids=repr)
def test_parts_that_would_merge_are_refused(parts, said):
    with pytest.raises(TemplateError) as caught:
        EncodedTemplate.build(plain_template(**parts), smollm2(), ("good", "bad")).label_words()
    assert said.replace("\n", "\\n") in str(caught.value)


@pytest.mark.models
@settings(deadline=None, max_examples=60)
@given(texts=st.lists(LINE.filter(lambda text: "<" not in text), min_size=2, max_size=4))
def test_any_text_in_the_bundled_templates(texts):
    *shots, query = texts
    pairs = [(text, LABELS[i % 3]) for i, text in enumerate(shots)]
    plain, chat = Template.from_name("classify"), Template.from_name("classify_chat")
    encoded = EncodedTemplate.build(plain, smollm2(), LABELS)
    assert [concatenated(encoded, pairs, query)] == smollm2().encode([rendered(plain, LABELS, pairs, query)])
    encoded = EncodedTemplate.build(chat, smollm2(), LABELS)
    text = smollm2().chat(conversation(chat, LABELS, pairs, query), answer_next=True)
    assert [concatenated(encoded, pairs, query)] == smollm2().encode([text], special=True)


CHATS = {
    # Two newlines at the end of a role merge into one token where nothing follows, and stay two before a letter.
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}": "merges the markup",
    # A blank before a content merges with its first word.
    "{% for m in messages %}{{ '<|im_start|>' + m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}": "merges the markup",
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}": "merges the markup",
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}": "ends an answer without a special token",
    "{{ messages[-1].content }}": "drops or rewrites turns",
    "{% for m in messages %}{{ loop.index ~ m.content + '<|im_end|>\n' }}{% endfor %}": "writes its turns unequally",
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}": "no system role",
}


@pytest.fixture(scope="module")
def with_chat(tmp_path_factory):
    """A maker of tokenizers with another chat template."""
    folder = tmp_path_factory.mktemp("model") / "model"
    shutil.copytree(locate("smollm2-135m"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tokenizer = HFTokenizer(folder)

    def made(source):
        tokenizer._tokenizer.chat_template = source
        return tokenizer

    return made


@pytest.mark.models
@pytest.mark.parametrize(("source", "said"), CHATS.items(), ids=range(len(CHATS)))
def test_chat_templates_that_cannot_be_cut_are_refused(with_chat, source, said):
    with pytest.raises(TemplateError, match=said):
        EncodedTemplate.build(Template.from_name("classify_chat"), with_chat(source), ("a", "b"))


@pytest.mark.models
def test_a_chat_template_of_another_kind(with_chat):
    tokenizer = with_chat(
        "<|endoftext|>{% for m in messages %}{% if m.role == 'system' %}<<{{ m.content }}>>\n"
        "{% elif m.role == 'user' %}[Q]\n{{ m.content }}\n[A]\n"
        "{% else %}{{ m.content }} <|im_end|>\n{% endif %}{% endfor %}"
    )
    template = Template.from_name("classify_chat")
    encoded = EncodedTemplate.build(template, tokenizer, ("a", "b"))
    pairs = [("first", "a"), ("second", "b")]
    text = tokenizer.chat(conversation(template, ("a", "b"), pairs, "x"), answer_next=True)
    assert [concatenated(encoded, pairs, "x")] == tokenizer.encode([text], special=True)
    assert smollm2().decode(encoded.terminator_ids) == " <|im_end|>"


def test_the_echo_model_speaks_chat():
    template = Template.from_name("classify_chat")
    encoded = EncodedTemplate.build(template, ByteTokenizer(), ("a", "b"))
    pairs = [("a\x03b", "a"), ("{{ 7*7 }}", "b")]
    ids = concatenated(encoded, pairs, "last")
    text = ByteTokenizer().chat(conversation(template, ("a", "b"), pairs, "last"), answer_next=True)
    assert ByteTokenizer().decode(ids) == text
    # system, two questions, two answers, the query: six turns end, and the user's \x03 ends none.
    assert ids.count(256) == 6
    assert ids.count(3) == 1


# Label words


def encoded_with(labels, name="classify", tokenizer=None):
    return EncodedTemplate.build(Template.from_name(name), tokenizer or ByteTokenizer(), labels)


@pytest.mark.parametrize("name", ["classify", "classify_chat"])
def test_label_words_that_are_the_same_are_refused(name):
    with pytest.raises(LabelError, match="the label word of 'a_b' is the same as that of 'a b'"):
        encoded_with(("a_b", "c", "a b"), name).label_words()
    data = Dataset(("x", "y"), ("a_b", "a b"), "classification", "twins")
    with pytest.raises(LabelError, match=f"in template '{name}'; rename one of them"):
        compile_program(data, model="echo", template=name, retriever="uniform")


def test_a_label_word_that_begins_another_is_refused():
    template = plain_template(answer=" {{ label | replace(';', ':') }}", end=":")
    with pytest.raises(TemplateError, match="the answer 'yes;no' contains the terminator ':'"):
        EncodedTemplate.build(template, ByteTokenizer(), ("yes", "yes;no")).label_words()
    without_end = EncodedTemplate.build(plain_template(end="x"), ByteTokenizer(), ("ye", "yexx"))
    with pytest.raises(TemplateError, match="contains the terminator 'x'"):
        without_end.label_words()
    # Where the answer ends as the terminator begins, one word begins another although neither contains the end.
    doubled = EncodedTemplate.build(plain_template(end=".\n."), ByteTokenizer(), ("a", "a.\n"))
    with pytest.raises(LabelError, match=r"the label word of 'a' is a prefix of that of 'a\.\\n'"):
        doubled.label_words()


@pytest.mark.parametrize("name", ["classify", "classify_chat"])
@settings(deadline=None)
@given(labels=st.sets(LINE, min_size=2, max_size=6).map(sorted))
def test_label_words_are_prefix_free_or_refused(name, labels):
    encoded = encoded_with(tuple(labels), name)
    shown = [encoded.template.answer(label) for label in labels]
    shown = [text.strip() for text in shown] if encoded.template.chat else shown
    if len(set(shown)) < len(labels):
        with pytest.raises(LabelError, match="the same as"):
            encoded.label_words()
    else:
        words = encoded.label_words()
        assert not any(a != b and b[: len(a)] == a for a in words for b in words)
        assert len({tuple(word) for word in words}) == len(labels)


@pytest.mark.models
@pytest.mark.parametrize("name", ["classify", "classify_chat"])
def test_falsy_labels_have_words(name):
    words = encoded_with(("", "0", "False", "0.0"), name, smollm2()).label_words()
    ends = "\n" if name == "classify" else "<|im_end|>"
    blank = " " if name == "classify" else ""
    assert [smollm2().decode(word) for word in words] == [
        f"{blank}{label}{ends}" for label in ("", "0", "False", "0.0")
    ]


def test_an_answer_must_not_contain_its_end():
    with pytest.raises(TemplateError, match=r"the answer 'two\\nlines' contains the terminator"):
        encoded_with(("one", "two\nlines")).label_words()
    with pytest.raises(TemplateError, match=r"contains the terminator '\\x03'"):
        encoded_with(("one", "two\x03"), "classify_chat").answers(["two\x03"])


def test_half_a_character_is_refused_in_words():
    with pytest.raises(DataError, match=r"the text 'a\\ud800b' holds half a character \('\\ud800', a surrogate"):
        encoded_with(("a", "b")).queries(["fine", "a\ud800b"])

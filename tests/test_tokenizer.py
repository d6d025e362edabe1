"""Tokenizers against the library they stand on, used directly, and against texts that break others."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from toys import NASTY, real_texts, smollm2

from icl_compiler.errors import ModelError, TemplateError
from icl_compiler.models import locate
from icl_compiler.tokenizer import ByteTokenizer, HFTokenizer, Tokenizer

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
# Six control characters, and planes without characters, have bytes that are no tokens of SmolLM2: it drops them.
ASSIGNED = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cc", "Cn", "Co"], include_characters="\n\r\t"))
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "where is my parcel?"},
    {"role": "assistant", "content": "parcel"},
]


# One token per byte


@settings(deadline=None)
@given(st.lists(ANY_TEXT))
def test_bytes_are_bytes(texts):
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(texts) == [list(text.encode("utf-8")) for text in texts]
    assert tokenizer.encode(texts, context="before") == tokenizer.encode(texts)
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts


def test_the_end_of_a_turn_is_no_byte_of_a_text():
    tokenizer = ByteTokenizer()
    assert isinstance(tokenizer, Tokenizer)
    text = tokenizer.chat(CONVERSATION, answer_next=True)
    assert text == "system\nBe brief.\x03\nuser\nwhere is my parcel?\x03\nassistant\nparcel\x03\nassistant\n"
    [marked], [plain] = tokenizer.encode([text], special=True), tokenizer.encode([text])
    assert marked.count(256) == 3
    assert plain.count(3) == 3
    assert max(plain) < 256
    assert tokenizer.decode(marked) == tokenizer.decode(plain) == text


# Hugging Face: the embedded model's tokenizer


@pytest.fixture(scope="module")
def library():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(locate("smollm2-135m"), "tokenizer.json")))


@pytest.mark.models
def test_plain_text_is_encoded_as_the_library_does(library, shared_data):
    texts = [*(text for text, _ in real_texts(shared_data, 50)), *(text for text in NASTY if "<" not in text)]
    tokenizer = smollm2()
    assert tokenizer.encode(texts) == [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert tokenizer.encode(texts, special=True) == tokenizer.encode(texts)
    assert tokenizer.encode([]) == []


@pytest.mark.models
@settings(deadline=None)
@given(before=ASSIGNED, texts=st.lists(ASSIGNED, min_size=1, max_size=3))
def test_decoding_gives_the_text_back_and_context_adds_up(before, texts):
    tokenizer = smollm2()
    assert [tokenizer.decode(ids) for ids in tokenizer.encode(texts)] == texts
    try:
        encoded = tokenizer.encode(texts, context=before)
    except TemplateError:
        merged = [tokenizer.encode([before + text])[0][: len(tokenizer.encode([before])[0])] for text in texts]
        assert any(ids != tokenizer.encode([before])[0] for ids in merged)
    else:
        for text, ids in zip(texts, encoded, strict=True):
            assert [*tokenizer.encode([before])[0], *ids] == tokenizer.encode([before + text])[0]


@pytest.mark.models
def test_markup_in_a_text_is_plain_text(library):
    tokenizer = smollm2()
    added = library.get_added_tokens_decoder()
    assert {1: "<|im_start|>", 2: "<|im_end|>"}.items() <= {i: token.content for i, token in added.items()}.items()
    for special_id, token in added.items():
        [plain], [special] = tokenizer.encode([token.content]), tokenizer.encode([token.content], special=True)
        assert special == [special_id]
        assert not set(plain) & set(added)
        assert tokenizer.decode(plain) == token.content
    assert {0, 1, 2} <= tokenizer.special_ids <= set(added)
    assert tokenizer.bos == []


@pytest.mark.models
def test_a_merge_with_the_context_is_refused():
    with pytest.raises(TemplateError, match="the tokenizer merges 'Label' with the text after it, 'ing'"):
        smollm2().encode(["ing"], context="Label")
    with pytest.raises(TemplateError, match="start the next one with a letter or a blank"):
        smollm2().encode(["\n"], context="\n")


@pytest.mark.models
@pytest.mark.parametrize("answer_next", [True, False])
def test_chat_is_the_models_own_template(answer_next):
    source = Path(locate("smollm2-135m"), "chat_template.jinja").read_text(encoding="utf-8")
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    expected = template.render(messages=CONVERSATION, add_generation_prompt=answer_next)
    assert smollm2().chat(CONVERSATION, answer_next=answer_next) == expected
    assert expected.startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhere is my parcel?<|im_end|>\n"
    )


@pytest.mark.models
def test_fingerprint_changes_with_any_change_and_not_with_use(tmp_path):
    source = Path(locate("smollm2-135m"))

    def changed(name, edit):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
        (folder / name).write_text(edit((folder / name).read_text(encoding="utf-8")), encoding="utf-8")
        return HFTokenizer(folder).fingerprint

    def without_last_merge(text):
        content = json.loads(text)
        content["model"]["merges"].pop()
        return json.dumps(content)

    fresh = HFTokenizer(source)
    fresh.encode(["<|im_end|>", "a"], special=True)
    fresh.chat(CONVERSATION, answer_next=True)
    assert fresh.fingerprint == smollm2().fingerprint
    others = {
        changed("tokenizer.json", without_last_merge),
        changed("chat_template.jinja", lambda text: text + " "),
        fresh.fingerprint,
    }
    assert len(others) == 3


# Hugging Face: a tokenizer of another kind, and those that do not work


@pytest.fixture(scope="module")
def sentencepiece_like(tmp_path_factory):
    """Puts a blank before whatever it is given, and `<s>` before that, as that of Llama 2 does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "<unk>", "▁", "▁good", "▁bad", "good", "bad", "\n", ":", "▁Text", "Text"]
    inner = Tokenizer(models.Unigram([(word, -1.0 if len(word) > 1 else -3.0) for word in words], unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.save_pretrained(folder)
    return HFTokenizer(folder)


def test_context_takes_away_the_blank_at_the_beginning(sentencepiece_like):
    words = {i: word for word, i in sentencepiece_like._tokenizer.get_vocab().items()}

    def tokens(text, context):
        [ids] = sentencepiece_like.encode([text], context=context)
        return [words[i] for i in ids]

    assert tokens("good\n", "") == ["▁good", "\n"]
    assert tokens("good\n", "\n") == ["good", "\n"]
    assert tokens(" good\n", ":") == ["▁good", "\n"]


def test_the_first_token_of_every_prompt_is_found(sentencepiece_like):
    assert sentencepiece_like.bos == [0]
    assert 0 in sentencepiece_like.special_ids


def test_a_model_without_chat_template_says_so(sentencepiece_like):
    with pytest.raises(TemplateError, match="this model has no chat template; use a plain one"):
        sentencepiece_like.chat(CONVERSATION, answer_next=True)


@pytest.mark.models
def test_a_chat_template_that_refuses_says_why(tmp_path):
    shutil.copytree(locate("smollm2-135m"), tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    with pytest.raises(TemplateError, match=r"refuses the conversation \(System role not supported\); use a plain"):
        HFTokenizer(tmp_path / "m").chat(CONVERSATION, answer_next=True)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": {"type": "New"}, "added_tokens": []}'])
def test_a_damaged_tokenizer_is_an_error_in_words(tmp_path, content):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"no tokenizer could be loaded from .*; expected a folder with tokenizer"):
        HFTokenizer(tmp_path)


def test_a_model_that_is_nowhere_is_an_error_in_words():
    with pytest.raises(ModelError, match="no tokenizer could be loaded from 'no-such-organisation/no-model'"):
        HFTokenizer("no-such-organisation/no-model")

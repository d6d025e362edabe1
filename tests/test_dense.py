"""Dense retrieval against cosines computed one by one; the real encoder against its promises."""

import math

import numpy as np
import pytest
from hashed_words import HashedWords
from toys import NASTY, customers, real_texts

from icl_compiler.models import locate
from retrievers.dense import Dense
from retrievers.encoder import SentenceEncoder
from retrievers.retriever import Resources

POOL = [*customers().texts, *NASTY]


def cosine(first, second):
    dot = math.fsum(float(a) * float(b) for a, b in zip(first, second, strict=True))
    return dot / math.sqrt(math.fsum(float(a) ** 2 for a in first) * math.fsum(float(b) ** 2 for b in second))


def fitted(encoder, pool):
    retriever = Dense(Resources(seed=0, encoder=encoder))
    retriever.fit(pool)
    return retriever


@pytest.mark.parametrize("copies", [1, 10])  # faiss computes few queries and many queries in different ways
def test_scores_are_cosines_and_the_best_are_found(copies):
    encoder = HashedWords()
    queries = ["my card is lost", "Where is the parcel", *NASTY] * copies
    hits = fitted(encoder, POOL).search(queries, 6)
    vectors = encoder.encode(POOL)
    for query, ids, scores in zip(queries, *hits, strict=True):
        [vector] = encoder.encode([query])
        expected = [cosine(vector, other) for other in vectors]
        np.testing.assert_allclose(scores, [expected[row] for row in ids], atol=1e-6)
        np.testing.assert_allclose(scores, sorted(expected, reverse=True)[:6], atol=1e-6)


def test_equal_scores_come_in_the_order_of_the_rows():
    retriever = fitted(HashedWords(), ["a b", "c", "A B", "c", "b a", "a b", "d"])
    assert retriever.search(["a b"], 4).ids.tolist() == [[0, 2, 4, 5]]
    assert retriever.search(["a b"], 3).ids.tolist() == [[0, 2, 4]]
    assert retriever.search(["c"] * 50, 2).ids.tolist() == [[1, 3]] * 50


class CountingModel:
    """Stands for the model of `sentence-transformers`."""

    def __init__(self):
        self.encoded = []

    def encode(self, texts, **settings):
        assert settings["normalize_embeddings"]
        self.encoded += texts
        return HashedWords().encode(texts)


def test_a_text_is_encoded_once():
    model = CountingModel()
    encoder = SentenceEncoder(lambda: pytest.fail("the model was asked for"))
    encoder.__dict__["_encoder"] = model
    texts = ["a", "b", "a", "c", "b"]
    np.testing.assert_array_equal(encoder.encode(texts), HashedWords().encode(texts))
    np.testing.assert_array_equal(encoder.encode(["d", "a"]), HashedWords().encode(["d", "a"]))
    assert model.encoded == ["a", "b", "c", "d"]
    # Memory is bounded: what is not asked for is forgotten, and encoded again when it is.
    encoder.remembered = 4
    np.testing.assert_array_equal(encoder.encode(["e", "b"]), HashedWords().encode(["e", "b"]))
    assert sorted(encoder._known) == ["b", "e"]
    assert encoder.encode([]).shape == (0, 0)
    assert model.encoded == ["a", "b", "c", "d", "e"]


def test_the_model_loads_on_first_use():
    asked = []
    retriever = Dense(Resources(seed=0, encoder=SentenceEncoder(lambda: asked.append(1) or "nowhere")))
    retriever.fit([])
    assert retriever.search(["x"], 3).ids.shape == (1, 0)
    assert asked == []


@pytest.mark.models
def test_the_real_encoder(shared_data):
    """Mean of the last layer over the tokens, of length 1, as the model's card says; computed with `transformers`."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = [text for text, _ in real_texts(shared_data, 3)] + ["🤖 naïve café", "", "x " * 50]
    vectors = SentenceEncoder(lambda: locate("minilm")).encode(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(locate("minilm")), AutoModel.from_pretrained(locate("minilm"))
    with torch.inference_mode():
        for text, vector in zip(texts, vectors, strict=True):
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            mean = states.mean(0).double().numpy()
            np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)

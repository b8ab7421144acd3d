"""Embeddings over HTTP: those of the engine, in both forms, in order."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import numpy as np
import pytest

from mnemos.engine.engine import InferenceEngine

openai = pytest.importorskip("openai")
PATH = "/v1/embeddings"
TEXTS = ["The cat sleeps.", "A dog barks at the moon.", "x"]


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_are_the_engines(client: httpx.Client, engine: InferenceEngine, form: str) -> None:
    assert engine.tokenizer is not None
    with openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0) as own:
        answer = own.embeddings.create(model="smollm2", input=TEXTS, encoding_format=form)
        by_default = own.embeddings.create(model="smollm2", input=TEXTS[0])
    ids = [engine.tokenizer.encode(text) for text in TEXTS]
    expected = engine.embed(ids)
    assert [one.index for one in answer.data] == [0, 1, 2] and answer.usage.prompt_tokens == sum(map(len, ids))
    vectors = [
        np.frombuffer(base64.b64decode(one.embedding), "<f4") if form == "base64" else one.embedding
        for one in answer.data
    ]
    np.testing.assert_array_equal(np.array(vectors, np.float32), expected)
    np.testing.assert_array_equal(np.array(by_default.data[0].embedding, np.float32), expected[0])


def test_token_ids_are_texts_too(client: httpx.Client, engine: InferenceEngine) -> None:
    assert engine.tokenizer is not None
    ids = engine.tokenizer.encode(TEXTS[0])
    answers = [client.post(PATH, json={"input": given}).json()["data"] for given in (TEXTS[0], ids, [ids])]
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0][0]["embedding"]) == engine.spec.hidden_size


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": ""}, "input", "not empty"),
        ({"input": []}, "input", "token ids"),
        ({"input": "word " * 3000}, "input", "context"),
        ({"input": [10**8]}, "input", "vocabulary"),
        ({"dimensions": 12}, "dimensions", "leave it out"),
        ({"encoding_format": "hex"}, "encoding_format", "base64"),
        ({"pooling": "max"}, "pooling", "mean"),
    ],
)
def test_what_is_wrong_is_named(client: httpx.Client, fields: dict[str, Any], param: str, words: str) -> None:
    response = client.post(PATH, json={"input": "a", **fields})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param and words in error["message"], error

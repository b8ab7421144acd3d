"""The NOVA documents' server, as its examples use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mnemos import InferenceAPI, InferenceEngine, ModelServer
from tests.serve.running import running


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[ModelServer]:
    with InferenceEngine.from_pretrained(str(smollm2), context_length=512) as engine:
        yield ModelServer(engine)


@pytest.fixture(scope="module")
def api(server: ModelServer) -> Iterator[httpx.Client]:
    with running(InferenceAPI(server, host="127.0.0.1", port=0).app) as client:
        yield client


def test_texts_are_continued_alone_and_together(server: ModelServer) -> None:
    texts = ["The capital of France is", "One, two, three,"]
    alone = [server.predict(text, max_length=15, temperature=0.8, seed=1) for text in texts]
    assert server.batch_predict(texts, max_length=15, seed=1) == alone and all(alone)


def test_generate_answers_as_the_document_says(server: ModelServer, api: httpx.Client) -> None:
    body = {"text": "Hello, how are you?", "max_length": 20, "temperature": 0.8, "seed": 7}
    answer = api.post("/generate", json=body).json()
    assert answer["generated_text"] == server.predict(body["text"], 20, 0.8, seed=7)
    assert api.get("/health").json() == {"status": "healthy"}
    refused = api.post("/generate", json={**body, "max_length": 0})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_length"


def test_the_description_is_shown_without_a_network(api: httpx.Client) -> None:
    page = api.get("/docs")
    assert page.status_code == 200 and "http" not in page.text.replace("<!doctype html>", "")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js"):
        assert f"docs/{name}" in page.text or name == "swagger-ui.css"
        assert api.get(f"/docs/{name}").status_code == 200
    assert "/generate" in api.get("/openapi.json").json()["paths"]

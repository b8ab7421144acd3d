"""llama.cpp takes the same tokens from a text as the folder that an exported file was made of."""

from __future__ import annotations

import gc
import json
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

xllamacpp = pytest.importorskip("xllamacpp")
torch = pytest.importorskip("torch")

from mnemos import export_to_gguf  # noqa: E402
from mnemos.text.tokenizer import Tokenizer  # noqa: E402
from tests.models.checkpoints import CONFIGS, build  # noqa: E402
from tests.text.test_gguf_form import IDENTITY, STEPS, make, train  # noqa: E402

pytestmark = pytest.mark.slow

TEXTS = [
    "I'm sure it's 3.14159 or 1234567, DON'T you'LL we'Ve?! (see [x_1])",
    "  two  spaces\n\n\tand tabs\r\n   end  ",
    "a<|end|>b  <|start|> c [user]d [user] e <s>hi</s> there <unk>",
    "\u00c9t\u00e9 \ufb01ne \uff21 \u00b2 \u4f60\u597d\uff0c \u041f\u0440\u0438 \U0001f468\u200d\U0001f469",
    "\u2581x\u2581 \u00a0\u3000\ufeff",
    "",
    " ",
    "\n",
]
KINDS: dict[str, Callable[[Path], object]] = {
    **{name: lambda folder, name=name: make(folder, STEPS[name]) for name in STEPS},  # type: ignore[misc]
    "bytes alone": lambda folder: make(folder, STEPS["gpt-2"], size=0),
    "sentencepiece": lambda folder: train(folder, **IDENTITY),
    "sentencepiece with symbols": lambda folder: train(
        folder, user_defined_symbols=["[user]"], control_symbols=["<|end|>"], pad_id=3, **IDENTITY
    ),
    "sentencepiece without bos": lambda folder: train(folder, bos_id=-1, eos_id=1, **IDENTITY),
    "sentencepiece without a space before": lambda folder: train(folder, add_dummy_prefix=False, **IDENTITY),
    "unigram": lambda folder: train(folder, model_type="unigram", byte_fallback=False),
    "unigram that keeps spaces": lambda folder: train(folder, model_type="unigram", byte_fallback=False, **IDENTITY),
}


@contextmanager
def served(path: Path) -> Iterator[Callable[[str, dict[str, Any]], dict[str, Any]]]:
    """llama.cpp's own server with the file, while the block runs: (path, request) -> answer."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 64, 1, False
    server = xllamacpp.Server(parameters)
    address = server.listening_address

    def post(name: str, content: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            address + name, json.dumps(content).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    try:
        yield post
    finally:
        del server
        gc.collect()


@pytest.mark.parametrize("name", KINDS)
def test_the_same_tokens(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path)
    before = Tokenizer.from_file(tmp_path)
    config = CONFIGS["llama"]()
    config.vocab_size = before.vocabulary_size + 7
    build(config, tmp_path)
    after = Tokenizer.from_gguf(export_to_gguf(tmp_path, tmp_path / "model.gguf").path)
    with served(tmp_path / "model.gguf") as post:
        for text in TEXTS:
            if name == "unigram that keeps spaces" and not text.strip():
                continue  # llama.cpp puts its space before the first word, if there is one
            for special in (True, False):
                found = post("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]
                assert found == after.encode(text, special, True) == before.encode(text, special, True), text

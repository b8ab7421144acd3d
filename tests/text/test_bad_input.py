"""Corrupt and hostile tokenizers, texts and ids are refused, saying what is wrong and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mnemos.errors import FormatError, MnemosError, RequestError, UnsupportedError
from mnemos.text.tokenizer import Tokenizer

from .metadata import byte_level, sentencepiece


def build(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_metadata(metadata, "bad.gguf").prepare()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"tokenizer\.ggml\.model is missing"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens"),
        ({"tokens": []}, r"tokenizer\.ggml\.tokens"),
        ({"tokens": 7}, r"tokenizer\.ggml\.tokens is 7"),
        ({"tokens": np.zeros(3, dtype=np.int32)}, r"tokenizer\.ggml\.tokens"),
        ({"tokens": ["a", "b", "a"]}, r"tokens holds 'a' at 0 and at 2; tokens must be unique"),
        ({"merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"merges": ["h e", "hx"]}, r"merges holds 'hx' at 1"),
        ({"merges": ["h "]}, r"merges holds 'h ' at 0"),
        ({"merges": ["h ", "hx"]}, r"merges holds 'h ' at 0"),
        ({"merges": ["h zz"]}, r"merges do not fit tokenizer\.ggml\.tokens.*zz"),
        ({"merges": ["h o"]}, r"merges do not fit tokenizer\.ggml\.tokens.*ho"),
        ({"token_type": np.ones(5, dtype=np.int32)}, r"token_type has 5 entries; the vocabulary has 261"),
        ({"token_type": "normal"}, r"token_type is normal"),
        ({"token_type": np.ones(261, dtype=np.float32)}, r"token_type"),
        ({"bos_token_id": "1"}, r"bos_token_id is '1'"),
        ({"bos_token_id": None, "add_bos_token": True}, r"add_bos_token is true, but tokenizer\.ggml\.bos_token_id"),
        ({"add_bos_token": 1}, r"add_bos_token is '1'; it must be a boolean"),
        ({"pre": 3}, r"tokenizer\.ggml\.pre is '3'"),
    ],
)
def test_byte_level_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=rf"^bad\.gguf: .*{message}"):
        build(byte_level(**changes))


def test_a_custom_of_the_pre_tokenizer_asks_for_nothing_that_is_not_there() -> None:
    """Files for llama-bpe begin a text with bos, even if they do not say so; a file without bos has none."""
    tokenizer = build(byte_level(pre="llama-bpe", bos_token_id=None, add_bos_token=None))
    assert tokenizer.encode("he") == tokenizer.encode("he", add_special=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"scores": np.zeros(3, dtype=np.float32)}, r"scores has 3 entries"),
    ],
)
def test_sentencepiece_metadata(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=rf"^bad\.gguf: .*{message}"):
        build(sentencepiece(**changes))


def test_unsupported_kinds_list_those_supported() -> None:
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.model is 'bert'; supported are gpt2, llama"):
        build(byte_level(model="bert"))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.model is '\[\]'; supported are"):
        build(byte_level(model=np.array([], dtype=np.int32)))
    with pytest.raises(UnsupportedError, match=r"tokenizer\.ggml\.pre is 'new'; supported are .*llama-bpe.*qwen2"):
        build(byte_level(pre="new"))


def test_chat_template_must_be_text() -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.chat_template is 5"):
        build({**byte_level(), "tokenizer.chat_template": 5})


def test_scores_that_are_no_numbers_change_nothing_but_the_order() -> None:
    scores = np.full(268, np.nan, dtype=np.float32)
    assert build(sentencepiece(scores=scores)).decode(build(sentencepiece(scores=scores)).encode("hello")) == "hello"


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.text(max_size=4), max_size=8),
    st.lists(st.integers(-5, 300), max_size=8).map(lambda numbers: np.array(numbers, dtype=np.int32)),
)
keys = ("model", "pre", "tokens", "token_type", "scores", "merges", "bos_token_id", "eos_token_id", "eot_token_id",
        "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token", "add_space_prefix")  # fmt: skip


@given(st.sampled_from([byte_level, sentencepiece]), st.dictionaries(st.sampled_from(keys), values, max_size=3))
def test_any_metadata_works_or_is_refused(make: Any, changes: dict[str, Any]) -> None:
    try:
        tokenizer = build(make(**changes))
        ids = tokenizer.encode("hello <|im_end|>\n")
        tokenizer.decode(ids)
    except MnemosError:
        pass


def test_ids_outside_of_the_vocabulary() -> None:
    tokenizer = build(byte_level())
    for decode in (lambda: tokenizer.decode([1, -1]), lambda: tokenizer.decoder().push(-1)):
        with pytest.raises(RequestError, match="token id -1 is outside of the vocabulary of 261 tokens"):
            decode()
    for padded in (261, 2**31):  # rows that only the model has
        assert tokenizer.decode([65, padded]) == tokenizer.decode([65])
        assert tokenizer.decoder().push(padded) == ""


@pytest.mark.parametrize("name", ["bos", "eos", "padding", "unknown", "eot"])
def test_an_id_that_is_not_there_is_dropped(name: str) -> None:
    ends = {"add_bos_token": True} if name == "bos" else {}
    for nothing in (-1, 2**32 - 1):
        tokenizer = build(byte_level(**ends, **{f"{name}_token_id": nothing}))
        assert (tokenizer.bos_id, tokenizer.pad_id) == (None if name == "bos" else 259, None)
        assert tokenizer.decode(tokenizer.encode("he")) == "he"
    with pytest.warns(UserWarning, match=rf"{name}_token_id is 261, which is ignored: the vocabulary has 261 tokens"):
        build(byte_level(**ends, **{f"{name}_token_id": 261})).encode("he")


def test_what_is_no_text() -> None:
    tokenizer = build(byte_level())
    with pytest.raises(RequestError, match=r"of type bytes; it must be a str"):
        tokenizer.encode(b"hello")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"lone surrogate U\+D83E at 2"):
        tokenizer.encode("ab\ud83e")


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("text", ["h" * 100_000, " " * 100_000, "he" * 50_000, "\U0001f999" * 20_000, "1" * 100_000])
def test_long_texts_without_breaks(make: Any, text: str) -> None:
    """A quadratic step anywhere would take hours."""
    tokenizer = build(make())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a tokenizer.json"),
        (b"[]", "is not a tokenizer.json"),
        (b"{}", "is not a tokenizer.json"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b'{"model": {"type": "Magic"}}', "is not a tokenizer.json"),
        (b"[" * 100_000, "is not a tokenizer.json"),
        (b'{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "a"}}', "model.vocab is empty"),
        (b'{"model": {"type": "WordLevel", "vocab": {"a": 4000000000}, "unk_token": "a"}}', "ids must be dense"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "is not a tokenizer.json"),
    ],
)
def test_tokenizer_json(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        Tokenizer.from_file(file).prepare()
    assert str(file) in str(caught.value)


def test_files_beside_tokenizer_json(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    for name, content, message in [
        ("tokenizer_config.json", "{", "is not JSON"),
        ("tokenizer_config.json", "[]", "holds a list; it must be a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is 5"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'"),
    ]:
        (tmp_path / name).write_text(content)
        with pytest.raises(FormatError, match=message):
            Tokenizer.from_file(tmp_path).prepare()
        (tmp_path / name).unlink()
    with pytest.raises(FormatError, match="does not exist"):
        Tokenizer.from_file(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_several_tokens_end_a_generation(name: str, tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1, "c": 2}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    (tmp_path / name).write_text('{"eos_token_id": [1, 2, -1], "pad_token_id": -1}')
    tokenizer = Tokenizer.from_file(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.pad_id) == ({1, 2}, None)
    (tmp_path / name).write_text('{"eos_token_id": [1, 3]}')
    with pytest.warns(UserWarning, match="eos_token_id is 3, which is ignored"):
        assert Tokenizer.from_file(tmp_path).eos_ids == {1}


@pytest.mark.parametrize("place", ["tokenizer_config.json", "added_tokens.json"])
def test_tokens_that_only_the_files_beside_it_have(place: str, tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    roles: dict[str, object] = {"eos_token": "<|end|>", "pad_token": "[PAD]"}
    if place == "added_tokens.json":
        (tmp_path / place).write_text('{"<|end|>": 3, "<|start|>": 2}')
    else:
        named = {"3": {"content": "<|end|>", "special": True}, "2": {"content": "<|start|>", "special": True}}
        roles["added_tokens_decoder"] = named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(roles))
    tokenizer = Tokenizer.from_file(tmp_path)
    assert tokenizer.encode("<|start|>b<|end|>") == [2, 1, 3]
    assert (tokenizer.eos_id, tokenizer.pad_id, 3 in tokenizer.special_ids) == (3, 4, True)


def test_the_librarys_own_errors_name_file_and_text(tmp_path: Path) -> None:
    model = {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(RequestError, match=r"tokenizer\.json: this tokenizer cannot encode 'z'"):
        Tokenizer.from_file(tmp_path).encode("z")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_tokenizer_json_works_or_is_refused(data: st.DataObject, tmp_path: Path) -> None:
    content = json.dumps(
        {
            "added_tokens": [{"id": 3, "content": "<s>", "special": True, "single_word": False, "lstrip": False,
                              "rstrip": False, "normalized": False}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        }
    ).encode()  # fmt: skip
    at = data.draw(st.integers(0, len(content) - 1))
    length = data.draw(st.integers(0, 12))
    changed = content[:at] + data.draw(st.binary(max_size=4)) + content[at + length :]
    (tmp_path / "tokenizer.json").write_bytes(changed)
    try:
        tokenizer = Tokenizer.from_file(tmp_path).prepare()
        tokenizer.decode(tokenizer.encode("abba<s>"))
    except MnemosError:
        pass

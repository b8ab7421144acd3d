"""tokenizer.json and its accompanying files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from mnemos.errors import RequestError, UnsupportedError
from mnemos.text.tokenizer import Tokenizer as MnemosTokenizer

from .test_vectors import TEXTS


def byte_level_folder(folder: Path) -> RustTokenizer:
    """A small BPE tokenizer trained here, with special tokens after the vocabulary, as in Llama 3."""
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    rust.decoder = decoders.ByteLevel()
    from tokenizers.trainers import BpeTrainer

    trainer = BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    rust.train_from_iterator(TEXTS * 3, trainer)
    rust.add_special_tokens(["<|begin|>", "<|im_end|>"])
    rust.add_tokens([AddedToken("<think>", normalized=False)])
    begin = rust.token_to_id("<|begin|>")
    rust.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", begin)])
    rust.enable_truncation(4)
    rust.save(str(folder / "tokenizer.json"))
    return rust


def test_ids_are_those_of_the_library(tmp_path: Path) -> None:
    rust = byte_level_folder(tmp_path)
    rust.no_truncation()
    ours = MnemosTokenizer.from_file(tmp_path)
    for text in [*TEXTS, "a <think>b</think> <|im_end|>"]:
        for add_special in (True, False):
            ids = rust.encode(text, add_special_tokens=add_special).ids
            assert ours.encode(text, add_special) == ids
            assert ours.decode(ids, skip_special=False) == rust.decode(ids, skip_special_tokens=False)
            assert ours.decode(ids) == rust.decode(ids)
    assert ours.vocabulary_size == rust.get_vocab_size()


def test_special_names_can_be_text(tmp_path: Path) -> None:
    rust = byte_level_folder(tmp_path)
    ours = MnemosTokenizer.from_file(tmp_path / "tokenizer.json")
    end, think = rust.token_to_id("<|im_end|>"), rust.token_to_id("<think>")
    assert ours.encode("<think><|im_end|>", add_special=False) == [think, end]
    plain = ours.encode("<think><|im_end|>", add_special=False, parse_special=False)
    assert plain[0] == think and end not in plain
    assert ours.decode(plain) == "<think><|im_end|>"
    assert ours.special_ids == {rust.token_to_id("<|begin|>"), end}


def test_roles_and_ends(tmp_path: Path) -> None:
    rust = byte_level_folder(tmp_path)
    begin, end, think = (rust.token_to_id(text) for text in ("<|begin|>", "<|im_end|>", "<think>"))
    config = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|im_end|>", "chat_template": "{{ bos_token }}!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, think], "pad_token_id": end}))
    ours = MnemosTokenizer.from_file(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.eos_ids) == (begin, end, end, {end, think})
    assert ours.apply_chat_template([]) == "<|begin|>!"
    assert ours.encode_chat([])[0] == begin
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert MnemosTokenizer.from_file(tmp_path).chat_template == "from its own file"
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert MnemosTokenizer.from_file(tmp_path).chat_template == "b"


SENTENCEPIECE: dict[str, Callable[[], decoders.Decoder]] = {
    "llama": lambda: decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    ),
    "gemma": lambda: decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": lambda: decoders.Metaspace(),
}


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_decoders(name: str, tmp_path: Path) -> None:
    words = ["\u2581", "h", "i", "\u2581h", "\u2581hi"]
    vocabulary = {text: token for token, text in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    merges = [("\u2581", "h"), ("\u2581h", "i")]
    rust = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    rust.decoder = SENTENCEPIECE[name]()
    rust.save(str(tmp_path / "tokenizer.json"))
    ours = MnemosTokenizer.from_file(tmp_path)
    for text in ("hi", " hi", "hi hi", "\u00e9hi\U0001f999"):
        ids = rust.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == rust.decode(ids)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_the_decoder_reads_added_tokens_too(name: str, special: bool, tmp_path: Path) -> None:
    rust = Tokenizer(models.BPE({"a": 0, "b": 1, "\u2581": 2}, []))
    rust.normalizer = normalizers.Replace(" ", "\u2581")
    rust.decoder = SENTENCEPIECE[name]()
    spaces = AddedToken("\u2581\u2581\u2581", special=special, normalized=True)
    (rust.add_special_tokens if special else rust.add_tokens)([spaces])
    rust.save(str(tmp_path / "tokenizer.json"))
    ours = MnemosTokenizer.from_file(tmp_path)
    for ids in ([0, 3, 1], [0, 2, 3, 1]):
        assert ours.decode(ids, skip_special=False) == rust.decode(ids, skip_special_tokens=False)
    assert ours.decode([0, 3, 1], skip_special=False) == "a   b"


def test_words_are_joined_by_spaces(tmp_path: Path) -> None:
    rust = Tokenizer(models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    rust.pre_tokenizer = pre_tokenizers.Whitespace()
    rust.save(str(tmp_path / "tokenizer.json"))
    ours = MnemosTokenizer.from_file(tmp_path)
    assert ours.encode("one two three") == [0, 1, 2]
    assert ours.decode([0, 1, 0]) == rust.decode([0, 1, 0]) == "one two one"


STEPS: dict[str, Callable[[], decoders.Decoder]] = {
    "end of word": lambda: decoders.BPEDecoder("</w>"),
    "another mark": lambda: decoders.Metaspace("_"),
    "another mark, no space before": lambda: decoders.Metaspace("_", prepend_scheme="never"),
    "bytes": lambda: decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]),
    "replaced": lambda: decoders.Replace("h", "th"),
    "replaced, bytes": lambda: decoders.Sequence([decoders.Replace("_", " "), decoders.ByteFallback()]),
    "replaced twice": lambda: decoders.Sequence([decoders.Replace("</w>", "_"), decoders.Replace("_", "-")]),
    "stripped, each": lambda: decoders.Sequence([decoders.Strip("h", 1, 0), decoders.Fuse()]),
    "stripped at the beginning": lambda: decoders.Sequence(
        [decoders.Fuse(), decoders.Replace("_", " "), decoders.Strip(" ", 1, 0)]
    ),
    "stripped at the end": lambda: decoders.Sequence(
        [decoders.Replace("</w>", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)]
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_decoders(name: str, tmp_path: Path) -> None:
    words = ["h", "i", "hi", "_hi", "_h", "i</w>", "hi</w>", "ih", "hhi", "\u00e9", "</s>"]
    vocabulary = {text: token for token, text in enumerate([*(f"<0x{byte:02X}>" for byte in range(256)), *words])}
    rust = Tokenizer(models.BPE(vocabulary, []))
    rust.decoder = STEPS[name]()
    rust.add_special_tokens(["</s>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    ours, random = MnemosTokenizer.from_file(tmp_path), np.random.default_rng(1)
    for length in [1, 1, 2, 2, *range(1, 40)]:
        ids = [0xC3, 0xA9, *random.integers(256, len(vocabulary), length).tolist()][:: random.choice((1, -1))]
        ids = ids[2:] if length % 2 else ids
        for skipped in (True, False):
            wanted = rust.decode(ids, skip_special_tokens=skipped)
            assert ours.decode(ids, skip_special=skipped) == wanted
            decoder = ours.decoder(skip_special=skipped)
            assert "".join(map(decoder.push, ids)) + decoder.finish() == wanted


def test_words_with_a_suffix_as_gpt_has_them(tmp_path: Path) -> None:
    from tokenizers.trainers import BpeTrainer

    rust = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    rust.normalizer, rust.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    rust.decoder = decoders.BPEDecoder("</w>")
    rust.train_from_iterator(TEXTS, BpeTrainer(vocab_size=400, special_tokens=["<unk>"], end_of_word_suffix="</w>"))
    rust.save(str(tmp_path / "tokenizer.json"))
    ours = MnemosTokenizer.from_file(tmp_path)
    for text in TEXTS[:12]:
        ids = rust.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == rust.decode(ids)


@pytest.mark.parametrize(
    "decoder",
    [
        decoders.CTC(),
        decoders.Replace(Regex("e+"), "e"),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]),
        decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 1, 0)]),
    ],
    ids=str,
)
def test_unknown_decoders_are_named(decoder: decoders.Decoder, tmp_path: Path) -> None:
    rust = Tokenizer(models.WordLevel({"one": 0}, unk_token="one"))
    rust.decoder = decoder
    rust.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnsupportedError, match=r"decoder is {'type': .*supported are ByteLevel"):
        MnemosTokenizer.from_file(tmp_path).prepare()


def test_a_pattern_that_takes_too_long_is_an_error(tmp_path: Path) -> None:
    rust = Tokenizer(models.BPE({character: i for i, character in enumerate("ab!")}, []))
    rust.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    rust.save(str(tmp_path / "tokenizer.json"))
    ours = MnemosTokenizer.from_file(tmp_path)
    assert ours.encode("ab") == [0, 1]
    with pytest.raises(RequestError, match="tokenizer.json: this tokenizer cannot encode"):
        ours.encode("a" * 40 + "!")


@pytest.mark.parametrize("kind", ["WordPiece", "WordPiece, no cleanup", "Fuse"])
def test_words_their_parts_and_letters_are_joined_as_the_library_does(kind: str, tmp_path: Path) -> None:
    special = ["<s>", "</s>", "[UNK]"]
    if kind == "Fuse":
        letters = sorted(set("".join(TEXTS[:12])))
        vocabulary = {text: token for token, text in enumerate([*special, *letters])}
        rust = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        rust.pre_tokenizer, rust.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    else:
        from tokenizers.trainers import WordPieceTrainer

        rust = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        rust.normalizer, rust.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        rust.decoder = decoders.WordPiece(cleanup="no" not in kind)
        sentences = ["don't stop, it's a quick fox . we've won !", "playing played plays ( and so on )"]
        rust.train_from_iterator(sentences * 3, WordPieceTrainer(vocab_size=90, special_tokens=special))
    rust.add_special_tokens(special)
    rust.save(str(tmp_path / "tokenizer.json"))
    tokenizer = MnemosTokenizer.from_file(tmp_path)
    assert tokenizer.special_ids == {0, 1, 2}
    for text in [*TEXTS[:12], "Playing, it's (a) fox. Don't!", "we 've don ' t"]:
        ids = rust.encode(text).ids
        assert tokenizer.encode(text) == ids
        wanted = rust.decode(ids)
        assert tokenizer.decode(ids) == wanted
        decoder = tokenizer.decoder()
        assert "".join(map(decoder.push, ids)) + decoder.finish() == wanted

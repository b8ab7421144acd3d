"""Hugging Face folders of architectures that are not built in: through transformers, with generate()'s results."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mnemos import InferenceEngine  # noqa: E402
from mnemos.errors import ConfigError, FormatError, MissingDependencyError, UnsupportedError  # noqa: E402
from mnemos.models.foreign.model import ForeignModel  # noqa: E402

WORDS = 60
PROMPTS = ["w5 w6 w7 w8 w5", "w11", "w20 w21 w22 w20 w21 w22 w20"]
OPTIONS = [{}, {"num_beams": 3}, {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}]
SIZES = dict(vocab_size=WORDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)

CAUSAL = {
    "OPT": dict(SIZES, ffn_dim=48, word_embed_proj_dim=32),
    "Bloom": dict(vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4),
    "Falcon": dict(SIZES, new_decoder_architecture=False, multi_query=True),
    "Phi": dict(SIZES, intermediate_size=48),
    "StableLm": dict(SIZES, intermediate_size=48, num_key_value_heads=2),
    "GPTJ": dict(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "T5": dict(vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "Bart": dict(
        vocab_size=WORDS, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
        forced_bos_token_id=0,
    ),
}  # fmt: skip


def words() -> Any:
    """A folder's tokenizer of words w0, w1, ..."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


def save(kind: str, sizes: dict[str, Any], folder: Path, suffix: str) -> Any:
    """Writes a random model with its tokenizer, and returns the module."""
    torch.manual_seed(len(kind))
    config = getattr(transformers, f"{kind}Config")(
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, **sizes}
    )
    module = getattr(transformers, f"{kind}{suffix}")(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    module.save_pretrained(folder)
    words().save_pretrained(folder)
    return module


def reference(module: Any, prompt: str, **options: Any) -> list[int]:
    ids = torch.tensor([[int(word[1:]) for word in prompt.split()]])
    return module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)[0].tolist()


@pytest.mark.parametrize("kind", CAUSAL)
def test_causal_folders_equal_hugging_face(kind: str, tmp_path: Path) -> None:
    module = save(kind, CAUSAL[kind], tmp_path, "ForCausalLM")
    with InferenceEngine.from_pretrained(tmp_path, device="cpu") as engine:
        assert isinstance(engine.model, ForeignModel)
        assert engine.model.calls.abilities.cache is not None, "its cache is used"
        ids = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]  # type: ignore[union-attr]
        for options in OPTIONS:
            wanted = [reference(module, prompt, max_new_tokens=12, **options) for prompt in PROMPTS]
            assert engine.generate(ids, max_new_tokens=12, **options) == wanted
        text = engine.generate(PROMPTS[0], max_new_tokens=3)
        assert text.split() == [f"w{i}" for i in reference(module, PROMPTS[0], max_new_tokens=3)[5:] if i != 2]


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_encoder_decoder_folders_equal_hugging_face(kind: str, tmp_path: Path) -> None:
    """Maximum lengths are reached, so that the last token is the forced one if the folder says so."""
    module = save(kind, SEQ2SEQ[kind], tmp_path, "ForConditionalGeneration")
    with InferenceEngine.from_pretrained(tmp_path, device="cpu") as engine:
        ids = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]  # type: ignore[union-attr]
        for options in OPTIONS:
            wanted = [reference(module, prompt, max_new_tokens=7, **options) for prompt in PROMPTS]
            assert engine.generate(ids, max_new_tokens=7, **options) == wanted


def test_what_is_built_in_runs_through_transformers_on_demand(tmp_path: Path) -> None:
    save("Llama", dict(SIZES, intermediate_size=48), tmp_path, "ForCausalLM")
    with (
        InferenceEngine.from_pretrained(tmp_path, dtype="float32") as own,
        InferenceEngine.from_pretrained(tmp_path, backend="transformers:cpu", dtype="bfloat16") as theirs,
    ):
        assert isinstance(theirs.model, ForeignModel) and not isinstance(own.model, ForeignModel)
        assert next(theirs.model.module.parameters()).dtype is torch.bfloat16
        assert theirs.spec.eos_token_ids == own.spec.eos_token_ids == (2,)


def test_a_tokenizer_that_only_transformers_reads(tmp_path: Path) -> None:
    sizes = dict(SEQ2SEQ["T5"], vocab_size=400)
    module = save("T5", sizes, tmp_path, "ForConditionalGeneration")
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(FormatError, match="has no file of a tokenizer; T5Tokenizer, its own, needs one of "):
        InferenceEngine.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))  # of bytes
    with InferenceEngine.from_pretrained(tmp_path, device="cpu") as engine:
        ids = torch.tensor([[*(b + 3 for b in b"abc"), 1]])
        wanted = module.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)
        assert engine.complete("abc", max_new_tokens=9).token_ids == wanted[0, 1:].tolist()


# What cannot be loaded.


def folder_of(kind: str, folder: Path, **changes: Any) -> Path:
    save(kind, CAUSAL[kind], folder, "ForCausalLM")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_an_architecture_that_nobody_knows_is_named(tmp_path: Path) -> None:
    folder_of("OPT", tmp_path, model_type="nonesuch", architectures=["NonesuchForCausalLM"])
    with pytest.raises(UnsupportedError, match="transformers .* cannot load its config.json either: .*nonesuch"):
        InferenceEngine.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="'NonesuchForCausalLM' / 'nonesuch' is not supported; supported are"):
        InferenceEngine.from_pretrained(tmp_path, backend="native")


def test_an_architecture_that_does_not_generate_is_named(tmp_path: Path) -> None:
    folder_of("OPT", tmp_path, model_type="clip", architectures=["CLIPModel"])
    with pytest.raises(UnsupportedError, match="CLIPModel does not generate text"):
        InferenceEngine.from_pretrained(tmp_path)


def test_missing_weights_are_never_made_up(tmp_path: Path) -> None:
    folder_of("OPT", tmp_path, num_hidden_layers=3)
    with pytest.raises(FormatError, match=r"lacks .*layers\.2.* and \d+ more, which OPTForCausalLM needs"):
        InferenceEngine.from_pretrained(tmp_path)


def test_code_in_a_folder_runs_only_where_it_is_trusted(tmp_path: Path) -> None:
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    folder_of("OPT", tmp_path, model_type="theirs", architectures=["Model"], auto_map=names)
    trace = tmp_path / "trace"
    (tmp_path / "theirs.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n"
        "from transformers import OPTConfig, OPTForCausalLM\n"
        "class Config(OPTConfig):\n    model_type = 'theirs'\n"
        "class Model(OPTForCausalLM):\n    config_class = Config\n"
    )
    with pytest.raises(UnsupportedError, match="give trust_remote_code=True"):
        InferenceEngine.from_pretrained(tmp_path)
    assert not trace.exists()
    with InferenceEngine.from_pretrained(tmp_path, trust_remote_code=True, device="cpu") as engine:
        assert trace.exists()
        assert engine.spec.architecture == "Model"
        assert len(engine.generate([5, 6], max_new_tokens=3, ignore_eos=True)) == 5


def test_without_transformers_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of("OPT", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "mnemos.models.foreign.pretrained", raising=False)
    with pytest.raises(MissingDependencyError, match=r"'OPTForCausalLM' / 'opt' is not built in.*mnemos\[torch\]"):
        InferenceEngine.from_pretrained(tmp_path)


def test_options_that_mean_nothing_there_are_refused(tmp_path: Path) -> None:
    folder_of("OPT", tmp_path)
    for option in ({"kv_dtype": "int8"}, {"threads": 2}, {"dtype": "int4"}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            InferenceEngine.from_pretrained(tmp_path, **option)  # type: ignore[arg-type]
    shutil.rmtree(tmp_path)

"""The examples of the NOVA document that concern generation."""

from __future__ import annotations

import copy
import json
import runpy
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mnemos import (  # noqa: E402
    BatchInference,
    CachedAttention,
    DistilledModel,
    GenerationConfig,
    InferenceEngine,
    KVCache,
    ModelPackager,
    ModelServer,
    PrunedModel,
    QuantizedModel,
    StreamingInference,
    TorchScriptExporter,
)
from mnemos.errors import ConfigError, RequestError  # noqa: E402
from tests.seeds.conftest import BOS, EOS, FIRST, PAD, count  # noqa: E402


def test_engine_with_three_strategies(engine: InferenceEngine) -> None:
    """Padding on either side, marked by the mask; greedy and beams count on and end, samples mostly do."""
    twos, threes = [BOS, *count(2, 2)[:3]], [BOS, *count(0, 3)[:5]]
    input_ids = torch.tensor([[PAD, PAD, *twos], threes])
    attention_mask = (input_ids != PAD).long()
    wanted = [[BOS, *count(2, 2)], [BOS, *count(0, 3)]]

    def texts(outputs: torch.Tensor) -> list[list[int]]:
        return [[token for token in row if token != PAD] for row in outputs.tolist()]

    config = GenerationConfig(strategy="greedy", max_length=100, pad_token_id=PAD)
    assert texts(engine.generate(input_ids, attention_mask, config)) == wanted
    config = GenerationConfig(
        strategy="beam_search", num_beams=5, max_length=100, early_stopping=True, pad_token_id=PAD, length_penalty=1.2
    )
    assert texts(engine.generate(input_ids, attention_mask, config)) == wanted
    for config in (
        GenerationConfig(strategy="sampling", temperature=0.8, top_p=0.95, max_length=100, seed=0),
        GenerationConfig(strategy="sampling", temperature=0.8, top_k=50, top_p=0.95, do_sample=True, seed=1),
        GenerationConfig(strategy="top_k", top_k=5, temperature=0.5, max_length=100, seed=2),
        GenerationConfig(strategy="top_p", top_p=0.8, max_length=100, seed=3),
        GenerationConfig(strategy="nucleus", top_p=0.8, max_length=100, seed=4),
    ):
        outputs = engine.generate(input_ids, attention_mask, config)
        assert outputs.shape[0] == 2
        assert texts(outputs)[0][4:7] == wanted[0][4:7]


def test_a_device_in_the_tokenizers_place_is_named(counter: torch.nn.Module) -> None:
    with pytest.raises(ConfigError, match="tokenizer is a str; .*; a device is given by name, device='cpu'"):
        InferenceEngine(counter, "cpu")


def test_all_defaults_of_the_document_given_by_name(engine: InferenceEngine) -> None:
    defaults = dict(
        strategy="greedy", max_length=512, min_length=1, temperature=1.0, do_sample=False, num_beams=1,
        length_penalty=1.0, early_stopping=False, top_k=50, top_p=1.0, repetition_penalty=1.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, num_return_sequences=1,
    )  # fmt: skip
    prompt = [BOS, *count(2, 2)[:3]]
    wanted = [BOS, *count(2, 2)]
    assert engine.generate(prompt, None, GenerationConfig(**defaults)) == wanted
    assert engine.generate(prompt, None, GenerationConfig(**{**defaults, "strategy": "beam_search"})) == wanted
    for strategy in ("sampling", "top_k", "top_p", "nucleus"):
        text = engine.generate(prompt, None, GenerationConfig(**{**defaults, "strategy": strategy}, seed=0))
        assert text[:4] == prompt and text[-1] == EOS


def test_lengths(engine: InferenceEngine) -> None:
    ids = torch.tensor([[BOS, *count(30, 2)[:3]]])
    assert engine.generate(ids, None, GenerationConfig(strategy="greedy", max_length=6)).shape == (1, 6)
    short = engine.generate(ids, None, GenerationConfig(strategy="greedy", max_length=60))
    longer = engine.generate(ids, None, GenerationConfig(strategy="greedy", max_length=60, min_length=20))
    assert short[0, -1] == EOS
    assert short.shape[1] == 7 < 20 <= longer.shape[1]


def test_translation_as_it_is_written(engine: InferenceEngine, tokenizer_folder: Path) -> None:
    """With the config in second place the result is a batch; a flat list elsewhere gives a flat list."""
    transformers = pytest.importorskip("transformers")
    config = GenerationConfig(
        strategy="beam_search", num_beams=5, max_length=100, length_penalty=1.2, early_stopping=True
    )
    words = " ".join(map(str, range(10, 39, 2)))
    for tokenizer in (engine.tokenizer, transformers.AutoTokenizer.from_pretrained(tokenizer_folder)):
        input_ids = tokenizer.encode("10 12 14")
        outputs = engine.generate(input_ids, config)
        translation = tokenizer.decode(outputs[0])
        assert translation.removeprefix("<bos> ").removesuffix(" <eos>") == words
        assert engine.generate(input_ids, config=config) == outputs[0]
        assert len(engine.generate(input_ids, config.with_overrides(num_return_sequences=3))) == 3
        batch = tokenizer.encode("10 12 14", return_tensors="pt") if tokenizer is not engine.tokenizer else [input_ids]
        assert [list(row) for row in engine.generate(batch, config)] == outputs
    assert engine.generate("10 12 14", config).split() == words.split()[3:]


def test_translation_of_a_batch(engine: InferenceEngine) -> None:
    config = GenerationConfig(
        strategy="beam_search", num_beams=5, max_length=100, length_penalty=1.2, early_stopping=True
    )
    assert engine.tokenizer is not None
    input_ids = engine.tokenizer.encode("10 12 14")
    outputs = engine.generate([input_ids], config)
    assert engine.tokenizer.decode(outputs[0]) == " ".join(map(str, range(10, 39, 2)))


def test_batch_inference(engine: InferenceEngine) -> None:
    batch_engine = BatchInference(engine, batch_size=8, pad_token_id=0)
    input_ids_list = [
        torch.tensor([BOS, FIRST + 10, FIRST + 20]),
        torch.tensor([BOS, FIRST + 15, FIRST + 16]),
        torch.tensor([BOS, FIRST + 10, FIRST + 12, FIRST + 14, FIRST + 16]),
    ]
    outputs = batch_engine.generate(input_ids_list, GenerationConfig(strategy="greedy", max_length=50))
    assert len(outputs) == 3
    assert outputs[1].tolist() == [BOS, *count(15, 1)]
    assert outputs[2].tolist() == [BOS, *count(10, 2)]


def test_streaming_inference(engine: InferenceEngine) -> None:
    streaming = StreamingInference(engine)
    input_ids = torch.tensor([[BOS, *count(5, 1)[:3]]])
    config = GenerationConfig(strategy="sampling", max_length=10, temperature=0.1, seed=0)
    tokens = [token.item() for token in streaming.generate_stream(input_ids, torch.ones_like(input_ids), config)]
    assert tokens == count(8, 1)[:6]


def test_streamed_dialogue_from_a_list_of_ids(engine: InferenceEngine) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    config = GenerationConfig(strategy="sampling", temperature=0.3, top_p=0.95, max_length=12, seed=1)
    stream = StreamingInference(engine).generate_stream(tokenizer.encode("3 6 9"), None, config)
    assert [tokenizer.decode([token]) for token in stream] == [str(n) for n in range(12, 36, 3)]


def test_key_value_cache() -> None:
    cache = KVCache(num_layers=12, batch_size=8, num_heads=8, head_dim=64, max_length=512, device="cpu")
    key, value = torch.randn(8, 8, 3, 64), torch.randn(8, 8, 3, 64)
    for layer_idx in range(12):
        cached_key, cached_value = cache.update(layer_idx, key, value)
    assert torch.equal(cached_key, key) and torch.equal(cached_value, value)
    cache.increment_length(3)
    cached_key, _ = cache.update(0, key[:, :, :1], value[:, :, :1])
    assert torch.equal(cached_key, torch.cat((key, key[:, :, :1]), dim=2))
    cache.increment_length(1)
    cache.reset()
    assert cache.update(0, key, value)[0].shape[2] == 3
    with pytest.raises(ConfigError, match=r"key \(8, 3, 64\) and value .* expected \(batch, heads, new positions"):
        cache.update(0, key[0], value[0])
    with pytest.raises(ConfigError, match="key list and value list do not fit the cache: expected "):
        cache.update(0, [1.0], [1.0])
    cache.clear()
    assert all(not tensor.any() for tensor in cache.keys)


def test_cached_attention() -> None:
    attention = CachedAttention(d_model=512, num_heads=8, dropout=0.1).eval()
    x = torch.randn(2, 5, 512)
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    whole, _ = attention(x, x, x, mask=causal)
    first, new = x[:, :4], x[:, 4:]
    output, cache = attention(first, first, first, mask=None, use_cache=True)
    assert cache[0].shape == (2, 8, 4, 64)
    newest, updated_cache = attention(new, new, new, mask=None, use_cache=True)
    assert updated_cache[0].shape[2] == 5
    assert torch.allclose(torch.cat((output, newest), dim=1), whole, atol=1e-5)
    attention.reset_cache()
    assert attention.cache is None


def test_masks_of_every_shape() -> None:
    """Each gives the same result for the last two of five positions, of which the first three are cached."""
    torch.manual_seed(0)
    attention = CachedAttention(32, 4).eval()
    x = torch.randn(2, 5, 32)
    rows = torch.rand(2, 5, 5) > 0.4
    rows |= torch.eye(5, dtype=torch.bool)
    whole, _ = attention(x, x, x, mask=rows)

    def last(mask: torch.Tensor | None, of: torch.Tensor = x) -> torch.Tensor:
        attention.reset_cache()
        attention(of[:, :3], of[:, :3], of[:, :3], use_cache=True)
        output, _ = attention(of[:, 3:], of[:, 3:], of[:, 3:], mask=mask, use_cache=True)
        return output

    additive = torch.zeros(2, 5, 5).masked_fill(~rows, float("-inf"))
    for mask in (rows, rows[:, None].expand(2, 4, 5, 5), rows.int(), rows.float(), additive):
        assert torch.allclose(last(mask[..., 3:, :]), whole[:, 3:], atol=1e-5)  # of the new queries
        assert torch.allclose(last(mask), whole[:, 3:], atol=1e-5)  # of all queries
    seen = rows.clone()
    seen[:, :, :3] = True
    assert torch.allclose(last(rows[:, 3:, 3:]), attention(x, x, x, mask=seen)[0][:, 3:], atol=1e-5)
    pads = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])  # a tokenizer's attention_mask
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = attention(x, x, x, mask=causal & pads[:, None].bool())[0][:, 3:]
    assert torch.allclose(last(pads[:, None, None]), expected, atol=1e-5)
    assert torch.allclose(last(torch.eye(2).bool())[:, 0], last(None)[:, 0], atol=1e-5)
    attention.reset_cache()
    assert torch.allclose(attention(x, x, x, mask=pads)[0], attention(x, x, x, mask=pads.bool()[:, None])[0])
    for wrong in (torch.zeros(7, 9).bool(), torch.ones(3, 2, 5), torch.ones(1, 1, 1, 2, 5)):
        with pytest.raises(ConfigError, match=r"mask is \(.*\); expected \(2, 5\), .*, \(2, 2, 5\), or broad"):
            last(wrong)
    with pytest.raises(ConfigError, match="mask is of whole numbers other than 0 and 1"):
        last(torch.full((2, 5), 3))


def test_attention_to_another_text_and_what_does_not_fit() -> None:
    attention = CachedAttention(32, 4).eval()
    x, other = torch.randn(2, 2, 32), torch.randn(2, 5, 32)
    plain, _ = attention(x, other, other)
    assert torch.allclose(attention(x, other, other, use_cache=True)[0], plain, atol=1e-6)
    with pytest.raises(ConfigError, match="query has a batch of 1 and the cache one of 2; call reset_cache"):
        attention(x[:1], x[:1], x[:1], use_cache=True)
    with pytest.raises(ConfigError, match=r"query is \(2, 32\); expected \(2, time, 32\)"):
        attention(x[0], x[0], x[0])
    with pytest.raises(ConfigError, match=r"key is \(2, 2, 8\); expected \(2, time, 32\)"):
        attention(x, x[..., :8], x)


def test_dropout_is_a_share() -> None:
    with pytest.raises(ConfigError, match=r"dropout is 1.5"):
        CachedAttention(32, 4, dropout=1.5)


def test_pytorch_s_own_dynamic_quantization(counter: torch.nn.Module, tokenizer: Any) -> None:
    """Its layers round a text's inputs by their common range, so earlier logits depend a little on later tokens."""
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(counter), {torch.nn.Linear})
    with InferenceEngine(quantized, tokenizer) as engine:
        assert engine.generate("2 4 6", max_new_tokens=4).split() == ["8", "10", "12", "14"]


def test_logits_that_are_a_view_of_a_parameter() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = torch.nn.Parameter(torch.tensor([0.0, 1.0, 3.0, 2.0]))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.values.expand(*input_ids.shape, -1)

    with InferenceEngine(Fixed(), context_length=16) as engine:
        assert engine.generate([1], max_new_tokens=3) == [1, 2, 2, 2]


def test_a_cache_has_the_dtype_of_its_keys() -> None:
    pair = torch.randn(1, 2, 3, 4)
    cache = KVCache(num_layers=2, batch_size=1, num_heads=2, head_dim=4, max_length=8)
    assert cache.keys[0].dtype == torch.float32
    assert cache.update(0, pair.half(), pair.half())[0].dtype == torch.float16
    with pytest.raises(ConfigError, match="key is torch.bfloat16 on cpu and the cache torch.float16 on cpu"):
        cache.increment_length(3)
        cache.update(0, pair.bfloat16(), pair.bfloat16())
    with pytest.raises(ConfigError, match="key is torch.float32 .* create the cache with the model's dtype and device"):
        KVCache(1, 1, 2, 4, 8, dtype=torch.float16).update(0, pair, pair)


def test_a_stream_of_several_results_is_refused(engine: InferenceEngine) -> None:
    config = GenerationConfig(strategy="sampling", num_return_sequences=2)
    with pytest.raises(RequestError, match="num_return_sequences is 2; here a request has one result"):
        StreamingInference(engine).generate_stream([BOS, FIRST], None, config)


def test_rows_are_padded_as_the_tokenizer_says(engine: InferenceEngine) -> None:
    """The model names no pad token."""
    ids = torch.tensor([[BOS, *count(33, 2)[:2]], [BOS, *count(1, 2)[:2]]])
    rows = engine.generate(ids).tolist()
    assert rows[0] == [BOS, *count(33, 2), *[PAD] * (len(rows[1]) - 6)]
    padded = torch.tensor([[BOS, *count(4, 2)[:3], PAD, PAD]])  # without a mask
    assert engine.generate(padded, max_new_tokens=3)[0, 6:].tolist() == count(10, 2)[:3]
    with InferenceEngine(engine.model, engine.tokenizer) as other:  # a pad token that is text, if the caller says so
        row = other.generate(torch.tensor([[BOS, FIRST + 3, FIRST + 5]]), pad_token_id=FIRST + 9, max_new_tokens=2)
        assert row[0, 3:].tolist() == [FIRST + 7, FIRST + 9]


def test_a_prompt_without_tokens_begins_with_the_bos_token(counter: torch.nn.Module) -> None:
    with InferenceEngine(counter) as engine:
        begun = engine.generate([BOS], max_new_tokens=4)
        assert engine.generate([], bos_token_id=BOS, max_new_tokens=4) == begun
        assert engine.generate(bos_token_id=BOS, max_new_tokens=4) == begun
        with pytest.raises(RequestError, match=r"messages of a conversation; call chat\(messages\)"):
            engine.generate([{"role": "user", "content": "Hello"}])
        with pytest.raises(RequestError, match="the prompts are an empty list"):
            engine.generate([], max_new_tokens=4)


def test_packaging(counter: torch.nn.Module, engine: InferenceEngine, tmp_path: Path, monkeypatch: Any) -> None:
    """The document's example, in its own folder; a class that takes its hyperparameters as one object gets them so."""
    monkeypatch.chdir(tmp_path)
    config = asdict(counter.args)
    packager = ModelPackager(counter, engine.tokenizer, config=config)
    packager.package("deployment/model_package")
    model, tokenizer, loaded = ModelPackager.load_package("deployment/model_package", model_class=type(counter))
    ids = torch.tensor([[BOS, *count(2, 2)[:3]]])
    assert loaded == config and torch.equal(model(ids)[0], counter(ids)[0])
    assert tokenizer.encode("2 4 6") == ids[0].tolist()
    metadata = json.loads(Path("deployment/model_package/metadata.json").read_text())
    assert metadata["model_class"] == type(counter).__name__ and metadata["device"] == "cpu"
    assert metadata["torch_version"] == torch.__version__ and metadata["python_version"].startswith("3.")
    datetime.fromisoformat(metadata["created_at"])
    with InferenceEngine(model, tokenizer) as loaded_engine:
        assert loaded_engine.generate("2 4 6", max_new_tokens=4).split() == ["8", "10", "12", "14"]


def test_a_quantized_model_is_served(counter: torch.nn.Module, engine: InferenceEngine) -> None:
    quantized = QuantizedModel(copy.deepcopy(counter), bits=8, method="dynamic")
    server = ModelServer(quantized, engine.tokenizer, device="cpu")
    # predict samples at 0.8, at which one answer in a hundred takes another step
    settings = {"max_length": 8, "temperature": 0.1}
    assert server.predict("2 4 6", **settings).split()[-4:] == ["8", "10", "12", "14"]
    assert server.batch_predict(["2 4 6", "3 6 9"], **settings)[1].split()[-4:] == ["12", "15", "18", "21"]
    with pytest.raises(RequestError, match="the prompts are one text, '2 4 6'; give a list of texts"):
        server.batch_predict("2 4 6")


def test_a_pruned_model_continues_batches(counter: torch.nn.Module, engine: InferenceEngine) -> None:
    pruned = PrunedModel(copy.deepcopy(counter), pruning_ratio=0.3, method="magnitude")
    pruned.make_permanent()
    input_ids_list = [engine.tokenizer.encode(f"{start} {start + 1} {start + 2}") for start in range(20)]
    with InferenceEngine(pruned, device="cpu") as pruned_engine:
        batch_engine = BatchInference(pruned_engine, batch_size=32)
        outputs = batch_engine.generate(input_ids_list, GenerationConfig(strategy="greedy", max_length=50))
    right = [output[:8] == [BOS, *count(start, 1)][:8] for start, output in enumerate(outputs)]
    assert sum(right) >= 15  # a third of the weights of a model this small is gone


def test_distillation_for_a_phone(counter: torch.nn.Module, tmp_path: Path) -> None:
    teacher, student = Scripted(64), Scripted(16)
    distilled = DistilledModel(student, teacher, temperature=2.0, alpha=0.5)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    inputs = torch.randint(0, 20, (8, 12), generator=torch.Generator().manual_seed(0))
    losses = [float(distilled.train_step(inputs, inputs, optimizer)) for _ in range(10)]
    assert losses[-1] < losses[0]
    TorchScriptExporter(student).export(str(tmp_path / "mobile_model.pt"), method="script")
    assert torch.equal(torch.jit.load(str(tmp_path / "mobile_model.pt"))(inputs), student(inputs))


class Scripted(torch.nn.Module):
    """Token ids (batch, time) to logits (batch, time, 20)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(20, width), torch.nn.Linear(width, 20)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.embedding(input_ids)))


@pytest.mark.slow
def test_the_document_s_test_suite(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "quick_inference_test.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and all(line.startswith("ok ") for line in lines)

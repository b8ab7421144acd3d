"""Every part of Mnemos on a small module of one's own, in seconds: python examples/quick_inference_test.py

Needs PyTorch; exports need 'mnemos[export]', and are skipped without it. Each line says what was checked; the first
thing that is not as it should be ends the script with an error.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from mnemos import (
    BatchInference,
    CachedAttention,
    DistilledModel,
    GenerationConfig,
    InferenceEngine,
    KVCache,
    ModelPackager,
    ONNXExporter,
    PrunedModel,
    QuantizedModel,
    StreamingInference,
    TorchScriptExporter,
)
from mnemos.errors import MissingDependencyError

VOCABULARY, WIDTH, HEADS, LAYERS = 96, 64, 4, 2
PROMPT = [5, 17, 3, 42]


class Layer(nn.Module):
    """Causal attention and a feed-forward part."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.joined, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(batch, time, WIDTH) to the same."""
        batch, time, _ = hidden.shape
        shape = (batch, time, 3, HEADS, WIDTH // HEADS)
        query, key, value = self.joined(self.before(hidden)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.output(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        return hidden + self.feed_forward(self.between(hidden))


class Small(nn.Module):
    """Token ids (batch, time) to logits (batch, time, VOCABULARY). It has no cache, which the engine is told."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(256, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits of the token after each one."""
        hidden = self.embedding(input_ids) + self.position(torch.arange(input_ids.shape[1]))
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def by_hand(module: nn.Module, prompt: list[int], count: int) -> list[int]:
    """What greedy decoding without any engine continues a prompt with."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(module(torch.tensor([ids]))[0, -1].argmax()))
    return ids


def engine_of(module: nn.Module) -> None:
    """Greedy decoding equals a loop by hand, beams are at least as probable, and samples repeat with their seed."""
    with InferenceEngine(module, use_kv_cache=False) as engine:
        greedy = engine.generate(PROMPT, GenerationConfig(strategy="greedy", max_new_tokens=12))
        assert greedy == [by_hand(module, PROMPT, 12)], greedy
        beams = engine.generate(PROMPT, GenerationConfig(strategy="beam_search", num_beams=4, max_new_tokens=12))
        assert log_probability(module, beams[0]) >= log_probability(module, greedy[0]) - 1e-4
        config = GenerationConfig(strategy="sampling", temperature=0.8, top_p=0.95, max_new_tokens=12, seed=7)
        assert engine.generate(PROMPT, config) == engine.generate(PROMPT, config)


def log_probability(module: nn.Module, ids: list[int]) -> float:
    """Of the tokens after the prompt, together."""
    with torch.inference_mode():
        rows = module(torch.tensor([ids]))[0].log_softmax(-1)
    return sum(float(rows[place - 1, ids[place]]) for place in range(len(PROMPT), len(ids)))


def batches(module: nn.Module) -> None:
    """Prompts of different lengths are continued together as they are alone."""
    prompts = [PROMPT[:length] for length in (1, 2, 3, 4)]
    with InferenceEngine(module, use_kv_cache=False) as engine:
        outputs = BatchInference(engine, batch_size=4).generate(prompts, GenerationConfig(max_new_tokens=8))
        assert [list(row) for row in outputs] == [by_hand(module, prompt, 8) for prompt in prompts]


def streams(module: nn.Module) -> None:
    """Tokens come one by one, the same as all at once."""
    with InferenceEngine(module, use_kv_cache=False) as engine:
        config = GenerationConfig(max_new_tokens=8)
        tokens = [int(token) for token in StreamingInference(engine).generate_stream(PROMPT, None, config)]
    assert PROMPT + tokens == by_hand(module, PROMPT, 8)


def key_value_cache(_: nn.Module) -> None:
    """What was put into a cache comes out, and a reset empties it."""
    cache = KVCache(num_layers=1, batch_size=1, num_heads=HEADS, head_dim=8, max_length=16)
    keys, values = torch.randn(1, HEADS, 3, 8), torch.randn(1, HEADS, 3, 8)
    found = cache.update(0, keys, values)
    assert torch.equal(found[0], keys) and torch.equal(found[1], values)
    cache.increment_length(3)
    assert cache.update(0, keys[:, :, :1], values[:, :, :1])[0].shape[2] == 4
    cache.reset()
    assert cache.update(0, keys, values)[0].shape[2] == 3


def cached_attention(_: nn.Module) -> None:
    """Attention with a cache, token by token, equals attention over the whole text."""
    attention = CachedAttention(WIDTH, HEADS).eval()
    hidden = torch.randn(1, 6, WIDTH)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    with torch.inference_mode():
        whole, _ = attention(hidden, hidden, hidden, mask=causal)
        parts = [attention(one, one, one, use_cache=True)[0] for one in hidden.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def quantization(module: nn.Module) -> None:
    """8 bits change logits by less than 2 percent, and the file is loaded with the same ones."""
    quantized = QuantizedModel(copy.deepcopy(module), bits=8, method="dynamic")
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        wanted, got = module(ids), quantized(ids)
        assert float((got - wanted).norm() / wanted.norm()) < 0.02
        with tempfile.TemporaryDirectory() as folder:
            quantized.save(Path(folder) / "small")
            again = QuantizedModel.load(Path(folder) / "small", model_class=Small)
            assert torch.equal(again(ids), got)
    with InferenceEngine(quantized, use_kv_cache=False) as engine:
        assert len(engine.generate(PROMPT, GenerationConfig(max_new_tokens=8))[0]) == len(PROMPT) + 8


def pruning(module: nn.Module) -> None:
    """30 percent of the weights are gone, for good."""
    pruned = PrunedModel(copy.deepcopy(module), pruning_ratio=0.3, method="magnitude")
    pruned.make_permanent()
    assert abs(pruned.sparsity() - 0.3) < 0.02
    with InferenceEngine(pruned, use_kv_cache=False) as engine:
        assert len(engine.generate(PROMPT, GenerationConfig(max_new_tokens=8))[0]) == len(PROMPT) + 8


def distillation(module: nn.Module) -> None:
    """A student of one layer comes nearer to its teacher."""
    student = Small(layers=1)
    distilled = DistilledModel(student, module, temperature=2.0, alpha=0.5)
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    inputs = torch.randint(0, VOCABULARY, (8, 16))
    labels = module(inputs).argmax(-1).detach()
    losses = [float(distilled.train_step(inputs, labels, optimizer)) for _ in range(20)]
    assert losses[-1] < losses[0]


def exports(module: nn.Module) -> None:
    """ONNX and TorchScript files are run and compared with the module before they get their names."""
    ids = torch.tensor([PROMPT])
    with tempfile.TemporaryDirectory() as folder:
        TorchScriptExporter(module).export(f"{folder}/small.pt", dummy_input=ids)
        ONNXExporter(module).export(f"{folder}/small.onnx", dummy_input=ids)
        assert torch.jit.load(f"{folder}/small.pt")(ids).shape == (1, len(PROMPT), VOCABULARY)


def packaging(module: nn.Module) -> None:
    """A package is loaded with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        ModelPackager(module, None, config={"layers": LAYERS}).package(f"{folder}/package")
        loaded, _, config = ModelPackager.load_package(f"{folder}/package", model_class=Small)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        assert config == {"layers": LAYERS} and torch.equal(loaded(ids), module(ids))


CHECKS: dict[str, Callable[[nn.Module], None]] = {
    "Inference engine": engine_of,
    "Batch inference": batches,
    "Streaming": streams,
    "Key/value cache": key_value_cache,
    "Cached attention": cached_attention,
    "Quantization": quantization,
    "Pruning": pruning,
    "Distillation": distillation,
    "Export": exports,
    "Packaging": packaging,
}


def main() -> None:
    """Runs all checks."""
    torch.manual_seed(0)
    module = Small().eval()
    for name, check in CHECKS.items():
        said = (check.__doc__ or "").partition("\n")[0]
        try:
            check(module)
        except MissingDependencyError as error:
            print(f"skipped  {name}: {error}")
        else:
            print(f"ok       {name}: {said}")


if __name__ == "__main__":
    main()

"""The Python in the documents about modules, files and memory runs as it is written, in a folder with what it names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from mnemos import InferenceEngine, MemoryAdapter, export_to_gguf, load_config  # noqa: E402
from mnemos.cli.main import main  # noqa: E402
from tests.cli.documents import run_python  # noqa: E402
from tests.compress.test_merge import adapted  # noqa: E402

CONFIG = """
model: {base_model_name: BASE, hidden_dim: 64, num_heads: 4, num_layers: 2, vocab_size: 258}
memory: {num_memory_tokens: 64, use_lora: LORA, use_both_memory_and_lora: LORA, lora_rank: 2}
training: {mixed_precision: "no"}
"""


class MyModel(torch.nn.Module):
    """Token ids (batch, time) to logits: a module as the documents mean it, with a field `layers`."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(258, 64)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(layers))
        self.head = torch.nn.Linear(64, 258)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (torch.nn.Linear(64, 64) for _ in range(4))
        self.up, self.down = torch.nn.Linear(64, 256), torch.nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).flatten(2))
        result: torch.Tensor = x + self.down(torch.nn.functional.gelu(self.up(x)))
        return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of each kind under the names that the documents use."""
    folder = tmp_path_factory.mktemp("documents")
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*characters, "th"])}
    inner = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
    config = transformers.LlamaConfig(
        vocab_size=258, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=None, eos_token_id=257,
    )  # fmt: skip
    for name in ("model", "path/to/llama"):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    base = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**dict(config.to_dict(), model_type="qwen2")))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    opt = transformers.OPTConfig(
        vocab_size=258, hidden_size=64, word_embed_proj_dim=64, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=257, pad_token_id=257,
    )  # fmt: skip
    transformers.OPTForCausalLM(opt).save_pretrained(folder / "path/to/opt-or-bart")
    tokenizer.save_pretrained(folder / "path/to/opt-or-bart")
    export_to_gguf(str(folder / "model"), str(folder / "model.gguf"))
    for name in ("lora-sql", "lora-legal"):
        adapted(
            transformers.LlamaForCausalLM.from_pretrained(folder / "model"), folder / name, target_modules=["q_proj"]
        )
    for name in ("configs/small.yaml", "configs/adapter_qwen2.5_1.5b.yaml", "outputs/final_model/config.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        base = "null" if "small" in name else str(folder / "base")
        (folder / name).write_text(CONFIG.replace("BASE", base).replace("LORA", str("small" not in name).lower()))
    (folder / "outputs/final_model/model").mkdir()
    adapter = another(folder)
    for file in ("model.pt", "model/model.pt"):
        torch.save(adapter.state_dict(), folder / "outputs/final_model" / file)
    return folder


@pytest.fixture
def values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the documents take as given."""
    monkeypatch.chdir(folder)
    torch.manual_seed(1)
    batches = [torch.randint(0, 258, (2, 12)) for _ in range(4)]
    tokenizer = transformers.AutoTokenizer.from_pretrained("model")
    hugging = transformers.LlamaForCausalLM.from_pretrained("model")
    return {
        "torch": torch, "MyModel": MyModel, "model": MyModel(12), "module": hugging, "teacher": MyModel(4),
        "tokenizer": tokenizer, "batches": batches, "held_out": batches[:1], "train": lambda model: None,
        "input_ids": batches[0], "ids": batches[0], "attention_mask": torch.ones_like(batches[0]),
        "inputs": batches[0], "labels": batches[0], "text": "An example. " * 200, "long_text": "An example. " * 200,
        "system_prompt": "You are helpful.", "prompt": "You are helpful. Hello!",
    }  # fmt: skip


def another(folder: Path) -> MemoryAdapter:
    return MemoryAdapter(load_config(folder / "outputs/final_model/config.yaml"))


def run(name: str, values: dict[str, Any], replaced: dict[str, str], chosen: slice = slice(None)) -> dict[str, Any]:
    """The values after the blocks of a document in docs/."""
    run_python(f"docs/{name}", values, replaced, chosen)
    return values


@pytest.mark.slow
def test_the_examples_of_compression(values: dict[str, Any]) -> None:
    small = {
        "steps=200": "steps=2",
        "evaluations[200]": "evaluations[2]",
        "distill=True": "distill=True, distillation_steps=2",
    }
    done = run("compression.md", values, small)
    assert done["quantized"].report() and isinstance(done["engine"].generate("SELECT", adapter="legal"), str)
    assert sum(p.numel() for p in done["student"].parameters()) < 0.6 * sum(p.numel() for p in MyModel(4).parameters())


@pytest.mark.slow
def test_the_examples_of_export(values: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """But for the devices, which need environments of their own and are tested with them."""
    pytest.importorskip("onnxruntime_genai")
    assert main(["export", "model", "--to", "onnx", "--out", "exported"]) == 0
    own, hugging, tokenizer = values["model"], values["module"], values["tokenizer"]
    for first, last in ((0, 1), (1, 2), (2, 3)):
        values |= {"model": own, "tokenizer": tokenizer}
        run("export.md", values, {}, slice(first, last))
    assert np.allclose(values["logits"], own(values["ids"]).detach(), atol=1e-4)
    with InferenceEngine.from_pretrained("folder") as engine, torch.no_grad():
        wanted = hugging(torch.tensor([[1, 2, 3]])).logits[0]
        assert np.allclose(engine.logits([1, 2, 3]), wanted, atol=0.05)


@pytest.mark.slow
def test_the_examples_of_memory(values: dict[str, Any], folder: Path, smollm2: Path) -> None:
    values["another_adapter"] = another(folder)
    done = run("memory.md", values, {})
    assert done["found"] is not None


@pytest.mark.slow
def test_the_examples_of_modules_and_packages(values: dict[str, Any], smollm2: Path) -> None:
    run("own-models.md", dict(values, module=MyModel(2)), {})
    done = run("packages.md", dict(values, model=MyModel(12)), {'{"d_model": 512}': '{"layers": 12}'})
    assert done["config"] == {"layers": 12}
    run("migrating.md", dict(values, model=MyModel(2)), {', device="cuda"': ""}, slice(0, 1))
    run("performance.md", values, {})

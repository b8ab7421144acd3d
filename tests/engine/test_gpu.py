"""The engine on a CUDA device: the tokens of the CPU, in every strategy, and memory that is given back."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mnemos import InferenceEngine  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from mnemos.models.load import load_model  # noqa: E402
from tests.gpu import needs_cuda  # noqa: E402
from tests.models.checkpoints import CONFIGS, VOCABULARY, build, token_ids  # noqa: E402

pytestmark = needs_cuda
PROMPTS = [token_ids(5, 1), token_ids(23, 2), token_ids(1, 3), token_ids(12, 4)]
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 7},
    "beams": {"num_beams": 3},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "drafts": {"speculative": "prompt_lookup"},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: build(CONFIGS[name](), tmp_path_factory.mktemp(name)).folder)


def engine_of(folder: Path, backend: str, dtype: str = "float32") -> InferenceEngine:
    model = load_model(open_checkpoint(folder), backend=backend, dtype=dtype, kv_dtype="float32")
    return InferenceEngine(model, cache_tokens=1024)


def texts(engine: InferenceEngine, **options: Any) -> list[list[int]]:
    handles = [engine.submit(prompt, max_new_tokens=12, ignore_eos=True, **options) for prompt in PROMPTS]
    return [list(handle.result().token_ids) for handle in handles]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma2", "qwen3moe", "gpt2", "phi3-partial"])
def test_its_tokens_are_those_of_the_cpu(name: str, folder: Callable[[str], Path]) -> None:
    with engine_of(folder(name), "numpy") as cpu, engine_of(folder(name), "torch:cuda") as gpu:
        for strategy, options in STRATEGIES.items():
            wanted = texts(cpu, **options)
            assert texts(gpu, **options) == wanted, strategy
            assert texts(gpu, **options) == wanted, f"{strategy}, with prefixes from the cache"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(dtype: str, folder: Callable[[str], Path]) -> None:
    with engine_of(folder("llama"), "numpy") as cpu, engine_of(folder("llama"), "torch:cuda", dtype) as gpu:
        for prompt in PROMPTS:
            wanted, found = torch.tensor(cpu.logits(prompt)), torch.tensor(gpu.logits(prompt))
            assert float((found - wanted).norm() / wanted.norm()) < (0.02 if dtype == "bfloat16" else 0.003)


def test_many_requests_leave_no_memory_behind(folder: Callable[[str], Path]) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=88, num_hidden_layers=2, num_attention_heads=4
    )
    own = transformers.LlamaForCausalLM(config).cuda().eval()
    with engine_of(folder("llama"), "torch:cuda") as built_in, InferenceEngine(own) as module:
        for engine in (built_in, module):
            used = []
            for _ in range(4):
                for _ in range(50 // len(PROMPTS)):
                    texts(engine)
                gc.collect()
                torch.cuda.synchronize()
                used.append(torch.cuda.memory_allocated())
            assert used[-1] <= used[1] + (1 << 20), used


@pytest.mark.parametrize("make", ["llama", "gpt2", "mistral", "t5", "mamba"])
def test_modules_of_transformers_give_their_own_tokens(make: str) -> None:
    torch.manual_seed(0)
    if make == "t5":
        sizes = dict(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
        config = transformers.T5Config(**sizes, decoder_start_token_id=0)
        module = transformers.T5ForConditionalGeneration(config)
    elif make == "mamba":
        config = transformers.MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=8)
        module = transformers.MambaForCausalLM(config)
    else:
        module = transformers.AutoModelForCausalLM.from_config(CONFIGS[make]())
    module = module.eval().cuda()
    module.generation_config.eos_token_id = None
    prompts = [[token % 50 for token in prompt] for prompt in PROMPTS]
    with InferenceEngine(module) as engine:
        handles = [engine.submit(prompt, max_new_tokens=10, ignore_eos=True) for prompt in prompts]
        found = [list(handle.result().token_ids) for handle in handles]
        streamed = list(engine.stream(prompts[0], max_new_tokens=10, ignore_eos=True)) if make == "llama" else []
    for prompt, own in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt], device="cuda")
        wanted = module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, min_new_tokens=10, do_sample=False
        )[0].tolist()
        assert own[-10:] == wanted[-10:]
    assert not streamed or len(streamed) > 0

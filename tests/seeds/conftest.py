"""A small model that learned to count in steps of one, two or three, up to 39: its texts can be checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mnemos import InferenceEngine, Tokenizer  # noqa: E402
from tests.models.foreign.mini_llm import ModelArgs, make_transformer  # noqa: E402

PAD, BOS, EOS, FIRST, LAST = 0, 1, 2, 3, 39
ARGUMENTS = ModelArgs(dim=48, n_layers=2, n_heads=6, n_kv_heads=3, vocab_size=FIRST + LAST + 1, max_seq_len=512)


def count(start: int, step: int) -> list[int]:
    """Token ids of the numbers from `start` in steps, up to the last, and the end."""
    return [FIRST + number for number in range(start, LAST + 1, step)] + [EOS]


def lesson(generator: torch.Generator, rows: int, time: int) -> torch.Tensor:
    draws = torch.randint(0, 10_000, (rows, 2), generator=generator).tolist()
    lists = [[BOS, *count(a % (LAST - 5), 1 + b % 3)][:time] for a, b in draws]
    return torch.tensor([one + [PAD] * (time - len(one)) for one in lists])


@pytest.fixture(scope="session")
def counter() -> Any:
    """The module: logits, past_kv = module(ids, use_cache=True, past_kv=past_kv)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    module = make_transformer(ARGUMENTS, seed=3).train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.0)
    steps = 220
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = lesson(generator, 32, 24)
        logits = module(ids[:, :-1])[0]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    torch.set_num_threads(threads)
    return module.eval()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json: a token for each number, <bos> before every text."""
    import tokenizers
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<pad>", "<bos>", "<eos>", *map(str, range(LAST + 1))]
    made = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    made.add_special_tokens(["<pad>", "<bos>", "<eos>"])
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "model_max_length": 128}
    settings = {**names, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_folder)


@pytest.fixture(scope="session")
def checkpoint(counter: Any, tokenizer_folder: Path) -> Path:
    """out/ckpt.pt as the training script writes it, next to the tokenizer."""
    path = tokenizer_folder / "ckpt.pt"
    torch.save({"model_args": asdict(counter.args), "model": counter.state_dict(), "iter_num": 300}, path)
    return path


@pytest.fixture(scope="session")
def engine(counter: Any, tokenizer: Tokenizer) -> Iterator[InferenceEngine]:
    with InferenceEngine(counter, tokenizer, device="cpu", use_kv_cache=True) as made:
        yield made


@pytest.fixture
def numbers() -> Any:
    """From a text to the numbers in it."""
    return lambda text: [int(word) for word in text.split()]

"""The examples of the Mini-LLM document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos import Generator, KVCache, apply_temperature, sample_top_p  # noqa: E402
from mnemos.errors import ConfigError, FormatError, MnemosError, RequestError  # noqa: E402
from tests.seeds.conftest import EOS, count  # noqa: E402


@pytest.fixture(scope="module")
def generator(checkpoint: Path, tokenizer_folder: Path) -> Iterator[Generator]:
    made = Generator(checkpoint_path=checkpoint, tokenizer_path=tokenizer_folder, device="cpu")
    yield made
    made.engine.close()


def test_basic_generation(generator: Generator, numbers: Any) -> None:
    output = generator.generate(prompt="1 2 3", max_new_tokens=50, temperature=0.2, top_p=0.95)
    assert numbers(output) == list(range(1, 40))
    assert numbers(generator.generate("2 5 8", temperature=0)) == list(range(2, 40, 3))


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 4},
        {"do_sample": False},
        {"penalty_alpha": 0.2},
        {"strategy": "greedy"},
        {"strategy": "beam_search"},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.1},
        {"top_k": 1},
    ],
    ids=str,
)
def test_other_strategies_in_place_of_the_defaults(generator: Generator, numbers: Any, asked: dict[str, Any]) -> None:
    assert numbers(generator.generate("2 5 8", **asked)) == list(range(2, 40, 3))
    assert list(generator.generate_stream("2 5 8", **asked)) == count(11, 3)


def test_stream(generator: Generator) -> None:
    tokens = list(generator.generate_stream("20 22 24", temperature=0))
    assert tokens == count(26, 2)
    assert "".join(generator.tokenizer.decode([t], continues=True) for t in tokens if t != EOS).split() == [
        str(n) for n in range(26, 40, 2)
    ]


def test_batch(generator: Generator, numbers: Any) -> None:
    outputs = generator.generate_batch(["0 1", "10 12 14", "9 12 15"], batch_size=3, temperature=0)
    assert [numbers(output) for output in outputs] == [
        list(range(40)), list(range(10, 40, 2)), list(range(9, 40, 3))
    ]  # fmt: skip


def test_its_parts(generator: Generator, checkpoint: Path) -> None:
    assert generator.model is generator.engine.model
    assert generator.tokenizer.eos_token_id == EOS
    other = Generator(checkpoint, generator.tokenizer)
    assert other.tokenizer is generator.tokenizer
    other.engine.close()
    with pytest.raises(RequestError, match="the prompts are one text, '1 2'; give a list of texts"):
        generator.generate_batch("1 2")
    with pytest.raises(RequestError, match="num_return_sequences is 2; here a request has one result"):
        generator.generate_stream("1 2", n=2)
    with pytest.raises(ConfigError, match="tokenizer_path is None"):
        Generator(checkpoint, None)


def test_a_tokenizer_of_transformers_and_a_context_smaller_than_the_default(
    checkpoint: Path, tokenizer_folder: Path, numbers: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    small = Generator(checkpoint, theirs, context_length=16)
    assert small.tokenizer is theirs
    assert numbers(small.generate("2 5 8", temperature=0, ignore_eos=True))[:13] == list(range(2, 40, 3))
    assert len(list(small.generate_stream("2 5 8", temperature=0, ignore_eos=True))) == 12
    with pytest.raises(MnemosError, match="4 tokens and 60 new ones are 48 more than the context of 16"):
        small.generate("2 5 8", max_new_tokens=60)
    small.engine.close()


def test_native_and_torch_agree_with_the_training_code(
    generator: Generator, checkpoint: Path, tokenizer_folder: Path, counter: Any
) -> None:
    ids = generator.tokenizer.encode("4 5 6 7")
    with torch.inference_mode():
        wanted = counter(torch.tensor([ids]))[0][0].numpy()
    assert np.abs(generator.engine.logits(ids) - wanted).max() < 0.05 * np.abs(wanted).max()
    other = Generator(checkpoint, tokenizer_folder, device="auto")
    assert np.abs(other.engine.logits(ids) - wanted).max() < 0.05 * np.abs(wanted).max()
    other.engine.close()


def test_what_is_missing_is_named(checkpoint: Path, tmp_path: Path, tokenizer_folder: Path) -> None:
    with pytest.raises(FormatError, match="tokenizer.json: does not exist"):
        Generator(checkpoint, tmp_path)
    with pytest.raises(FormatError, match="ckpt.pt"):
        Generator(tmp_path / "ckpt.pt", tokenizer_folder)


def test_temperature() -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.5])
    assert apply_temperature(logits, 0.5).tolist() == [4.0, 3.0, 2.0, 1.0]
    assert apply_temperature(logits, 2.0).tolist() == [1.0, 0.75, 0.5, 0.25]
    assert apply_temperature(logits, 0.0).softmax(-1)[0] == 1
    with pytest.raises(ConfigError, match="temperature is -1"):
        apply_temperature(logits, -1)


def nucleus(probs: Any, p: float) -> set[int]:
    """The tokens that the document's code may return; where a sum meets p exactly, those of its worked example."""
    ordered, index = torch.sort(probs.double(), descending=True)
    kept = ~(torch.cumsum(ordered, dim=-1) - ordered > p - 1e-6)
    return set(index[kept].tolist())


def test_the_worked_example_of_top_p() -> None:
    torch.manual_seed(0)
    words = ["the", "a", "an", "this", "that", "some", "any"]
    probs = torch.tensor([0.40, 0.25, 0.15, 0.10, 0.05, 0.03, 0.02])
    assert {words[i] for i in sample_top_p(probs.expand(2000, -1), 0.9).flatten().tolist()} == set(words[:4])


def test_top_p() -> None:
    torch.manual_seed(0)
    probs = torch.tensor([0.02, 0.40, 0.03, 0.25, 0.05, 0.15, 0.10])
    for p in (0.1, 0.4, 0.65, 0.85, 1.0):
        seen = torch.bincount(sample_top_p(probs.expand(2000, -1), p).flatten(), minlength=7) / 2000
        expected = torch.zeros(7)
        chosen = sorted(nucleus(probs, p))
        expected[chosen] = probs[chosen] / probs[chosen].sum()
        assert set(seen.nonzero().flatten().tolist()) == set(chosen)
        assert (seen - expected).abs().max() < 0.04
    assert sample_top_p(probs, 0.5).shape == (1,)
    np.random.seed(0)
    drawn = sample_top_p(np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), 0.9)
    assert drawn.shape == (2, 1) and drawn[1, 0] == 2
    with pytest.raises(ConfigError, match="p is 0"):
        sample_top_p(probs, 0)
    with pytest.raises(ConfigError, match="probabilities sum to 0"):
        sample_top_p(torch.zeros(3), 0.5)


def test_memory_formula() -> None:
    assert KVCache.bytes(16, 512, 6, 64, bytes_per_value=2) == 2 * 16 * 512 * 6 * 64 * 2
    assert round(KVCache.bytes(num_layers=16, max_length=512, num_kv_heads=6, head_dim=64) / 1e6, 1) == 12.6
    cache = KVCache(16, 1, 6, 64, 512, dtype=torch.bfloat16)
    assert sum(tensor.nbytes for tensor in (*cache.keys, *cache.values)) == KVCache.bytes(16, 512, 6, 64)


def test_the_script(checkpoint: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], numbers: Any) -> None:
    from examples.generate import main

    main(str(checkpoint), str(tokenizer_folder), "3 4 5")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:6] == ["Generator Ready.", "", "Prompt: 3 4 5", "-" * 30] and lines[-1] == "-" * 30
    assert numbers(lines[6])[:3] == [3, 4, 5]

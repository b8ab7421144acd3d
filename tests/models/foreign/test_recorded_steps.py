"""Recorded steps of modules of transformers: the logits of their own steps, whoever comes, goes, forks or returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from mnemos.models.foreign import recorded_steps  # noqa: E402
from mnemos.models.foreign.adapt import adapt  # noqa: E402
from mnemos.models.foreign.model import ForeignModel  # noqa: E402
from tests.gpu import HAS_CUDA  # noqa: E402
from tests.models.foreign.batches import batch_of  # noqa: E402

SIZES = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
CONFIGS: dict[str, Callable[..., Any]] = {
    "llama": lambda **more: transformers.LlamaConfig(intermediate_size=48, num_key_value_heads=2, **SIZES, **more),
    "gpt2": lambda **more: transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, **more),
    "qwen2": lambda **more: transformers.Qwen2Config(intermediate_size=48, num_key_value_heads=2, **SIZES, **more),
}


class Repeats:
    """In place of a CUDA graph: runs the step again, on the same inputs."""

    def __init__(self) -> None:
        self.recorded, self.repeated = 0, 0

    def __call__(self, run: Callable[[], Sequence[Any]]) -> Callable[[], Sequence[Any]]:
        self.recorded += 1

        def again() -> Sequence[Any]:
            self.repeated += 1
            return run()

        return again


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> Repeats:
    made = Repeats()
    monkeypatch.setattr(recorded_steps, "RECORDS", ("cpu",))
    monkeypatch.setattr(recorded_steps, "Recorder", lambda: made)
    return made


def module_of(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name](**more)).eval()


class Texts:
    """Texts that a model evaluates, and the logits of a whole call for each."""

    def __init__(self, module: Any, model: ForeignModel) -> None:
        self.module, self.model = module, model
        self.tokens: dict[int, list[int]] = {}
        self.generator = np.random.default_rng(0)

    def step(self, **counts: int) -> None:
        """Continues the text in slot N by counts["sN"] tokens, and compares the last logits."""
        parts = []
        for name, count in counts.items():
            slot = int(name[1:])
            start = len(self.tokens.setdefault(slot, []))
            new = self.generator.integers(0, 60, count).tolist()
            self.tokens[slot] += new
            parts.append((slot, start, new))
        found = self.model.forward(batch_of(*parts, rows=np.cumsum([len(new) for _, _, new in parts]) - 1))
        device = next(self.module.parameters()).device
        for row, (slot, _, _) in enumerate(parts):
            with torch.no_grad():
                answer = self.module(torch.tensor([self.tokens[slot]], device=device), output_hidden_states=True)
            wanted, hidden = (one[0, -1].float().cpu().numpy() for one in (answer.logits, answer.hidden_states[-1]))
            np.testing.assert_allclose(found.logits[row], wanted, rtol=1e-3, atol=2e-4)
            np.testing.assert_allclose(found.hidden[row], hidden, rtol=1e-3, atol=2e-4)

    def greedy(self, *slots: int) -> None:
        """Continues these texts by their most probable tokens, and compares those."""
        parts = [(slot, len(self.tokens[slot]), [7 + slot]) for slot in slots]
        for slot, _, new in parts:
            self.tokens[slot] += new
        found = self.model.forward(replace(batch_of(*parts), greedy=True))
        chosen = found.logits.argmax(-1) if found.tokens is None else found.tokens
        device = next(self.module.parameters()).device
        for token, slot in zip(chosen, slots, strict=True):
            with torch.no_grad():
                assert token == self.module(torch.tensor([self.tokens[slot]], device=device)).logits[0, -1].argmax()
        self.found = found

    def fork(self, source: int, target: int) -> None:
        self.model.copy_states([source], [target])
        self.tokens[target] = list(self.tokens[source])

    def end(self, slot: int) -> None:
        self.model.clear_states([slot])
        del self.tokens[slot]

    def cut(self, slot: int, length: int) -> None:
        del self.tokens[slot][length:]


def go_through(texts: Texts) -> None:
    texts.step(s0=5)
    for _ in range(3):
        texts.step(s0=1)
    texts.step(s1=9, s2=2)
    for _ in range(3):
        texts.step(s0=1, s1=1, s2=1)
    texts.end(1)
    texts.step(s2=1, s0=1)
    texts.step(s3=4, s0=1)
    for _ in range(2):
        texts.step(s2=1, s3=1)  # one pauses
    texts.step(s0=1, s2=1, s3=1)
    texts.greedy(0, 2, 3)
    assert texts.found.tokens is not None and texts.found.logits.shape == (3, 0)
    texts.fork(0, 4)
    texts.greedy(2, 4)  # one that is recorded and one that just forked
    assert texts.found.tokens is None or len(texts.found.tokens) == 2
    for _ in range(recorded_steps.STEADY + 2):
        texts.step(s4=1, s0=1, s3=1)
    texts.cut(3, 3)
    texts.step(s3=2, s0=1)
    for _ in range(recorded_steps.STEADY + 2):
        texts.step(s0=1, s2=1, s3=1, s4=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_recorded_computes_the_step(name: str, records: Repeats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "LEAST_ROOM", 16)  # so that texts outgrow it
    module = module_of(name)
    model = adapt(module)
    assert isinstance(model, ForeignModel)
    model.reserve_states(5)
    go_through(Texts(module, model))
    assert records.recorded >= 3 and records.repeated > records.recorded + 10


def test_what_waits_in_a_full_row_is_not_written_to(records: Repeats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_steps, "LEAST_ROOM", 16)
    module = module_of("llama")
    model = adapt(module)
    model.reserve_states(2)
    texts = Texts(module, model)
    texts.step(s0=13, s1=4)
    for _ in range(3):
        texts.step(s0=1, s1=1)  # 16 tokens: a row of that length would have no place left
    for _ in range(3):
        texts.step(s1=1)
    texts.step(s0=1, s1=1)
    assert records.recorded > 1


def test_other_weights_are_noticed(records: Repeats) -> None:
    module = module_of("llama")
    model = adapt(module)
    model.reserve_states(1)
    texts = Texts(module, model)
    texts.step(s0=3)
    texts.step(s0=1)
    texts.end(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.data = torch.rand_like(parameter)
    texts.step(s0=3)
    for _ in range(2):
        texts.step(s0=1)
    assert records.recorded == 2


def test_what_cannot_be_recorded_runs_as_it_is(records: Repeats, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = transformers.MistralConfig(sliding_window=8, intermediate_size=48, num_key_value_heads=2, **SIZES)

    class Own(transformers.LlamaForCausalLM):
        pass

    def fails(run: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    for module in (transformers.MistralForCausalLM(windows).eval(), Own(CONFIGS["llama"]()).eval()):
        model = adapt(module)
        model.reserve_states(1)
        texts = Texts(module, model)
        for count in (12, 1, 1):
            texts.step(s0=count)
    assert records.recorded == 0
    for failure in (fails, lambda run: lambda: [2 * run()[0], run()[1]]):  # raises, or computes something else
        monkeypatch.setattr(recorded_steps, "Recorder", lambda failure=failure: failure)
        module = module_of("llama")
        model = adapt(module)
        model.reserve_states(1)
        texts = Texts(module, model)
        for count in (12, 1, 1, 1):
            texts.step(s0=count)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="there is no CUDA device")
@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_on_a_gpu_compute_the_step(name: str) -> None:
    module = module_of(name).cuda()
    model = adapt(module)
    assert isinstance(model, ForeignModel)
    model.reserve_states(5)
    go_through(Texts(module, model))
    assert model.calls._recorded.works and model.calls._recorded._graphs

"""Modules as people write them: every style of signature and cache gives the tokens of a hand-written loop."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mnemos.compat.generate import generate, generate_batch  # noqa: E402
from mnemos.engine.engine import InferenceEngine  # noqa: E402
from mnemos.errors import ModelError, RequestError  # noqa: E402
from tests.models.foreign import foreign_modules as modules  # noqa: E402

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13], [4, 4, 4, 4]]
NEW = 10


def by_hand(module: Any, prompt: list[int], new: int = NEW) -> list[int]:
    """Greedy over the whole text each time; `module` returns logits, or a tuple with them as its first tensor."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            output = module.eval()(torch.tensor([ids]))
            ids.append(int((output[0] if isinstance(output, tuple) else output)[0, -1].argmax()))
    return ids


def quiet(module: nn.Module, **options: Any) -> InferenceEngine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return InferenceEngine(module, **options)


class RequiredMask(modules.Plain):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        assert attention_mask.shape == input_ids.shape
        return super().forward(input_ids)


class RequiredPast(modules.PastArgument):
    def forward(self, x: Tensor, past_kv: Any) -> Any:
        return super().forward(x, True, past_kv)


@dataclass
class Answer:
    logits: Tensor
    past_key_values: Any


class TuplesAsPastKeyValues(modules.PastArgument):
    """The name of Hugging Face's argument, but another kind of cache in it."""

    def forward(self, input_ids: Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
        return Answer(*super().forward(input_ids, True, past_key_values))


class StackedPast(modules.PastArgument):
    """All layers' keys and values as one tensor."""

    def forward(self, x: Tensor, past: Tensor | None = None) -> Any:
        pairs = None if past is None else [(layer[0], layer[1]) for layer in past]
        logits, present = super().forward(x, True, pairs)
        return logits, torch.stack([torch.stack(pair) for pair in present])


class Layer(NamedTuple):
    keys: Tensor
    values: Tensor


class NamedLayers(modules.PastArgument):
    """One named tuple per layer."""

    def forward(self, x: Tensor, cache: list[Layer] | None = None) -> Any:
        past = None if cache is None else [(layer.keys, layer.values) for layer in cache]
        logits, present = super().forward(x, True, past)
        return logits, [Layer(*pair) for pair in present]


class CountedPast(modules.PastArgument):
    """The number of positions is part of the cache."""

    def forward(self, x: Tensor, past: Any = None) -> Any:
        pairs, length = (None, 0) if past is None else past
        assert length == (0 if pairs is None else pairs[0][0].shape[2])
        logits, present = super().forward(x, True, pairs)
        return logits, (present, length + x.shape[1])


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *values: Any, **named: Any) -> Any:
        return self.module(*values, **named)


STYLES: dict[str, tuple[Callable[[], nn.Module], type, bool]] = {  # module, what it computes, whether its cache is used
    "required mask": (RequiredMask, modules.Plain, False),
    "required past": (RequiredPast, modules.PastArgument, True),
    "tuples as past_key_values": (TuplesAsPastKeyValues, modules.PastArgument, True),
    "stacked": (StackedPast, modules.PastArgument, True),
    "named layers": (NamedLayers, modules.PastArgument, True),
    "counted": (CountedPast, modules.PastArgument, True),
    "wrapper": (lambda: Wrapper(modules.PastArgument()), modules.PastArgument, True),
    "wrapper of a wrapper": (lambda: Wrapper(Wrapper(modules.Plain())), modules.Plain, False),
    "data parallel": (lambda: nn.DataParallel(modules.PastArgument()), modules.PastArgument, True),
    "last only": (modules.LastOnly, modules.LastOnly, False),
    "traced": (
        lambda: torch.jit.trace(
            nn.Sequential(nn.Embedding(29, 8), nn.Linear(8, 29)).requires_grad_(False), torch.ones(1, 5).long()
        ),
        nn.Module,
        False,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "kind", "cached"), STYLES.values(), ids=STYLES.keys())
def test_every_style_gives_the_tokens_of_a_loop_by_hand(
    make: Callable[[], nn.Module], kind: type, cached: bool
) -> None:
    module = make()
    truth = module if kind is nn.Module else kind()
    wanted = [by_hand(truth, prompt) for prompt in PROMPTS]
    with quiet(module) as engine:
        assert (engine.model.calls.abilities.cache is not None) == cached
        assert engine.generate(PROMPTS, max_new_tokens=NEW) == wanted
        assert engine.generate(PROMPTS, max_new_tokens=NEW, speculative="prompt_lookup") == wanted


def test_a_wrapped_module_is_named_with_the_signature_inside() -> None:
    with pytest.raises(ModelError, match=r"Wrapper\(NotCausal\)\.forward\(ids.* is not causal"):
        quiet(Wrapper(modules.NotCausal()))
    two = Wrapper(modules.Plain())
    two.other = nn.Identity()  # it is unknown which of the two defines the arguments
    with pytest.raises(ModelError, match=r"Wrapper\.forward\(\*values.*names no argument; expected forward\(input_ids"):
        quiet(two)


class CountsFromTheEnd(modules.Base):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1]).flip(0))
        return self.head(self.norm(x))


class DropsAlways(modules.Base):
    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.dropout(self.embedding(ids), 0.5))


def test_logits_that_depend_on_the_length_or_on_chance_are_refused() -> None:
    with pytest.raises(ModelError, match="is not causal: without token 5"):
        quiet(CountsFromTheEnd())
    with pytest.raises(ModelError, match="other logits for the same ids when it is called again.*ignore self.training"):
        quiet(DropsAlways())


@pytest.mark.parametrize("kind", [modules.NotCausal, modules.WrongCache])
def test_what_is_wrong_is_found_in_small_logits_too(kind: type) -> None:
    """Like those of an untrained module."""
    module = kind()
    with torch.no_grad():
        module.head.weight.mul_(1e-4)
    if kind is modules.NotCausal:
        with pytest.raises(ModelError, match="is not causal"):
            quiet(module)
    else:
        with quiet(module) as engine:
            assert engine.model.calls.abilities.cache is None


@pytest.mark.filterwarnings("ignore")
def test_layers_quantized_at_run_time_are_causal_enough() -> None:
    module = torch.ao.quantization.quantize_dynamic(modules.Plain().eval(), {nn.Linear}, dtype=torch.qint8)
    with quiet(module) as engine:
        assert engine.generate([1, 2, 3], max_new_tokens=NEW) == by_hand(module, [1, 2, 3])


class LearnedPositions(modules.Base):
    max_seq_len = None  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(1, 24, modules.WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embedding(ids) + self.positions[:, : ids.shape[1]]))


class Undeclared(modules.Plain):
    max_seq_len = None  # type: ignore[assignment]


@pytest.mark.parametrize(("kind", "context"), [(LearnedPositions, 24), (Undeclared, modules.CONTEXT)])
def test_positions_that_a_module_does_not_declare_are_found_in_its_tables(kind: type, context: int) -> None:
    with quiet(kind()) as engine:
        assert engine.spec.context_length == context
        completion = engine.complete([1, 2, 3])
        assert (len(completion.token_ids), completion.finish_reason) == (context - 3, "length")
    with quiet(kind(), context_length=1000) as engine:  # the user knows best, as tables may grow
        assert engine.spec.context_length == 1000


class KeepsWhatItMade(modules.PastArgument):
    """Creates what it needs in its first call, as is common for rotary tables."""

    def embed(self, ids: Tensor, start: int, positions: Tensor | None = None) -> Tensor:
        if not hasattr(self, "scale"):
            self.scale = torch.full((modules.WIDTH,), 1.1)
        return super().embed(ids, start, positions) * self.scale


def test_training_goes_on_after_a_text_and_texts_follow_the_weights() -> None:
    module = KeepsWhatItMade()
    with quiet(module) as engine:
        for step in range(3):
            assert engine.generate([1, 2, 3], max_new_tokens=NEW) == by_hand(module, [1, 2, 3])
            ids = torch.arange(12)[None] % modules.VOCABULARY
            logits = module.train()(ids)
            F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.data -= 0.5 * parameter.grad  # leaves no trace in PyTorch's version counter
                    parameter.grad = None
            assert engine.generate([1, 2, 3], max_new_tokens=NEW) == by_hand(module, [1, 2, 3]), f"after step {step}"


class Grows(modules.PastArgument):
    """Has a table from the start, which it extends when a text needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scales", torch.full((12,), 1.1), persistent=False)

    def embed(self, ids: Tensor, start: int, positions: Tensor | None = None) -> Tensor:
        end = start + ids.shape[1]
        if end > len(self.scales):
            self.scales = torch.full((2 * end,), 1.1)
        return super().embed(ids, start, positions) * self.scales[start:end, None]


class KeepsItsLast(modules.PastArgument):
    def embed(self, ids: Tensor, start: int, positions: Tensor | None = None) -> Tensor:
        self.last = {"inputs": [super().embed(ids, start, positions)]}
        return self.last["inputs"][0]


@pytest.mark.parametrize(
    ("kind", "fast"), [(modules.PastArgument, True), (Grows, True), (KeepsItsLast, False), (KeepsWhatItMade, False)]
)
def test_modules_run_in_inference_mode_and_what_they_keep_can_be_trained_with(kind: type, fast: bool) -> None:
    module, seen = kind(), set()
    module.register_forward_pre_hook(lambda *_: seen.add(torch.is_inference_mode_enabled()))
    with quiet(module) as engine:
        seen.clear()
        tokens = engine.generate([1, 2, 3], max_new_tokens=20)
        assert seen == {fast}
        assert tokens == by_hand(module, [1, 2, 3], 20)
    module.train()(torch.arange(12)[None] % modules.VOCABULARY).sum().backward()
    assert all(not tensor.is_inference() for tensor in module.buffers())


def test_every_part_of_a_module_gets_its_own_mode_back() -> None:
    module = modules.PastArgument()
    module.layers[0].mlp.append(nn.Dropout(0.9))
    wanted = by_hand(module, [1, 2, 3])
    with quiet(module) as engine:
        for outer, inner in ((True, False), (False, True)):
            module.train(outer)
            module.layers[0].train(inner)
            modes = [part.training for part in module.modules()]
            assert engine.generate([1, 2, 3], max_new_tokens=NEW) == wanted
            assert [part.training for part in module.modules()] == modes


def test_two_engines_may_share_a_module() -> None:
    module = modules.PastArgument().train()
    wanted = [by_hand(modules.PastArgument(), prompt) for prompt in PROMPTS]
    engines = [quiet(module), quiet(module, use_kv_cache=False)]
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda e=e: results.extend(e.generate(PROMPTS, max_new_tokens=NEW) for _ in range(10)))
        for e in engines
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [wanted] * 20
    assert all(part.training and "forward" not in part.__dict__ for part in module.modules())
    for engine in engines:
        engine.close()


def test_a_module_can_be_copied_and_saved_beside_its_engine() -> None:
    module = modules.PastArgument()
    with quiet(module) as engine:
        engine.generate([1, 2, 3], penalty_alpha=0.6, top_k=3, max_new_tokens=2)
        twin = copy.deepcopy(module)
        torch.save(module, io.BytesIO())
        assert by_hand(twin, [1, 2, 3]) == by_hand(module, [1, 2, 3])
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_windows_count_the_distance_between_tokens_in_every_company() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, vocab_size=61, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=4, initializer_range=0.3, eos_token_id=2,
    )  # fmt: skip
    module = transformers.GPTNeoForCausalLM(config).eval()
    wanted = [
        module.generate(torch.tensor([p]), do_sample=False, max_new_tokens=NEW, pad_token_id=0)[0].tolist()
        for p in PROMPTS
    ]
    with quiet(module) as engine:
        assert engine.model.calls.able.gaps  # they do share calls
        assert engine.generate(PROMPTS, max_new_tokens=NEW) == wanted


@pytest.mark.parametrize("draft", [modules.Plain, modules.PastArgument])
def test_a_module_drafts_for_a_module(draft: type) -> None:
    wanted = [by_hand(modules.PastArgument(), prompt) for prompt in PROMPTS]
    with quiet(modules.PastArgument(), draft_model=draft()) as engine:
        assert engine.generate(PROMPTS, max_new_tokens=NEW, speculative="draft") == wanted
        assert engine.stats().acceptance_rate > 0.9  # both have the same weights


class Numbers:
    """Texts of numbers."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{token} " for token in ids)


@pytest.mark.filterwarnings("ignore")
def test_one_call_writes_as_much_as_the_context_has_room_for() -> None:
    module = modules.Plain()
    text = generate(module, Numbers(), "1 2 3", do_sample=False)
    assert Numbers().encode(text) == by_hand(module, [1, 2, 3], modules.CONTEXT - 3)[3:]
    with pytest.raises(RequestError, match="one text, '1 2'; give a list"):
        generate_batch(module, Numbers(), "1 2")

"""`MemoryTransformer` and `MemoryAdapter` compute what another implementation does, call by call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos.errors import ConfigError, RequestError  # noqa: E402
from mnemos.models.memory_transformer.banks import QuantizedBank  # noqa: E402
from mnemos.models.memory_transformer.config import Config, MemorySettings, ModelConfig  # noqa: E402
from mnemos.models.memory_transformer.transformer import MemoryTransformer  # noqa: E402
from tests.models.memory_transformer.references import (  # noqa: E402
    ADAPTERS,
    CASES,
    CHAPTERED,
    Reference,
    columns,
    read_reference,
    strategies_of,
)

EVERY = [*CASES, *((name, strategy) for name in ADAPTERS for strategy in strategies_of(name))]
TOLERANCE = 1e-4


def close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    found = found.detach().numpy() if torch.is_tensor(found) else found
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def check_routes(reference: Reference, key: str, routes: Any) -> None:
    for layer, route in (routes or {}).items():
        np.testing.assert_array_equal(route.indices, reference.numbers[f"{key}.route_idx.layer{layer}"])
        close(route.weights, reference.numbers[f"{key}.route_w.layer{layer}"], 1e-5)


@pytest.mark.parametrize(("name", "strategy"), EVERY)
@torch.no_grad()
def test_a_whole_text(make_module: Any, name: str, strategy: str) -> None:
    reference = read_reference(name)
    ids = torch.from_numpy(reference.ids).long()
    out = make_module(reference, strategy)(ids, labels=ids)
    close(columns(out.logits), reference.numbers[f"full.{strategy}.logits"])
    close(out.loss, reference.numbers[f"full.{strategy}.loss"])
    check_routes(reference, f"full.{strategy}", out.routes)


@pytest.mark.parametrize(("name", "strategy"), EVERY)
@torch.no_grad()
def test_token_by_token(make_module: Any, name: str, strategy: str) -> None:
    reference = read_reference(name)
    model, ids = make_module(reference, strategy), torch.from_numpy(reference.ids).long()
    out = model(ids[:, :8], use_cache=True)
    check_routes(reference, f"decode.{strategy}.prefill", out.routes)
    steps, tokens = [out.logits[:, -1]], []
    for _ in range(8):
        tokens.append(steps[-1].argmax(-1))
        out = model(tokens[-1][:, None], use_cache=True, past_key_values=out.past_key_values)
        steps.append(out.logits[:, -1])
    np.testing.assert_array_equal(torch.stack(tokens, 1), reference.numbers[f"decode.{strategy}.tokens"])
    close(columns(torch.stack(steps)), reference.numbers[f"decode.{strategy}.step_logits"])


@pytest.mark.parametrize(("name", "strategy"), CASES)
@torch.no_grad()
def test_padding_and_chunks(make_module: Any, name: str, strategy: str) -> None:
    reference = read_reference(name)
    model, ids = make_module(reference, strategy), torch.from_numpy(reference.ids).long()
    mask, positions = (torch.from_numpy(reference.numbers[f"mask.{n}"]) for n in ("attention_mask", "position_ids"))
    masked = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    close(columns(masked.logits), reference.numbers[f"mask.{strategy}.cached.logits"])
    if f"chunked.{strategy}.logits" in reference.numbers:
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], use_cache=True, past_key_values=first.past_key_values)
        both = torch.cat((first.logits, rest.logits), 1)
        close(columns(both), reference.numbers[f"chunked.{strategy}.logits"])


@pytest.mark.parametrize("name", CHAPTERED)
@pytest.mark.parametrize("strategy", ["rolling", "hybrid"])
@torch.no_grad()
def test_windows_belong_to_a_text(make_module: Any, name: str, strategy: str) -> None:
    """A second text begins with an empty window, and one without a cache touches none."""
    reference = read_reference(name)
    model, ids = make_module(reference, strategy), torch.from_numpy(reference.ids).long()
    past, held = None, 0
    calls = [
        (0, 3, "new"),
        (3, 4, "next"),
        (4, 5, "next"),
        (6, 9, "new"),
        (0, 12, "alone"),
        (9, 10, "next"),
        (10, 12, "next"),
    ]
    for number, (first, last, kind) in enumerate(calls):
        continued = past if kind == "next" else None
        offset = held if kind == "next" else 0
        out = model(ids[:, first:last], use_cache=kind != "alone", past_key_values=continued, position_offset=offset)
        if kind != "alone":
            past, held = out.past_key_values, offset + last - first
        close(columns(out.logits), reference.numbers[f"ring.{strategy}.call{number}.logits"])


@torch.no_grad()
def test_texts_that_take_turns_do_not_mix(make_module: Any) -> None:
    reference = read_reference("09_chapters_shared_norm")
    model, ids = make_module(reference, "rolling"), torch.from_numpy(reference.ids).long()
    alone = [model(row[None, :6], use_cache=True) for row in ids]
    one = model(ids[:1, 6:7], use_cache=True, past_key_values=alone[0].past_key_values).logits
    model(ids[1:, 6:7], use_cache=True, past_key_values=alone[1].past_key_values)
    again = model(ids[:1, 6:7], use_cache=True, past_key_values=alone[0].past_key_values).logits
    assert torch.equal(one, again)


@pytest.mark.parametrize("strategy", ["sequence", "sequence-rolling", "rolling", "hybrid"])
@torch.no_grad()
def test_a_padded_batch_generates_the_same_ids(make_module: Any, strategy: str) -> None:
    reference = read_reference("09_chapters_shared_norm")
    model, known = make_module(reference, strategy), reference.generated(strategy)
    longest = max(map(len, known["batch_prompts"]))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in known["batch_prompts"]])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in known["batch_prompts"]])
    positions = (mask.cumsum(1) - 1).clamp_min(0) * mask
    out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True)
    logits = out.logits[torch.arange(2), mask.sum(1) - 1]
    texts = ids
    for step in range(8):
        new = logits.argmax(-1, keepdim=True)
        texts, mask = torch.cat((texts, new), 1), torch.cat((mask, torch.ones(2, 1, dtype=mask.dtype)), 1)
        if step < 7:
            positions = mask.sum(1, keepdim=True) - 1
            out = model(
                new, attention_mask=mask, position_ids=positions, use_cache=True, past_key_values=out.past_key_values
            )
            logits = out.logits[:, -1]
    assert texts.tolist() == known["generate_batch_ids"]


@pytest.mark.parametrize("name", CHAPTERED)
@pytest.mark.parametrize("strategy", ["sequence", "sequence-rolling", "token"])
def test_training_losses(make_module: Any, name: str, strategy: str) -> None:
    reference = read_reference(name)
    model, ids = make_module(reference).train(), torch.from_numpy(reference.ids).long()
    model.config.memory.routing_strategy_train = strategy
    model.config.memory.memory_gradient_checkpointing = True
    out = model(ids, labels=ids)
    close(out.loss, reference.numbers[f"train.{strategy}.loss"], 2e-4)
    for number, route in enumerate(out.routes.values()):
        for loss, value in route.losses.items():
            close(value, reference.numbers[f"train.{strategy}.router_loss{number}.{loss}"], 2e-4)
    out.loss.backward()
    unmoved = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not unmoved


@torch.no_grad()
def test_left_padding_leaves_numbers(make_module: Any) -> None:
    reference = read_reference("15_memory_heads_8_1")
    model, ids = make_module(reference), torch.from_numpy(reference.ids).long()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = model(ids, attention_mask=mask, position_ids=positions).logits
    assert padded.isfinite().all()
    close(padded[1:, 4:], model(ids[1:, 4:]).logits.numpy())


@torch.no_grad()
def test_lora_is_merged_once(make_module: Any) -> None:
    reference = read_reference("5_qwen2_lora_only")
    model, ids = make_module(reference), torch.from_numpy(reference.ids).long()
    before = model(ids).logits
    model.merge_lora()
    model.merge_lora()
    close(columns(model(ids).logits), reference.numbers["merged.logits"], 3e-4)
    merged = model.state_dict()
    assert not [name for name in merged if "lora_" in name]
    again = make_module(reference)  # a model of the same config, whose layers have factors
    again.load_state_dict(merged)
    close(columns(again(ids).logits), reference.numbers["merged.logits"], 3e-4)
    model.unmerge_lora()
    close(model(ids).logits, before.numpy())


@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_quantized_banks_are_saved_and_loaded(make_module: Any, bits: int) -> None:
    reference = read_reference("09_chapters_shared_norm")
    model, ids = make_module(reference), torch.from_numpy(reference.ids).long()
    exact = model(ids).logits
    model.quantize_memory(bits)
    logits = model(ids).logits
    assert not torch.equal(logits, exact)
    loaded = MemoryTransformer(reference.config()).eval()
    loaded.load_state_dict(model.state_dict())
    bank = loaded.memory_banks[0].base_bank
    assert isinstance(bank, QuantizedBank) and bank.half().scales.dtype == torch.float32
    assert torch.equal(loaded(ids).logits, logits)


def test_a_fresh_model_begins_as_if_without_memory() -> None:
    """`wo_init_zero`: what is read from memory is zero until it has been learned."""
    model = ModelConfig(hidden_dim=16, num_heads=2, num_layers=2, intermediate_dim=24, vocab_size=11)
    settings = MemorySettings(num_memory_tokens=8)
    transformer = MemoryTransformer(Config(model, settings)).eval()
    ids = torch.arange(5)[None]
    before = transformer(ids).logits
    with torch.no_grad():
        transformer.memory_banks[0].memory.mul_(100)
    assert torch.equal(transformer(ids).logits, before)
    attention = transformer.layers[0].memory_attn
    torch.nn.init.normal_(attention.o_proj.weight)
    assert not torch.equal(transformer(ids).logits, before)


def test_outputs_are_read_by_name_and_number(make_module: Any) -> None:
    reference = read_reference("05_factorized")
    out = make_module(reference)(torch.from_numpy(reference.ids).long())
    assert out["logits"] is out.logits and out[0] is out.logits and out.keys() == ["logits", "hidden"]


def test_what_cannot_be_is_refused(make_module: Any) -> None:
    reference = read_reference("05_factorized")
    model, ids = make_module(reference), torch.from_numpy(reference.ids).long()
    with pytest.raises(RequestError, match=r"attention_mask has shape \(2, 5\); it must be \(2, 12\)"):
        model(ids, attention_mask=torch.ones(2, 5))
    with pytest.raises(RequestError, match="position_ids has -1"):
        model(ids, position_ids=torch.arange(-1, 11))
    adapter = reference.config()
    adapter.model.base_model_name = "somewhere"
    with pytest.raises(ConfigError, match="use MemoryAdapter"):
        MemoryTransformer(adapter)

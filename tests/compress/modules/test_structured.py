"""Neurons, heads and layers that are removed: from whatever module, found by what it does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mnemos.compress.modules.depth import spread_out  # noqa: E402
from mnemos.compress.modules.layers import matrices  # noqa: E402
from mnemos.compress.modules.pruned_model import PrunedModel  # noqa: E402
from mnemos.compress.modules.structured import choose_and_fit  # noqa: E402
from mnemos.compress.modules.student import student_of  # noqa: E402
from mnemos.compress.modules.units import Units, find_units  # noqa: E402
from mnemos.errors import ConfigError, ModelError  # noqa: E402
from tests.compress.modules.test_pruned_model import batches, distance  # noqa: E402
from tests.models.foreign.foreign_modules import VOCABULARY, Plain  # noqa: E402

WIDTH, IDS = 32, torch.arange(16).view(2, 8)


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def found(module: nn.Module) -> dict[str, Units]:
    return {one.reader: one for one in find_units(module, matrices(module), IDS)}


class Attention(nn.Module):
    """Grouped queries, and a number of heads that forward relies on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.inner = 8, 4, WIDTH
        self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], -1, 4)
        q, k, v = (part.view(shape).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        k, v = (part.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], self.inner))


class Gated(nn.Module):
    """A gate and its values in one matrix, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(WIDTH, 2 * 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.both(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * value)


class Model(nn.Module):
    """Layers of both, in a list."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.n_layers = 3
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(
            nn.ModuleList((nn.RMSNorm(WIDTH), Attention(), nn.RMSNorm(WIDTH), Gated())) for _ in range(3)
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        for i in range(self.n_layers):
            norm, attention, other, feed_forward = self.blocks[i]
            x = x + attention(norm(x))
            x = x + feed_forward(other(x))
        return self.head(x)


def test_units_are_found_by_what_a_module_does() -> None:
    units = found(Model())
    assert sorted(units) == sorted(f"blocks.{i}.{name}" for i in range(3) for name in ("1.o", "3.down"))
    heads, neurons = units["blocks.0.1.o"], units["blocks.0.3.down"]
    assert (heads.kind, heads.size, heads.count) == ("heads", 8, 4)  # two heads with the keys and values they share
    assert heads.rows["blocks.0.1.q"].tolist() == [i // 8 for i in range(32)]
    assert heads.rows["blocks.0.1.k"].tolist() == heads.rows["blocks.0.1.v"].tolist() == [i // 4 for i in range(16)]
    assert (neurons.kind, neurons.count) == ("neurons", 24)
    assert neurons.rows["blocks.0.3.both"].tolist() == [i // 2 for i in range(48)]


def test_what_somebody_else_reads_is_no_unit() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)
            self.up, self.down, self.normed = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
            self.last = nn.Linear(8, 8)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = F.relu(self.up(self.embedding(ids)))
            x = self.down(hidden) + hidden[..., :8]  # `up` is read past `down`
            return self.head(self.last(F.layer_norm(self.normed(x), (8,))))  # a norm makes all depend on all

    assert list(found(Read())) == ["head"]


def forwards_agree(pruned: PrunedModel, model: nn.Module) -> None:
    """What is left is much nearer to the module than its answers are spread."""
    assert distance(pruned, model, batches()[0]) < float(model(batches()[0]).detach().var())


@pytest.mark.parametrize("criterion", ["weights", "activations"])
def test_neurons_and_heads_go_and_the_module_runs(criterion: str) -> None:
    model = Model()
    pruned = PrunedModel(model, 0.5, "structured", parts=("neurons", "heads"), criterion=criterion, batches=batches())
    attention, feed_forward = pruned.model.blocks[1][1], pruned.model.blocks[1][3]
    assert feed_forward.both.weight.shape == (24, WIDTH) and feed_forward.down.weight.shape == (WIDTH, 12)
    assert attention.q.weight.shape == (16, WIDTH) and attention.k.bias.shape == (8,)
    assert (attention.num_heads, attention.num_kv_heads, attention.inner) == (4, 2, 16)
    assert model.blocks[1][1].num_heads == 8 and model.blocks[1][1].q.weight.shape == (WIDTH, WIDTH)
    before, after = (sum(p.weight.numel() for p in matrices(one).values()) for one in (model, pruned.model))
    assert pruned.sparsity() == pytest.approx(1 - after / before) == pytest.approx(0.47, abs=0.01)
    assert size(pruned) < 0.6 * size(model)
    forwards_agree(pruned, model)
    assert {(one.kind, one.before, one.after) for one in pruned.removed} == {("neurons", 24, 12), ("heads", 4, 2)}
    loss = pruned(batches()[0]).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in pruned.parameters())


def test_neurons_that_do_nothing_go_first_and_cost_nothing() -> None:
    model = Model()
    idle = [1, 5, 8, 13, 21, 23]
    with torch.no_grad():
        for block in model.blocks:
            block[3].down.weight[:, idle] = 0
    for options in ({"criterion": "weights"}, {}):
        pruned = PrunedModel(model, 0.25, "structured", batches=batches(), **options)
        assert distance(pruned, model, batches()[1]) < 1e-6


def test_neurons_that_others_can_stand_in_for_go_and_cost_nothing() -> None:
    """Twins: one of each goes, and the other takes over."""
    model = Model()
    with torch.no_grad():
        for block in model.blocks:
            block[3].both.weight[24:], block[3].both.bias[24:] = block[3].both.weight[:24], block[3].both.bias[:24]
    pruned = PrunedModel(model, 0.5, "structured", batches=batches())
    plain = PrunedModel(model, 0.5, "structured", batches=batches(), criterion="weights")
    assert distance(pruned, model, batches()[1]) < 0.05 * distance(plain, model, batches()[1])


@pytest.mark.parametrize("unit", [1, 4])
def test_the_units_that_stay_are_fitted(unit: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 16, generator=generator) @ torch.randn(16, 16, generator=generator) + 1
    weight = torch.randn(8, 16, generator=generator)
    from mnemos.compress.modules.moments import Moments

    moments = Moments(inputs.mean(0), inputs.T @ inputs / 256, 256)
    units = Units("reader", unit, 16 // unit, {})
    kept, fitted, shift = choose_and_fit(weight, moments, units, 8 // unit, has_bias=True)
    columns = kept.repeat_interleave(unit)
    error = (inputs @ weight.T - inputs[:, columns] @ fitted.T - shift).square().mean()
    reference = torch.linalg.lstsq(torch.cat((inputs[:, columns], torch.ones(256, 1)), 1), inputs @ weight.T).solution
    best = (inputs @ weight.T - torch.cat((inputs[:, columns], torch.ones(256, 1)), 1) @ reference).square().mean()
    assert int(kept.sum()) == 8 // unit and error < 1.05 * best
    first = torch.linalg.lstsq(inputs[:, :8] - inputs[:, :8].mean(0), (inputs - inputs.mean(0)) @ weight.T)
    naive = (
        ((inputs - inputs.mean(0)) @ weight.T - (inputs[:, :8] - inputs[:, :8].mean(0)) @ first.solution)
        .square()
        .mean()
    )
    assert error < naive


def test_the_layer_that_changes_least_goes() -> None:
    model = Model()
    with torch.no_grad():
        for part in (model.blocks[1][1].o, model.blocks[1][3].down):
            for parameter in part.parameters():
                parameter.mul_(1e-3)

    class Layer(nn.Module):
        def __init__(self, parts: Any) -> None:
            super().__init__()
            self.parts = parts

        def forward(self, x: Tensor) -> Tensor:
            norm, attention, other, feed_forward = self.parts
            x = x + attention(norm(x))
            return x + feed_forward(other(x))

    chain = nn.Sequential(model.embedding, nn.Sequential(*(Layer(parts) for parts in model.blocks)), model.head)
    pruned = PrunedModel(chain, 0.3, "structured", parts="layers", batches=batches())
    assert len(pruned.model[1]) == 2 and distance(pruned, chain, batches()[0]) < 1e-3
    assert [(one.name, one.kind, one.before, one.after) for one in pruned.removed] == [("1", "layers", 3, 2)]


def test_without_activations_layers_go_at_even_distances() -> None:
    assert spread_out(12, 6) == [1, 3, 5, 6, 8, 10] and spread_out(3, 1) == [1]
    model = Model()
    pruned = PrunedModel(model, 0.5, "structured", parts=["layers"], criterion="weights", batches=batches())
    assert pruned.model.n_layers == len(pruned.model.blocks) == 1 and model.n_layers == 3
    assert pruned(IDS).shape == (2, 8, VOCABULARY)


transformers_configs = {
    "Llama": {"num_key_value_heads": 2, "head_dim": 8},
    "Qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "GPT2": {},
}


@pytest.mark.parametrize("name", transformers_configs)
def test_a_transformers_model_is_saved_and_loaded_smaller(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=32)
        config.bos_token_id = config.eos_token_id = 0
        parts = ("neurons", "layers")
    else:
        shared = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        config = getattr(transformers, f"{name}Config")(
            vocab_size=VOCABULARY, max_position_embeddings=32, **shared, **transformers_configs[name]
        )
        parts = ("neurons", "heads", "layers")
    class_ = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    model = class_(config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = PrunedModel(model, 0.5, "structured", parts=parts, batches=[{"input_ids": ids} for ids in batches()])
    pruned.model.save_pretrained(tmp_path)
    again = class_.from_pretrained(tmp_path).eval()
    assert size(again) == size(pruned) < size(model)
    with torch.no_grad():
        assert torch.allclose(again(IDS).logits, pruned(IDS).logits, atol=1e-5)
        longer = again.generate(IDS[:, :4], max_new_tokens=4, do_sample=False)  # its cache agrees with its new numbers
    assert longer.shape == (2, 8)
    from mnemos.engine.engine import InferenceEngine
    from mnemos.formats.checkpoint import open_checkpoint
    from mnemos.models.load import load_model

    with InferenceEngine(load_model(open_checkpoint(tmp_path), dtype="float32")) as engine:
        logits = engine.logits(IDS[0].tolist())
    assert torch.allclose(torch.as_tensor(logits[-1]), again(IDS).logits[0, -1], atol=1e-3)


@pytest.mark.parametrize("parts", [["neurons", "heads"], ["layers", "neurons"]])
def test_a_smaller_module_is_saved_and_loaded(parts: list[str], tmp_path: Path) -> None:
    pruned = PrunedModel(Model(), 0.5, "structured", parts=parts, batches=batches())
    pruned.save(tmp_path / "pruned.safetensors")
    again = PrunedModel.load(tmp_path / "pruned.safetensors", model_class=Model)
    assert torch.equal(again(IDS), pruned(IDS))
    assert again.removed == pruned.removed and again.sparsity() == pruned.sparsity()
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "pruned.safetensors").read_bytes()


def test_a_smaller_transformers_model_is_loaded_without_its_class(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    given = [{"input_ids": ids} for ids in batches()]
    pruned = PrunedModel(model, 0.5, "structured", parts=("neurons", "heads", "layers"), batches=given)
    pruned.save(tmp_path / "pruned")
    again = PrunedModel.load(tmp_path / "pruned").eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, pruned(IDS).logits)
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.Hardswish, nn.GELU])
@pytest.mark.parametrize("rows", [1, 32])
def test_neurons_that_are_rarely_active_are_found(activation: type[nn.Module], rows: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Linear(16, 64), activation(), nn.Dropout(), nn.Linear(64, 64), activation(), nn.Linear(64, 8)
    )
    module[0].bias.data -= 0.5
    x = torch.randn(64, 16)
    pruned = PrunedModel(module.eval(), 0.5, "structured", batches=x.split(rows))
    assert [(one.name, one.before, one.after) for one in pruned.removed] == [("3", 64, 32), ("5", 64, 32)]
    assert pruned.model[0].weight.shape == (32, 16) and pruned.model[3].weight.shape == (32, 32)
    assert distance(pruned, module, x) < 0.1 * distance(module, nn.Linear(16, 8), x)


def test_what_a_config_cannot_express_is_said() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    config.bos_token_id = config.eos_token_id = 0
    with pytest.warns(UserWarning, match="config of GPT2LMHeadModel cannot express this number of heads"):
        pruned = PrunedModel(transformers.GPT2LMHeadModel(config), 0.5, "structured", parts="heads")
    assert pruned.model.transformer.h[0].attn.num_heads == 2


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Plain(), {"parts": "heads"}, "Plain has no heads that can be removed: forward cannot do with fewer"),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)), {}, "Sequential has no neurons that can be removed"),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), {}, "give batches"),
        (nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)), {"batches": torch.ones(16, 4)}, "a norm's"),
        (Model(), {"parts": ("neurons", "nerves")}, "parts is ('neurons', 'nerves'); it must be one of neurons, heads"),
        (Model(), {"pattern": "2:4"}, "takes no pattern, scope or skip"),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5)), {"parts": "layers"}, "has no list of layers"),
    ],
)  # fmt: skip
def test_bad_input_is_named(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ModelError)) as caught:
        PrunedModel(model, 0.5, "structured", **options)
    assert message in str(caught.value)


def test_batches_that_the_module_does_not_take_are_refused() -> None:
    given = torch.full((4, 16), 10**6)
    with pytest.raises(ConfigError, match="batch 0 cannot be run: IndexError: .*; expected what Model.forward takes"):
        PrunedModel(Model(), 0.5, "structured", batches=given)
    with pytest.raises(ConfigError, match="batch 0 cannot be run: IndexError: .*; expected what Model.forward takes"):
        student_of(Model(), batches=given)

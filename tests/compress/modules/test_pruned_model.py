"""Zeros among a module's weights: how many, where, what they cost, and that training keeps them."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mnemos.compress.modules.masks import Pattern, fit_sparse, lowest  # noqa: E402
from mnemos.compress.modules.own_text import own_text  # noqa: E402
from mnemos.compress.modules.pruned_model import PrunedModel  # noqa: E402
from mnemos.compress.modules.state_file import save_state  # noqa: E402
from mnemos.errors import ConfigError, FormatError, ModelError  # noqa: E402
from tests.models.foreign.foreign_modules import VOCABULARY, Plain  # noqa: E402


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (8, 12), generator=generator) for _ in range(2)]


def distance(module: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        return float((module(inputs) - other(inputs)).square().mean())


@pytest.mark.parametrize("criterion", ["weights", "activations", None])
@pytest.mark.parametrize("ratio", [0.3, 0.75])
def test_the_share_of_zeros_is_what_was_asked_for(criterion: str | None, ratio: float) -> None:
    model = Plain()
    before = copy.deepcopy(model.state_dict())
    pruned = PrunedModel(model, ratio, criterion=criterion)
    assert pruned.sparsity() == pytest.approx(ratio, abs=1e-3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ids = batches()[0]
    masked = copy.deepcopy(pruned.model)
    assert torch.equal(pruned(ids), masked(ids))
    assert {name: mask.shape for name, mask in pruned.masks.items()} == {
        name: layer.weight.shape for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
    }


def test_by_weights_the_smallest_go_of_all_layers_or_of_each() -> None:
    model = Plain()
    for scope in ("global", "layer"):
        pruned = PrunedModel(model, 0.4, scope=scope)
        parts = [(model.get_submodule(name).weight.abs(), mask) for name, mask in pruned.masks.items()]
        if scope == "global":
            parts = [tuple(torch.cat([part.flatten() for part in column]) for column in zip(*parts, strict=True))]
        for weight, mask in parts:
            assert weight[~mask].max() <= weight[mask].min()


def test_inputs_make_pruning_cost_less() -> None:
    """A module's own guesses are better than none, and its actual inputs better still."""
    model, texts = Plain(), batches()
    costs = [
        distance(PrunedModel(model, 0.5, **options), model, texts[0])
        for options in ({"batches": texts}, {}, {"criterion": "weights"})
    ]
    assert costs[0] < costs[1] < costs[2]


def test_what_is_fitted_is_better_than_what_is_only_masked() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    weight = torch.randn(16, 24, generator=generator)
    fitted, mask = fit_sparse(weight, inputs.T @ inputs / 512, 0.5, Pattern())
    assert int(mask.sum()) == 16 * 24 // 2 and not fitted[~mask].any()

    def error(other: Tensor) -> float:
        return float((inputs @ (weight - other).T).square().mean())

    score = weight.abs() * inputs.square().mean(0).sqrt()
    wanda = weight * (score > score.median(1, keepdim=True).values)
    assert error(fitted) < 0.5 * error(wanda)
    # No weight alone can be changed for the better: the gradient of the error is small where weights stay.
    slope = ((fitted - weight) @ (inputs.T @ inputs / 512))[mask].abs().mean()
    assert slope < 0.1 * ((wanda - weight) @ (inputs.T @ inputs / 512))[mask].abs().mean()


@pytest.mark.parametrize("given", [True, False])
def test_two_of_every_four_weights_stay(given: bool) -> None:
    pruned = PrunedModel(Plain(), pattern="2:4", batches=batches() if given else None)
    assert pruned.sparsity() == 0.5
    for mask in pruned.masks.values():
        assert (mask.unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("scope", [None, "global", "layer"])
def test_whole_blocks_go(scope: str | None) -> None:
    pruned = PrunedModel(Plain(), 0.25, pattern="4x8", scope=scope)
    assert pruned.sparsity() == pytest.approx(0.25, abs=0.01)
    assert "head" not in pruned.masks  # 29 rows are not blocks of 4
    for mask in pruned.masks.values():
        blocks = mask.unflatten(0, (-1, 4)).unflatten(2, (-1, 8)).float().mean((1, 3))
        assert set(blocks.flatten().tolist()) <= {0.0, 1.0}


def test_of_equal_scores_exactly_as_many_go_as_shall() -> None:
    scores = torch.tensor([[2.0, 1.0, 1.0], [1.0, 0.0, 3.0]])
    assert [int(lowest(scores, count).sum()) for count in range(7)] == list(range(7))
    assert lowest(scores, 2).tolist() == [[False, True, False], [False, True, False]]


class Conv1D(nn.Module):
    """As GPT-2's in transformers: the weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Tied(nn.Module):
    """A transposed layer, and a head that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(20, 8), Conv1D(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embedding(input_ids))))


@pytest.mark.parametrize("criterion", ["weights", "activations"])
def test_a_transposed_layer_is_pruned_and_a_tied_head_is_left(criterion: str) -> None:
    torch.manual_seed(0)
    pruned = PrunedModel(Tied(), 0.5, criterion=criterion)
    assert list(pruned.masks) == ["middle"]
    assert (pruned.model.middle.weight == 0).float().mean() == 0.5
    assert torch.equal(pruned.masks["middle"], (pruned.model.middle.weight != 0).T)


def train(pruned: PrunedModel, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    pruned.train()
    for ids in (batches() * steps)[:steps]:
        logits = pruned(ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_zeros(pruned: PrunedModel, module: nn.Module | None = None) -> None:
    for name, mask in pruned.masks.items():
        weight = (module or pruned.model).get_submodule(name).weight
        assert not weight[~mask].any() and (weight[mask] != 0).float().mean() > 0.99


def test_training_keeps_the_zeros_and_changes_the_rest() -> None:
    model = Plain()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)  # with a momentum from before
    F.cross_entropy(model(batches()[0]).flatten(0, 1), batches()[0].flatten()).backward()
    optimizer.step()
    pruned = PrunedModel(model, 0.5, inplace=True)
    before = copy.deepcopy(pruned.model.state_dict())
    train(pruned, optimizer)
    assert all(not pruned.model.get_submodule(name).weight.grad[~mask].any() for name, mask in pruned.masks.items())
    after = pruned.model.state_dict()
    assert_zeros(pruned)
    assert all(not torch.equal(before[name], after[name]) for name in before if "layers" in name)


def test_two_calls_may_come_before_one_backward_pass() -> None:
    pruned = PrunedModel(Plain(), 0.5).train()
    (pruned(batches()[0]).sum() + pruned(batches()[1]).sum()).backward()
    assert pruned.model.head.weight.grad is not None


@pytest.mark.parametrize("how", ["copied", "pickled"])
def test_a_copy_keeps_its_zeros_too(how: str) -> None:
    pruned = PrunedModel(Plain(), 0.5)
    if how == "copied":
        other = copy.deepcopy(pruned)
    else:
        file = io.BytesIO()
        torch.save(pruned, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    train(other, torch.optim.SGD(other.parameters(), 0.1))
    other.model.state_dict()
    assert_zeros(pruned, other.model)
    assert other.sparsity() == pytest.approx(0.5, abs=1e-3)


def test_the_state_is_the_modules_own_and_what_is_loaded_has_the_zeros() -> None:
    model = Plain()
    pruned = PrunedModel(model, 0.5)
    assert pruned.model.state_dict().keys() == model.state_dict().keys()
    pruned.model.load_state_dict(model.state_dict())
    pruned(batches()[0])
    assert_zeros(pruned)


def test_what_is_permanent_is_an_ordinary_module() -> None:
    pruned = PrunedModel(Plain(), 0.5)
    expected, masks = pruned(batches()[0]), pruned.masks
    module = pruned.make_permanent()
    assert module is pruned.model and not pruned.masks and pruned.sparsity() == pytest.approx(0.5, abs=1e-3)
    assert torch.equal(module(batches()[0]), expected)
    train(pruned, torch.optim.SGD(pruned.parameters(), 0.1))
    assert module.head.weight[~masks["head"]].any()


def test_the_engine_takes_it_like_the_module() -> None:
    from mnemos.engine.engine import InferenceEngine

    pruned = PrunedModel(Plain(), 0.5)
    ids = [1, 2, 3]
    for _ in range(6):
        ids.append(int(pruned(torch.tensor([ids]))[0, -1].argmax()))
    with InferenceEngine(pruned, use_kv_cache=False) as engine:
        assert engine.generate([1, 2, 3], max_new_tokens=6) == ids


def broken() -> nn.Module:
    model = Plain()
    with torch.no_grad():
        model.layers[1].out.weight[3, 4] = torch.nan
    return model


def test_own_text_is_of_the_models_tokens_whatever_other_tables_it_has() -> None:
    class PositionsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.tokens = nn.Embedding(500, 8), nn.Embedding(20, 8)
            self.head = nn.Linear(8, 24)  # padded

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.tokens(ids) + self.positions.weight[: ids.shape[1]])

    text = own_text(PositionsFirst())
    assert text is not None and text.shape == (32, 64) and int(text.min()) >= 0 and int(text.max()) < 20


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (None, {}, "model is a NoneType; expected a torch.nn.Module"),
        (Plain(), {"pruning_ratio": 0.0}, "pruning_ratio is 0.0; it must be a number above 0 and below 1"),
        (Plain(), {"pruning_ratio": 1.5}, "pruning_ratio is 1.5"),
        (Plain(), {"pruning_ratio": float("nan")}, "pruning_ratio is nan"),
        (Plain(), {"method": "random"}, "method is 'random'; it must be one of magnitude, structured"),
        (Plain(), {"pattern": "4:2"}, "pattern is '4:2'; it must be None, N:M"),
        (Plain(), {"pattern": "64x64"}, "pattern divides none of the matrices"),
        (Plain(), {"batches": []}, "batches is empty"),
        (Plain(), {"batches": ["text"]}, "a batch is a str; expected token ids"),
        (Plain(), {"batches": batches(), "scope": "global"}, "scope is 'global' with criterion 'activations'"),
        (Plain(), {"skip": ["*"]}, "which leaves no layer"),
        (nn.Sequential(nn.ReLU()), {}, "Sequential has no nn.Linear"),
        (nn.Linear(4, 4), {"criterion": "activations"}, "is no language model"),
        (broken(), {}, "layers.1.out.weight has values that are NaN or infinite"),
    ],
)
def test_bad_input_is_named(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message.replace("(", r"\(")):
        PrunedModel(model, **options)


def test_a_file_holds_the_zeros_and_training_goes_on_with_them(tmp_path: Path) -> None:
    pruned = PrunedModel(Plain(), 0.6, batches=batches())
    pruned.save(tmp_path / "pruned.safetensors")
    again = PrunedModel.load(tmp_path / "pruned.safetensors", model_class=Plain)
    assert all(torch.equal(mask, again.masks[name]) for name, mask in pruned.masks.items())
    assert len(again.masks) == len(pruned.masks) and again.sparsity() == pruned.sparsity()
    assert torch.equal(again(batches()[0]), pruned(batches()[0]))
    optimizer = torch.optim.SGD(again.parameters(), 0.1)
    again(batches()[0]).square().mean().backward()
    optimizer.step()
    assert again.sparsity() == pytest.approx(pruned.sparsity())
    pruned.make_permanent()
    pruned.save(tmp_path / "permanent.safetensors")
    assert not PrunedModel.load(tmp_path / "permanent.safetensors", model_class=Plain).masks


def test_a_file_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pruned.safetensors"
    PrunedModel(Plain(), 0.6, criterion="weights").save(path)
    with pytest.raises(ModelError, match=r"pruned.safetensors does not fit a Sequential: .*Missing key|Unexpected key"):
        PrunedModel.load(path, model_class=nn.Sequential)
    with pytest.raises(ConfigError, match=r"holds a Plain; expected the class, load\(path, model_class=Plain\)"):
        PrunedModel.load(path)
    save_state(Plain().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(FormatError, match="is no pruned module; expected a file that PrunedModel.save has written"):
        PrunedModel.load(tmp_path / "other.safetensors", model_class=Plain)


def test_a_name_to_skip_need_not_be_in_a_list() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    assert list(PrunedModel(model, 0.5, criterion="weights", skip="0*").masks) == ["1"]
    with pytest.raises(ConfigError, match="skip is 3; it must be a non-empty string"):
        PrunedModel(model, 0.5, skip=3)  # type: ignore[arg-type]

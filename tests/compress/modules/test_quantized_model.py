"""Modules of one's own in 8 and 4 bits: how close they stay, what becomes of each layer, files, and the engine."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mnemos import (  # noqa: E402
    DistilledModel,
    InferenceEngine,
    ModelServer,
    PrunedModel,
    QuantizedModel,
    quantize_full_model,
)
from mnemos.compress.modules import conversion  # noqa: E402
from mnemos.errors import CapacityError, ConfigError, FormatError, ModelError, RequestError  # noqa: E402
from mnemos.native import core  # noqa: E402
from tests.models.foreign.foreign_modules import CONTEXT, VOCABULARY, PastArgument, Plain  # noqa: E402

pytestmark = pytest.mark.skipif(core is None, reason="the native core is not built")


class Stack(nn.Module):
    """Residual blocks between a table and a head: nothing here makes up for what a layer loses."""

    def __init__(self, width: int = 128, hidden: int = 512, tied: bool = False, vocabulary: int = 300) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(vocabulary, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(width, hidden) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(hidden, width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(F.gelu(up(norm(x))))
        logits: Tensor = self.head(x)
        return logits


def ids(rows: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(0, 300, (rows, 32), generator=torch.Generator().manual_seed(seed))


def change(new: Tensor, old: Tensor) -> float:
    return float((new - old).norm() / old.norm())


@torch.no_grad()
def error(quantized: nn.Module, model: nn.Module) -> float:
    return change(quantized(ids()), model(ids()))


def test_eight_bits_lose_less_than_a_hundredth(tmp_path: Path) -> None:
    model = Stack(256, 1024)
    quantized = QuantizedModel(model)
    assert error(quantized, model) < 0.01
    quantized.save(tmp_path / "model.st")
    assert (tmp_path / "model.st").stat().st_size < 0.27 * 4 * sum(p.numel() for p in model.parameters())


def test_four_bits_stay_within_their_size_and_error(tmp_path: Path) -> None:
    model = Stack(384, 2048)
    quantized = QuantizedModel(model, bits=4)
    assert error(quantized, model) < 0.07
    quantized.save(tmp_path / "model.st")
    assert (tmp_path / "model.st").stat().st_size < 0.15 * 4 * sum(p.numel() for p in model.parameters())


def test_calibration_makes_four_bits_better_at_the_same_size() -> None:
    model = Stack()
    plain = QuantizedModel(model, bits=4)
    calibrated = QuantizedModel(model, bits=4, method="static").calibrate([ids(32, seed) for seed in (2, 3)])
    assert error(calibrated, model) < 0.93 * error(plain, model)
    assert calibrated.report().bytes == plain.report().bytes


def test_moments_that_do_not_fit_into_the_memory_are_measured_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Stack(64, 96)
    whole = QuantizedModel(model, bits=4, method="static").calibrate(ids(16))
    monkeypatch.setattr(conversion, "machine_memory", lambda: 8 * 4 * 2 * 64 * 64)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    turns = QuantizedModel(model, bits=4, method="static").calibrate(ids(16))
    assert len(calls) > 3
    assert torch.equal(turns(ids()), whole(ids()))


def test_the_module_itself_is_left_as_it_was() -> None:
    model = Stack()
    before, mode = copy.deepcopy(model.state_dict()), model.training
    QuantizedModel(model, bits=4)
    QuantizedModel(model, method="static").calibrate(ids())
    assert model.training is mode and type(model.head) is nn.Linear
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_file_gives_the_same_bits_back(tied: bool, bits: int, tmp_path: Path) -> None:
    quantized = QuantizedModel(Stack(tied=tied), bits)
    quantized.save(tmp_path / "model.pt")
    for model_class in (Stack, Stack(tied=tied)):
        arguments = {} if isinstance(model_class, nn.Module) else {"tied": tied}
        loaded = QuantizedModel.load(tmp_path / "model.pt", model_class, **arguments)
        assert torch.equal(loaded(ids()), quantized(ids()))
        assert str(loaded.report()) == str(quantized.report())
        assert (loaded.bits, loaded.method) == (bits, "dynamic")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_file_keeps_buffers_of_types_that_it_does_not_have(tmp_path: Path) -> None:
    class Rotated(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rotations", torch.polar(torch.ones(3), torch.arange(3.0)))
            self.register_buffer("mask", torch.tensor([True, False]))

    quantized = QuantizedModel(Rotated())
    quantized.save(tmp_path / "model.safetensors")
    loaded = QuantizedModel.load(tmp_path / "model.safetensors", Rotated)
    assert loaded.mask.dtype is torch.bool and loaded.mask.tolist() == [True, False]
    assert torch.equal(loaded.rotations, Rotated().rotations) and torch.equal(loaded(ids()), quantized(ids()))


def test_shared_weights_are_kept_once() -> None:
    tied, apart = QuantizedModel(Stack(tied=True)), QuantizedModel(Stack())
    assert tied.report().bytes < apart.report().bytes
    rows = {row.name: row for row in tied.report()}
    assert rows["head"].reason == "shares the weight of table" and rows["head"].bytes == 0
    restored = tied.dequantize()
    assert restored.head.weight is restored.table.weight
    assert change(restored(ids()), tied(ids())) < 0.01


def test_the_report_says_what_stays_in_float_and_why() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scaled = nn.Embedding(50, 32, max_norm=1.0), _Scaled(50, 32)
            self.cell, self.filter = nn.LSTM(32, 32, batch_first=True), nn.Conv1d(32, 32, 1)
            self.tiny, self.head = nn.Linear(32, 32), nn.Linear(32, 50)
            self.mixing = nn.Parameter(torch.eye(32))
            with torch.no_grad():
                self.tiny.weight.mul_(1e-6)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.cell(self.table(x) + self.scaled(x))
            y = y + self.tiny(y) @ self.mixing + self.filter(y.transpose(1, 2)).transpose(1, 2)
            logits: Tensor = self.head(y)
            return logits

    torch.manual_seed(0)
    model = Mixed().eval()
    quantized = QuantizedModel(model)
    assert change(quantized(ids() % 50), model(ids() % 50)) < 0.02
    reasons = {row.name: (row.form, row.reason) for row in quantized.report()}
    assert reasons["head"] == ("int8", "")
    assert reasons["table.weight"] == ("float32", "its rows are renormalised when they are read")
    assert reasons["scaled.weight"] == ("float32", "_Scaled is a subclass with a forward of its own")
    assert reasons["cell.weight_ih_l0"] == ("float32", "recurrent layers are not quantized")
    assert reasons["filter.weight"] == ("float32", "convolutions are not quantized")
    assert reasons["mixing"] == ("float32", "Mixed computes with it itself")
    assert reasons["tiny"][0] == "float32" and "float16 scales" in reasons["tiny"][1]
    assert quantized.report().parameters == sum(p.numel() for p in model.parameters())
    assert "recurrent layers" in str(quantized.report())


class _Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("batch_first", [True, False])
def test_pytorchs_attention_is_quantized_inside_its_layers(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    quantized = QuantizedModel(model)
    forms = {row.name: row.form for row in quantized.report()}
    assert {forms[f"layers.1.self_attn.{name}_proj"] for name in ("q", "k", "v", "out")} == {"int8"}
    x, causal = torch.randn(7, 7, 64), nn.Transformer.generate_square_subsequent_mask(7)
    padding = torch.zeros(7, 7, dtype=torch.bool)
    padding[:, 5:] = True
    for arguments in ({}, {"mask": causal}, {"mask": causal < 0}, {"src_key_padding_mask": padding}):
        assert change(*(one(x, **arguments)[:5, :5] for one in (quantized, model))) < 0.02


def test_attention_over_other_keys_and_its_weights() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(64, 4, kdim=32, vdim=48, batch_first=True).eval()
    q, k, v = torch.randn(2, 5, 64), torch.randn(2, 9, 32), torch.randn(2, 9, 48)
    for arguments in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        exact, got = model(q, k, v, **arguments), QuantizedModel(model)(q, k, v, **arguments)
        assert change(got[0], exact[0]) < 0.02
        assert (got[1] is None) == (exact[1] is None)
        assert got[1] is None or change(got[1], exact[1]) < 0.02
    assert change(QuantizedModel(model)(q[0], k[0], v[0])[0], model(q[0], k[0], v[0])[0]) < 0.02


def test_models_of_transformers_need_no_class(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=100, n_positions=64, initializer_range=0.05
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    quantized = QuantizedModel(model)
    rows = {row.name: row for row in quantized.report()}
    assert rows["transformer.h.0.attn.c_attn"].shape == (192, 64)  # transposed, three products in one
    x = ids() % 100
    assert change(quantized(x).logits, model(x).logits) < 0.02
    quantized.save(tmp_path / "gpt2.safetensors")
    loaded = QuantizedModel.load(tmp_path / "gpt2.safetensors")
    assert torch.equal(loaded(x).logits, quantized(x).logits)
    assert loaded.config.n_embd == 64


def test_the_engine_takes_it_with_its_cache() -> None:
    torch.manual_seed(0)
    module = PastArgument().eval()
    quantized = QuantizedModel(module)
    engine = InferenceEngine(quantized)
    prompts = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11]]
    alone = [engine.generate(torch.tensor([prompt]), max_new_tokens=12)[0].tolist() for prompt in prompts]
    handles = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
    assert [prompt + list(handle.result().token_ids) for prompt, handle in zip(prompts, handles, strict=True)] == alone
    text = list(prompts[0])
    for _ in range(12):  # the greedy text, without a cache
        logits = quantized(torch.tensor([text]))
        text.append(int((logits[0] if isinstance(logits, tuple) else logits)[0, -1].argmax()))
    assert text == alone[0]
    assert engine.model.spec.parameters == sum(p.numel() for p in module.parameters())
    assert engine.model.spec.context_length == CONTEXT


def test_the_server_object_takes_it() -> None:
    class Letters:
        eos_token_id = None

        def encode(self, text: str) -> list[int]:
            return [ord(letter) % VOCABULARY for letter in text]

        def decode(self, tokens: Any) -> str:
            return "".join(chr(97 + int(token) % 26) for token in tokens)

    server = ModelServer(QuantizedModel(PastArgument().eval(), bits=4), Letters())
    assert len(server.predict("abc", max_length=10)) > 0


def test_copies_and_states() -> None:
    quantized = QuantizedModel(Stack(), bits=4)
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(ids()), quantized(ids()))
    torch.manual_seed(1)
    other_module = Stack()
    with torch.no_grad():
        for p in other_module.parameters():
            p.add_(0.01 * torch.randn_like(p))
    other = QuantizedModel(other_module, bits=4)
    assert not torch.equal(other(ids()), quantized(ids()))
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(ids()), quantized(ids()))
    assert change(twin.to(torch.bfloat16)(ids()).float(), quantized(ids())) < 0.05


def test_other_modes_and_places_are_refused() -> None:
    quantized = QuantizedModel(Stack())
    with pytest.raises(ConfigError, match="mode is True; quantized weights cannot be trained"):
        quantized.train()
    assert quantized.eval() is quantized
    with pytest.raises(ConfigError, match="device is 'meta'; a quantized module runs on 'cpu' or 'cuda'"):
        quantized.to("meta")
    assert not any(tensor.is_meta for tensor in quantized.state_dict().values())  # nothing has moved
    with pytest.raises(RequestError, match="input is on meta; expected a tensor on the CPU"):
        quantized(ids().to("meta"))
    with pytest.raises(RequestError, match="input is on meta; expected a tensor on the CPU"):
        quantized.up[0](torch.zeros(1, 128, device="meta"))
    with pytest.raises(RequestError, match="input is torch.float32; expected row numbers"):
        quantized(ids().float())
    with pytest.raises(ConfigError, match="quantized to 8 bits already"):
        QuantizedModel(quantized)


def test_what_cannot_be_asked_for() -> None:
    for bits in (3, 16, 8.0, "8", None, True, torch.tensor([8, 4])):
        with pytest.raises(ConfigError, match="bits is .*; expected 8 or 4"):
            QuantizedModel(Stack(), bits=bits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="method is 'best'"):
        QuantizedModel(Stack(), method="best")
    with pytest.raises(ConfigError, match="model is a str"):
        QuantizedModel("model")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="Sequential has nothing to quantize.*GELU, LayerNorm, Sequential"):
        QuantizedModel(nn.Sequential(nn.LayerNorm(8), nn.GELU()))
    with pytest.raises(ModelError, match="Sequential has nothing to quantize"):
        QuantizedModel(nn.Sequential(nn.LazyLinear(8)))
    model = nn.Sequential(nn.Linear(32, 8), nn.Embedding(0, 8))
    assert [row.reason for row in QuantizedModel(model).report() if row.name == "1.weight"] == ["it has no values"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_said() -> None:
    small = Stack()
    for model in (
        QuantizedModel(small),
        PrunedModel(small, criterion="weights"),
        DistilledModel(small, Stack()),
        quantize_full_model(small, "fp8"),
    ):
        with pytest.raises(ConfigError, match="the device cannot be used here: .*; expected 'cpu' or one that"):
            model.to("cuda")


def test_nan_weights_are_named() -> None:
    model = Stack()
    with torch.no_grad():
        model.down[1].weight[3, 4] = torch.nan
    with pytest.raises(ModelError, match="down.1.weight"):
        QuantizedModel(model)
    model = Stack()
    with torch.no_grad():
        model.down[1].bias[3] = torch.inf
    with pytest.raises(ModelError, match="down.1.bias has values that are NaN or infinite"):
        QuantizedModel(model)


def test_static_waits_for_its_batches(tmp_path: Path) -> None:
    quantized = QuantizedModel(Stack(), method="static")
    for use in (lambda: quantized(ids()), lambda: quantized.save(tmp_path / "model.st")):
        with pytest.raises(ConfigError, match="calibrate\\(batches\\)"):
            use()
    with pytest.raises(ConfigError, match="batches is empty"):
        quantized.calibrate([])
    with pytest.raises(ConfigError, match="batches have 15 rows or tokens in all; expected 16 or more"):
        quantized.calibrate([ids()[:1, :5]] * 3)
    with pytest.raises(ConfigError, match=r"batch 1 cannot be run: IndexError: .*; expected what Stack.forward takes"):
        quantized.calibrate([ids(), ids() + 10**6])
    names: list[str] = []
    quantized.calibrate([(ids(), ids())], names.append)
    assert set(names) >= {"table", "up.0", "head"}
    assert quantized(ids()).shape == (4, 32, 300)
    with pytest.raises(ConfigError, match="quantized already"):
        quantized.calibrate(ids())


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.st"
    QuantizedModel(Stack()).save(path)
    with pytest.raises(ConfigError, match="model_class is None and .* holds a Stack"):
        QuantizedModel.load(path)
    with pytest.raises(ModelError, match="Plain has no layer table"):
        QuantizedModel.load(path, Plain)
    with pytest.raises(ModelError, match="table.weight has shape \\(300, 64\\).*\\(300, 128\\)"):
        QuantizedModel.load(path, Stack, width=64)
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-5], b"PK" + content[2:]):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match="model.st"):
            QuantizedModel.load(path, Stack)
    with pytest.raises(FormatError, match="does not exist"):
        QuantizedModel.load(tmp_path / "none.st", Stack)


def test_a_module_to_load_into_needs_values(tmp_path: Path) -> None:
    QuantizedModel(Stack()).save(tmp_path / "model.st")
    with pytest.raises(ConfigError, match="table.weight of the module to load into is on the device meta"):
        QuantizedModel.load(tmp_path / "model.st", Stack().to("meta"))
    with pytest.raises(ConfigError, match="model_class is 5; expected a class, or a module of it"):
        QuantizedModel.load(tmp_path / "model.st", 5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Linear\(in_features.* cannot be called with depth: .*expected them beside"):
        QuantizedModel.load(tmp_path / "model.st", torch.nn.Linear, depth=2)


def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.st"
    first = QuantizedModel(Stack())
    first.save(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="cannot be written: No space left on device; it needs"):
        QuantizedModel(Stack(), bits=4).save(path)
    monkeypatch.undo()
    assert [one.name for one in tmp_path.iterdir()] == ["model.st"]
    assert torch.equal(QuantizedModel.load(path, Stack)(ids()), first(ids()))
    with pytest.raises(FormatError, match="cannot be written"):
        first.save(tmp_path / "no folder" / "model.st")

"""Quantized modules on a GPU: torchao's tensors hold what the blocks hold, and files and devices go together."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchao")

from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from mnemos import (  # noqa: E402
    InferenceEngine,
    ModelServer,
    PrunedModel,
    QuantizedModel,
    distill,
    quantize_full_model,
    student_of,
)
from mnemos.compress.modules.block_weights import BLOCK, quantize  # noqa: E402
from mnemos.compress.modules.gpu_weights import (  # noqa: E402
    int4_parts,
    linear_weight,
    multiply,
    on_device,
    pick_rows,
)
from mnemos.errors import ConfigError, RequestError  # noqa: E402
from mnemos.native import core  # noqa: E402
from tests.compress.modules.test_quantized_model import Stack, change, ids  # noqa: E402
from tests.gpu import needs_cuda  # noqa: E402
from tests.models.foreign.foreign_modules import VOCABULARY, PastArgument  # noqa: E402

CPU = torch.device("cpu")
on_gpu = [*needs_cuda, pytest.mark.skipif(core is None, reason="the native core is not built")]


def gpu(function: object) -> object:
    for mark in on_gpu:
        function = mark(function)
    return function


@pytest.mark.parametrize("shape", [(16, 64), (13, 100), (300, 1056)])
def test_int4_operands_hold_the_values_of_the_blocks(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weights = quantize(torch.randn(shape), 4)
    codes, scales = int4_parts(weights)
    rows, columns = shape
    assert codes.shape[1] % 512 == 0 and codes.shape[0] % 8 == 0 and scales.dtype is torch.bfloat16
    whole = torch.stack((codes >> 4, codes & 15), dim=2).flatten(1).float()
    step, zero = (part.float().T.repeat_interleave(BLOCK, dim=1) for part in scales.unbind(2))
    values = (whole - 8) * step + zero
    assert change(values[:rows, :columns], weights.values()) < 0.004  # bfloat16 rounds the scales
    assert not values[rows:].any() and not values[:, -(-columns // BLOCK) * BLOCK :].any()


@pytest.mark.parametrize("rounds_inputs", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (30, 50)])
def test_int8_weights_multiply_like_the_blocks(shape: tuple[int, int], rounds_inputs: bool) -> None:
    torch.manual_seed(0)
    weights, bias = quantize(torch.randn(shape), 8), torch.randn(shape[0])
    placed = linear_weight(weights, CPU, rounds_inputs)
    for rows in (0, 1, 17, 40):
        x = torch.randn(2, rows, shape[1])
        exact, got = F.linear(x, weights.values(), bias), multiply(x, placed, bias)
        assert got.shape == exact.shape and got.dtype is exact.dtype
        assert not rows or change(got, exact) < 0.02


@pytest.mark.parametrize("bits", [8, 5, 4])
def test_rows_of_a_table_are_the_blocks_own(bits: int) -> None:
    torch.manual_seed(0)
    weights = quantize(torch.randn(40, 50) * (torch.arange(40) % 3 > 0)[:, None], bits).compact()
    picked = pick_rows(on_device(weights, CPU), torch.tensor([[3, 39], [0, 3]]))
    assert torch.equal(picked, weights.values()[[3, 39, 0, 3]].view(2, 2, 50))


# How far logits may be from the float module's, by bits and method.
WORST = {(8, "dynamic"): 0.025, (8, "static"): 0.015, (4, "dynamic"): 0.1, (4, "static"): 0.1}


@gpu
@pytest.mark.parametrize(("bits", "method"), WORST)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_a_module_on_a_gpu_is_quantized_there(bits: int, method: str, tied: bool, tmp_path: Path) -> None:
    model = Stack(256, 1024, tied=tied)
    exact = model(ids())
    on_device_model = copy.deepcopy(model).cuda()
    quantized = QuantizedModel(on_device_model, bits, method)
    if method == "static":
        quantized.calibrate([ids(32, seed) for seed in (2, 3)])
    assert quantized.device.type == "cuda" and next(on_device_model.parameters()).is_cuda
    assert change(quantized(ids().cuda()).cpu(), exact) < WORST[bits, method]
    alone = torch.cat([quantized(row[None].cuda()) for row in ids()])
    assert change(alone, quantized(ids().cuda())) < 0.01  # few rows are filled up for the product
    with pytest.raises(RequestError, match="input is on cpu; expected a tensor on cuda:0"):
        quantized(ids())
    quantized.save(tmp_path / "model.st")
    on_cpu = QuantizedModel.load(tmp_path / "model.st", Stack, width=256, hidden=1024, tied=tied)
    assert on_cpu.device == CPU and change(on_cpu(ids()), exact) < WORST[bits, method]
    there = QuantizedModel.load(tmp_path / "model.st", Stack(256, 1024, tied=tied).cuda())
    assert torch.equal(there(ids().cuda()), quantized(ids().cuda()))
    assert change(quantized.dequantize()(ids().cuda()).cpu(), exact) < WORST[bits, method]


@gpu
@pytest.mark.parametrize("bits", [8, 4])
@torch.no_grad()
def test_to_moves_a_quantized_module_and_back(bits: int) -> None:
    quantized = QuantizedModel(Stack(128, 512, tied=True), bits)
    before, state = quantized(ids()), {name: value.cpu() for name, value in quantized.state_dict().items()}
    assert quantized.to("cuda") is quantized and quantized.device.type == "cuda"
    assert change(quantized(ids().cuda()).cpu(), before) < 0.03
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(ids().cuda()), quantized(ids().cuda()))
    assert change(twin.to(torch.bfloat16)(ids().cuda()).float().cpu(), before) < 0.06
    assert twin.device.type == "cuda"
    with pytest.raises(ConfigError, match="device is 'meta'"):
        quantized.to("meta")
    quantized.cpu()
    assert torch.equal(quantized(ids()), before)
    assert all(torch.equal(state[name], value) for name, value in quantized.state_dict().items())
    table = QuantizedModel(nn.Sequential(nn.Embedding(30, 32), nn.Linear(32, 30, bias=False)), bits).cuda()
    assert table(ids().cuda() % 30).is_cuda  # there is nothing in it but the blocks


@gpu
def test_a_module_on_two_devices_is_refused() -> None:
    model = Stack()
    model.head.cuda()
    with pytest.raises(ConfigError, match="head.weight is on cuda:0 and .* on cpu; expected all of it on one device"):
        QuantizedModel(model)


@gpu
@pytest.mark.parametrize("bits", [8, 4])
def test_the_engine_and_the_server_take_it_there(bits: int) -> None:
    torch.manual_seed(0)
    module = PastArgument().eval()
    quantized = QuantizedModel(OnDevice(copy.deepcopy(module)).cuda(), bits)
    with InferenceEngine(quantized) as engine:
        prompts = [[1, 2, 3, 4, 5], [7, 8], [9, 10, 11]]
        alone = [engine.generate([prompt], max_new_tokens=12)[0] for prompt in prompts]
        assert [len(text) for text in alone] == [17, 14, 15]
        handles = [engine.submit(prompt, max_new_tokens=12) for prompt in prompts]
        assert all(len(handle.result().token_ids) == 12 for handle in handles)

    class Letters:
        eos_token_id = None

        def encode(self, text: str) -> list[int]:
            return [ord(letter) % VOCABULARY for letter in text]

        def decode(self, tokens: list[int]) -> str:
            return "".join(chr(97 + int(token) % 26) for token in tokens)

    assert len(ModelServer(quantized, Letters()).predict("abc", max_length=10)) > 0
    moved = QuantizedModel(OnDevice(module), bits)
    with InferenceEngine(moved, device="cuda") as engine:
        assert moved.device.type == "cuda" and engine.generate([prompts[0]], max_new_tokens=12)[0] == alone[0]


class OnDevice(nn.Module):
    """A module whose own tables are made where its ids are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module
        self.max_seq_len = module.max_seq_len

    def forward(self, x: Tensor, use_cache: bool = False, past_kv: object = None) -> object:
        with torch.device(x.device):
            return self.inner(x, use_cache, past_kv)


@gpu
@pytest.mark.parametrize("method", ["fp8", "bnb_8bit", "bnb_4bit", "bnb_fp8", "dynamic", "bf16", "fp16"])
@torch.no_grad()
def test_other_precisions_on_a_gpu(method: str, tmp_path: Path) -> None:
    if method.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    model = Stack(128, 512)
    exact, x = model(ids()), ids().cuda()
    made = quantize_full_model(copy.deepcopy(model).cuda(), method)
    assert change(made(x).float().cpu(), exact) < (0.15 if "4bit" in method else 0.07)
    if method in ("fp8", "bnb_fp8"):
        assert change(made.to(torch.bfloat16)(x).float().cpu(), exact) < 0.08
    if method == "fp8":
        made.cpu()
        assert change(made(ids()).float(), exact) < 0.08


@gpu
@pytest.mark.parametrize("pattern", [None, "2:4", "4x8"])
def test_pruned_modules_train_on_a_gpu_and_keep_their_zeros(pattern: str | None, tmp_path: Path) -> None:
    x = ids().cuda()
    pruned = PrunedModel(Stack(64, 128).cuda(), 0.5, pattern=pattern, batches=[ids(16)])
    share = pruned.sparsity()
    optimizer = torch.optim.AdamW(pruned.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(pruned(x).flatten(0, 1), x.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and pruned.sparsity() == pytest.approx(share)
    assert pruned.to("cpu")(ids()).shape == (4, 32, 300)
    plain = pruned.cuda().make_permanent()
    assert (plain if isinstance(plain, nn.Module) else pruned)(x).is_cuda


@gpu
@pytest.mark.parametrize("writer", [None, "student", "teacher"])
def test_distillation_on_a_gpu(writer: str | None, tmp_path: Path) -> None:
    teacher = Stack(64, 128).cuda()
    student = student_of(teacher, width=0.5)
    generated = {} if writer is None else {"generated": 1.0, "writer": writer}
    done = distill(
        student,
        teacher,
        [ids(4, seed) for seed in range(4)],
        steps=6,
        held_out=ids(2),
        alone=True,
        checkpoints=tmp_path,
        checkpoint_every=3,
        **generated,
    )
    assert next(done.student.parameters()).is_cuda and len(done.losses) == 6 and done.alone is not None
    again = distill(
        student_of(teacher, width=0.5),
        teacher,
        [ids(4, seed) for seed in range(4)],
        steps=6,
        held_out=ids(2),
        checkpoints=tmp_path,
        checkpoint_every=3,
        **generated,
    )
    assert again.losses == []


@gpu
def test_structured_pruning_on_a_gpu() -> None:
    model = Stack(64, 128).cuda()
    pruned = PrunedModel(model, 0.5, method="structured", batches=[ids(16)])
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    assert pruned(ids().cuda()).is_cuda

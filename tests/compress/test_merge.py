"""Adapters merged into files: the result computes what peft's own merge computes, for folders and GGUF files alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
hf = pytest.importorskip("transformers")

from gguf import GGMLQuantizationType  # noqa: E402

from mnemos.compress.merge import merge_files  # noqa: E402
from mnemos.engine.engine import InferenceEngine  # noqa: E402
from mnemos.engine.options import LoadOptions  # noqa: E402
from mnemos.engine.pretrained import load_pretrained  # noqa: E402
from mnemos.errors import CapacityError, ConfigError, FormatError, UnsupportedError  # noqa: E402
from mnemos.formats.adapters import read_adapter  # noqa: E402
from mnemos.formats.checkpoint import open_checkpoint  # noqa: E402
from mnemos.formats.tensor_types import TensorType  # noqa: E402
from mnemos.models.load import load_model  # noqa: E402
from tests.models.checkpoints import CONFIGS, token_ids  # noqa: E402
from tests.models.gguf_files import write_gguf  # noqa: E402

PROMPT = token_ids(12)
ATTENTION = ["q_proj", "k_proj", "o_proj", "down_proj"]


def base_model(name: str) -> Any:
    torch.manual_seed(0)
    module = hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    return module


def adapted(module: Any, folder: Path, seed: int = 1, **options: Any) -> Any:
    """The module with a random adapter, which is saved in `folder`."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(module, peft.LoraConfig(r=4, lora_alpha=6, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:  # those that begin as zeros
                parameter.copy_(torch.randn_like(parameter) * 0.2)
            if "modules_to_save.default" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "magnitude" in name:
                parameter.mul_(1.3)
    model.save_pretrained(folder)
    return model


def logits(path: Path) -> np.ndarray:
    with InferenceEngine(load_model(open_checkpoint(path), dtype="float32")) as engine:
        return np.array(engine.logits(PROMPT))


def expected(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].numpy()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ATTENTION}),
        ("llama", {"target_modules": ATTENTION, "use_rslora": True, "alpha_pattern": {"k_proj": 11}}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.1.self_attn.v_proj": 2}}),
        ("llama", {"target_modules": ATTENTION, "use_dora": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        ("llama", {"target_modules": ["embed_tokens", "v_proj"]}),
        ("llama-tied", {"target_modules": ATTENTION}),
        ("qwen3", {"target_modules": ATTENTION}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_the_result_is_that_of_peft(name: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    module = base_model(name)
    source = tmp_path / "base" if kind == "folder" else tmp_path / "base.gguf"
    if kind == "folder":
        module.save_pretrained(source)
    else:
        write_gguf(module, source)
    before = expected(module)
    wanted = expected(adapted(module, tmp_path / "lora", **options))
    out = tmp_path / f"out{source.suffix}"
    seen: list[tuple[str, int, int]] = []
    done = merge_files(source, [(read_adapter(tmp_path / "lora"), 1.0)], out, progress=lambda *step: seen.append(step))
    assert np.allclose(logits(out), wanted, atol=2e-3) and not np.allclose(before, wanted, atol=0.05)
    assert done and all(one.lost < 1e-3 < one.change for one in done) and seen[-1][1] == seen[-1][2]
    if kind == "folder":
        again = hf.AutoModelForCausalLM.from_pretrained(out).eval()
        assert np.allclose(expected(again), wanted, atol=1e-4)


def test_rows_that_the_model_takes_in_another_order_are_changed_where_the_file_has_them(tmp_path: Path) -> None:
    module = base_model("gpt_neox")  # whose queries, keys and values are stored head by head
    module.save_pretrained(tmp_path / "base")
    wanted = expected(adapted(module, tmp_path / "lora", target_modules=["query_key_value"]))
    merge_files(tmp_path / "base", [(read_adapter(tmp_path / "lora"), 1.0)], tmp_path / "out")
    assert np.allclose(logits(tmp_path / "out"), wanted, atol=2e-3)
    adapters = {"lora": read_adapter(tmp_path / "lora")}
    with InferenceEngine(load_model(open_checkpoint(tmp_path / "base"), dtype="float32", adapters=adapters)) as engine:
        found = engine.complete(PROMPT, adapter="lora", max_new_tokens=1, logprobs=1).choices[0]
    best = int(wanted[-1].argmax())
    assert found.token_ids == [best]
    assert found.logprobs[0] == pytest.approx(float(wanted[-1, best] - np.logaddexp.reduce(wanted[-1])), abs=2e-3)


@pytest.mark.parametrize("quantization", [None, GGMLQuantizationType.Q8_0])
def test_an_adapter_is_merged_as_a_model_is_loaded(quantization: Any, tmp_path: Path) -> None:
    module = base_model("llama")
    write_gguf(module, tmp_path / "base.gguf", quantization)
    adapted(module, tmp_path / "lora", target_modules=ATTENTION)
    merge_files(tmp_path / "base.gguf", [(read_adapter(tmp_path / "lora"), 1.0)], tmp_path / "merged.gguf")
    options = LoadOptions(dtype="float32", adapter=tmp_path / "lora", tokenizer=object())
    model, _ = load_pretrained(tmp_path / "base.gguf", options)
    plain = load_model(open_checkpoint(tmp_path / "base.gguf"), dtype="float32")
    assert model.spec.fingerprint != plain.spec.fingerprint  # so that no prefix of the other is used
    with InferenceEngine(model) as engine:
        assert np.array_equal(np.array(engine.logits(PROMPT)), logits(tmp_path / "merged.gguf"))


def test_a_module_of_transformers_gets_its_adapter_from_peft(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    wanted = expected(adapted(base_model("llama"), tmp_path / "lora", target_modules=ATTENTION))
    options = LoadOptions(backend="transformers", device="cpu", adapter=tmp_path / "lora", tokenizer=ids_only())
    model, _ = load_pretrained(tmp_path / "base", options)
    with InferenceEngine(model) as engine:
        assert np.allclose(np.array(engine.logits(PROMPT)), wanted, atol=1e-4)


def test_a_model_of_peft_is_merged_in_memory_and_left_as_it_is(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from mnemos.compat.merge import merge_adapter_weights

    model = adapted(base_model("llama"), tmp_path / "lora", target_modules=ATTENTION, use_dora=True)
    wanted = expected(model)
    state = merge_adapter_weights(model, output_path=tmp_path / "merged.safetensors")
    assert np.array_equal(expected(model), wanted) and not any("lora" in name for name in state)
    plain = base_model("llama")
    plain.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    assert np.allclose(expected(plain), wanted, atol=1e-4)


def ids_only() -> Any:
    """A tokenizer in name only: prompts are token ids."""

    class Ids:
        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

        def __len__(self) -> int:
            return len(PROMPT)

    return Ids()


def test_adapters_are_merged_one_after_the_other_with_their_strengths(tmp_path: Path) -> None:
    base_model("llama").save_pretrained(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        adapted(base_model("llama"), tmp_path / name, seed, target_modules=ATTENTION)
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    merge_files(tmp_path / "base", [(one, 0.5), (two, -2.0)], tmp_path / "out")
    key = "model.layers.1.self_attn.q_proj"
    before, after = (open_checkpoint(tmp_path / name).tensors[f"{key}.weight"].dequantize() for name in ("base", "out"))
    added = 0.5 * one.pairs[key].scale * one.pairs[key].b @ one.pairs[key].a
    added = added - 2 * two.pairs[key].scale * two.pairs[key].b @ two.pairs[key].a
    assert np.allclose(after - before, added, atol=1e-5)


def test_quantized_weights_are_rounded_once_and_what_that_costs_is_said(tmp_path: Path) -> None:
    module = base_model("llama")
    write_gguf(module, tmp_path / "base.gguf", GGMLQuantizationType.Q4_0)
    adapted(module, tmp_path / "lora", target_modules=["q_proj"])
    adapter = read_adapter(tmp_path / "lora")
    fine = merge_files(tmp_path / "base.gguf", [(adapter, 1.0)], tmp_path / "fine.gguf")
    coarse = merge_files(tmp_path / "base.gguf", [(adapter, 0.05)], tmp_path / "coarse.gguf", type=TensorType.Q4_0)
    assert {(one.source, one.type) for one in fine} == {(TensorType.Q4_0, TensorType.F16)}
    assert max(one.lost for one in fine) < 0.01 and min(one.lost for one in coarse) > 0.5
    assert open_checkpoint(tmp_path / "coarse.gguf").tensors["blk.0.attn_q.weight"].type is TensorType.Q4_0
    untouched = open_checkpoint(tmp_path / "fine.gguf").tensors["blk.0.attn_k.weight"]
    assert np.array_equal(untouched.data, open_checkpoint(tmp_path / "base.gguf").tensors["blk.0.attn_k.weight"].data)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    base_model("llama").save_pretrained(tmp_path / "base")
    adapted(base_model("llama"), tmp_path / "lora", target_modules=ATTENTION)
    return tmp_path


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_full_disk_leaves_nothing(kind: str, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mnemos.compress import merge

    source, out = made / "base", made / "out"
    if kind == "gguf":
        source, out = write_gguf(base_model("llama"), made / "base.gguf"), made / "out.gguf"
    before = sorted(path.name for path in made.iterdir())

    def full(values: Any, type: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(merge, "encode", full)
    with pytest.raises(CapacityError, match="No space left on device"):
        merge_files(source, [(read_adapter(made / "lora"), 1.0)], out)
    assert sorted(path.name for path in made.iterdir()) == before


def test_what_exists_is_not_written_over(made: Path) -> None:
    with pytest.raises(ConfigError, match="which exists"):
        merge_files(made / "base", [(read_adapter(made / "lora"), 1.0)], made / "lora")


def test_an_adapter_of_another_model_is_refused(made: Path) -> None:
    adapter = read_adapter(made / "lora")
    base_model("llama-biases").save_pretrained(made / "wide")
    with pytest.raises(FormatError, match="has factors for a weight of shape"):
        merge_files(made / "wide", [(adapter, 1.0)], made / "out")
    base_model("gpt2").save_pretrained(made / "other")
    with pytest.raises(FormatError, match="which .* does not have; expected an adapter of this model"):
        merge_files(made / "other", [(adapter, 1.0)], made / "out")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"peft_type": "LOHA"}, UnsupportedError, "peft_type is 'LOHA'; only LORA is supported"),
        ({"lora_alpha": "high"}, FormatError, "lora_alpha is 'high'; expected a number"),
        ({"alora_invocation_tokens": [1]}, UnsupportedError, "activated LoRA"),
    ],
)
def test_a_config_that_cannot_be_followed_is_refused(
    change: dict[str, Any], error: type[Exception], message: str, made: Path
) -> None:
    path = made / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error, match=message):
        read_adapter(made / "lora")


def test_factors_that_do_not_fit_together_are_refused(made: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = made / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, path)
    with pytest.raises(FormatError, match="has values that are NaN"):
        read_adapter(made / "lora")
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(FormatError, match="expected lora_A .rank, in. and lora_B"):
        read_adapter(made / "lora")


def test_the_command_says_what_became_of_every_weight(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mnemos.cli.main import main

    assert main(["merge", str(made / "base"), "--adapter", f"{made / 'lora'}=0.5", "--out", str(made / "out")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("changed") == 13 and "12 weights changed" in shown and "lost by rounding" in shown
    assert main(["merge", str(made / "base"), "--adapter", f"{made / 'lora'}=much", "--out", str(made / "b")]) == 2
    assert "expected a folder, or a folder=strength" in capsys.readouterr().err

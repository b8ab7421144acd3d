"""Quantized files: what they hold, how they say how they were made, and what is refused."""

import errno
import os

import numpy as np
import pytest

from mnemos import InferenceEngine
from mnemos.cli.main import main
from mnemos.compress import quantize
from mnemos.compress.calibration import Calibration
from mnemos.compress.evaluate import compare, cut
from mnemos.compress.plan import override_of
from mnemos.compress.quantize import Importance, quantize_file
from mnemos.errors import CapacityError, ConfigError, FormatError
from mnemos.formats.blocks import encode
from mnemos.formats.checkpoint import open_checkpoint
from mnemos.formats.gguf import GGUFFile
from mnemos.formats.gguf_writer import writing_gguf
from mnemos.formats.tensor_types import TensorType as T
from mnemos.models.load import load_model
from mnemos.native import core

pytestmark = pytest.mark.skipif(core is None, reason="the native core is not built")

LAYERS, WIDTH, INNER = 2, 64, 256


def weights():
    generator = np.random.default_rng(3)
    shapes = {"token_embd.weight": (40, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(LAYERS):
        shapes[f"blk.{i}.attn_v.weight"] = (WIDTH, WIDTH)
        shapes[f"blk.{i}.ffn_down.weight"] = (WIDTH, INNER)
        shapes[f"blk.{i}.ffn_up_exps.weight"] = (3, INNER, WIDTH)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.attention.head_count": 4,
    "general.file_type": 0,
    "tokenizer.ggml.tokens": ["a", "b"],
}


def write(path, arrays, type_=T.F32, metadata=METADATA):
    with writing_gguf(path, metadata, [(name, array.shape) for name, array in arrays.items()]) as writer:
        for name, array in arrays.items():
            stored = type_ if array.ndim > 1 else T.F32
            writer.write(name, stored, [array.view(np.uint8) if stored is T.F32 else encode(array, stored)])
    return path


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "model.gguf", weights())


def test_every_tensor_has_the_bytes_of_its_type(source, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize, "PIECE", 1000)  # several pieces a tensor, the last of each shorter
    out = tmp_path / "small.gguf"
    result = quantize_file(source, out, "q4_k_m")
    file = GGUFFile.open(out)
    assert {row.name: row.type for row in result.rows} == {name: t.type for name, t in file.tensors.items()}
    assert file.tensors["blk.1.ffn_down.weight"].type is T.Q6_K and file.tensors["output_norm.weight"].type is T.F32
    assert file.tensors["blk.0.ffn_up_exps.weight"].type is T.Q5_0
    for name, values in weights().items():
        tensor = file.tensors[name]
        assert tensor.shape == values.shape and np.array_equal(tensor.data, encode(values, tensor.type)), name
    assert result.bytes == sum(len(t.data) for t in file.tensors.values())


def test_the_metadata_say_how_the_file_was_made(source, tmp_path):
    out = tmp_path / "small.gguf"
    importance = Importance({"blk.0.ffn_down.weight": np.ones(INNER, np.float32)}, "text.txt")
    quantize_file(source, out, "Q4_K", importance=importance, overrides=[override_of("attn_v=q8_0")])
    before, after = GGUFFile.open(source), GGUFFile.open(out)
    assert after.metadata["general.file_type"] == 15 and after.metadata["general.quantization_version"] == 2
    made = after.metadata["mnemos.quantized"]
    assert made.startswith("q4_k_m, attn_v=q8_0, importance of text.txt (Mnemos ")
    kept = [key for key in before.metadata if key != "general.file_type"]
    assert [after.stored_metadata[k] for k in kept] == [before.stored_metadata[k] for k in kept]


def test_importance_weighs_the_columns_of_each_expert(source, tmp_path):
    name = "blk.0.ffn_up_exps.weight"
    values = np.random.default_rng(4).random((3, WIDTH)).astype(np.float32)
    out = tmp_path / "small.gguf"
    quantize_file(source, out, "q4_0", importance=Importance({name: values}, "text"))
    expected = np.concatenate([encode(part, T.Q4_0, w) for part, w in zip(weights()[name], values, strict=True)])
    assert np.array_equal(GGUFFile.open(out).tensors[name].data, expected)


def test_parts_become_one_file(tmp_path):
    arrays = weights()
    names = list(arrays)
    for number, chosen in enumerate((names[:3], names[3:])):
        split = {
            "split.no": np.uint16(number),
            "split.count": np.uint16(2),
            "split.tensors.count": np.int32(len(names)),
        }
        path = tmp_path / f"model-0000{number + 1}-of-00002.gguf"
        write(path, {n: arrays[n] for n in chosen}, metadata={**(METADATA if number == 0 else {}), **split})
    quantize_file(tmp_path / "model-00001-of-00002.gguf", tmp_path / "out.gguf", "q8_0")
    file = GGUFFile.open(tmp_path / "out.gguf")
    assert list(file.tensors) == names and not any(key.startswith("split.") for key in file.metadata)


def test_values_beyond_a_type_s_scale_get_another_type(tmp_path):
    arrays = weights()
    arrays["blk.0.attn_v.weight"][5, 3] = 2e6  # Q8_0's scale can be 65504
    arrays["blk.1.attn_v.weight"][6, 3] = 3e9
    source, out = write(tmp_path / "model.gguf", arrays), tmp_path / "small.gguf"
    rows = {row.name: row for row in quantize_file(source, out, "q4_0").rows}
    assert rows["blk.0.attn_v.weight"].type is T.Q8_0 and rows["blk.1.attn_v.weight"].type is T.BF16
    assert "row 5 has values up to 2e+06, beyond what the float16 numbers of Q4_0" in rows["blk.0.attn_v.weight"].reason
    for tensor in GGUFFile.open(out).tensors.values():
        assert np.isfinite(tensor.dequantize()).all()
    with pytest.raises(FormatError, match=r"blk.0.attn_v.weight: row 5 has values up to 2e\+06"):
        overrides = [override_of("token_embd=q8_0")]
        quantize_file(source, tmp_path / "strict.gguf", "q4_0", strict=True, overrides=overrides)
    assert not (tmp_path / "strict.gguf").exists()


def test_nan_is_named_and_leaves_no_file(tmp_path):
    arrays = weights()
    arrays["blk.1.ffn_down.weight"][7, 9] = np.nan
    with pytest.raises(FormatError, match=r"blk.1.ffn_down.weight: row 7 has nan in column 9"):
        quantize_file(write(tmp_path / "model.gguf", arrays), tmp_path / "small.gguf", "q4_k_m")
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_a_full_disk_leaves_no_file(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CapacityError, match="small.gguf: cannot be written: No space left"):
        quantize_file(source, tmp_path / "small.gguf", "q4_0")
    assert os.listdir(tmp_path) == ["model.gguf"]


def test_quantizing_again_must_be_allowed(tmp_path):
    source, out = write(tmp_path / "model.gguf", weights(), T.Q8_0), tmp_path / "small.gguf"
    with pytest.raises(
        ConfigError, match=r"is Q8_0 already \(6 of 8 tensors are quantized\), and Q4_0 would add its error"
    ):
        quantize_file(source, out, "q4_0")
    quantize_file(source, out, "f16")  # loses nothing that counts
    quantize_file(source, tmp_path / "same.gguf", "q8_0")
    quantize_file(source, out, "q4_0", allow_requantize=True)
    again = GGUFFile.open(out).tensors["blk.0.attn_v.weight"]
    first = GGUFFile.open(source).tensors["blk.0.attn_v.weight"].dequantize()
    assert np.array_equal(again.data, encode(first, T.Q4_0))


def test_strict_refuses_another_type_than_asked_for(source, tmp_path):
    with pytest.raises(
        ConfigError, match=r"would be Q5_1 .*: Q5_K needs rows of a multiple of 256 values, these have 64"
    ):
        quantize_file(source, tmp_path / "small.gguf", "q4_k_s", strict=True)
    quantize_file(source, tmp_path / "small.gguf", "q8_0", strict=True)


def test_importance_of_another_model_is_refused(source, tmp_path):
    for values, problem in [
        ({"blk.0.ffn_down.weight": np.ones(7, np.float32)}, "has 7 values for blk.0.ffn_down.weight"),
        ({"another": np.ones(7, np.float32)}, "is for other tensors"),
    ]:
        with pytest.raises(ConfigError, match=problem):
            quantize_file(source, tmp_path / "small.gguf", "q4_0", importance=Importance(values, "text"))


def test_the_model_itself_is_never_written_over(source):
    with pytest.raises(ConfigError, match="the model itself"):
        quantize_file(source, source, "q4_0")


def test_a_hugging_face_folder_becomes_a_gguf_file(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.models.checkpoints import CONFIGS, build
    from tests.text.test_gguf_form import STEPS, make

    folder, out = tmp_path / "model", tmp_path / "small.gguf"
    build(CONFIGS["llama"](), folder)
    make(folder, STEPS["gpt-2"])
    config = CONFIGS["llama"]()
    config.vocab_size = 800
    build(config, folder)
    rows = {row.name: row for row in quantize_file(folder, out, "q8_0").rows}
    assert rows["blk.0.attn_q.weight"].type is T.Q8_0 and rows["output_norm.weight"].type is T.F32
    with InferenceEngine.from_pretrained(folder) as before, InferenceEngine.from_pretrained(out) as after:
        ids = before.tokenizer.encode("Hello world")
        assert after.tokenizer.encode("Hello world") == ids
        difference = np.abs(before.logits(ids) - after.logits(ids)).max()
        assert 0 < difference < 0.05 * np.abs(before.logits(ids)).max()


def test_on_the_command_line(source, tmp_path, capsys):
    out = tmp_path / "small.gguf"
    arguments = ["quantize", str(source), "--type", "q4_k_m", "--tensor", "attn_v=f16"]
    assert main([*arguments, "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert not out.exists()
    assert main([*arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(planned) and "small.gguf written in" in shown
    lines = {line.split()[0]: line for line in planned.splitlines()}
    assert "F32 -> Q4_K" in lines["blk.0.ffn_down.weight"] and "F32 -> Q6_K" in lines["blk.1.ffn_down.weight"]
    assert " 0-1 " in lines["blk.*.attn_v.weight"] and "by override" in lines["blk.*.attn_v.weight"]
    assert "Q5_0" in lines["blk.*.ffn_up_exps.weight"] and "these have 64" in lines["blk.*.ffn_up_exps.weight"]
    assert "2 of 8 tensors have another type than the mix's" in planned


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["--type", "q4_0"], "--out is missing"),
        (["--type", "q4", "--dry-run"], "type is 'q4'"),
        (["--type", "q4_0", "--dry-run", "--calibrate", "a", "--imatrix", "b"], "give one of them"),
        (["--type", "q4_0", "--dry-run", "--save-imatrix", "b"], "--save-imatrix keeps what --calibrate measures"),
        ([], "--type, --size and --loss each say what the tensors become; give one of them"),
        (["--type", "q4_0", "--size", "70MB"], "give one of them"),
        (["--size", "70MB", "--out", "x"], "--size and --loss measure what each type costs; give --calibrate TEXT"),
        (["--size", "7 apples", "--calibrate", "a", "--out", "x"], "--size is '7 apples'; expected a number of bytes"),
        (["--loss", "nan", "--calibrate", "a", "--out", "x"], "--loss is nan; expected a number of nats above 0"),
        (["--loss", "-1", "--calibrate", "a", "--out", "x"], "--loss is -1.0; expected a number of nats above 0"),
        (["--type", "q4_0", "--dry-run", "--search"], "--search needs to know what the weights are multiplied with"),
    ],
)
def test_wrong_options_are_named(source, arguments, problem, capsys):
    assert main(["quantize", str(source), *arguments]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("wanted", [["--type", "q4_k_m"], ["--size", "70MB"], ["--loss", "0.1"]], ids=" ".join)
def test_what_is_refused_by_its_types_is_refused_before_anything_is_measured(source, wanted, tmp_path, capsys):
    again = tmp_path / "again.gguf"
    quantize_file(source, again, "q8_0")
    text = tmp_path / "text.txt"  # is missing, which would be said first
    arguments = [*wanted, "--calibrate", str(text), "--out", str(tmp_path / "small.gguf")]
    assert main(["quantize", str(again), *arguments]) == 2
    assert "is Q8_0 already" in capsys.readouterr().err


def test_what_exists_is_not_written_over_and_a_missing_folder_is_named(source, capsys):
    other = source.parent / "kept.gguf"
    other.write_text("kept")
    assert main(["quantize", str(source), "--type", "q4_0", "--out", str(other)]) == 2
    assert "which exists; give a new name" in capsys.readouterr().err
    assert other.read_text() == "kept"
    missing = str(source.parent / "missing" / "small.gguf")
    assert main(["quantize", str(source), "--type", "q4_0", "--out", missing]) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.skipif(core is None, reason="the native module is not built")
def test_a_search_loses_less_than_importance_alone(tmp_path):
    checkpoints = pytest.importorskip("tests.models.checkpoints")
    from tests.models.gguf_files import write_gguf

    reference = checkpoints.build(checkpoints.CONFIGS["llama"](), tmp_path / "folder")
    source = write_gguf(reference.module, tmp_path / "model.gguf")
    text, other = (checkpoints.token_ids(512, seed) for seed in (1, 2))
    calibration = Calibration(open_checkpoint(source), text, chunk=128)
    importance = Importance(calibration.importance(), "text")
    options = {"weighed": {}, "searched": {"search": calibration}}
    lost, sizes = {}, {}
    with InferenceEngine(load_model(open_checkpoint(source), dtype="float32")) as exact:
        for name, more in options.items():
            made = quantize_file(source, tmp_path / f"{name}.gguf", "q4_0", importance=importance, **more)
            with InferenceEngine(load_model(open_checkpoint(made.path), dtype="float32")) as small:
                lost[name] = compare(small, exact, cut(other, 128)).divergence
            sizes[name] = made.path.stat().st_size
    assert lost["searched"] < 0.8 * lost["weighed"]
    assert sizes["searched"] == sizes["weighed"]


def test_moments_are_measured_in_groups_that_fit(tmp_path, monkeypatch):
    checkpoints = pytest.importorskip("tests.models.checkpoints")
    from tests.models.gguf_files import write_gguf

    reference = checkpoints.build(checkpoints.CONFIGS["llama"](), tmp_path / "folder")
    source = write_gguf(reference.module, tmp_path / "model.gguf")
    text, runs = checkpoints.token_ids(256), []
    calibration = Calibration(open_checkpoint(source), text, progress=lambda *now: runs.append(now))
    names = [f"blk.{layer}.{part}.weight" for layer in range(3) for part in ("attn_q", "ffn_down")]
    squares = calibration.importance(wanted=names)
    whole = {name: calibration.full_moments(name, names).products for name in names}
    assert len(runs) == 1
    np.testing.assert_allclose(np.diagonal(whole[names[0]][0]), squares[names[0]], rtol=1e-5)
    monkeypatch.setattr("mnemos.compress.calibration.BUDGET", 4 * (64**2 + 88**2))
    calibration = Calibration(open_checkpoint(source), text, progress=lambda *now: runs.append(now))
    for name in names:
        np.testing.assert_array_equal(calibration.full_moments(name, names).products, whole[name])
    assert len(runs) == 1 + 3
    assert calibration.full_moments("blk.2.attn_norm.weight", ["blk.2.attn_norm.weight"]) is None


def test_a_folder_is_written_in_another_floating_point_type(tmp_path, capsys):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.models.checkpoints import CONFIGS, build

    folder, out = tmp_path / "model", tmp_path / "half"
    reference = build(CONFIGS["qwen2"](), folder)
    (folder / "tokenizer.json").write_text("{}")
    assert main(["quantize", str(folder), "--type", "bf16", "--out", str(out)]) == 0
    assert "F32 -> BF16" in capsys.readouterr().out
    assert (out / "tokenizer.json").read_text() == "{}"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert str(model.dtype) == "torch.bfloat16"
    for name, parameter in reference.module.named_parameters():
        assert (model.get_parameter(name) == parameter.bfloat16()).all(), name
    assert sorted(os.listdir(tmp_path)) == ["half", "model"]


@pytest.mark.parametrize(
    "source, type_, problem",
    [
        ("model", "q4_0", "a folder of safetensors holds f32, f16, bf16: give --out a name that ends in .gguf"),
        ("model.gguf", "f16", "is no Hugging Face folder"),
        ("model", "f16", "which exists"),
    ],
)
def test_folders_that_cannot_be_written_are_refused(source, type_, problem, tmp_path, capsys):
    pytest.importorskip("torch")
    from tests.models.checkpoints import CONFIGS, build

    build(CONFIGS["llama"](), tmp_path / "model")
    write(tmp_path / "model.gguf", weights())
    out = tmp_path / ("model" if "exists" in problem else "half")
    assert main(["quantize", str(tmp_path / source), "--type", type_, "--out", str(out)]) == 2
    assert problem in capsys.readouterr().err

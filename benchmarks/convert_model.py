"""Writes a GGUF model in the forms that the peers read, so that all run the same weights.

    PEERS/bin/python benchmarks/convert_model.py MODEL.gguf OUT_DIR

OUT_DIR gets hf (bfloat16, Hugging Face), ct2 (int8, CTranslate2) and ort (int4, ONNX Runtime GenAI).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def write_huggingface(gguf: Path, target: Path) -> None:
    """The weights dequantized, then rounded to bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    plain = type(model)(model.config).to(torch.bfloat16)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any("lm_head" not in name for name in missing):
        raise SystemExit(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    plain.tie_weights()
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def write_ctranslate2(source: Path, target: Path) -> None:
    converter = Path(sys.executable).with_name("ct2-transformers-converter")
    options = ["--model", source, "--output_dir", target, "--quantization", "int8", "--force"]
    subprocess.run([converter, *options], check=True)


def write_onnxruntime(source: Path, target: Path) -> None:
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    options = ["-m", source, "-i", source, "-o", target, "-p", "int4", "-e", "cpu", "-c", target.with_name("cache")]
    subprocess.run([*builder, *options], check=True)


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    gguf, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    write_huggingface(gguf, out / "hf")
    for write, name in ((write_ctranslate2, "ct2"), (write_onnxruntime, "ort")):
        try:
            write(out / "hf", out / name)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name} could not be written, its engine will be missing from the comparison: {error}")


if __name__ == "__main__":
    main()

"""A decoder as a folder that onnxruntime-genai runs as it is: with genai_config.json and the files of the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mnemos.errors import FormatError, UnsupportedError
from mnemos.export.example import Example
from mnemos.export.onnx import ONNXExporter
from mnemos.export.torch_form import TorchForm, WithCache
from mnemos.formats.checkpoint import Checkpoint
from mnemos.text.tokenizer_files import write_tokenizer

CONFIG_NAME = "genai_config.json"


class DecoderExporter(ONNXExporter):
    """Exports a built-in architecture with its cache, and writes beside it what onnxruntime-genai reads.

    Its `export` takes what `cache_example` gives. Files that only a tokenizer needs are left out, with a note, where
    the model has no tokenizer that can be written: onnxruntime-genai then takes token ids.
    """

    def __init__(self, form: TorchForm, checkpoint: Checkpoint, tolerance: float) -> None:
        super().__init__(WithCache(form), tolerance)
        self._form, self._checkpoint = form, checkpoint

    def _write(
        self, made: Path, example: Example, outputs: tuple[str, ...], opset: int, bits: int | None,
        rounded: dict[str, Any],
    ) -> list[str]:  # fmt: skip
        notes = super()._write(made, example, outputs, opset, bits, rounded)
        config = json.dumps(genai_config(self._form, made.name), indent=2)
        (made.parent / CONFIG_NAME).write_text(config + "\n", encoding="utf-8")
        try:
            write_tokenizer(self._checkpoint, made.parent)
        except (FormatError, UnsupportedError) as error:
            notes.append(f"without a tokenizer, so onnxruntime-genai takes token ids: {error}")
        return notes


def genai_config(form: TorchForm, file: str) -> dict[str, Any]:
    """The content of a genai_config.json for a decoder in `file` whose inputs and outputs `cache_example` names."""
    spec = form.spec
    model: dict[str, Any] = {
        "type": "llama",  # the pipeline, which is the same for every decoder: what is computed is in the file
        "vocab_size": spec.vocabulary_size,
        "context_length": spec.context_length,
        "decoder": {
            "filename": file,
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "hidden_size": spec.hidden_size,
            "head_size": form.head_dim,
            "num_attention_heads": form.heads,
            "num_key_value_heads": form.kv_heads,
            "num_hidden_layers": form.layers,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    ends = spec.eos_token_ids
    pad = spec.pad_token_id if spec.pad_token_id is not None else next(iter(ends), None)
    ids = {"bos_token_id": spec.bos_token_id, "eos_token_id": list(ends) or None, "pad_token_id": pad}
    model |= {name: value for name, value in ids.items() if value is not None}
    # The cache grows with the text: sharing one buffer takes an attention operator that only some devices have.
    search = {"do_sample": False, "max_length": spec.context_length, "past_present_share_buffer": False}
    return {"model": model, "search": search}

"""Small decoders with a tokenizer of bytes, and what onnxruntime-genai makes of their exported folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mnemos.formats.gguf import GGUFFile
from mnemos.formats.gguf_writer import RawValue, writing_gguf
from tests.models.checkpoints import CONFIGS, Reference, build

SPECIAL = ("<pad>", "<s>", "</s>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"


def decoder(name: str, folder: Path, **changes: Any) -> Reference:
    """A random model of an architecture of `CONFIGS`, whose tokenizer has a token for each byte."""
    config = CONFIGS[name]()
    config.vocab_size = len(SPECIAL) + len(BYTES)
    for key, value in changes.items():
        setattr(config, key, value)
    reference = build(config, folder)
    made = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *BYTES])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>",'
        f' "chat_template": "{TEMPLATE}"}}'
    )
    return reference


def genai_ids(folder: Path, prompt: list[int], length: int) -> list[int]:
    """What onnxruntime-genai continues a prompt with, greedily, up to a length of all."""
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=length)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def first_layers(source: Path, path: Path, layers: int) -> Path:
    """A GGUF file with the first layers of another one, and all its tokenizer."""
    file = GGUFFile.open(source)
    architecture = file.metadata["general.architecture"]
    stored: dict[str, Any] = {key: RawValue(bytes(value)) for key, value in file.stored_metadata.items()}
    stored[f"{architecture}.block_count"] = np.uint32(layers)
    kept = [name for name in file.tensors if not name.startswith("blk.") or int(name.split(".")[1]) < layers]
    with writing_gguf(path, stored, [(name, file.tensors[name].shape) for name in kept]) as writer:
        for name in kept:
            writer.write(name, file.tensors[name].type, [file.tensors[name].data])
    return path

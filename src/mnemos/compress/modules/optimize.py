"""`optimize`: distills, prunes and quantizes a module, in this order, as a config says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mnemos.compress.modules.batches import listed
from mnemos.compress.modules.distill import distill
from mnemos.compress.modules.distilled_model import ALPHA, TEMPERATURE
from mnemos.compress.modules.layers import check_module
from mnemos.compress.modules.pruned_model import METHOD, RATIO, PrunedModel
from mnemos.compress.modules.quantized_model import QuantizedModel
from mnemos.compress.modules.student import student_of
from mnemos.errors import ConfigError
from mnemos.rules import COUNT, FLAG, Rule, one_of

if TYPE_CHECKING:
    from mnemos.engine.engine import InferenceEngine

BITS = Rule(lambda value: value if value in (4, 8) and not isinstance(value, bool) else None, "8 or 4")
QUANTIZATION = one_of("dynamic", "static")
DEFAULT_STEPS = 200


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """What `optimize` does to a module. Checked when it is made; ConfigError for a value that is not allowed.

    use_kv_cache         whether the engine that `engine` makes keeps keys and values
    quantize             to quantization_bits (8 or 4), by quantization_method: "dynamic" or "static" (calibrated)
    prune                pruning_ratio of the weights or neurons, by pruning_method: "magnitude" or "structured"
    distill              train the module on teacher_model with `temperature` and `alpha`; without a teacher the module
                         is the teacher of a student with half of its parameters
    distillation_steps   how many steps that takes
    """

    use_kv_cache: bool = True
    quantize: bool = False
    quantization_bits: int = 8
    quantization_method: str = "dynamic"
    prune: bool = False
    pruning_ratio: float = 0.3
    pruning_method: str = "magnitude"
    distill: bool = False
    teacher_model: nn.Module | None = None
    temperature: float = 2.0
    alpha: float = 0.5
    distillation_steps: int = DEFAULT_STEPS

    def __post_init__(self) -> None:
        rules = {
            "use_kv_cache": FLAG,
            "quantize": FLAG,
            "quantization_bits": BITS,
            "quantization_method": QUANTIZATION,
            "prune": FLAG,
            "pruning_ratio": RATIO,
            "pruning_method": METHOD,
            "distill": FLAG,
            "temperature": TEMPERATURE,
            "alpha": ALPHA,
            "distillation_steps": COUNT,
        }
        for name, rule in rules.items():
            object.__setattr__(self, name, rule.apply(name, getattr(self, name)))
        if self.teacher_model is not None:
            check_module(self.teacher_model, "teacher_model")

    def engine(self, model: nn.Module, tokenizer: Any = None, **options: Any) -> InferenceEngine:
        """An `InferenceEngine` for what `optimize` returned, with or without a cache as the config says."""
        from mnemos.engine.engine import InferenceEngine

        return InferenceEngine(model, tokenizer, use_kv_cache=self.use_kv_cache, **options)


def optimize(
    model: nn.Module,
    config: OptimizationConfig,
    *,
    batches: Any = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """A smaller, faster copy of a module: distilled, then pruned, then quantized, as far as the config asks for it.

    batches: token ids or (inputs, labels); distillation and static quantization need
    them, and pruning is better with them. progress: called with (stage, done, total) while it distills.

    The copy that is trained here is pruned after the training: train on `PrunedModel` for recovery. Errors: those of
    `student_of`, `distill`, `PrunedModel` and `QuantizedModel`; ConfigError where batches are missing.
    """
    check_module(model)
    if not isinstance(config, OptimizationConfig):
        raise ConfigError(f"config is a {type(config).__name__}; expected an OptimizationConfig")
    given = None if batches is None else listed(batches)
    static = config.quantize and config.quantization_method == "static"
    for name, wanted in (("distill", config.distill), ("quantization_method='static'", static)):
        if wanted and given is None:
            raise ConfigError(f"{name} needs batches of token ids; give batches")
    result = model
    if config.distill and given is not None:
        teacher = model if config.teacher_model is None else config.teacher_model
        result = student_of(model, batches=given) if config.teacher_model is None else copy.deepcopy(model)
        distill(
            result,
            teacher,
            given,
            steps=config.distillation_steps,
            temperature=config.temperature,
            alpha=config.alpha,
            progress=progress,
        )
    if config.prune:
        pruned = PrunedModel(result, config.pruning_ratio, config.pruning_method, batches=given)
        result = pruned.make_permanent()
    if config.quantize:
        quantized = QuantizedModel(result, config.quantization_bits, config.quantization_method)
        if static and given is not None:
            quantized.calibrate(given)
        result = quantized
    return result

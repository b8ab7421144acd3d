"""A config of what to do to a module, and that it is done in the right order."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mnemos.compress.modules.optimize import OptimizationConfig, optimize  # noqa: E402
from mnemos.errors import ConfigError  # noqa: E402
from tests.compress.modules.test_pruned_model import batches, distance  # noqa: E402
from tests.compress.modules.test_structured import IDS, Model, size  # noqa: E402


def test_nothing_asked_for_is_nothing_done() -> None:
    model = Model()
    assert optimize(model, OptimizationConfig()) is model


def test_a_student_of_the_module_is_distilled_and_then_pruned() -> None:
    model, seen = Model(), []
    config = OptimizationConfig(distill=True, distillation_steps=5, prune=True, pruning_ratio=0.25)
    small = optimize(model, config, batches=batches(), progress=lambda *step: seen.append(step))
    assert seen[-1] == ("distilling", 5, 5) and size(small) == pytest.approx(0.5 * size(model), rel=0.15)
    weights = small.head.weight
    assert (weights == 0).float().mean() == pytest.approx(0.25, abs=0.01)  # zeros that no training has filled again
    with config.engine(small) as engine:
        assert len(engine.generate([1, 2, 3], max_new_tokens=4)) == 7


def test_a_teacher_of_its_own_teaches_a_copy_of_the_module() -> None:
    model, teacher = Model(), Model()
    with torch.no_grad():
        teacher.head.weight.add_(0.3 * torch.randn_like(teacher.head.weight))
    config = OptimizationConfig(distill=True, teacher_model=teacher, alpha=1.0, distillation_steps=20)
    taught = optimize(model, config, batches=batches())
    assert distance(taught, teacher, IDS) < distance(model, teacher, IDS) and taught is not model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization_bits": 3}, "quantization_bits is 3; it must be 8 or 4"),
        ({"quantization_method": "fast"}, "quantization_method is 'fast'"),
        ({"pruning_ratio": 1}, "pruning_ratio is 1; it must be a number above 0 and below 1"),
        ({"pruning_method": "l1"}, "pruning_method is 'l1'"),
        ({"prune": 1}, "prune is 1; it must be True or False"),
        ({"teacher_model": "big"}, "teacher_model is a str"),
        ({"temperature": -1}, "temperature is -1"),
        ({"distill": True}, "distill needs batches"),
        ({"quantize": True, "quantization_method": "static"}, "quantization_method='static' needs batches"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        optimize(Model(), OptimizationConfig(**options))
    assert message in str(caught.value)

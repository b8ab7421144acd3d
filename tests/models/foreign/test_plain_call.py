"""Calls of modules whose forwards are written in several ways."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import Tensor, nn  # noqa: E402

from mnemos.models.foreign.plain_call import plain_call  # noqa: E402

ONE, TWO, THREE = (torch.tensor([value]) for value in (1, 2, 3))


class Positional(nn.Module):
    def forward(self, ids: Tensor, /, scale: Any = None, use_cache: bool = True) -> Any:
        return ids, scale, use_cache


class ByKeyword(nn.Module):
    def forward(self, *, mask: Any = None, input_ids: Tensor) -> Any:
        return input_ids, mask


class Several(nn.Module):
    def forward(self, ids: Tensor, *more: Tensor) -> Any:
        return ids, *more


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize(
    ("module", "inputs", "expected"),
    [
        (Positional(), ONE, (ONE, None, False)),
        (Positional(), {"ids": ONE, "scale": TWO}, (ONE, TWO, False)),
        (Positional(), {"ids": ONE, "use_cache": True}, (ONE, None, True)),
        (ByKeyword(), ONE, (ONE, None)),
        (ByKeyword(), {"input_ids": ONE, "mask": TWO}, (ONE, TWO)),
        (Several(), {"ids": ONE, "past.0": TWO, "past.1": THREE}, (ONE, TWO, THREE)),
        (Wrapped(Positional()), {"ids": ONE}, (ONE, None, False)),
    ],
)
def test_every_way_gets_what_it_takes(module: nn.Module, inputs: Any, expected: Any) -> None:
    assert plain_call(module, inputs) == expected


def test_a_name_that_forward_lacks_is_python_s_own_error() -> None:
    with pytest.raises(TypeError, match="scales"):
        plain_call(Positional(), {"ids": ONE, "scales": TWO})

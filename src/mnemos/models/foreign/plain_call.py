"""One call of a module as its own code would make it: all that it is given, no cache, nothing read from the answer."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import Parameter
from typing import Any

from torch import Tensor, nn

from mnemos.models.foreign.signature import CACHE_FLAGS, parameters_of


def plain_call(module: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Any:
    """The module's answer to a tensor of token ids, or to a mapping by the names of forward's parameters.

    A flag that asks for a cache is off unless it is given. Names that forward does not have are passed on as keywords
    if it takes any, else in their order. Errors are the module's own.
    """
    parameters = parameters_of(module).values()
    named = [one.name for one in parameters if one.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)]
    kinds = {one.name: one.kind for one in parameters}
    in_order = Parameter.VAR_POSITIONAL in kinds.values() and Parameter.VAR_KEYWORD not in kinds.values()
    if isinstance(inputs, Tensor):
        inputs = {"input_ids" if "input_ids" in named or not named else named[0]: inputs}
    given = dict(inputs)
    more = [name for name in given if name not in named]
    positional = []
    for name in named:  # by position as far as they follow one another
        if name not in given or kinds[name] is Parameter.KEYWORD_ONLY:
            break
        positional.append(given.pop(name))
    if in_order and list(given) == more:
        positional += [given.pop(name) for name in more]
    flag = next((name for name in CACHE_FLAGS if name in named), None)
    if flag is not None and flag not in inputs:
        given[flag] = False
    return module(*positional, **given)

"""nn.LSTM, nn.GRU and nn.RNN as a scan over time, which a program of torch.export can hold for any length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mnemos.export.forwards import parts_of, replaced

State = tuple[Tensor, ...]  # (h,) or (h, c), each (batch, size)


def is_recurrent(module: nn.Module) -> bool:
    """Whether some part is a recurrent layer, which torch.export itself unrolls for one length."""
    return bool(parts_of(module, nn.RNNBase))


@contextmanager
def scanned(module: nn.Module) -> Iterator[None]:
    """Inside, the module's recurrent layers are scans; afterwards as before. Packed sequences are not taken."""
    with replaced({layer: partial(_forward, layer) for layer in parts_of(module, nn.RNNBase)}):
        yield


def _forward(layer: nn.RNNBase, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """What the layer's own forward returns: all outputs, and the last states, as its documentation has them."""
    batched = x.dim() == 3
    x = x if batched else x.unsqueeze(0 if layer.batch_first else 1)
    x = x.transpose(0, 1) if layer.batch_first else x  # (time, batch, size)
    given = None if hx is None else tuple(hx) if layer.mode == "LSTM" else (hx,)
    if given is not None and not batched:
        given = tuple(state.unsqueeze(1) for state in given)
    ways = 2 if layer.bidirectional else 1
    last: list[State] = []
    for depth in range(layer.num_layers):
        outputs = []
        for way in range(ways):
            begun = _zeros(layer, x) if given is None else tuple(state[depth * ways + way] for state in given)
            after, found = _scan(layer, x.flip(0) if way else x, begun, f"_l{depth}{'_reverse' if way else ''}")
            outputs.append(found.flip(0) if way else found)
            last.append(after)
        x = torch.cat(outputs, -1) if ways == 2 else outputs[0]
    states = [torch.stack(each) for each in zip(*last, strict=True)]
    x = x.transpose(0, 1) if layer.batch_first else x
    if not batched:
        x, states = x.squeeze(0 if layer.batch_first else 1), [state.squeeze(1) for state in states]
    return x, (tuple(states) if layer.mode == "LSTM" else states[0])


def _zeros(layer: nn.RNNBase, x: Tensor) -> State:
    sizes = [layer.proj_size or layer.hidden_size] + [layer.hidden_size] * (layer.mode == "LSTM")
    return tuple(torch.zeros(x.shape[1], size, dtype=x.dtype, device=x.device) for size in sizes)


def _scan(layer: nn.RNNBase, x: Tensor, begun: State, suffix: str) -> tuple[State, Tensor]:
    """One layer in one direction: the last states, and the outputs (time, batch, size)."""
    from torch._higher_order_ops.scan import scan

    def own(name: str) -> Tensor | None:
        return getattr(layer, name + suffix, None)

    gates = functional.linear(x, getattr(layer, "weight_ih" + suffix), own("bias_ih"))
    step = partial(_STEPS[layer.mode], getattr(layer, "weight_hh" + suffix), own("bias_hh"), own("weight_hr"))

    def combine(states: State, gate: Tensor) -> tuple[State, Tensor]:
        after = step(states, gate)
        return after, after[0].clone()  # a scan's results may not share memory

    after, outputs = scan(combine, begun, gates, dim=0)
    return after, outputs


def _lstm(weight: Tensor, bias: Tensor | None, projection: Tensor | None, states: State, gate: Tensor) -> State:
    h, c = states
    into, forget, new, out = (gate + functional.linear(h, weight, bias)).chunk(4, -1)
    c = forget.sigmoid() * c + into.sigmoid() * new.tanh()
    h = out.sigmoid() * c.tanh()
    return (h if projection is None else functional.linear(h, projection)), c


def _gru(weight: Tensor, bias: Tensor | None, _: Tensor | None, states: State, gate: Tensor) -> State:
    (h,) = states
    reset, update, new = functional.linear(h, weight, bias).chunk(3, -1)
    reset_in, update_in, new_in = gate.chunk(3, -1)
    update = (update_in + update).sigmoid()
    new = (new_in + (reset_in + reset).sigmoid() * new).tanh()
    return (new + update * (h - new),)


def _plain(
    activation: Callable[[Tensor], Tensor],
    weight: Tensor, bias: Tensor | None, _: Tensor | None, states: State, gate: Tensor,
) -> State:  # fmt: skip
    return (activation(gate + functional.linear(states[0], weight, bias)),)


_STEPS: dict[str, Callable[..., State]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": partial(_plain, torch.tanh),
    "RNN_RELU": partial(_plain, torch.relu),
}

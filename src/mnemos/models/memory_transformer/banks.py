"""Memory banks as modules: matrices of learned vectors, whole, factorized, or quantized."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemos.formats.quantized_rows import QuantizedRows
from mnemos.models.memory_transformer.config import Config


class MemoryBank(nn.Module):
    """N learned vectors, a parameter `memory` (N, width)."""

    def __init__(self, tokens: int, width: int, init_std: float) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(tokens, width) * init_std)

    def forward(self) -> Tensor:
        """The matrix (N, width)."""
        return self.memory


class FactorizedBank(nn.Module):
    """A (N, rank) times B (width, rank) transposed."""

    def __init__(self, tokens: int, width: int, rank: int, init_std: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.randn(tokens, rank) * init_std)
        self.B = nn.Parameter(torch.randn(width, rank) * rank**-0.5)

    def forward(self) -> Tensor:
        """The matrix (N, width)."""
        return self.A @ self.B.T


class QuantizedBank(nn.Module):
    """A bank in 8 or 4 bits with a scale for each vector; see `mnemos.formats.quantized_rows`. It cannot be trained."""

    def __init__(self, tokens: int, width: int, bits: int) -> None:
        super().__init__()
        self.bits = bits
        columns = width // 2 if bits == 4 else width
        self.register_buffer("quantized_memory", torch.zeros(tokens, columns, dtype=torch.int8))
        self.register_buffer("scales", torch.zeros(tokens))
        self.quantized_memory: Tensor
        self.scales: Tensor

    @classmethod
    def of(cls, memory: Tensor, bits: int) -> QuantizedBank:
        """The quantized form of a matrix. ConfigError: bits other than 4 and 8, an odd width at 4 bits."""
        rows = QuantizedRows.of(memory.detach().float().cpu().numpy(), bits)
        bank = cls(memory.shape[0], memory.shape[1], bits)
        bank.quantized_memory, bank.scales = torch.from_numpy(rows.codes), torch.from_numpy(rows.scales)
        return bank.to(memory.device)

    def forward(self) -> Tensor:
        """The matrix (N, width) that the codes stand for, in the type of the scales."""
        codes = self.quantized_memory
        if self.bits == 4:
            codes = torch.stack((codes << 4 >> 4, codes >> 4), dim=-1).flatten(1)
        return codes.to(self.scales.dtype) * self.scales[:, None]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves and converts as usual, but leaves the scales in float32: halving them would move every value."""
        scales = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scales = scales.to(self.scales.device)
        return self

    def rows(self) -> QuantizedRows:
        """Codes and scales as arrays."""
        return QuantizedRows(self.quantized_memory.cpu().numpy(), np.asarray(self.scales.cpu()), self.bits)


class ChapteredBank(nn.Module):
    """A bank whose vectors form chapters of equal length, one after the other."""

    def __init__(self, base_bank: nn.Module, chapters: int) -> None:
        super().__init__()
        self.base_bank = base_bank
        self.chapters = chapters

    def forward(self) -> Tensor:
        """The matrix (N, width)."""
        matrix: Tensor = self.base_bank()
        return matrix


def make_bank(config: Config, hidden: int) -> nn.Module:
    """One bank of the kind that the config names, for a model with this hidden size."""
    memory, width = config.memory, config.bank_width(hidden)
    tokens, std = memory.num_memory_tokens, memory.memory_init_std
    bank: nn.Module
    if memory.is_factorized:
        bank = FactorizedBank(tokens, width, memory.memory_rank, std)
    else:
        bank = MemoryBank(tokens, width, std)
    return ChapteredBank(bank, memory.num_chapters) if memory.use_chapters else bank


def quantize_banks(banks: nn.ModuleList, bits: int) -> None:
    """Replaces every bank by its quantized form, inside chapters too; quantized ones are left alone."""
    for number, bank in enumerate(banks):
        inner = bank.base_bank if isinstance(bank, ChapteredBank) else bank
        if isinstance(inner, QuantizedBank):
            continue
        quantized = QuantizedBank.of(inner(), bits)
        if isinstance(bank, ChapteredBank):
            bank.base_bank = quantized
        else:
            banks[number] = quantized


def adopt_quantized(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook before a state dict is loaded: banks that it holds in quantized form become quantized here."""
    banks = module.memory_banks
    assert isinstance(banks, nn.ModuleList)
    for number, bank in enumerate(banks):
        inner = bank.base_bank if isinstance(bank, ChapteredBank) else bank
        name = f"{prefix}memory_banks.{number}." + ("base_bank." if isinstance(bank, ChapteredBank) else "")
        codes = state_dict.get(name + "quantized_memory")
        if codes is None or isinstance(inner, QuantizedBank):
            continue
        tokens, width = inner().shape
        quantized = QuantizedBank(tokens, width, 8 if codes.shape[-1] == width else 4)
        if isinstance(bank, ChapteredBank):
            bank.base_bank = quantized
        else:
            banks[number] = quantized

"""`MemoryAdapter`: a pretrained Hugging Face model, after some of whose layers memory is read."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from mnemos.errors import ConfigError
from mnemos.formats.memory_checkpoint import base_folder
from mnemos.models.memory_transformer.attention import MemoryAttention
from mnemos.models.memory_transformer.banks import adopt_quantized, make_bank, quantize_banks
from mnemos.models.memory_transformer.config import Config
from mnemos.models.memory_transformer.lora import apply_lora, merge_lora, unmerge_lora
from mnemos.models.memory_transformer.output import MemoryOutput
from mnemos.models.memory_transformer.reading import MemoryCall, make_routers, router_of, total_loss

EPSILON = 1e-6  # of the norm before memory, whatever the config's norm_eps
PRECISIONS = {"bf16": "bfloat16", "fp16": "float16"}


class MemoryBlock(nn.Module):
    """memory_attn(memory_layernorm(h)): what is added to a layer's output."""

    def __init__(self, config: Config, hidden: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.memory_layernorm = nn.RMSNorm(hidden, eps=EPSILON)
        self.memory_attn = MemoryAttention(config, hidden, *shape)


class MemoryAdapter(nn.Module):
    """A base model with memory after its layers, and with LoRA, as the `Config` says.

    base_model: a transformers module; None loads the config's `base_model_name`, a folder (also beside the config's) or
    a name on the Hugging Face hub, in the type of `mixed_precision`. Memory is computed in the type of its own
    parameters, float32 at first. State dicts are those of the published checkpoints: `base_model.*`, `memory_banks.*`,
    `memory_adapters.*`, `routers.*`; `load_state_dict(..., strict=False)` takes one without the base.
    """

    def __init__(self, config: Config, base_model: nn.Module | None = None) -> None:
        super().__init__()
        config.check()
        memory = config.memory
        self.base_model = base_model if base_model is not None else _load_base(config)
        base: Any = getattr(self.base_model, "config", None)
        if base is None or not hasattr(base, "num_attention_heads"):
            raise ConfigError(f"base_model is a {type(self.base_model).__name__}; expected a model of transformers")
        hidden, kv_heads = base.hidden_size, getattr(base, "num_key_value_heads", None)
        config.model.num_layers = base.num_hidden_layers
        self.config = config
        if config.model.freeze_base_model:
            self.base_model.requires_grad_(False)
        if memory.uses_lora:
            paths = apply_lora(
                self.base_model, memory.lora_targets, memory.lora_rank, memory.lora_alpha, memory.lora_dropout
            )
            if not paths:
                raise ConfigError(f"memory.lora_targets is {memory.lora_targets}; no linear layer has such a name")
        self.bank_of_layer, banks = memory.banks(base.num_hidden_layers)
        shape = config.attention_shape(base.num_attention_heads, kv_heads, hidden) if banks else (1, 1, hidden)
        self.memory_banks = nn.ModuleList(make_bank(config, hidden) for _ in range(banks))
        self.memory_adapters = nn.ModuleDict({str(i): MemoryBlock(config, hidden, shape) for i in self.bank_of_layer})
        self.routers = make_routers(memory, hidden, self.bank_of_layer)
        self._initialize()
        self.register_load_state_dict_pre_hook(adopt_quantized)  # type: ignore[no-untyped-call]
        # transformers 5 calls it `cache`.
        named = "past_key_values" in signature(self.base_model.forward).parameters
        self._past = "past_key_values" if named else "cache"
        self._call: MemoryCall | None = None
        self._hidden: Tensor | None = None
        layers = decoder_layers(self.base_model, base.num_hidden_layers)
        for number in self.bank_of_layer:
            # No closure: a copy of the adapter has hooks of its own, as copies of bound methods belong to the copy.
            layers[number].register_forward_hook(partial(self._read, number))

    def _initialize(self) -> None:
        for part in (self.memory_adapters, self.routers):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=self.config.model.initializer_range)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        if self.config.memory.wo_init_zero:
            for module in self.memory_adapters.modules():
                if isinstance(module, MemoryAttention):
                    nn.init.zeros_(module.last.weight)

    def quantize_memory(self, bits: int) -> None:
        """Replaces the banks by ones of 8 or 4 bits, which cannot be trained."""
        quantize_banks(self.memory_banks, bits)

    def merge_lora(self) -> None:
        """Merges the low-rank additions into the base model's weights; its state dict then has no factors."""
        merge_lora(self.base_model)

    def unmerge_lora(self) -> None:
        """Takes them out of the weights again."""
        unmerge_lora(self.base_model)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        position_offset: int | None = None,
    ) -> MemoryOutput:
        """Logits of input_ids (B, T). The arguments are transformers'; positions are the base model's business.

        position_offset has no effect. labels (B, T): the loss too, with the routers' in training. The windows of
        rolling and hybrid routers are kept with `past_key_values`.
        """
        windows = None if past_key_values is None else getattr(past_key_values, "memory_windows", {})
        self._call = call = MemoryCall(self.config.memory, self.training, use_cache, windows, attention_mask)
        head: Any = self.base_model.get_output_embeddings()  # type: ignore[operator]  # it may have been quantized
        watch = head.register_forward_pre_hook(self._keep_hidden)
        try:
            out = self.base_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{self._past: past_key_values},
            )
            hidden = self._hidden
        finally:
            watch.remove()
            self._call = self._hidden = None
        past = getattr(out, self._past, None) if use_cache else None
        if past is not None:
            past.memory_windows = call.kept
        return MemoryOutput(
            loss=None if labels is None else total_loss(out.logits, labels, call),
            logits=out.logits,
            past_key_values=past,
            hidden=hidden,
            routes=call.routes or None,
        )

    def _read(self, layer: int, module: nn.Module, arguments: Any, output: Any) -> Any:
        """A hook that adds what is read from memory to a layer's output; without a call of the adapter, nothing."""
        call = self._call
        if call is None:
            return output
        states = output[0] if isinstance(output, tuple) else output
        block = self.memory_adapters[str(layer)]
        assert isinstance(block, MemoryBlock)
        x = states.to(block.memory_layernorm.weight.dtype)
        bank, router = self.memory_banks[self.bank_of_layer[layer]], router_of(self.routers, layer)
        added = states + call.read(layer, block.memory_attn, bank, router, block.memory_layernorm(x), x).to(states)
        return (added, *output[1:]) if isinstance(output, tuple) else added

    def _keep_hidden(self, module: nn.Module, arguments: Any) -> None:
        self._hidden = arguments[0]


def decoder_layers(base: nn.Module, count: int) -> nn.ModuleList:
    """The module's list of `count` layers. ConfigError if it has none."""
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(f"base_model is a {type(base).__name__}, which has no list of {count} layers to add memory to")


def _load_base(config: Config) -> nn.Module:
    name = config.model.base_model_name
    if name is None:
        raise ConfigError(
            "model.base_model_name is null; an adapter needs a base model: give one, or use MemoryTransformer"
        )
    from mnemos.models.foreign.pretrained import load_module

    dtype = PRECISIONS.get(config.mixed_precision, "float32")
    folder = base_folder(name, None if config.path is None else config.path.parent)
    return load_module(folder, dtype=dtype, device="cpu", trust_remote_code=False)

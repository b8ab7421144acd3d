"""From an open checkpoint to a running model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.contract import Batch, Cache, KVLayout, ModelSpec, Output, SpillingCache
from mnemos.errors import ConfigError, FormatError, MissingDependencyError
from mnemos.formats.checkpoint import Checkpoint
from mnemos.formats.strict_json import parse_json_object
from mnemos.machine.memory import check_memory
from mnemos.models.blocks import Architecture
from mnemos.models.fields import Fields, gguf_fields
from mnemos.models.fingerprint import fingerprint_of
from mnemos.models.registry import find_architecture, is_known
from mnemos.models.rope import Rope
from mnemos.models.weights import Weights
from mnemos.ops.backends import get_ops
from mnemos.ops.protocol import Ops
from mnemos.rules import DTYPE, KV_DTYPE

if TYPE_CHECKING:
    from mnemos.formats.adapters import Adapter
    from mnemos.models.config import DecoderConfig
    from mnemos.models.foreign.encoder_decoder import EncoderDecoderModel
    from mnemos.models.foreign.model import ForeignModel
    from mnemos.models.low_rank import Adapters
    from mnemos.models.memory_transformer.model import MemoryModel
    from mnemos.models.memory_transformer.reader import Routing
    from mnemos.ops.protocol import Windows

MOST_EARLY_STEPS = 4
RECALLING = ("native", "numpy")  # backends whose attention obeys a layout's `recall`
OWN_FORM_KEY = "mnemos.checkpoint"  # of GGUF files with tensors under Mnemos' own names: what the checkpoint says


class LoadedModel:
    """A built-in architecture with its weights, on one backend."""

    def __init__(self, architecture: Architecture, spec: ModelSpec, ops: Ops, weight_bytes: int = 0) -> None:
        self.architecture = architecture
        self.spec = spec
        self.ops = ops
        self.weight_bytes = weight_bytes  # of memory; 0 if the backend does not know before it has read them
        self.spill_folder: Path | None = None  # where pages that left memory are stored; None: they stay
        self._cache: Cache | None = None
        self._step: Callable[[Batch], Output] | None = None
        self._early_steps: dict[tuple[int, ...], Callable[[Batch], Output]] = {}

    @property
    def cache(self) -> Cache:
        """The pages that `reserve` made room for."""
        if self._cache is None:
            raise ConfigError("the model has no cache yet; call reserve(pages) first")
        return self._cache

    @property
    def device(self) -> str:
        """The device that it computes on: "cpu", or a PyTorch device."""
        return str(getattr(self.ops, "device", "cpu"))

    def reserve_states(self, slots: int) -> None:
        """See `StatefulModel`, as for the next two: states are the windows of routers."""
        self._windows.reserve(slots)

    def copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Forks sequences."""
        self._windows.copy(sources, targets)

    def clear_states(self, slots: Sequence[int]) -> None:
        """Forgets sequences."""
        self._windows.clear(slots)

    @property
    def _windows(self) -> Windows:
        routing = _routing(self.architecture)
        windows = None if routing is None else routing.windows
        if windows is None:
            raise ConfigError(f"{self.spec.architecture} keeps no states")
        return windows

    @property
    def threads(self) -> int | None:
        """See `ThreadedModel`."""
        return getattr(self.ops, "threads", None)

    def limit_threads(self, threads: int) -> None:
        """See `ThreadedModel`."""
        if self.threads is not None:
            self.ops.limit_threads(threads)  # type: ignore[attr-defined]  # what has threads can limit them

    def finish(self) -> None:
        """Reads the weights now, if the backend would otherwise wait until `reserve`; another thread may call it."""
        self.ops.finish()

    def reserve(self, pages: int | Sequence[int]) -> None:
        """Makes room for this many cache pages of each layer group; called once, before the first forward."""
        counts = self.spec.layout.counts(pages)
        if min(counts) < 1:
            raise ConfigError(f"pages is {pages}; expected at least 1")
        self._cache = self.ops.cache(self.spec.layout, counts)
        if self.spill_folder is not None and isinstance(self._cache, SpillingCache):
            self._cache.spill(self.spill_folder)
        self._step = self.ops.compile(self.architecture.forward, self._cache)

    def forward(self, batch: Batch) -> Output:
        """One step; the output's arrays are views that the next step overwrites."""
        if self._step is None:
            raise ConfigError("the model has no cache yet; call reserve(pages) first")
        return self._early_step(batch.early_layers)(batch) if batch.early_layers else self._step(batch)

    def _early_step(self, layers: tuple[int, ...]) -> Callable[[Batch], Output]:
        """The step with the logits of these layers' inputs; the latest MOST_EARLY_STEPS are kept."""
        step = self._early_steps.pop(layers, None)
        if step is None:
            from mnemos.models.early_exits import EarlyExits

            step = self.ops.compile(EarlyExits(self.architecture, layers), self._cache)
        self._early_steps[layers] = step
        if len(self._early_steps) > MOST_EARLY_STEPS:
            del self._early_steps[next(iter(self._early_steps))]
        return step


def load_model(
    checkpoint: Checkpoint,
    *,
    backend: str = "auto",
    dtype: str = "auto",
    kv_dtype: str = "auto",
    context_length: int | None = None,
    threads: int | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> LoadedModel:
    """The model of an open checkpoint, fully checked before anything is allocated.

    dtype: "auto" keeps weights as stored, "float32" expands them; "bfloat16" and "float16" are for PyTorch. kv_dtype:
    "auto" is float32 with float32 weights, else whichever of float16 and bfloat16 is faster with the backend on this
    machine. context_length: a shorter context than the model's own, or a longer one if its rotary embedding can be
    stretched (see mnemos.models.rope). threads: None uses all cores that the process may use. adapters: by the names
    that `ModelSpec.adapters` then has, for batches whose sequences choose one (see mnemos.models.low_rank).
    Errors: FormatError, UnsupportedError, ConfigError.
    """
    return load_model_on(
        lambda: get_ops(backend, dtype=dtype, threads=threads),
        checkpoint,
        dtype=dtype,
        kv_dtype=kv_dtype,
        context_length=context_length,
        adapters=adapters,
    )


def load_model_on(
    make_ops: Callable[[], Ops],
    checkpoint: Checkpoint,
    *,
    dtype: str,
    kv_dtype: str = "auto",
    context_length: int | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> LoadedModel:
    """As `load_model`, on operators of the caller's own, which are made after the checkpoint has been checked."""
    _check_dtypes(dtype, kv_dtype)
    architecture, fields = describe_architecture(checkpoint, context_length)
    added = _adapters(adapters)
    checked = _build(architecture, fields, checkpoint, None, added)
    ops = make_ops()
    needed = _check_memory(checkpoint, ops, dtype)
    kv_dtype = ops.cache_dtype if kv_dtype == "auto" and dtype != "float32" else kv_dtype
    # Before the weights are read: a backend releases a mapped file's pages as it goes, and this touches many.
    spec = _specify(checkpoint, checked, ops.name, dtype, kv_dtype)
    if added is None:
        return LoadedModel(_build(architecture, fields, checkpoint, ops), spec, ops, needed)
    from mnemos.models.low_rank import AdaptedOps

    spec = replace(spec, adapters=added.names, fingerprint=f"{spec.fingerprint}+{added.fingerprint}")
    ops = AdaptedOps(ops).as_ops()
    return LoadedModel(_build(architecture, fields, checkpoint, ops, added), spec, ops, needed)


def _adapters(adapters: Mapping[str, Adapter] | None) -> Adapters | None:
    if not adapters:
        return None
    from mnemos.models.low_rank import Adapters  # imported where there are any: few processes need it

    return Adapters(adapters)


def describe_model(
    checkpoint: Checkpoint, *, dtype: str = "auto", kv_dtype: str = "auto", context_length: int | None = None
) -> ModelSpec:
    """The description of the model that `load_model` would load, with the same checks; nothing is loaded."""
    _check_dtypes(dtype, kv_dtype)
    architecture, fields = describe_architecture(checkpoint, context_length)
    checked = _build(architecture, fields, checkpoint, None)
    return _specify(checkpoint, checked, "", dtype, kv_dtype)


def open_architecture(checkpoint: Checkpoint) -> Architecture:
    """The checkpoint's architecture with all of `load_model`'s checks, and without weights."""
    architecture, fields = describe_architecture(checkpoint)
    return _build(architecture, fields, checkpoint, None)


def is_built_in(checkpoint: Checkpoint) -> bool:
    """Whether `load_model` supports the checkpoint's architecture. FormatError if it names none."""
    return any(is_known(name) for name in architecture_names(checkpoint))


def _check_dtypes(dtype: str, kv_dtype: str) -> None:
    DTYPE.apply("dtype", dtype)
    KV_DTYPE.apply("kv_dtype", kv_dtype)


def _specify(checkpoint: Checkpoint, model: Architecture, backend: str, dtype: str, kv_dtype: str) -> ModelSpec:
    if kv_dtype == "auto":
        kv_dtype = "float32" if dtype == "float32" else "float16"
    config = model.config
    rope = getattr(config, "rope", None)  # a method of memory transformers' configs
    windows = tuple(window if window < config.context_length else 0 for window in config.windows)
    layout = KVLayout(
        config.num_hidden_layers,
        config.num_key_value_heads,
        config.head_dim,
        dtype=kv_dtype,
        windows=windows if any(windows) else (),
    )
    return ModelSpec(
        architecture=type(model).__module__.rpartition(".")[2],
        vocabulary_size=config.vocab_size,
        context_length=config.context_length,
        hidden_size=config.hidden_size,
        layout=layout,
        position_limit=config.position_limit,
        parameters=sum(tensor.size for tensor in checkpoint.tensors.values()),
        fingerprint=fingerprint_of(checkpoint, config, (backend, dtype, kv_dtype)),
        recalls=backend in RECALLING and _routing(model) is None,
        layers=config.num_hidden_layers,
        tied_embeddings=_is_tied(checkpoint, config),
        slow_components=rope.slowest(config.head_dim) if isinstance(rope, Rope) else (),
        details=_details(checkpoint),
        **_special_tokens(checkpoint, config.vocab_size),
        **({} if (routing := _routing(model)) is None else routing.promises),
    )


def _routing(model: Architecture) -> Routing | None:
    """How the model's chapter routers go with the engine; None if it has none."""
    return getattr(model, "routing", None)


def _is_tied(checkpoint: Checkpoint, config: DecoderConfig) -> bool:
    """Whether the output projection is the embedding: in GGUF, if there is no other."""
    if has_huggingface_names(checkpoint):
        return config.tie_word_embeddings
    return "output.weight" not in checkpoint.tensors


def _own_form(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What the checkpoint says that a GGUF file for Mnemos alone was made of; None for any other."""
    content = checkpoint.metadata.get(OWN_FORM_KEY) if checkpoint.kind == "gguf" else None
    return None if content is None else parse_json_object(str(content).encode(), f"{checkpoint.path}: {OWN_FORM_KEY}")


def architecture_names(checkpoint: Checkpoint) -> list[str]:
    """The file's names for its architecture, the most specific first."""
    own = _own_form(checkpoint)
    metadata = checkpoint.metadata if own is None else own
    if checkpoint.kind == "gguf" and own is None:
        name = metadata.get("general.architecture")
        # Mixtral's files call themselves llama.
        names = ["mixtral" if name == "llama" and metadata.get("llama.expert_count") else name]
    else:
        classes = metadata.get("architectures")
        names = [*(classes if isinstance(classes, (list, tuple)) else [classes])[:1], metadata.get("model_type")]
    found = [name for name in names if isinstance(name, str) and name]
    if not found:
        field = "general.architecture" if checkpoint.kind == "gguf" else "architectures or model_type"
        raise FormatError(f"{checkpoint.path}: field {field} is absent; expected the architecture's name")
    return found


def describe_architecture(checkpoint: Checkpoint, context_length: int | None = None) -> tuple[type[Any], Fields]:
    """The architecture's class and its hyperparameters."""
    names = architecture_names(checkpoint)
    architecture = find_architecture(names, checkpoint.path)
    own = _own_form(checkpoint)
    if own is not None:
        return architecture, Fields(checkpoint.path, own, context_length=context_length)
    if checkpoint.kind != "gguf":
        nested = checkpoint.metadata.get("text_config")
        values = {**checkpoint.metadata, **nested} if isinstance(nested, Mapping) else checkpoint.metadata
        return architecture, Fields(checkpoint.path, values, context_length=context_length)
    tensors = checkpoint.tensors
    return architecture, gguf_fields(checkpoint.path, checkpoint.metadata, tensors, context_length)


def has_huggingface_names(checkpoint: Checkpoint) -> bool:
    """Whether tensors have names and orders as in a Hugging Face checkpoint."""
    return checkpoint.kind != "gguf" or OWN_FORM_KEY in checkpoint.metadata


def _build(
    architecture: type[Any],
    fields: Fields,
    checkpoint: Checkpoint,
    ops: Ops | None,
    adapters: Adapters | None = None,
) -> Architecture:
    """The architecture with its weights; with `ops` None, everything is checked and nothing allocated."""
    names = None if has_huggingface_names(checkpoint) else architecture.gguf_names
    if adapters is None:
        weights = Weights(checkpoint.path, checkpoint.tensors, ops, names)
    else:
        from mnemos.models.low_rank import AdaptedWeights

        weights = AdaptedWeights(checkpoint.path, checkpoint.tensors, ops, names, adapters)
    model: Architecture = architecture(fields, weights)
    weights.finish(model.ignored)
    return model


def _check_memory(checkpoint: Checkpoint, ops: Ops, dtype: str) -> int:
    """The bytes that the weights take, 0 if unknown; CapacityError, with what is missing, if there are not as many."""
    needed = ops.weight_memory(checkpoint.tensors.values())
    if needed is not None:
        check_memory(needed, f"{checkpoint.path} as {dtype}")
    return needed or 0


def _special_tokens(checkpoint: Checkpoint, vocabulary_size: int) -> dict[str, Any]:
    """Ids that end, begin and pad a text. Ids outside the vocabulary cannot occur and are left out."""
    if checkpoint.kind == "gguf":
        key = "tokenizer.ggml.{}_token_id"
        ends = [checkpoint.metadata.get(key.format(name)) for name in ("eos", "eot", "eom")]
        begin, pad = checkpoint.metadata.get(key.format("bos")), checkpoint.metadata.get(key.format("padding"))
    else:
        config = {**checkpoint.metadata, **checkpoint.generation_config}
        eos = config.get("eos_token_id")
        ends = list(eos) if isinstance(eos, (list, tuple)) else [eos]
        begin, pad = config.get("bos_token_id"), config.get("pad_token_id")
    known = range(vocabulary_size)
    return {
        "eos_token_ids": tuple(dict.fromkeys(e for e in ends if type(e) is int and e in known)),
        "bos_token_id": begin if type(begin) is int and begin in known else None,
        "pad_token_id": pad if type(pad) is int and pad in known else None,
    }


def _details(checkpoint: Checkpoint) -> dict[str, object]:
    """Details that `inspect` shows in addition to the specification."""
    metadata = checkpoint.metadata
    return {
        "name": metadata.get("general.name") or metadata.get("_name_or_path") or Path(checkpoint.path).name,
        "license": metadata.get("general.license") or metadata.get("license"),
    }


def adapt(module: Any, **options: Any) -> ForeignModel | EncoderDecoderModel | MemoryModel:
    """A `Model` around an nn.Module; for the options, see `mnemos.models.foreign.adapt.adapt`.

    PyTorch is imported here, and only for such a module.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("running an nn.Module needs PyTorch: pip install 'mnemos[torch]'") from error
    from concurrent.futures import ThreadPoolExecutor

    from mnemos.models.foreign.adapt import adapt as adapt_module

    # OpenMP keeps worker threads for every thread that ever used it, and if there are more of them than cores, each
    # operator waits for its workers to wake up. So the module is probed in a thread that ends.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(adapt_module, module, **options).result()

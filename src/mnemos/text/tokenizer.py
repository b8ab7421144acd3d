"""The tokenizer that the rest of Mnemos uses, whichever file it comes from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from mnemos.errors import FormatError, RequestError
from mnemos.text.core import TokenizerCore
from mnemos.text.incremental import IncrementalDecoder, decode_tokens, flat_ids

if TYPE_CHECKING:
    from mnemos.formats.checkpoint import Checkpoint
    from mnemos.formats.gguf import GGUFFile
    from mnemos.text.chat import ChatTemplate
    from mnemos.text.encoding import Encoding

Message = Mapping[str, Any]

MOST_TEMPLATES = 8  # compiled ones that are kept
_TEMPLATE = "tokenizer.chat_template"


class Tokenizer:
    """Text to token ids and back.

    Made by `from_gguf`, `from_file` or `from_checkpoint`, which only look at the file; the tokenizer is built by
    `prepare()` or when it is needed, once, by whichever thread comes first. Safe to use from many threads.
    """

    def __init__(
        self,
        build: Callable[[], TokenizerCore],
        vocabulary_size: int | None = None,
        chat_template: str | None = None,
        named_templates: Mapping[str, str] | None = None,
    ) -> None:
        self.chat_template = chat_template
        self.named_templates = dict(named_templates or {})  # the model's others, such as "tool_use"
        self._vocabulary_size = vocabulary_size
        self._build = build
        self._built: TokenizerCore | None = None
        self._templates: dict[str, ChatTemplate] = {}  # compiled, by their sources
        self._controls: tuple[str, ...] | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_gguf(cls, source: str | Path | GGUFFile) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata."""
        from mnemos.formats.gguf import GGUFFile

        file = GGUFFile.open(source) if isinstance(source, (str, Path)) else source
        return cls.from_metadata(file.metadata, str(file.path))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], label: str) -> Tokenizer:
        """The tokenizer that GGUF metadata describes; `label` is the file, for errors."""
        from mnemos.text.gguf import build_core, model_name, named_templates
        from mnemos.text.vocabulary import used_size

        model_name(metadata, label)
        tokens = metadata.get("tokenizer.ggml.tokens")
        if tokens is None:
            raise FormatError(f"{label}: tokenizer.ggml.tokens is missing; without it there is no tokenizer")
        if not isinstance(tokens, Sequence) or isinstance(tokens, str):
            raise FormatError(f"{label}: tokenizer.ggml.tokens is {str(tokens)[:80]}; it must be an array of strings")
        template = metadata.get(_TEMPLATE)
        if template is not None and not isinstance(template, str):
            raise FormatError(f"{label}: tokenizer.chat_template is {str(template)[:80]}; it must be a string")
        size = used_size(metadata, len(tokens))
        return cls(lambda: build_core(metadata, label), size, template, named_templates(metadata))

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """The tokenizer in a `tokenizer.json` or SentencePiece's `tokenizer.model`, or in the folder that holds one."""
        from mnemos.text import huggingface, sentencepiece

        file = huggingface.tokenizer_file(Path(path))
        build = sentencepiece.build_core if file.suffix == ".model" else huggingface.build_core
        settings = huggingface.read_settings(file.parent)
        template, named = huggingface.read_chat_templates(file.parent, settings)
        return cls(lambda: build(file, settings), chat_template=template, named_templates=named)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer inside, or beside, an open checkpoint."""
        path = Path(checkpoint.path)
        if checkpoint.kind == "gguf":
            return cls.from_metadata(checkpoint.metadata, str(path))
        return cls.from_file(path if path.is_dir() else path.parent)

    @property
    def source(self) -> Path:
        """The file that it was read from."""
        return Path(self._core.label)

    def prepare(self) -> Tokenizer:
        """Builds the tokenizer now, as while weights load in another thread."""
        _ = self._core
        return self

    @property
    def _core(self) -> TokenizerCore:
        if self._built is None:
            with self._lock:
                if self._built is None:
                    self._built = self._build()
        return self._built

    @overload
    def encode(
        self,
        text: str,
        add_special: bool = ...,
        parse_special: bool = ...,
        continues: bool = ...,
        *,
        add_special_tokens: bool | None = ...,
        truncation: bool | None = ...,
        max_length: int | None = ...,
        return_tensors: None = ...,
    ) -> list[int]: ...
    @overload
    def encode(
        self,
        text: str,
        add_special: bool = ...,
        parse_special: bool = ...,
        continues: bool = ...,
        *,
        add_special_tokens: bool | None = ...,
        truncation: bool | None = ...,
        max_length: int | None = ...,
        return_tensors: str,
    ) -> Any: ...

    def encode(
        self,
        text: str,
        add_special: bool = True,
        parse_special: bool = True,
        continues: bool = False,
        *,
        add_special_tokens: bool | None = None,
        truncation: bool | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
    ) -> Any:
        """Token ids of a text: a list of ints, or with return_tensors an array or tensor (1, time).

        add_special, or add_special_tokens: with the bos and eos tokens around it that the model expects.
        parse_special: the names of special tokens in the text mean those tokens; False for text that others wrote.
        continues: the text continues other text: nothing is put around it, not even the space that SentencePiece
        tokenizers prepend.
        truncation, max_length, return_tensors: see `__call__`.
        """
        if not isinstance(text, str):
            raise RequestError(f"the text to encode is of type {type(text).__name__}; it must be a str")
        _check_surrogates(text)
        add_special = add_special if add_special_tokens is None else add_special_tokens
        if max_length is not None or truncation or return_tensors is not None:
            from mnemos.text.encoding import Form, encode_texts

            form = Form(truncation=truncation, max_length=max_length, return_tensors=return_tensors)
            made = encode_texts(lambda one: self.encode(one, add_special, parse_special, continues), text, 0, form)
            return made.input_ids
        if continues:
            return self._core.encode_inside(text, parse_special)
        return self._core.encode(text, add_special, parse_special)

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | None = None,
        max_length: int | None = None,
        padding_side: str = "left",
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
    ) -> Encoding:
        """Token ids and attention mask of one text or several, as programs for other libraries' tokenizers expect.

        padding: True or "longest" fills shorter rows up to the longest, "max_length" to that; by default on the left,
        as generation continues the right end. max_length: longer texts lose their beginning, unless truncation is
        False. return_tensors: "pt" for tensors, "np" for arrays, always (batch, time); None for lists.
        ConfigError for other values, and for rows of several lengths as one array.
        """
        from mnemos.text.encoding import Form, encode_texts

        fill = next(token for token in (self.pad_id, self.eos_id, 0) if token is not None)
        form = Form(padding, truncation, max_length, padding_side, return_tensors)
        return encode_texts(lambda one: self.encode(one, add_special_tokens), text, fill, form)

    def batch_decode(
        self,
        sequences: Iterable[Iterable[int]],
        skip_special: bool = True,
        *,
        skip_special_tokens: bool | None = None,
    ) -> list[str]:
        """The text of each row of token ids; see `decode`."""
        return [self.decode(row, skip_special, skip_special_tokens=skip_special_tokens) for row in sequences]

    def decode(
        self,
        ids: int | Iterable[int],
        skip_special: bool = True,
        continues: bool = False,
        *,
        skip_special_tokens: bool | None = None,
    ) -> str:
        """The text of token ids, an array or a tensor (time,) of them, or one; bytes that are not UTF-8 are U+FFFD.

        skip_special, or skip_special_tokens: leaves out the names of special tokens.
        continues: the ids continue a text, so a leading space belongs to it; otherwise the one space is stripped
        that SentencePiece tokenizers put before a text. RequestError for rows of ids, which `batch_decode` takes.
        """
        skip_special = skip_special if skip_special_tokens is None else skip_special_tokens
        return decode_tokens(self._core, flat_ids(ids), skip_special, continues)

    def decoder(self, skip_special: bool = True, continues: bool = False) -> IncrementalDecoder:
        """A decoder for a stream of ids; its pieces add up to the result of `decode`."""
        return IncrementalDecoder(self._core, skip_special, continues)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text; a special token's are its name."""
        return self._core.token_bytes(token_id)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """A conversation as the text that the model was trained on.

        messages: each with a role and a content, as OpenAI's clients send them: see `mnemos.text.conversation`.
        chat_template: Jinja text, or the name of one of the model's templates, instead of the one that the model has
        for such a conversation. continue_final_message: the text ends with the last message, to be continued; no prompt
        is added then. variables: more for the template, such as `tools`.
        Errors: RequestError if the template refuses the messages.
        """
        from mnemos.text.conversation import check_messages

        template = self.template_for(chat_template, variables.get("tools"))
        return template.render(
            check_messages(messages),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**self._token_names(), **variables},
        )

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        allow_special: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation. Where the model wants bos and its template does not write it, it is added.

        allow_special: names of control tokens in what users and tools wrote, such as <|im_end|>, mean those tokens;
        otherwise they are text, so that nobody closes a message from inside it. Other options are those of
        `apply_chat_template`.
        """
        from mnemos.text.conversation import PLAIN_MARK

        names = () if allow_special else self._control_texts()
        text = self.apply_chat_template(messages, add_generation_prompt, control_texts=names, **variables)
        if not text:
            raise RequestError(f"{self._core.label}: the chat template makes no text at all of these messages")
        _check_surrogates(text)
        core = self._core
        ids = core.encode_marked(text, PLAIN_MARK, names) if PLAIN_MARK in text else core.encode(text, False, True)
        if core.bos_id is not None and core.prefix_ids == (core.bos_id,) and ids[:1] != [core.bos_id]:
            return [core.bos_id, *ids]
        return ids

    def _token_names(self) -> dict[str, str]:
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        names["unk_token"] = self._core.unknown_id
        return {name: "" if token is None else self._core.texts[token] for name, token in names.items()}

    def _control_texts(self) -> tuple[str, ...]:
        if self._controls is None:
            core = self._core
            self._controls = tuple(core.texts[token] for token in sorted(core.special_ids))
        return self._controls

    def template_for(self, source: str | None, tools: Any) -> ChatTemplate:
        """The template to use: the one asked for, the model's for tools if there are any, or the model's own."""
        from mnemos.text.chat import ChatTemplate, default_template

        if source is None and tools:
            source = self.named_templates.get("tool_use")
        source = self.chat_template if source is None else self.named_templates.get(source, source)
        label = self._core.label
        if source is None:
            find = self._core.find
            source = default_template(lambda text: find(text) is not None, label)
        with self._lock:
            if source not in self._templates:
                if len(self._templates) >= MOST_TEMPLATES:
                    del self._templates[next(iter(self._templates))]
                self._templates[source] = ChatTemplate(source, label)
            return self._templates[source]

    @property
    def vocabulary_size(self) -> int:
        """Ids run from 0 to one less than this."""
        return len(self._core.texts) if self._vocabulary_size is None else self._vocabulary_size

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens that are not text, such as bos, eos and the marks of a chat."""
        return self._core.special_ids

    @property
    def bos_id(self) -> int | None:
        return self._core.bos_id

    @property
    def eos_id(self) -> int | None:
        return self._core.eos_id

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every token that ends a generation."""
        return self._core.eos_ids

    @property
    def pad_id(self) -> int | None:
        return self._core.pad_id

    # The same under the names that transformers has for them.

    def __len__(self) -> int:
        return self.vocabulary_size

    @property
    def vocab_size(self) -> int:
        """vocabulary_size."""
        return self.vocabulary_size

    @property
    def bos_token_id(self) -> int | None:
        """bos_id."""
        return self.bos_id

    @property
    def eos_token_id(self) -> int | None:
        """eos_id."""
        return self.eos_id

    @property
    def pad_token_id(self) -> int | None:
        """pad_id."""
        return self.pad_id


def _check_surrogates(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        character = f"U+{ord(text[error.start]):04X}"
        problem = f"has the lone surrogate {character} at {error.start}"
        raise RequestError(f"the text {problem}; expected Unicode text without surrogates") from error

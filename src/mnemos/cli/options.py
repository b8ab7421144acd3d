"""Options that several commands share: which model and how it runs, and how text is generated."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mnemos.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from mnemos.decoding.config import GenerationConfig
    from mnemos.engine.engine import InferenceEngine
    from mnemos.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Option:
    """A command-line option for the field of GenerationConfig with the same name."""

    field: str
    parse: Callable[[str], Any] | None
    help: str
    metavar: str = "N"

    @property
    def flag(self) -> str:
        return "--" + self.field.replace("_", "-")


GROUPS = {
    "length": (
        Option("max_new_tokens", int, "most tokens to generate (default 256)"),
        Option("min_new_tokens", int, "fewest tokens to generate"),
        Option("max_time", float, "stop after this many seconds", "S"),
        Option("ignore_eos", None, "go on behind the model's end of text"),
        Option("overflow", str, "a prompt too long: error (default), truncate_left, sliding (endless)", "HOW"),
    ),
    "sampling (without any of these the most probable token is taken)": (
        Option("temperature", float, "below 1 is more sober, above 1 more random; 0 is greedy", "T"),
        Option("top_k", int, "choose among the N most probable tokens"),
        Option("top_p", float, "choose among the most probable tokens that together have probability P", "P"),
        Option("min_p", float, "leave out tokens below P times the best one's probability", "P"),
        Option("typical_p", float, "locally typical sampling with mass P", "P"),
        Option("epsilon_cutoff", float, "leave out tokens below this probability", "P"),
        Option("eta_cutoff", float, "eta sampling with this cut-off", "P"),
        Option("seed", int, "same seed, same text"),
    ),
    "repetition": (
        Option("repetition_penalty", float, "above 1: makes tokens that occurred less probable", "X"),
        Option("presence_penalty", float, "subtracted once from each generated token's logit", "X"),
        Option("frequency_penalty", float, "subtracted for each time a token was generated", "X"),
        Option("no_repeat_ngram_size", int, "no N tokens in a row occur twice"),
        Option("stop_when_repeating", None, "end a text that runs in circles"),
    ),
    "search": (
        Option("num_beams", int, "beam search with N beams"),
        Option("length_penalty", float, "above 0 favours longer results of beam search", "X"),
        Option("penalty_alpha", float, "contrastive search with this weight", "A"),
    ),
    "constraints": (
        Option("json_schema", str, "the text is JSON of this schema", "JSON"),
        Option("regex", str, "the text matches this regular expression", "REGEX"),
        Option("grammar", str, "the text follows this Lark grammar", "TEXT"),
    ),
    "speed (changes the time only)": (
        Option("speculative", str, "prompt_lookup: guess tokens from the prompt; draft: by --draft's model", "HOW"),
        Option("draft_tokens", int, "most tokens to guess at once (default 10)"),
    ),
}
SEVERAL = (
    Option("stop", str, "end the text before this string; may be given several times", "TEXT"),
    Option("choice", str, "the text is one of these; given several times", "TEXT"),
)
RESULTS = (
    Option("num_return_sequences", int, "with --json: this many results"),
    Option("logprobs", int, "with --json: log probabilities, and those of the N most probable tokens"),
)


def add_model_arguments(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """MODEL, and how it is run."""
    where = f" (default {default})" if default else ""
    text = f"a known name, hf:org/name[:file], a .gguf file or a Hugging Face folder{where}"
    parser.add_argument("model", metavar="MODEL", nargs="?" if default else None, default=default, help=text)
    group = parser.add_argument_group("running the model")
    group.add_argument(
        "--backend", default="auto", metavar="NAME", help="native (default), torch, or numpy, the reference"
    )
    group.add_argument("--dtype", default="auto", metavar="TYPE", help="auto: weights as stored; float32: expanded")
    group.add_argument("--context", type=int, metavar="N", help="context length in tokens (default: the model's)")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of GROUPS and SEVERAL, unset ones stay None; and --draft."""
    for title, options in GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            if option.parse is None:
                group.add_argument(option.flag, action="store_true", default=None, help=option.help)
            else:
                group.add_argument(option.flag, type=option.parse, metavar=option.metavar, help=option.help)
            if option.field == "speculative":
                text = "a small model with the same vocabulary, which guesses tokens for the large one to check"
                group.add_argument("--draft", metavar="MODEL", help=text)
    for option in SEVERAL:
        parser.add_argument(option.flag, action="append", metavar=option.metavar, help=option.help)


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of RESULTS, for a command that prints whole completions."""
    for option in RESULTS:
        parser.add_argument(option.flag, type=option.parse or str, metavar=option.metavar, help=option.help)


def generation_config(arguments: argparse.Namespace) -> GenerationConfig:
    """ConfigError for values outside their meaning."""
    from mnemos.decoding.config import GenerationConfig

    options = [*(option for group in GROUPS.values() for option in group), *SEVERAL, *RESULTS]
    values: dict[str, Any] = {option.field: getattr(arguments, option.field, None) for option in options}
    draft, how = getattr(arguments, "draft", None), values["speculative"]
    if draft is not None:
        if how not in (None, "draft"):
            raise ConfigError(f"--speculative is {how!r} and --draft {draft!r}; with a draft model it is 'draft'")
        values["speculative"] = "draft"
    elif how == "draft":
        raise ConfigError("--speculative is 'draft' and there is no draft model; name one by --draft MODEL")
    return GenerationConfig(**values)


def load_engine(arguments: argparse.Namespace) -> InferenceEngine:
    """The engine for `arguments.model`, fetched first if need be, with progress on standard error."""
    from mnemos.cli.terminal import ProgressBar
    from mnemos.engine.pretrained import load_parts

    with ProgressBar(arguments.model) as progress:
        parts = load_parts(
            arguments.model,
            backend=arguments.backend,
            dtype=arguments.dtype,
            context_length=arguments.context,
            draft=getattr(arguments, "draft", None),
            progress=progress,
        )
    from mnemos.engine.engine import InferenceEngine  # only now: weights are read meanwhile

    return InferenceEngine(**parts)


def tokenizer_of(engine: InferenceEngine, model: str) -> Tokenizer:
    """The engine's tokenizer; the model that `from_pretrained` loads always has one."""
    if engine.tokenizer is None:
        raise FormatError(f"{model} has no tokenizer")
    return engine.tokenizer

"""`mnemos eval`: perplexity of a text, and what a model has lost compared with another."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemos.cli.options import add_model_arguments, load_engine, tokenizer_of
from mnemos.cli.terminal import ProgressBar, human_bytes
from mnemos.errors import ConfigError, FormatError, MissingDependencyError

if TYPE_CHECKING:
    from mnemos.compress.evaluate import Comparison, Speed
    from mnemos.engine.engine import InferenceEngine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos eval MODEL FILE [options]\n       mnemos eval MODEL --against MODEL --text FILE [options]"
    add_model_arguments(parser)
    parser.add_argument("file", metavar="FILE", nargs="?", help="a text file in UTF-8")
    parser.add_argument("--text", metavar="FILE", help="the same")
    parser.add_argument("--against", metavar="MODEL", help="compare with this model, computed in float32")
    parser.add_argument("--chunk", type=int, metavar="N", help="tokens per chunk (default 512)")
    parser.add_argument("--picture", metavar="FILE", help="with --against: draw the divergences into an SVG file")
    parser.add_argument("--tasks", metavar="NAME,...", help="in place of a text: tasks of lm-evaluation-harness")
    parser.add_argument("--limit", type=int, metavar="N", help="with --tasks: so many documents of each")
    parser.add_argument("--shots", type=int, metavar="N", help="with --tasks: examples before each question")
    parser.add_argument("--task-folder", metavar="DIR", help="with --tasks: where further ones are described in YAML")
    parser.add_argument("--json", action="store_true", help="print the figures as a JSON object")
    parser.epilog = (
        "The text's tokens are cut into non-overlapping chunks; each token except a chunk's first is scored, given\n"
        "those before it in the chunk. Perplexity is exp of the mean negative log likelihood. With --against, the\n"
        "divergence is that of MODEL's next-token probabilities from the other model's (Kullback-Leibler, in nats);\n"
        "--dtype float32 shows what the weights alone have lost.\n\n"
        "examples:\n"
        "  mnemos eval smollm2-135m book.txt\n"
        "  mnemos eval model.gguf book.txt --chunk 1024 --dtype float32 --json\n"
        "  mnemos eval small.gguf --against model.gguf --text book.txt --picture loss.svg\n"
        "  mnemos eval model.gguf --tasks arc_easy,hellaswag --limit 200"
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.tasks is not None:
        return _run_tasks(arguments)
    file = _file(arguments)
    text = _read(Path(file))
    if arguments.against is not None:
        return _compare(arguments, file, text)
    if arguments.picture is not None:
        raise ConfigError("--picture is given without --against; it draws what a comparison has found")
    from mnemos.compress.evaluate import perplexity

    with load_engine(arguments) as engine:
        chunks, size, count = _chunks(engine, arguments, file, text)
        total, scored = 0.0, 0
        with ProgressBar(file, unit="tokens") as progress:
            for log_likelihood, tokens, done in _score(engine, chunks):
                total -= log_likelihood
                scored += tokens
                progress.note = f"perplexity {perplexity(total / scored):.2f}"
                progress("scoring", done, count)
    mean = total / scored
    if arguments.json:
        figures = {"tokens": scored, "negative_log_likelihood": mean, "perplexity": perplexity(mean)}
        print(json.dumps({"file": file, "chunk": size, **figures}))
    else:
        print(f"perplexity {perplexity(mean):.4f} (mean negative log likelihood {mean:.5f} over {scored} tokens)")
    return 0


def _run_tasks(arguments: argparse.Namespace) -> int:
    for option in ("file", "text", "against", "picture", "chunk"):
        if getattr(arguments, option) is not None:
            raise ConfigError(f"--tasks is given with {option.upper()}; tasks have their own texts")
    try:
        from mnemos.compress.tasks import run_tasks, table
    except ImportError as error:
        raise MissingDependencyError(
            f"--tasks runs lm-evaluation-harness, which is not installed: pip install 'mnemos[eval]' ({error})"
        ) from error
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    with load_engine(arguments) as engine, ProgressBar(arguments.model, unit="requests") as progress:
        found = run_tasks(
            engine,
            tokenizer_of(engine, arguments.model),
            names,
            limit=arguments.limit,
            shots=arguments.shots,
            folder=arguments.task_folder,
            progress=progress,
        )
    print(json.dumps(found["results"], default=str) if arguments.json else table(found))
    return 0


def compare_files(model: str, against: str, text: str) -> int:
    """What `mnemos eval MODEL --against AGAINST --text TEXT` prints, at the end of what made one of the other."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    print()
    return run(parser.parse_args([model, "--against", against, "--text", text]))


def _file(arguments: argparse.Namespace) -> str:
    given = [file for file in (arguments.file, arguments.text) if file is not None]
    if len(given) != 1:
        raise ConfigError(f"{len(given)} text files are given; expected one, as FILE or with --text")
    return str(given[0])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _chunks(
    engine: InferenceEngine, arguments: argparse.Namespace, file: str, text: str
) -> tuple[list[list[int]], int, int]:
    """The text's chunks, their size, and the number of its tokens."""
    from mnemos.compress.evaluate import CHUNK, cut

    token_ids = tokenizer_of(engine, arguments.model).encode(text, add_special=False, parse_special=False)
    longest = engine.spec.context_length
    size = min(CHUNK, longest) if arguments.chunk is None else arguments.chunk
    if not 2 <= size <= longest:
        raise ConfigError(f"--chunk is {size}; it must be from 2 to {longest}, the model's context")
    chunks = cut(token_ids, size)
    if not chunks:
        raise ConfigError(f"{file} has {len(token_ids)} tokens; at least 2 are needed")
    return chunks, size, len(token_ids)


def _score(engine: InferenceEngine, chunks: list[list[int]]) -> Iterator[tuple[float, int, int]]:
    """Yields, for each chunk, its log likelihood, its number of scored tokens, and the tokens done so far."""
    done = 0
    for chunk in chunks:
        (score,) = engine.score([chunk])
        done += len(chunk)
        yield math.fsum(score.logprobs.tolist()), len(score.logprobs), done


def _compare(arguments: argparse.Namespace, file: str, text: str) -> int:
    from mnemos.compress.evaluate import compare, measure_speed

    other = argparse.Namespace(**{**vars(arguments), "model": arguments.against})
    with load_engine(arguments) as engine:
        chunks, size, _ = _chunks(engine, arguments, file, text)
        exact = load_engine(argparse.Namespace(**{**vars(other), "dtype": "float32"}))
        with exact, ProgressBar(file, unit="tokens") as progress:
            found = compare(engine, exact, chunks, lambda done, total: progress("comparing", done, total))
        speeds = [measure_speed(engine, chunks[0])]
    with load_engine(other) as against:
        speeds.append(measure_speed(against, chunks[0]))
    sizes = [_tensor_bytes(arguments.model), _tensor_bytes(arguments.against)]
    if arguments.picture is not None:
        from mnemos.compress.picture import draw

        Path(arguments.picture).write_text(draw(found, f"{arguments.model} against {arguments.against}"), "utf-8")
    if arguments.json:
        print(json.dumps({"file": file, "chunk": size, **_figures(found, sizes, speeds)}))
    else:
        _print_table(arguments, found, sizes, speeds)
    return 0


def _tensor_bytes(model: str) -> int:
    """Bytes of all tensors, as stored."""
    from mnemos.formats.checkpoint import open_checkpoint
    from mnemos.hub.sources import resolve

    return sum(len(tensor.data) for tensor in open_checkpoint(resolve(model)).tensors.values())


def _figures(found: Comparison, sizes: list[int], speeds: list[Speed]) -> dict[str, Any]:
    return {
        "tokens": len(found.divergences),
        "perplexity": found.perplexity,
        "against_perplexity": found.against_perplexity,
        "kl_mean": found.divergence,
        "kl_median": found.percentile(50),
        "kl_99": found.percentile(99),
        "top1_agreement": found.agreement,
        "tensor_bytes": sizes[0],
        "against_tensor_bytes": sizes[1],
        "prompt_tokens_per_second": speeds[0].prompt,
        "against_prompt_tokens_per_second": speeds[1].prompt,
        "tokens_per_second": speeds[0].generation,
        "against_tokens_per_second": speeds[1].generation,
    }


def _print_table(arguments: argparse.Namespace, found: Comparison, sizes: list[int], speeds: list[Speed]) -> None:
    own, other = found.perplexity, found.against_perplexity
    rows = [
        ("", Path(arguments.model).name, Path(arguments.against).name, ""),
        ("size of the tensors", *map(human_bytes, sizes), f"x{sizes[0] / sizes[1]:.3f}"),
        ("perplexity", f"{own:.4f}", f"{other:.4f}", f"{100 * (own / other - 1):+.2f}%"),
        (
            "prompt, tokens/s",
            *(f"{speed.prompt:.0f}" for speed in speeds),
            f"x{speeds[0].prompt / speeds[1].prompt:.2f}",
        ),
        (
            "generation, tokens/s",
            *(f"{speed.generation:.1f}" for speed in speeds),
            f"x{speeds[0].generation / speeds[1].generation:.2f}",
        ),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for first, *rest in rows:
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    print()
    print(f"divergence            {found.divergence:.6f} nats per token on average")
    print(f"                      {found.percentile(50):.6f} median, {found.percentile(99):.6f} at 99% of the tokens")
    print(f"same most probable    {100 * found.agreement:.2f}% of {len(found.divergences)} tokens")

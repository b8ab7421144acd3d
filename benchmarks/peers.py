"""Measures one peer with the metrics of docs/performance.md; prints one JSON line for each figure.

    PEERS/bin/python benchmarks/peers.py ENGINE --gguf FILE --models DIR --metrics pp512,tg128,...

ENGINE is one of PEERS below; DIR holds what convert_model.py wrote. A metric that a peer does not support is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

THREADS = len(os.sched_getaffinity(0))
PROMPT = "The capital of France is"
BATCH_PROMPT = 64
BATCH_STEPS = 64


def random_tokens(count: int) -> list[int]:
    return [random.randrange(100, 40_000) for _ in range(count)]


class Peer(ABC):
    """An engine with the model loaded."""

    @abstractmethod
    def seconds(self, prompt: list[int], new: int) -> float:
        """The time of a prompt and `new` greedy tokens, at batch 1."""

    def batch_rate(self, size: int) -> float | None:
        """Tokens/s of `size` sequences together, decoding only; None if the engine has no batches."""
        return None


class StaticBatchPeer(Peer):
    """An engine whose batch is one call: decoding is the difference of a long and a short one."""

    @abstractmethod
    def batch_seconds(self, prompt: list[int], new: int, size: int) -> float: ...

    def seconds(self, prompt: list[int], new: int) -> float:
        return self.batch_seconds(prompt, new, 1)

    def batch_rate(self, size: int) -> float | None:
        prompt = random_tokens(BATCH_PROMPT)
        whole = self.batch_seconds(prompt, BATCH_STEPS + 1, size)
        return size * BATCH_STEPS / (whole - self.batch_seconds(prompt, 1, size))


class LlamaCpp(Peer):
    cold = (
        "from llama_cpp import Llama; m = Llama({gguf!r}, n_ctx=2048, n_threads={threads}, verbose=False); "
        "print(m({prompt!r}, max_tokens=1, temperature=0)['choices'][0]['text'])"
    )

    def __init__(self, gguf: str, models: str) -> None:
        from llama_cpp import Llama

        self.model = Llama(gguf, n_ctx=2048, n_threads=THREADS, n_threads_batch=THREADS, verbose=False)

    def seconds(self, prompt: list[int], new: int) -> float:
        self.model.reset()
        start = time.perf_counter()
        self.model.eval(prompt)
        for _ in range(new - 1):
            self.model.eval([1234])  # which token it is makes no difference to the time
        return time.perf_counter() - start

    def batch_rate(self, size: int) -> float | None:
        from llama_cpp import llama_cpp as native

        parameters = native.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = size * 256, 2048, 512
        parameters.n_threads = parameters.n_threads_batch = THREADS
        parameters.n_seq_max = size
        context = native.llama_init_from_model(self.model.model, parameters)
        batch = native.llama_batch_init(2048, 0, 1)
        each = min(BATCH_PROMPT, 2048 // size)
        self._run(native, context, batch, size, 0, each)
        start = time.perf_counter()
        for step in range(BATCH_STEPS):
            self._run(native, context, batch, size, each + step, 1)
        rate = size * BATCH_STEPS / (time.perf_counter() - start)
        native.llama_batch_free(batch)
        native.llama_free(context)
        return rate

    def _run(self, native: Any, context: Any, batch: Any, size: int, position: int, count: int) -> None:
        row = 0
        for sequence in range(size):
            for offset, token in enumerate(random_tokens(count)):
                batch.token[row], batch.pos[row] = token, position + offset
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
                batch.logits[row] = int(offset == count - 1)
                row += 1
        batch.n_tokens = row
        if native.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")


class LlamaCppWheel(StaticBatchPeer):
    """llama.cpp as the wheel `xllamacpp` builds it, for every CPU: its kernels are chosen when it is loaded."""

    def __init__(self, gguf: str, models: str) -> None:
        import xllamacpp

        self.library, self.gguf = xllamacpp, gguf
        self.servers: dict[int, Any] = {}  # by slots: each has its share of the context

    def server(self, slots: int) -> Any:
        if slots not in self.servers:
            parameters = self.library.CommonParams()
            parameters.model.path, parameters.port = self.gguf, 0
            parameters.n_parallel, parameters.n_ctx = slots, 2048 if slots == 1 else 256 * slots
            parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = THREADS
            self.servers = {slots: self.library.Server(parameters)}
        return self.servers[slots]

    def batch_seconds(self, prompt: list[int], new: int, size: int) -> float:
        server = self.server(size)
        request = {"prompt": prompt, "n_predict": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        start = time.perf_counter()
        with ThreadPoolExecutor(size) as pool:
            answers = list(pool.map(server.handle_completions, [request] * size))
        seconds = time.perf_counter() - start
        if any(answer.get("timings", {}).get("predicted_n") != new for answer in answers):
            raise RuntimeError(f"llama.cpp answered {str(answers[0])[:200]}")
        return seconds


class OpenVino(Peer):
    cold = "import openvino_genai as g; print(g.LLMPipeline({gguf!r}, 'CPU').generate({prompt!r}, max_new_tokens=1))"

    def __init__(self, gguf: str, models: str) -> None:
        import openvino_genai

        self.library = openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(gguf, "CPU")

    def seconds(self, prompt: list[int], new: int) -> float:
        import numpy as np
        import openvino

        config = self.library.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
        tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
        start = time.perf_counter()
        self.pipeline.generate(tokens, config)
        return time.perf_counter() - start


class CTranslate2(StaticBatchPeer):
    cold = (
        "import ctranslate2; from tokenizers import Tokenizer as T; t = T.from_file({models!r}+'/hf/tokenizer.json'); "
        "g = ctranslate2.Generator({models!r} + '/ct2', device='cpu', compute_type='int8', intra_threads={threads}); "
        "print(g.generate_batch([t.encode({prompt!r}).tokens], max_length=1)[0].sequences[0][-1])"
    )

    def __init__(self, gguf: str, models: str) -> None:
        import ctranslate2
        from tokenizers import Tokenizer

        self.spell = Tokenizer.from_file(f"{models}/hf/tokenizer.json").id_to_token
        options = {"device": "cpu", "compute_type": "int8", "intra_threads": THREADS}
        self.model = ctranslate2.Generator(f"{models}/ct2", **options)

    def batch_seconds(self, prompt: list[int], new: int, size: int) -> float:
        words = [[self.spell(token) for token in prompt]] * size
        start = time.perf_counter()
        self.model.generate_batch(words, max_length=new, min_length=new, include_prompt_in_result=False)
        return time.perf_counter() - start


class OnnxRuntime(StaticBatchPeer):
    def __init__(self, gguf: str, models: str) -> None:
        import onnxruntime_genai

        self.library = onnxruntime_genai
        self.model = onnxruntime_genai.Model(f"{models}/ort")

    def batch_seconds(self, prompt: list[int], new: int, size: int) -> float:
        import numpy as np

        length = len(prompt) + new
        parameters = self.library.GeneratorParams(self.model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=size)
        generator = self.library.Generator(self.model, parameters)
        start = time.perf_counter()
        generator.append_tokens(np.array([prompt] * size, dtype=np.int32))
        for _ in range(new):
            generator.generate_next_token()
        return time.perf_counter() - start


class Transformers(StaticBatchPeer):
    cold = (
        "import torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; d = {models!r} + '/hf'; "
        "t = T.from_pretrained(d); m = M.from_pretrained(d, dtype=torch.bfloat16); "
        "print(t.decode(m.generate(**t({prompt!r}, return_tensors='pt'), max_new_tokens=1)[0]))"
    )

    def __init__(self, gguf: str, models: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(THREADS)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(f"{models}/hf", dtype=torch.bfloat16).eval()

    def batch_seconds(self, prompt: list[int], new: int, size: int) -> float:
        tokens = self.torch.tensor([prompt] * size)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        start = time.perf_counter()
        self.model.generate(tokens, attention_mask=self.torch.ones_like(tokens), **options)
        return time.perf_counter() - start


class Vllm(StaticBatchPeer):
    def __init__(self, gguf: str, models: str) -> None:
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="2",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            OMP_NUM_THREADS=str(THREADS),  # else it takes one
            HF_HUB_OFFLINE="1",
        )
        from vllm import LLM, SamplingParams

        self.parameters = SamplingParams
        options = {"max_num_batched_tokens": 2048, "max_num_seqs": 32, "enable_prefix_caching": False}
        self.model = LLM(f"{models}/hf", max_model_len=2048, dtype="bfloat16", **options)

    def batch_seconds(self, prompt: list[int], new: int, size: int) -> float:
        parameters = self.parameters(max_tokens=new, temperature=0, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt}] * size
        start = time.perf_counter()
        self.model.generate(prompts, parameters, use_tqdm=False)
        return time.perf_counter() - start


PEERS: dict[str, type[Peer]] = {
    "llama.cpp": LlamaCpp,
    "xllamacpp": LlamaCppWheel,
    "ctranslate2": CTranslate2,
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "transformers": Transformers,
    "vllm": Vllm,
}


def report(engine: str, metric: str, value: float, unit: str) -> None:
    print(json.dumps({"engine": engine, "metric": metric, "value": round(value, 3), "unit": unit}), flush=True)


def measure_start(engine: str, code: str) -> None:
    """Median seconds of a whole process that generates one token, and its peak memory."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        command = [sys.executable, "-c", code]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    report(engine, "cold", statistics.median(times[1:]), "s")
    report(engine, "rss", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, "MB")


def measure(engine: str, peer: Peer, metric: str) -> None:
    match = re.fullmatch(r"(pp|tg|b)(\d+)(?:@d(\d+))?", metric)
    if match is None:
        return
    kind, count = match[1], int(match[2])
    if kind == "pp":
        rate: float | None = count / min(peer.seconds(random_tokens(count), 1) for _ in range(4))
    elif kind == "tg":
        rate = max(decode_rate(peer, int(match[3]) - count - 1 if match[3] else 16, count) for _ in range(3))
    else:
        rate = peer.batch_rate(count)
    if rate is not None:
        report(engine, metric, rate, "tokens/s")


def decode_rate(peer: Peer, depth: int, tokens: int) -> float:
    first = min(peer.seconds(random_tokens(depth), 1) for _ in range(2))
    return tokens / (peer.seconds(random_tokens(depth), tokens + 1) - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=PEERS)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--models", required=True)
    parser.add_argument("--metrics", required=True)
    arguments = parser.parse_args()
    metrics = arguments.metrics.split(",")
    random.seed(0)
    kind = PEERS[arguments.engine]
    code = getattr(kind, "cold", None)
    if code and ("cold" in metrics or "rss" in metrics):
        values = {"gguf": arguments.gguf, "models": arguments.models, "prompt": PROMPT, "threads": THREADS}
        measure_start(arguments.engine, code.format(**values))
    steps = [metric for metric in metrics if metric not in ("cold", "rss")]
    if steps:
        peer = kind(arguments.gguf, arguments.models)  # type: ignore[call-arg]
        peer.seconds(random_tokens(16), 4)
        for metric in steps:
            measure(arguments.engine, peer, metric)


if __name__ == "__main__":
    main()

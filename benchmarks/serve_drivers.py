"""Runs one engine through a workload that benchmarks/serve_peers.py planned; prints when each request's tokens came.

    PYTHON benchmarks/serve_drivers.py ENGINE --gguf FILE --models DIR < WORKLOAD

The workload is a JSON list of [seconds after the start, prompt's token ids, tokens to generate]; the output is a line
`RESULT [[seconds, ...], ...]`: when each token of each request arrived, on the same clock. Decoding is greedy, and
end-of-text does not end a text, so all engines do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

THREADS = len(os.sched_getaffinity(0))
SLOTS = 32  # requests running at once
BATCH = 512  # rows of a step
CONTEXT = 2048  # positions of a request

Work = list[tuple[float, list[int], int]]
Times = list[list[float]]


def run_mnemos(gguf: str, models: str, work: Work) -> Times:
    """The engine as users have it, with its defaults."""
    from mnemos.engine.engine import InferenceEngine

    with InferenceEngine.from_pretrained(gguf, max_sequences=SLOTS, prefix_cache=False) as engine:
        engine.complete([work[0][1]] * 2, max_new_tokens=8, ignore_eos=True)
        handles = []
        start = time.perf_counter()
        for at, prompt, count in work:
            time.sleep(max(0.0, start + at - time.perf_counter()))
            handles.append(engine.submit(prompt, max_new_tokens=count, ignore_eos=True))
        return [[moment - start for moment in handle.result().timings.tokens] for handle in handles]


@dataclass
class Slot:
    """A request in one of llama.cpp's sequences; `next`: the rest of its prompt, then its last token."""

    number: int
    sequence: int
    next: list[int]
    left: int
    position: int = 0
    row: int = -1
    times: list[float] = field(default_factory=list)


class LlamaServer:
    """llama.cpp's library, driven as its server does: a step has a token of every text, then prompts that fit."""

    def __init__(self, gguf: str) -> None:
        import numpy as np
        from llama_cpp import Llama, llama_cpp

        self.np, self.native = np, llama_cpp
        self.model = Llama(gguf, n_ctx=512, verbose=False)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = SLOTS * CONTEXT, 4 * BATCH, BATCH
        parameters.n_threads = parameters.n_threads_batch = THREADS
        parameters.n_seq_max, parameters.kv_unified = SLOTS, True
        self.context = llama_cpp.llama_init_from_model(self.model.model, parameters)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(4 * BATCH, 0, 1)
        self.vocabulary = self.model.n_vocab()

    def run(self, work: Work) -> Times:
        waiting, running = list(enumerate(work)), list[Slot]()
        times: Times = [[] for _ in work]
        free = list(range(SLOTS))
        start = time.perf_counter()
        while waiting or running:
            now = time.perf_counter() - start
            while waiting and free and waiting[0][1][0] <= now:
                number, (_, prompt, count) = waiting.pop(0)
                running.append(Slot(number, free.pop(), list(prompt), count, times=times[number]))
            if not running:
                time.sleep(max(0.0, waiting[0][1][0] - now))
                continue
            self._step(running)
            moment = time.perf_counter() - start
            for slot in [slot for slot in running if slot.row >= 0]:
                row = self.native.llama_get_logits_ith(self.context, slot.row)
                slot.next = [int(self.np.ctypeslib.as_array(row, (self.vocabulary,)).argmax())]
                slot.times.append(moment)
                slot.left -= 1
                if not slot.left:
                    self.native.llama_memory_seq_rm(self.memory, slot.sequence, -1, -1)
                    free.append(slot.sequence)
                    running.remove(slot)
        return times

    def _step(self, running: list[Slot]) -> None:
        room, rows = 4 * BATCH, 0
        for slot in sorted(running, key=lambda slot: len(slot.next) > 1):
            taken, slot.next = slot.next[: room - rows], slot.next[room - rows :]
            for offset, token in enumerate(taken):
                self._put(rows + offset, token, slot.position + offset, slot.sequence)
            rows += len(taken)
            slot.position += len(taken)
            slot.row = -1
            if taken and not slot.next:
                slot.row = rows - 1
                self.batch.logits[slot.row] = 1
        self.batch.n_tokens = rows
        if self.native.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _put(self, row: int, token: int, position: int, sequence: int) -> None:
        batch = self.batch
        batch.token[row], batch.pos[row], batch.logits[row] = token, position, 0
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence


def run_llama(gguf: str, models: str, work: Work) -> Times:
    server = LlamaServer(gguf)
    server.run([(0.0, work[0][1], 8)] * 2)
    return server.run(work)


def run_vllm(gguf: str, models: str, work: Work) -> Times:
    """vLLM's engine with the scheduler of its server, in this process."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="2",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        OMP_NUM_THREADS=str(THREADS),
        HF_HUB_OFFLINE="1",
    )
    from vllm import LLM, SamplingParams

    options = {"max_num_batched_tokens": BATCH, "max_num_seqs": SLOTS, "enable_prefix_caching": False}
    engine = LLM(f"{models}/hf", max_model_len=CONTEXT, dtype="bfloat16", **options).llm_engine

    def run(work: Work) -> Times:
        times: Times = [[] for _ in work]
        waiting = list(enumerate(work))
        start = time.perf_counter()
        while waiting or engine.has_unfinished_requests():
            now = time.perf_counter() - start
            while waiting and waiting[0][1][0] <= now:
                number, (_, prompt, count) = waiting.pop(0)
                parameters = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
                engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
            if not engine.has_unfinished_requests():
                time.sleep(max(0.0, waiting[0][1][0] - now))
                continue
            outputs = engine.step()
            moment = time.perf_counter() - start
            for output in outputs:
                own = times[int(output.request_id)]
                own += [moment] * (len(output.outputs[0].token_ids) - len(own))
        return times

    run([(0.0, work[0][1], 8)] * 2)
    return run(work)


DRIVERS: dict[str, Callable[[str, str, Work], Times]] = {
    "mnemos": run_mnemos,
    "llama.cpp": run_llama,
    "vllm": run_vllm,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=DRIVERS)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--models", required=True)
    arguments = parser.parse_args()
    work: Any = [tuple(item) for item in json.load(sys.stdin)]
    print("RESULT", json.dumps(DRIVERS[arguments.engine](arguments.gguf, arguments.models, work)), flush=True)


if __name__ == "__main__":
    main()

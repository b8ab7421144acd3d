"""Metrics and logs."""

from __future__ import annotations

import json
import logging

import httpx
from prometheus_client.parser import text_string_to_metric_families

from mnemos.engine.engine import InferenceEngine
from mnemos.serve.application import app
from mnemos.serve.logs import LineFormatter
from tests.serve.running import running

BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "ignore_eos": True}


def values(client: httpx.Client) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, *map(str, sample.labels.values())): sample.value for one in families for sample in one.samples
    }


def test_counters_move_by_what_was_used(engine: InferenceEngine) -> None:
    with running(app(engine, name="small")) as client:
        before = values(client)
        usage = client.post("/v1/chat/completions", json=BODY).json()["usage"]
        client.get("/no/such/path")
        after = values(client)

    def moved(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert moved("mnemos_generated_tokens_total", "small") == usage["completion_tokens"] == 5
    assert moved("mnemos_prompt_tokens_total", "small") == usage["prompt_tokens"]
    assert moved("mnemos_results_total", "small", "length") == 1
    assert moved("mnemos_time_to_first_token_seconds_count", "small") == 1
    assert moved("mnemos_inter_token_latency_seconds_count", "small") == 1
    assert moved("mnemos_http_responses_total", "POST", "/v1/chat/completions", "200") == 1
    assert moved("mnemos_http_responses_total", "GET", "other", "404") == 1
    assert 0 <= after["vllm:kv_cache_usage_perc", "small"] <= 1
    assert after["vllm:num_requests_waiting", "small"] == 0


def test_a_log_line_stays_one_line() -> None:
    record = logging.makeLogRecord({"msg": "request", "levelname": "INFO", "path": "/a\n\x1b[31mb", "seconds": 0.5})
    as_json, as_text = (LineFormatter(kind).format(record) for kind in (True, False))
    assert json.loads(as_json)["path"] == "/a\n\x1b[31mb"
    for line in (as_json, as_text):
        assert "\n" not in line and "\x1b" not in line

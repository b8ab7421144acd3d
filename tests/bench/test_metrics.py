"""Metrics by name."""

from __future__ import annotations

import json

import pytest

from mnemos.bench.metrics import DEFAULT_METRICS, Metric, parse_metrics
from mnemos.bench.results import Result
from mnemos.errors import ConfigError


def test_names_say_what_is_measured() -> None:
    assert parse_metrics(["pp512", "tg128", "tg64@d1024", "b32", "rss"]) == [
        Metric("pp512", "pp", 512),
        Metric("tg128", "tg", 128, 16),
        Metric("tg64@d1024", "tg", 64, 959),
        Metric("b32", "b", 32),
        Metric("rss", "rss"),
    ]
    assert len(parse_metrics(DEFAULT_METRICS)) == len(DEFAULT_METRICS)


@pytest.mark.parametrize("name", ["", "pp", "pp0", "tg-1", "b32@d10", "tg128@d100", "warm", "pp99999999999"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="metric"):
        parse_metrics([name])


def test_a_result_is_one_json_line() -> None:
    result = Result("tg128", 150.12345, "tokens/s", limit=300.0)
    assert json.loads(result.to_json()) == {"engine": "mnemos", "metric": "tg128", "value": 150.123, "unit": "tokens/s"}
    assert result.share == pytest.approx(0.5004115)

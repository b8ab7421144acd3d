"""Routers for your own generation loop, against another implementation's choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mnemos import (  # noqa: E402
    HybridRouter,
    RollingWindowRouter,
    SequenceLevelRouter,
    SequenceRollingRouter,
    TokenLevelRouter,
    create_inference_router,
)
from mnemos.errors import ConfigError  # noqa: E402
from mnemos.models.memory_transformer.routing import ChapterRouter  # noqa: E402

NUMBERS = Path(__file__).parents[1] / "data" / "memory_transformer" / "routers.npz"
EXCLUDED = (0, 1, 2, 6, 7, 8)


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    with np.load(NUMBERS) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture
def router(known: dict[str, Any]) -> ChapterRouter:
    made = ChapterRouter(32, 8, 3)
    made.router.load_state_dict({"weight": known["router.weight"], "bias": known["router.bias"]})
    return made


def same(known: dict[str, Any], name: str, chosen: Any) -> None:
    indices, weights = chosen
    assert torch.equal(indices, known[f"{name}.indices"].long())
    torch.testing.assert_close(weights, known[f"{name}.weights"], rtol=0, atol=1e-6)


def test_by_the_whole_call(known: dict[str, Any], router: ChapterRouter) -> None:
    states = known["hidden_states"]
    same(known, "SequenceLevelRouter", SequenceLevelRouter(router, top_k=3).route(states))
    same(known, "TokenLevelRouter", TokenLevelRouter(router, top_k=3).route(states))
    for window in (1, 4, 7, 20, 128):
        chosen = SequenceRollingRouter(router, top_k=3, window_size=window).route(states)
        same(known, f"SequenceRollingRouter.w{window}", chosen)


def test_a_rolling_window_is_kept_between_calls(known: dict[str, Any], router: ChapterRouter) -> None:
    states, rolling = known["hidden_states"], RollingWindowRouter(router, top_k=3, window_size=4)
    for number, (first, last) in enumerate(((0, 3), (3, 4), (4, 9), (9, 10), (10, 20))):
        same(known, f"RollingWindowRouter.chunk{number}", rolling.route(states[:, first:last], use_cache=True))
        assert torch.equal(rolling.cache, known[f"RollingWindowRouter.chunk{number}.cache"])
    same(known, "RollingWindowRouter.nocache_call", rolling.route(states[:, 5:7], use_cache=False))
    assert torch.equal(rolling.cache, known["RollingWindowRouter.cache_after_nocache_call"])
    rolling.reset_cache()
    same(known, "RollingWindowRouter.after_reset", rolling.route(states[:, 5:7]))


@pytest.mark.parametrize(("name", "length"), [("long", 20), ("short", 2)])
def test_hybrid_turns_to_the_window(known: dict[str, Any], router: ChapterRouter, name: str, length: int) -> None:
    states, steps = known["hidden_states"], known["step_states"]
    hybrid = HybridRouter(router, top_k=3, window_size=4)
    same(known, f"HybridRouter.{name}.prefill", hybrid.route(states[:, :length]))
    hybrid.start_generation(states[:, :length])
    assert torch.equal(hybrid.cache, known[f"HybridRouter.{name}.cache_after_start"])
    for i in range(6):
        same(known, f"HybridRouter.{name}.step{i}", hybrid.route(steps[:, i : i + 1]))
    hybrid.reset()
    same(known, f"HybridRouter.{name}.after_reset", hybrid.route(states[:, :5]))


@pytest.mark.parametrize("strategy", ["sequence", "sequence-rolling", "sequence_rolling", "rolling", "token", "hybrid"])
def test_routers_by_name(known: dict[str, Any], router: ChapterRouter, strategy: str) -> None:
    made = create_inference_router(router, strategy, top_k=3, window_size=4)
    same(known, f"create.{strategy}", made.route(known["hidden_states"]))
    same(known, f"create.{strategy}.second", made.route(known["step_states"][:, :1]))


@pytest.mark.parametrize("excluded", EXCLUDED)
@pytest.mark.parametrize("strategy", ["sequence", "sequence-rolling", "token"])
def test_chapters_that_are_never_chosen(
    known: dict[str, Any], router: ChapterRouter, strategy: str, excluded: int
) -> None:
    router.routing_strategy = strategy
    states = known["hidden_states"]
    check_route(known, f"ChapterRouter.{strategy}.exclude{excluded}", router(states, True, excluded, 4))
    by_token = router.route_token_level(states, True, excluded)
    check_route(known, f"ChapterRouter.route_token_level.exclude{excluded}", by_token)


def check_route(known: dict[str, Any], name: str, route: Any) -> None:
    same(known, name, (route.indices, route.weights))
    for loss, value in route.losses.items():
        torch.testing.assert_close(value, known[f"{name}.loss.{loss}"], rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lower_chapter() -> None:
    router = ChapterRouter(4, 6, 3)
    torch.nn.init.zeros_(router.router.weight)
    torch.nn.init.zeros_(router.router.bias)
    indices, weights = SequenceLevelRouter(router, 3).route(torch.randn(2, 5, 4))
    assert indices.tolist() == [[0, 1, 2]] * 2 and torch.allclose(weights, torch.full((2, 3), 1 / 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "rollin"}, "strategy is 'rollin'; did you mean rolling"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 9}, "top_k is 9; it must be at most the 8 chapters"),
        ({"strategy": "rolling", "window_size": 0}, "window_size is 0"),
    ],
)
def test_what_is_refused(router: ChapterRouter, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_inference_router(router, **{"strategy": "sequence", "top_k": 3, **arguments})


def test_states_and_routers_that_do_not_fit(router: ChapterRouter) -> None:
    states = torch.randn(2, 5, 32)
    for strategy in ("sequence", "sequence-rolling", "rolling", "hybrid", "token"):
        made = create_inference_router(router, strategy, top_k=3)
        with pytest.raises(ConfigError, match=r"hidden_states is \(2, 5, 8\); expected .* \(batch, positions, 32\)"):
            made.route(states[..., :8])
        with pytest.raises(ConfigError, match="hidden_states is a list"):
            made.route([1.0])
    rolling = RollingWindowRouter(router, top_k=3)
    rolling.route(states)
    with pytest.raises(ConfigError, match="is a batch of 1 and the texts so far were 2; call reset_cache"):
        rolling.route(states[:1])
    with pytest.raises(ConfigError, match="router is a str; expected one of the model's"):
        SequenceLevelRouter("router", top_k=3)

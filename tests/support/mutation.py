"""Tests for mutants, each in a fork of a process that has imported torch and transformers: a second, not ten.

`cosmic-ray` changes one operator of a module at a time and runs a command; `make mutants` has it run this file:

    python mutation.py serve SOCKET            import what is slow, and wait for orders
    python -S mutation.py run SOCKET TEST ...  run pytest on the tests in a fork; exit 0 if they pass
    python mutation.py sample SESSION NUMBER   leave so many mutants of a session, drawn from a fixed seed
    python mutation.py report SESSION          what survived, and the share of mutants that were killed
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys

#: Seconds after which a mutant is taken to loop for ever.
ENOUGH = 150


def serve(path: str) -> None:
    """Answer every connection, which sends arguments of pytest separated by newlines, with pytest's exit status."""
    import importlib

    for name in (
        "torch", "numpy", "pytest", "hypothesis", "accelerate", "peft", "transformers.trainer",
        "transformers.models.auto", "transformers.models.bert.modeling_bert", "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama", "transformers.modeling_utils", "fusion_kernels",
    ):  # fmt: skip
        importlib.import_module(name)
    import pytest

    sys.path.insert(0, os.path.join(os.getcwd(), "python"))
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        while True:
            connection, _ = server.accept()
            with connection:
                arguments = connection.recv(65536).decode().split("\n")
                child = os.fork()
                if child == 0:
                    sys.dont_write_bytecode = True
                    signal.alarm(ENOUGH)
                    sink = os.open(os.devnull, os.O_RDWR)
                    for descriptor in (0, 1, 2):
                        os.dup2(sink, descriptor)
                    # One file after the other: most mutants are killed by the first, before the rest is imported.
                    runs = (int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", file])) for file in arguments)
                    os._exit(next((code for code in runs if code != 0), 0))
                _, status = os.waitpid(child, 0)
                with contextlib.suppress(BrokenPipeError):  # whoever asked has given up waiting
                    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def run(path: str, arguments: list[str]) -> int:
    """Let the server run pytest on `arguments`."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        client.sendall("\n".join(arguments).encode())
        return int(client.recv(64) or b"1")


def sample(session: str, number: int) -> None:
    """Skip all but `number` of the mutants that are to be run."""
    import random
    import sqlite3

    with sqlite3.connect(session) as database:
        query = "select job_id from mutation_specs where job_id not in (select job_id from work_results) order by "
        rows = database.execute(query + "start_pos_row, start_pos_col, operator_name, occurrence").fetchall()
        random.Random(0).shuffle(rows)
        database.executemany(
            "insert into work_results values ('SKIPPED', 'not drawn', null, null, ?)", sorted(rows[number:])
        )


def report(session: str) -> None:
    """Print what survived of a session of cosmic-ray, and how many mutants of each module were killed."""
    import sqlite3

    rows = sqlite3.connect(session).execute(
        "select module_path, test_outcome, operator_name, start_pos_row, worker_outcome from mutation_specs "
        "join work_results using (job_id) order by 1, 4"
    ).fetchall()  # fmt: skip
    alive = [row for row in rows if row[1] == "SURVIVED" and row[4] == "NORMAL"]
    for module, _, operator, line, _ in alive:
        sys.stdout.write(f"{module}:{line}: {operator.removeprefix('core/')} survived\n")
    counted = [row for row in rows if row[4] != "SKIPPED"]
    share = 1.0 - len(alive) / max(1, len(counted))
    sys.stdout.write(f"{session}: {len(counted)} mutants, {len(alive)} survived, {100 * share:.1f} % killed\n")


if __name__ == "__main__":
    command, target, *rest = sys.argv[1:]
    if command == "serve":
        serve(target)
    elif command == "run":
        sys.exit(run(target, rest))
    elif command == "sample":
        sample(target, int(rest[0]))
    else:
        report(target)

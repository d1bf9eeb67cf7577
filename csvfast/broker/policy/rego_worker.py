"""The process in which Rego is evaluated. Run as a program, by path, and fed through its standard input; see rego.py.

It knows nothing worth stealing: no environment, no descriptors but its pipes, no secrets in what it is asked. Before it reads the
first policy it limits itself: no core files, no written files, no child processes, few descriptors, CPU time per request, and
address space beyond what the interpreter's allocator has reserved. What memory is really used, its parent watches.

A message is its length in 4 bytes, big-endian, and JSON. Request: {"module", "helper" or null, "data", "input" as JSON texts,
"query", "cpu": seconds}. Answer: {"output": text} as the interpreter prints it, or {"error": text}. The first answer, unasked, is
{"ready": version}.

Only the standard library and regopy are imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import sys
from typing import Any, Final

MESSAGE_LIMIT: Final = 8 << 20
_KNOWN_LIMIT: Final = 8  # interpreters that are kept, each with a policy and its data compiled in
_ERROR_MESSAGE: Final = re.compile(r"\(errormsg \d+:([^)\n]{1,300})")


def _read_exactly(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            sys.exit(0)  # the parent is gone, or has no more questions
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _send(descriptor: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    if len(data) > MESSAGE_LIMIT:
        data = json.dumps({"error": f"an answer of {len(data)} bytes"}).encode()
    left = memoryview(len(data).to_bytes(4, "big") + data)
    while left:
        left = left[os.write(descriptor, left) :]


def _limit(memory: int) -> None:
    """After the interpreter's library is loaded: its allocator reserves 256 GiB of address space then, and backs none of it."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no more imports than needed
        used = int(file.read().split()[0]) * resource.getpagesize()
    for name, value in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_NOFILE", 16),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_AS", used + memory),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def _allow_cpu(seconds: float) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    # The kernel's default answer to the soft limit ends the process.
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _interpreter(known: dict[str, Any], request: dict[str, Any]) -> Any:
    from regopy import Interpreter

    parts = [request["module"], request["helper"] or "", request["data"]]
    key = hashlib.sha256("\0".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()
    found = known.pop(key, None)
    if found is None:
        found = Interpreter()
        found.add_module("policy", request["module"])
        if request["helper"]:
            found.add_module("helper", request["helper"])
        found.add_data_json(request["data"])
    known[key] = found  # the last one used stands last
    while len(known) > _KNOWN_LIMIT:
        del known[next(iter(known))]
    return found


def _answer(known: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    from regopy import RegoError

    try:
        interpreter = _interpreter(known, request)
        # As a term: set_input takes text as it is, add_data takes it escaped, and then equal texts are not equal.
        interpreter.set_input_term(request["input"])
        output = interpreter.query(request["query"])
        if output.ok():
            return {"output": str(output)}
        reason = str(output)
    except RegoError as error:
        reason = str(error)
    except json.JSONDecodeError as error:  # regopy reads every output as JSON; errors of the policy are none
        reason = error.doc
    known.clear()  # whatever state an error left behind
    return {"error": _message(reason)}


def _message(text: str) -> str:
    """What went wrong; the rest of such a text repeats the policy and its input."""
    found = _ERROR_MESSAGE.findall(text)
    return "; ".join(found[:4]) if found else "an error of the policy that the interpreter does not explain"


def main() -> None:
    """Answers requests until the parent closes the pipe."""
    sys.path.append(sys.argv[1])  # where regopy is installed
    memory = int(sys.argv[2])
    requests, answers = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # the interpreter prints
        os.dup2(null, descriptor)
    import regopy

    _limit(memory)
    _send(answers, {"ready": regopy.__version__})
    known: dict[str, Any] = {}
    while True:
        size = int.from_bytes(_read_exactly(requests, 4), "big")
        if size > MESSAGE_LIMIT:
            sys.exit(1)
        request = json.loads(_read_exactly(requests, size))
        _allow_cpu(request["cpu"])
        _send(answers, _answer(known, request))


if __name__ == "__main__":
    main()

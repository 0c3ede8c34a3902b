"""The process in which math-verify runs: reads a pair of answers per line of JSON, and writes a verdict per line.

It is started as a script and imports nothing of potstill, so that it starts quickly. An error inside math-verify is
written as an error, because math-verify itself would call the answers different.
"""

import json
import os
import resource
import sys
from typing import Any

MAX_BYTES = 4 * 2**30  # of memory; a tower of powers wants more


def compare(reference: str, answer: str) -> dict[str, Any]:
    """`{"equal": bool}`, or `{"unreadable": SIDE}` where math-verify reads no expression on one side."""
    from math_verify import parse, verify

    sides = {}
    for name, text in (("reference", reference), ("answer", answer)):
        sides[name] = parse(f"${text}$", parsing_timeout=None, raise_on_error=True)
        if all(isinstance(expression, str) for expression in sides[name]):
            return {"unreadable": name}
    is_equal = verify(sides["reference"], sides["answer"], timeout_seconds=None, raise_on_error=True)
    return {"equal": bool(is_equal)}


def main() -> None:
    """Answer until the input ends."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no verdict
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    for line in sys.stdin:
        try:
            verdict = compare(*json.loads(line))
        except Exception as error:
            verdict = {"error": f"{type(error).__name__}: {error}"}
        output.write(json.dumps(verdict) + "\n")
        output.flush()


if __name__ == "__main__":
    main()

"""Shows the functions of `potstill.api` with the signatures of `potstill/__init__.pyi`, which name every option."""

from typing import Any

import griffe


class StubSignatures(griffe.Extension):
    """An extension of griffe, which reads the code for the reference."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Give each public function the parameters of its stub, once the package is read."""
        if pkg.name != "potstill":
            return
        for name, function in pkg["api"].functions.items():
            stub = pkg.members.get(name)
            if isinstance(stub, griffe.Function):
                function.parameters = stub.parameters

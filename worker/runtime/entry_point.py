"""Import the function behind a command, "module:function", without what makes imports slow.

Only the command line does this, because it changes the whole process: a program that imports this
package keeps its own garbage collection and its own web3.
"""

import gc
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def load(target: str) -> Callable[..., Any]:
    """Return the function that `target`, "module:function", names."""
    module, _, name = target.partition(":")
    limit = sys.getrecursionlimit()
    _leave_out_curves()
    # Imported objects stay until the process ends. The garbage collector would scan them again and
    # again, also at the end: two of the six seconds in which a worker starts and stops.
    gc.disable()
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    finally:
        gc.freeze()
        gc.enable()
    # web3 imports py_ecc, which raises the limit a hundredfold: a deeply nested answer of a peer or
    # an RPC server would then overflow the stack and end the process, instead of being refused.
    sys.setrecursionlimit(limit)
    return function


def _leave_out_curves() -> None:
    """Put empty modules in the place of py_ecc's curves, which it computes when it is imported.

    web3 imports them through eth_keyfile, for keys of Ethereum's validators, which no account here
    has. They take 0.4 s of the processor in nearly every process.
    """
    for name, content in (
        ("py_ecc.bls", {"G2ProofOfPossession": None}),
        ("py_ecc.bls12_381", {"curve_order": 0}),
    ):
        module = ModuleType(name)
        vars(module).update(content)
        sys.modules.setdefault(name, module)

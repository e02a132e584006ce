"""hivewright's worker: trains a language model in a swarm, and hosts the swarm's other roles."""

import sys
from types import ModuleType

__version__ = "0.1.0"


def _leave_out(name: str, **content: object) -> None:
    """Put an empty module with this content in the place of a module that nobody needs."""
    module = ModuleType(name)
    vars(module).update(content)
    sys.modules.setdefault(name, module)


# web3 imports eth_keyfile, which also reads the keys of Ethereum's validators. Their curves, which
# no key here is on, are computed at import: 0.4 s of processor time in nearly every process.
_leave_out("py_ecc.bls", G2ProofOfPossession=None)
_leave_out("py_ecc.bls12_381", curve_order=0)

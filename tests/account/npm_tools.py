"""Programs from npm that the tests use, at the versions in npm/package-lock.json."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent / "npm"
CACHE = Path(__file__).parents[2] / ".cache/npm"


def modules() -> Path:
    """Return the folder node_modules; the first call installs it."""
    lock = (HERE / "package-lock.json").read_bytes()
    folder = CACHE / hashlib.sha256(lock).hexdigest()[:16]
    if not (folder / ".complete").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, folder)
        subprocess.run(
            ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
            cwd=folder,
            check=True,
            timeout=240,
            capture_output=True,
        )
        (folder / ".complete").touch()
    return folder / "node_modules"


@contextmanager
def openid_provider(callback: str) -> Iterator[str]:
    """Run a real OpenID Connect provider for our client until the block ends: its issuer."""
    environment = {**os.environ, "NODE_PATH": str(modules())}
    command = ["node", str(HERE / "provider.mjs"), callback]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("http"), process.stderr.read()
            yield line.strip()
        finally:
            process.kill()
            process.wait()

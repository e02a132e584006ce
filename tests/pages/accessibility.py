"""axe-core, which finds barriers for keyboards and screen readers; fetched once by npm."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from playwright.sync_api import Page

FILE = Path(__file__).resolve().parents[2] / ".cache/axe/axe-4.14.1.min.js"
PACKAGE = "axe-core@4.14.1"
SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"


def barriers(page: Page) -> list[str]:
    """Return what axe finds in the page, a line each: rule, element."""
    page.evaluate(_source())
    found = page.evaluate("axe.run()")
    return [
        f"{each['id']}: {node['html'][:200]}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


def _source() -> str:
    if not FILE.exists():
        _fetch()
    return FILE.read_text()


def _fetch() -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("axe-core is fetched by npm, which is not installed")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([npm, "pack", PACKAGE, "--silent"], cwd=folder, check=True, timeout=120)
        (archive,) = Path(folder).glob("*.tgz")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        assert digest == SHA256, f"{PACKAGE} has the digest {digest}; expected {SHA256}"
        with tarfile.open(archive) as files:
            source = files.extractfile("package/axe.min.js")
            assert source is not None
            FILE.parent.mkdir(parents=True, exist_ok=True)
            FILE.write_bytes(source.read())

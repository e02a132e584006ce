"""A real git repository in a temporary folder."""

import subprocess
from pathlib import Path


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder and return its output. Raises CalledProcessError."""
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    done = subprocess.run(
        ["git", "-C", folder, *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
        timeout=30,
    )
    return done.stdout.strip()


def make_repository(folder: Path) -> Path:
    """Make a repository: two commits on `main`, of which the first has the tag `v1`."""
    folder.mkdir()
    git(folder, "init", "--quiet", "--initial-branch=main")
    git(folder, "commit", "--quiet", "--allow-empty", "--message=one")
    git(folder, "tag", "--annotate", "v1", "--message=v1")
    git(folder, "commit", "--quiet", "--allow-empty", "--message=two")
    return folder

"""Releases: /opt/hivewright/releases/COMMIT with a virtual environment; `current` is one of them.

Both are named by their content: a release by its commit, an environment by a digest of its inputs.
Existing ones are complete and never change, so a run with the same commit does nothing, two
releases with the same lock file share an environment, and rolling back changes one symbolic link.
"""

import base64
import hashlib
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

from pyinfra import host
from pyinfra.api import StringCommand, deploy, operation
from pyinfra.facts.files import File

from deploys import operator, units
from deploys.facts import FileContent, PastDeploys, Releases
from deploys.hardware import Distribution
from deploys.inventory.host_plan import Planned
from deploys.offline import shipping
from deploys.offline.wheelhouse import ANVIL_INPUTS
from deploys.paths import ANVILS, CURRENT, ENVIRONMENTS, RELEASES, SHIPPED, USER, WHEELS
from deploys.system import python_of

KEEP = 3
ENVIRONMENT_INPUTS = ("requirements/worker.lock", "requirements/first.txt", "scripts/environment")
# Suffix of an environment with the trackers' packages.
TRACKERS_LOCK, TRACKERS_PROGRAM = "requirements/trackers.lock", "bin/trackio"
DIGEST = "sha256sum | cut -c 1-16"
CHECKOUT_SECONDS = 600
# Enough for a first download of torch over a slow connection.
BUILD_SECONDS = 3600


@deploy("Release")
def fetch_release(plan: Planned) -> None:
    """Check out the plan's commit, build its environment, and check the host's settings with it.

    The release does not become current yet.
    """
    has_anvil = plan.host.needs_anvil
    if plan.host.deployment.release_source == "wheelhouse":
        ship_release(plan, has_anvil)
    else:
        checkout(
            name=f"Check out {plan.commit[:12]}",
            repository=plan.repository,
            commit=plan.commit,
            _timeout=CHECKOUT_SECONDS,
        )
    build_environment(
        name="Build the virtual environment of its lock file",
        commit=plan.commit,
        torch_index=plan.torch_index,
        is_shipped=plan.host.deployment.release_source == "wheelhouse",
        has_trackers=plan.host.has_trackers,
        _timeout=BUILD_SECONDS,
    )
    if has_anvil:
        install_anvil(name="Install its anvil", commit=plan.commit, _timeout=BUILD_SECONDS)
    texts = {file: units.settings_text(of) for file, of in plan.host.settings_files().items()}
    check_settings(name="Check the settings with it", commit=plan.commit, texts=texts)


def ship_release(plan: Planned, has_anvil: bool) -> None:
    """Send everything that the release is made from to a host that cannot fetch it."""
    of = {"repository": plan.repository, "commit": plan.commit}
    shipping.checkout(name=f"Ship {plan.commit[:12]}", **of, _timeout=CHECKOUT_SECONDS)
    shipping.wheels(
        name="Ship the wheels of its lock file",
        **of,
        torch_index=plan.torch_index,
        _timeout=CHECKOUT_SECONDS,
    )
    if has_anvil:
        shipping.anvil(name="Ship its anvil", **of, _timeout=CHECKOUT_SECONDS)


@deploy("Release")
def switch_to_release(plan: Planned) -> None:
    """Make the plan's commit current, after the state of the host was saved for a rollback."""
    activate(name="Make it the current release", commit=plan.commit)


@operation()
def checkout(
    repository: str,
    commit: str,
) -> Iterator[str]:
    """Check out `commit` into its release folder."""
    if commit in host.get_fact(Releases).parts:
        host.noop(f"{commit} is checked out")
        return
    git = 'git -C "$partial"'
    options = shlex.join(["--quiet", "--depth=1", *operator.read_options(repository)])
    # Removes folders of interrupted runs: the lock ensures that no other run is active.
    yield (
        f"rm -rf {RELEASES}/.partial*; partial=$(mktemp -d {RELEASES}/.partial-XXXXXX) && chmod 755"
        " $partial && trap 'rm -rf $partial' EXIT && git init --quiet $partial &&"
        f" GIT_TERMINAL_PROMPT=0 {git} fetch {options} {shlex.quote(repository)} {commit} && {git}"
        f" checkout --quiet --detach FETCH_HEAD && mv -T $partial {RELEASES / commit}"
    )


@operation()
def build_environment(
    commit: str,
    torch_index: str | None,
    is_shipped: bool,
    has_trackers: bool = False,
) -> Iterator[str]:
    """Build the environment of the release's lock file, and link it from the release.

    `has_trackers`: it must have the trackers' packages.
    """
    release = RELEASES / commit
    is_there = host.get_fact(Releases).has(commit, ENVIRONMENTS)
    program = release / "environment" / TRACKERS_PROGRAM
    if is_there and not (has_trackers and host.get_fact(File, path=str(program)) is None):
        host.noop(f"the environment of {commit} is complete")
        return
    python = python_of(host.get_fact(Distribution))
    script = environment_script(release, torch_index, python, is_shipped, has_trackers)
    yield f"{script} && ln -sfn $folder {release}/environment"


def environment_script(
    checkout_folder: Path,
    torch_index: str | None,
    python: str = "python3",
    is_shipped: bool = False,
    has_trackers: bool = False,
) -> str:
    """Return shell commands that make the environment of a checkout unless it exists, in `$folder`.

    `is_shipped`: use only the wheels that are linked in the checkout.
    """
    index = (
        '"$(readlink wheels)"' if is_shipped else shlex.quote(torch_index) if torch_index else ""
    )
    lock, *others = ENVIRONMENT_INPUTS
    files = " ".join((TRACKERS_LOCK if has_trackers else lock, *others))
    name = "trackers" if has_trackers else "worker"
    inputs = f"{{ cat {files}; {python} --version; echo {index}; }}"
    own = "" if python == "python3" else f"PYTHON={python} "
    return (
        f"cd {checkout_folder} && folder={ENVIRONMENTS}/$({inputs} | {DIGEST})"
        f" && mkdir -p {ENVIRONMENTS} && {own}scripts/environment $folder {name} {index}"
    )


@operation()
def install_anvil(commit: str) -> Iterator[str]:
    """Install the release's version of anvil, and link it from the release."""
    if host.get_fact(Releases).has(commit, ANVILS):
        host.noop(f"the anvil of {commit} is installed")
        return
    release = RELEASES / commit
    yield f"{anvil_script(release, ANVILS)} && ln -sfn $folder {release}/anvil"


def anvil_script(checkout_folder: Path, anvils: Path) -> str:
    """Return shell commands that install the anvil of a checkout unless it exists, in `$folder`."""
    return (
        f"cd {checkout_folder} && folder={anvils}/$(cat {' '.join(ANVIL_INPUTS)} | {DIGEST})"
        " && mkdir -p $folder && scripts/anvil $folder"
    )


@operation()
def check_settings(
    commit: str,
    texts: Mapping[Path, str],
) -> Iterator[StringCommand]:
    """Check the host's settings with the release before it becomes current or any file changes.

    Not everything can be checked on the operator's side: the task families, for instance, depend on
    the environment.
    """
    is_current = host.get_fact(Releases).current == commit
    for file, text in texts.items():
        found = host.get_fact(FileContent, path=str(file))
        if not (is_current and found and found.sha256 == hashlib.sha256(text.encode()).hexdigest()):
            encoded = base64.b64encode(text.encode()).decode()
            yield StringCommand(check_script(RELEASES / commit, file, USER), _stdin=[encoded])


def check_script(
    release: Path,
    file: Path,
    user: str,
) -> str:
    """Return shell commands that check a base64 settings file from standard input."""
    new = f"{file}.new"
    return (
        f"umask 027 && base64 -d > {new} && chgrp {user} {new} && cd {release} && runuser -u {user}"
        f" -- environment/bin/python -m worker check --settings {new} > /dev/null; code=$?; rm -f"
        f" {new}; case $code in 0) ;; 2) echo '{file} is left as it was, and so is all that runs;"
        f" fix the inventory and run again' >&2;; *) echo '{file} could not be checked, and is left"
        " as it was' >&2;; esac; exit $code"
    )


@operation()
def activate(commit: str) -> Iterator[str]:
    """Point `current` at the release, atomically."""
    if host.get_fact(Releases).current == commit:
        host.noop(f"{commit} is current")
        return
    yield f"ln -sfn {RELEASES / commit} {CURRENT}.new && mv -T {CURRENT}.new {CURRENT}"


@operation()
def prune() -> Iterator[str]:
    """Remove all releases but the current, the previous and the latest ones, and unused folders."""
    found = host.get_fact(Releases)
    others = [commit for commit in found.parts if commit != found.current]
    kept = {found.current, host.get_fact(PastDeploys).previous, *others[: KEEP - 1]}
    for commit in others:
        if commit not in kept:
            yield f"rm -rf {RELEASES / commit}"
    used = {part for commit, parts in found.parts.items() if commit in kept for part in parts}
    for folder in sorted(found.folders - used):
        # Shipped files to which no folder of wheels has a hard link are no longer needed.
        unused = (
            f" && find {SHIPPED} -maxdepth 1 -type f -links 1 -delete"
            if folder.parent == WHEELS
            else ""
        )
        yield f"rm -rf {folder}{unused}"

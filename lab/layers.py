"""The read-only layers of lab hosts, cached outside the checkout and named by their content.

    base-DIGEST       Debian from `mmdebstrap`, plus what makes it a test host (sshd, masked timers)
    apt-DIGEST        an apt repository of the packages that a deploy installs, seen at /srv/apt
    installed-DIGEST  most of these packages, installed: a deploy installs the others
    python-DIGEST     /opt/hivewright/environments/DIGEST, by the checkout's scripts/environment
    anvil-DIGEST      /opt/hivewright/anvil/DIGEST, by the checkout's scripts/anvil

A layer is made in a temporary folder and renamed when complete, so an interrupted run leaves no
incomplete layer. Deleting the cache costs only the minutes that it takes to make it again.
"""

import contextlib
import fcntl
import hashlib
import inspect
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from deploys import paths, release, system, wireguard
from deploys.offline import wheelhouse
from lab.process import run

CACHE = Path("/var/tmp/hivewright-lab/cache")
CHECKOUT_IN_LAYER = Path("/srv/checkout")
# Debian 12, the default of a lab.
SUITE = "bookworm"
# Other checkouts of this machine may use other layers; those unused for a day are removed.
KEEP_SECONDS = 24 * 3600
BASE_PACKAGES = (
    "systemd,systemd-sysv,dbus,openssh-server,python3,sudo,ca-certificates,iproute2,procps"
)
# Units that start work by themselves, and the network manager, since the lab sets the addresses.
MASKED = (
    "getty@tty1.service",
    "console-getty.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "dpkg-db-backup.timer",
    "fstrim.timer",
    "systemd-networkd.service",
    "systemd-resolved.service",
    "systemd-timesyncd.service",
)
# Left out of the installed ones, so that a deploy to any host has packages to install.
LEFT_TO_THE_DEPLOY = ("screen", "unzip")
SSHD = "PasswordAuthentication no\nUseDNS no\nMaxStartups 100:30:200\n"


def base(suite: str = SUITE) -> Path:
    """Return Debian with systemd and sshd, without host keys and machine id."""
    mirror = _debian_mirror()
    parts = [mirror, suite, BASE_PACKAGES, SSHD, *MASKED]
    return _layer("base", parts, _make_base, lambda folder: _make_base(folder, mirror, suite))


def packages(suite: str = SUITE) -> Path:
    """Return an apt repository with the packages that the deploy installs."""
    names = [*system.PACKAGES, *system.COORDINATOR_PACKAGES, *wireguard.PACKAGES]
    below = base(suite)
    return _layer(
        "apt",
        [below.name, *names],
        _fill_repository,
        lambda folder: _fill_repository(folder, below, names, suite),
    )


def installed_packages() -> Path:
    """Return the packages of every deployed host but LEFT_TO_THE_DEPLOY, as installed by apt."""
    names = [name for name in system.PACKAGES if name not in LEFT_TO_THE_DEPLOY]
    below, repository = base(), packages()
    return _layer(
        "installed",
        [below.name, *names],
        _install_packages,
        lambda folder: _install_packages(folder, below, repository, names),
    )


def python_environment(checkout: Path) -> Path:
    """Return the virtual environment of the checkout's lock file, where a deploy looks for it."""
    below = [installed_packages(), base()]
    parts = [(checkout / name).read_text() for name in release.ENVIRONMENT_INPUTS]
    script = release.environment_script(CHECKOUT_IN_LAYER, torch_index=None)
    return _layer(
        "python",
        [*(layer.name for layer in below), script, *parts],
        _build_environment,
        lambda folder: _build_environment(folder, below, checkout),
    )


def anvil(checkout: Path) -> Path:
    """Return the embedded chain, where a deploy looks for it."""
    parts = [(checkout / name).read_text() for name in wheelhouse.ANVIL_INPUTS]
    script = release.anvil_script(checkout, paths.ANVILS)
    return _layer(
        "anvil", [script, *parts], _install_anvil, lambda folder: _install_anvil(folder, checkout)
    )


@contextlib.contextmanager
def overlay(
    lower: Sequence[Path],
    upper: Path,
    root: Path,
) -> Iterator[Path]:
    """Mount `lower` (topmost first) under `upper` at `root` for the duration of the block."""
    mount_overlay(lower, upper, root)
    try:
        yield root
    finally:
        run("umount", root)


def mount_overlay(
    lower: Sequence[Path],
    upper: Path,
    root: Path,
) -> None:
    """Mount `lower` (topmost first) under the writable folder `upper` at `root`."""
    work = upper.parent / "work"
    for folder in (upper, work, root):
        folder.mkdir(parents=True, exist_ok=True)
    options = f"lowerdir={':'.join(map(str, lower))},upperdir={upper},workdir={work}"
    run("mount", "-t", "overlay", "overlay", "-o", options, root)


def _layer(
    kind: str,
    parts: Sequence[str],
    recipe: Callable[..., None],
    make: Callable[[Path], None],
) -> Path:
    """Return the layer that `recipe` makes from `parts`; `make` fills a new folder if needed."""
    inputs = "\0".join([inspect.getsource(recipe), *parts])
    digest = hashlib.sha256(inputs.encode()).hexdigest()[:16]
    layer = CACHE / f"{kind}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not layer.exists():
            partial = CACHE / f"{layer.name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            _remove_old(kind)
            partial.rename(layer)
        os.utime(layer)
    return layer


def _remove_old(kind: str) -> None:
    """Remove layers that nobody has used for KEEP_SECONDS and that are not mounted."""
    mounts = Path("/proc/self/mounts").read_text()
    for layer in CACHE.glob(f"{kind}-*"):
        age = time.time() - layer.stat().st_mtime
        if age > KEEP_SECONDS and str(layer) not in mounts:
            shutil.rmtree(layer)


def _debian_mirror() -> str:
    """Return this machine's Debian mirror, or Debian's own."""
    for sources in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        for line in sources.read_text().splitlines():
            if line.startswith("URIs:") and "debian" in line:
                return line.split()[1]
    return "http://deb.debian.org/debian"


def _make_base(folder: Path, mirror: str, suite: str) -> None:
    run(
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--dpkgopt=force-unsafe-io",
        f"--include={BASE_PACKAGES}",
        suite,
        folder,
        mirror,
        timeout=300,
    )
    (folder / "etc/machine-id").write_text("")
    (folder / "var/lib/dbus/machine-id").unlink(missing_ok=True)
    for key in (folder / "etc/ssh").glob("ssh_host_*"):
        key.unlink()
    (folder / "etc/ssh/sshd_config.d/lab.conf").write_text(SSHD)
    (folder / "etc/apt/sources.list").write_text("deb [trusted=yes] file:/srv/apt ./\n")
    units = folder / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (units / "default.target").symlink_to("/lib/systemd/system/multi-user.target")


def _fill_repository(
    folder: Path,
    below: Path,
    names: Sequence[str],
    suite: str,
) -> None:
    """Download packages with this machine's network, against the state of the base's dpkg."""
    (folder / "partial").mkdir()
    with _scratch([below]) as root:
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        (root / "etc/apt/sources.list").write_text(f"deb {_debian_mirror()} {suite} main\n")
        get = "apt-get -qq update && apt-get -qq -y --no-install-recommends --download-only install"
        _enter(
            root,
            f"{get} {' '.join(names)}",
            timeout=600,
            binds=[f"{folder}:/var/cache/apt/archives"],
            network=True,
        )
    shutil.rmtree(folder / "partial")
    (folder / "lock").unlink(missing_ok=True)
    (folder / "Packages").write_text(
        run("sh", "-c", 'cd "$0" && apt-ftparchive packages .', folder, timeout=60).stdout
    )


def _install_packages(
    folder: Path,
    below: Path,
    repository: Path,
    names: Sequence[str],
) -> None:
    """Install packages in a temporary host, and keep the files that this writes."""
    with _scratch([below]) as root:
        script = (
            "apt-get -qq update && apt-get -qq -y --no-install-recommends install"
            f" {' '.join(names)} && rm -rf /var/lib/apt/lists/*"
        )
        _enter(root, script, timeout=300, binds=[f"{repository}:/srv/apt"])
        run("cp", "--archive", f"{root.parent}/upper/.", folder, timeout=60)


def _build_environment(
    folder: Path,
    below: Sequence[Path],
    checkout: Path,
) -> None:
    """Run the checkout's script in a temporary host with this machine's network and caches."""
    with _scratch(below) as root:
        binds = [f"{checkout}:{CHECKOUT_IN_LAYER}", *_package_sources(root)]
        script = release.environment_script(CHECKOUT_IN_LAYER, torch_index=None)
        _enter(root, script, timeout=1200, binds=binds, network=True)
        built = root / paths.ENVIRONMENTS.relative_to("/")
        shutil.copytree(built, folder / paths.ENVIRONMENTS.relative_to("/"), symlinks=True)


def _install_anvil(folder: Path, checkout: Path) -> None:
    """Run the checkout's script on this machine, and make its links relative."""
    below = folder / paths.ANVILS.relative_to("/")
    run("sh", "-euc", release.anvil_script(checkout, below), timeout=300)
    for link in below.glob("*/anvil"):
        target = link.resolve().relative_to(link.parent)
        link.unlink()
        link.symlink_to(target)


def _package_sources(root: Path) -> list[str]:
    """Copy this machine's pip configuration; return binds for the local folders in it."""
    options, binds = [], []
    for line in run("python3", "-m", "pip", "config", "list").stdout.splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name not in ("find-links", "index-url"):
            continue
        value = value.strip("'")
        options.append(f"{name} = {value}")
        for word in value.split():
            local = word.removeprefix("file://")
            if local.startswith("/"):
                binds.append(f"{local}:{local}")
    (root / "etc/pip.conf").write_text("\n".join(["[global]", *dict.fromkeys(options)]) + "\n")
    certificates = "/etc/ssl/certs/ca-certificates.crt"
    binds.append(f"{certificates}:{certificates}")
    cache = Path("/root/.cache/uv")
    cache.mkdir(parents=True, exist_ok=True)
    return [*dict.fromkeys(binds), f"+{cache}:{cache}"]


@contextlib.contextmanager
def _scratch(lower: Sequence[Path]) -> Iterator[Path]:
    """Provide a temporary root file system."""
    folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=CACHE))
    try:
        with overlay(lower, folder / "upper", folder / "root") as root:
            yield root
    finally:
        shutil.rmtree(folder)


def _enter(
    root: Path,
    script: str,
    timeout: float,
    binds: Sequence[str] = (),
    network: bool = False,
) -> None:
    """Run a shell script in `root`.

    Binds are SOURCE:TARGET, read-only unless they start with `+`.
    """
    writable = {"/var/cache/apt/archives"}
    options = []
    for bind in binds:
        is_writable = bind.startswith("+") or bind.partition(":")[2] in writable
        options.append(f"--bind{'' if is_writable else '-ro'}={bind.removeprefix('+')}")
    machine = f"bake-{os.getpid()}"
    run(
        "systemd-nspawn",
        "--quiet",
        f"--directory={root}",
        f"--machine={machine}",
        "--register=no",
        "--keep-unit",
        "--console=pipe",
        f"--resolv-conf={'copy-host' if network else 'off'}",
        "--timezone=off",
        *([] if network else ["--private-network"]),
        *options,
        "--setenv=SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt",
        "--setenv=DEBIAN_FRONTEND=noninteractive",
        "/bin/sh",
        "-euc",
        script,
        timeout=timeout,
    )
    forget_machine(machine)


def forget_machine(machine: str) -> None:
    """Remove the folder that systemd-nspawn leaves behind for every machine that it has run."""
    propagate = Path("/run/systemd/nspawn/propagate") / machine
    if propagate.exists():
        propagate.rmdir()

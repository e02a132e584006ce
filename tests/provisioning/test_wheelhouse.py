"""A release for hosts without internet: collected from local wheels, shipped, built offline."""

import base64
import hashlib
import importlib.metadata
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from deploys import facts, operator, paths, release
from deploys.offline import shipping, wheelhouse
from deploys.offline.wheelhouse import Parcel, Target
from tests.provisioning.shell_host import ShellHost
from worker.errors import WorkerError

CHECKOUT = Path(__file__).parents[2]
HERE = Target("x86_64", "3.11", "2.36", None)


def write_wheel(
    folder: Path, name: str, version: str, tag: str = "py3-none-any", needs: str = ""
) -> Path:
    file = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    content = {
        f"{name}.py": f"VERSION = '{version}'\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(file, "w") as wheel:
        for path, text in content.items():
            wheel.writestr(path, text)
    return file


def repack(folder: Path, name: str) -> Path:
    """Rebuild the wheel of an installed package."""
    package = importlib.metadata.distribution(name)
    info = Path(str(package.locate_file(f"{name}-{package.version}.dist-info")))
    tag = next(
        line.split()[1]
        for line in (info / "WHEEL").read_text().splitlines()
        if line.startswith("Tag: ")
    )
    file = folder / f"{name}-{package.version}-{tag}.whl"
    with zipfile.ZipFile(file, "w") as wheel:
        for entry in package.files or []:
            place = (
                f"{name}-{package.version}.data/scripts/{entry.name}"
                if entry.parts[0] == ".."
                else str(entry)
            )
            if "__pycache__" not in entry.parts and Path(str(entry.locate())).exists():
                wheel.write(str(entry.locate()), place)
    return file


BUILD_SYSTEM = (
    '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
)


def write_source(folder: Path, name: str, version: str, build_system: str = BUILD_SYSTEM) -> Path:
    """Make a source distribution; without `build_system` it has no pyproject.toml."""
    file = folder / f"{name}-{version}.tar.gz"
    setup = (
        f"from setuptools import setup\nsetup(name='{name}', version='{version}',"
        f" py_modules=['{name}'])\n"
    )
    files = {
        "setup.py": setup,
        f"{name}.py": f"VERSION = '{version}'\n",
        "pyproject.toml": build_system,
    }
    with tarfile.open(file, "w:gz") as tar:
        for path, text in files.items():
            if not text:
                continue
            entry = tarfile.TarInfo(f"{name}-{version}/{path}")
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return file


def git(repository: Path, *arguments: str) -> str:
    author = ("-c", "user.name=t", "-c", "user.email=t@localhost")
    command = ["git", "-C", str(repository), *author, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=30, check=True
    ).stdout.strip()


def lock_line(file: Path, marker: str = "") -> str:
    name, version = file.name.split("-")[:2]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f"{name}=={version.removesuffix('.tar.gz')}{marker} \\\n    --hash=sha256:{digest}\n"


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index for pip: small packages, and the installed uv and setuptools."""
    folder = tmp_path_factory.mktemp("index")
    write_wheel(folder, "alpha", "1.0")
    write_wheel(folder, "arm", "1.0", "py3-none-manylinux_2_17_aarch64")
    write_wheel(
        folder, "torch", "0.0.7", needs="Requires-Dist: cuda==3.0; platform_machine == 'x86_64'"
    )
    write_wheel(folder, "cuda", "3.0", "py3-none-manylinux_2_28_x86_64")
    write_source(folder, "native", "2.0")
    repack(folder, "uv")
    repack(folder, "setuptools")
    return folder


@pytest.fixture
def repository(index: Path, tmp_path: Path) -> Path:
    """A release: its lock file, and the checkout's own script."""
    folder = tmp_path / "repository"
    for place in ("requirements", "scripts"):
        (folder / place).mkdir(parents=True)
    uv = importlib.metadata.version("uv")
    (folder / "requirements/first.txt").write_text(f"# first\nuv=={uv}\ntorch==0.0.7\n")
    lock = [
        lock_line(index / "alpha-1.0-py3-none-any.whl"),
        lock_line(
            index / "arm-1.0-py3-none-manylinux_2_17_aarch64.whl",
            " ; platform_machine == 'aarch64'",
        ),
        lock_line(index / "native-2.0.tar.gz"),
    ]
    (folder / "requirements/worker.lock").write_text("# lock\n" + "".join(lock))
    # As in the real one: for the lock file torch needs nothing, and that must not be what a host
    # installs.
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\n'
        '[[tool.uv.dependency-metadata]]\nname = "torch"\nversion = "0.0.7"\nrequires-dist = []\n'
    )
    script = folder / "scripts/environment"
    script.write_text((CHECKOUT / "scripts/environment").read_text())
    script.chmod(0o755)
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "release")
    return folder


@pytest.fixture
def host(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShellHost:
    """A bare host with /opt/hivewright in a temporary folder; pip here knows only `index`."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "true")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(wheelhouse, "FOLDER", tmp_path / "wheelhouse")
    root = tmp_path / "opt"
    for name in ("RELEASES", "ENVIRONMENTS", "ANVILS", "SHIPPED", "WHEELS", "CURRENT"):
        place = root / getattr(paths, name).relative_to(paths.ROOT)
        for module in (facts, release, shipping):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, place)
    monkeypatch.setattr(shipping, "PARTIAL", root / "shipped/.partial")
    (root / "releases").mkdir(parents=True)
    stand_in = ShellHost()
    for module in (release, shipping):
        monkeypatch.setattr(module, "host", stand_in)
    return stand_in


def ship(host: ShellHost, repository: Path, commit: str) -> None:
    """Do what `release.fetch_release` does for an environment from a wheelhouse."""
    host.run(shipping.checkout._inner(str(repository), commit))
    host.run(shipping.wheels._inner(str(repository), commit, None))
    host.run(release.build_environment._inner(commit, None, True))


def test_environment_is_built_without_network_from_what_was_shipped_once(
    host: ShellHost, repository: Path, tmp_path: Path
) -> None:
    commit = operator.resolve(str(repository), git(repository, "branch", "--show-current"), "")
    ship(host, repository, commit)
    there = tmp_path / "opt/releases" / commit
    assert sorted(path.name for path in there.iterdir()) == [
        "environment",
        "pyproject.toml",
        "requirements",
        "scripts",
        "wheels",
    ]
    names = sorted(path.name.split("-")[0] for path in (there / "wheels/").iterdir())
    assert names == ["alpha", "cuda", "native", "setuptools", "torch", "uv"]
    said = subprocess.run(
        [
            there / "environment/bin/python",
            "-c",
            "import alpha, native, cuda; print(alpha.VERSION, native.VERSION)",
        ],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert said.stdout == "1.0 2.0\n"

    host.sent.clear()
    ship(host, repository, commit)
    assert host.sent == []
    assert len(host.noops) == 3

    (repository / "README").write_text("news\n")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "--message", "next")
    ship(host, repository, git(repository, "rev-parse", "HEAD"))
    archive, links = (sent for sent in host.sent if sent)
    assert archive < 20_000, "more than the release's own files"
    assert links < 1000, "wheels that are there were sent again"
    assert len(list((tmp_path / "opt/environments").iterdir())) == 1


def parcel(content: bytes) -> Parcel:
    made = Parcel("file", hashlib.sha256(content).hexdigest(), len(content))
    made.path.parent.mkdir(parents=True, exist_ok=True)
    made.path.write_bytes(content)
    return made


def test_file_that_was_cut_off_goes_on_where_it_stopped(
    host: ShellHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "CHUNK", 1000)
    content = bytes(range(256)) * 20
    large = parcel(content)
    host.run([shipping._prepare()])
    (shipping.PARTIAL / large.sha256).write_bytes(content[:3500])
    host.run(shipping.send([large, parcel(b"small"), parcel(b"another")]))
    encoded = [len(base64.b64encode(content[at : at + 1000])) for at in (3500, 4500)]
    assert host.sent[1:3] == [*encoded][:2]
    assert {file.read_bytes() for file in shipping.SHIPPED.iterdir() if file.is_file()} == {
        content,
        b"small",
        b"another",
    }
    host.sent.clear()
    host.run(shipping.send([large]))
    assert host.sent == []


def test_file_that_arrives_damaged_is_refused_and_sent_anew(
    host: ShellHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipping, "CHUNK", 1000)
    large = parcel(b"x" * 2500)
    host.run([shipping._prepare()])
    (shipping.PARTIAL / large.sha256).write_bytes(b"y" * 2000)
    with pytest.raises(
        AssertionError, match=f"{large.sha256} arrived damaged and was removed; run again"
    ):
        host.run(shipping.send([large]))
    host.run(shipping.send([large]))
    assert (shipping.SHIPPED / large.sha256).read_bytes() == b"x" * 2500


def test_commands_that_were_run_keep_nothing_of_what_they_sent(host: ShellHost) -> None:
    host.run([shipping._prepare()])
    commands = []
    for command in shipping.send([parcel(b"x" * 5000)]):
        host.run([command])
        commands.append(command)
    assert [command.connector_arguments.get("_stdin") for command in commands] == [[]]


def test_release_of_before_wheelhouses_is_refused(host: ShellHost, repository: Path) -> None:
    git(repository, "rm", "--quiet", "requirements/first.txt")
    git(repository, "commit", "--quiet", "--message", "old")
    commit = git(repository, "rev-parse", "HEAD")
    with pytest.raises(
        WorkerError,
        match=r"has no requirements/first\.txt; it can only be deployed from its reposit",
    ):
        wheelhouse.pack_wheels(str(repository), commit, HERE)


def test_package_that_can_not_be_had_is_named_and_nothing_is_kept(
    host: ShellHost, repository: Path, tmp_path: Path
) -> None:
    target = Target("aarch64", "3.11", "2.10", None)
    commit = git(repository, "rev-parse", "HEAD")
    with pytest.raises(
        WorkerError, match=r"^pip: ERROR: Could not find a version that satisfies .* arm==1\.0"
    ):
        wheelhouse.pack_wheels(str(repository), commit, target)
    assert not list((tmp_path / "wheelhouse").glob("wheels-*.json"))


def test_what_builds_a_source_distribution_is_shipped_with_it(tmp_path: Path) -> None:
    assert wheelhouse._build_requirements(write_source(tmp_path, "new", "1")) == ["setuptools"]
    assert wheelhouse._build_requirements(write_source(tmp_path, "old", "1", "")) == [
        "setuptools>=40.8.0"
    ]


def test_wheels_are_asked_for_as_the_target_takes_them() -> None:
    flags = Target("aarch64", "3.13", "2.41", None).pip_flags()
    assert flags[:4] == ["--implementation", "cp", "--python-version", "3.13"]
    platforms = [flag.removeprefix("--platform=") for flag in flags[4:]]
    assert platforms[0] == "manylinux_2_41_aarch64"
    assert "manylinux_2_17_aarch64" in platforms
    assert platforms[-1] == "linux_aarch64"
    assert Target("aarch64", "3.13", "2.41", None).markers()["platform_machine"] == "aarch64"

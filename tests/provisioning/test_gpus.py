"""GPUs as a driver reports them, and the build of torch chosen for them."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

from deploys import gpus
from deploys.gpus import Gpu, Gpus
from deploys.hardware import HostGpus, OwnPipSources
from deploys.inventory import torch_builds
from deploys.inventory.torch_builds import BUILDS, CPU_INDEX, choose_torch
from worker.errors import SettingsError

ROOT = Path(__file__).parents[2]
INDEX = "https://download.pytorch.org/whl/"
# As a driver of 2025 prints it.
HEADER = "| NVIDIA-SMI 580.95.05    Driver Version: 580.95.05    CUDA Version: 13.0     |"


def ask(folder: Path, shim: str | None) -> Gpus:
    """Ask the fact through a real shell with this nvidia-smi (None: without one)."""
    for name in ("sed", "head", "cat", "timeout", "grep"):
        (folder / name).symlink_to(f"/usr/bin/{name}")
    if shim is not None:
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{shim}\n")
        (folder / "nvidia-smi").chmod(0o755)
    fact = HostGpus()
    done = subprocess.run(
        ["/bin/sh", "-c", fact.command()],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env={**os.environ, "PATH": str(folder)},
    )
    lines = done.stdout.splitlines()
    return fact.process(lines) if lines else fact.default()


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path) -> None:
    rows = "\\n".join(
        f"{n}, GPU-{n}, NVIDIA H100 80GB HBM3, 81559, 9.0, 580.95.05" for n in range(8)
    )
    found = ask(tmp_path, f'case "$1" in --query*) printf "{rows}\\n";; *) echo "{HEADER}";; esac')
    assert found.cards[7] == Gpu(7, "GPU-7", "NVIDIA H100 80GB HBM3", 81559, (9, 0))
    assert (len(found.cards), found.driver_cuda, found.driver, found.problem) == (
        8,
        (13, 0),
        "580.95.05",
        None,
    )


def test_host_without_a_driver_has_no_gpus(tmp_path: Path) -> None:
    assert ask(tmp_path, None) == Gpus()


def test_driver_that_fails_is_a_problem_with_its_own_words(tmp_path: Path) -> None:
    found = ask(
        tmp_path, "echo 'NVIDIA-SMI has failed because it could not reach the driver.'; exit 9"
    )
    assert found.cards == ()
    assert (
        found.problem
        == "nvidia-smi says: NVIDIA-SMI has failed because it could not reach the driver.; install"
        " or fix the NVIDIA driver until `nvidia-smi` lists the GPUs"
    )


def test_answer_in_another_form_is_a_problem() -> None:
    assert "expected index,uuid" in str(
        gpus.parse(["gpu 0, GPU-0, Tesla K80, 11441, [N/A], 470.256"]).problem
    )


def test_dead_card_and_card_without_a_figure_cost_the_others_nothing(tmp_path: Path) -> None:
    """From public reports: a lost H100 of eight, with nvidia-smi's message and exit code."""
    rows = "\\n".join(
        f"{n}, GPU-{n}, NVIDIA H100, 81559, 9.0, 580.95.05" for n in range(8) if n != 3
    )
    lost = "Unable to determine the device handle for GPU3: 0000:5E:00.0: Unknown Error"
    shim = (
        f'case "$1" in --query*) printf "{rows}\\n{lost}\\n"; exit 15;; *) echo "{HEADER}";; esac'
    )
    found = ask(tmp_path, shim)
    assert (list(found.by_number), found.problem) == ([0, 1, 2, 4, 5, 6, 7], None)
    assert "GPU3" in str(found.warning)


@pytest.mark.parametrize(
    "row", ["3, [Unknown Error], ERR!, [Unknown Error], [N/A], 580", "3, [N/A]"]
)
def test_row_of_a_dead_card_is_named(row: str) -> None:
    found = gpus.parse(["gpu 0, GPU-0, NVIDIA H100, 81559, 9.0, 580.1", f"gpu {row}", "cuda 13.0"])
    assert [card.index for card in found.cards] == [0]
    assert row in str(found.warning)


def test_unified_memory_is_the_machines() -> None:
    row = "gpu 0, GPU-aaaa, NVIDIA GB10, [N/A], 12.1, 580.126.09"
    assert gpus.parse([row, "ram 125829120", "cuda 13.0"]).cards[0].memory_mib == 122880


def host(driver: str, cuda: tuple[int, int], *capabilities: tuple[int, int]) -> Gpus:
    return Gpus(
        tuple(Gpu(n, f"GPU-{n}", f"card {n}", 24000, c) for n, c in enumerate(capabilities)),
        cuda,
        driver,
    )


@pytest.mark.parametrize(
    ("found", "asked", "index"),
    [
        (Gpus(), None, CPU_INDEX),
        (Gpus(), f"{INDEX}cu130", f"{INDEX}cu130"),
        (host("580.95", (13, 0), (8, 6)), None, f"{INDEX}cu130"),
        (host("590.44", (13, 1), (12, 1)), None, f"{INDEX}cu130"),
        (host("550.54", (12, 4), (8, 9), (9, 0)), None, f"{INDEX}cu126"),
        (host("580.95", (13, 0), (6, 1)), None, f"{INDEX}cu126"),
        (host("580.95", (13, 0), (7, 0), (8, 6)), None, f"{INDEX}cu126"),
        (host("580.95", (13, 0), (8, 6)), CPU_INDEX, CPU_INDEX),
        (
            host("580.95", (13, 0), (13, 0)),
            "https://example.org/nightly",
            "https://example.org/nightly",
        ),
    ],
)
def test_build_of_torch_follows_from_the_facts_unless_it_is_named(
    found: Gpus, asked: str | None, index: str
) -> None:
    assert choose_torch(found, asked) == index


def test_arm_has_builds_of_its_own() -> None:
    hopper, spark, turing = (
        host("580.95", (13, 0), capability) for capability in ((9, 0), (12, 1), (7, 5))
    )
    assert choose_torch(Gpus(), None, "aarch64") == CPU_INDEX
    assert (
        choose_torch(hopper, None, "aarch64")
        == choose_torch(spark, None, "aarch64")
        == f"{INDEX}cu130"
    )
    assert choose_torch(host("550.54", (12, 4), (9, 0)), None, "aarch64") == f"{INDEX}cu126"
    with pytest.raises(SettingsError) as refused:
        choose_torch(turing, None, "aarch64")
    assert (
        str(refused.value)
        == "card 0 (compute capability 7.5) is older than every build of torch 2.13.0 on aarch64"
        " knows; set torch_index to an index with a build for it, or to"
        " https://download.pytorch.org/whl/cpu to train on the CPU"
    )
    with pytest.raises(SettingsError, match=r"no build of torch 2\.13\.0 for GPUs on ppc64le"):
        choose_torch(hopper, None, "ppc64le")


@pytest.mark.parametrize(
    ("found", "asked", "message"),
    [
        (
            host("600.1", (14, 0), (14, 0)),
            None,
            (
                "card 0 (compute capability 14.0) is newer than every build of torch 2.13.0 knows;"
                " set torch_index to an index with a build for it, or to"
                " https://download.pytorch.org/whl/cpu to train on the CPU"
            ),
        ),
        (
            host("390.1", (9, 1), (3, 7)),
            None,
            (
                "card 0 (compute capability 3.7) is older than every build of torch 2.13.0 knows;"
                " set torch_index to an index with a build for it, or to"
                " https://download.pytorch.org/whl/cpu to train on the CPU"
            ),
        ),
        (
            host("570.86", (12, 8), (12, 0)),
            None,
            (
                "driver 570.86 runs CUDA 12.8; torch 2.13.0 for card 0 (compute capability 12.0)"
                " (cu130) needs driver 580 or newer: upgrade the NVIDIA driver"
            ),
        ),
        (
            host("580.95", (13, 0), (12, 0)),
            f"{INDEX}cu126",
            (
                "torch_index: cu126 has no kernels for card 0 (compute capability 12.0); set"
                " torch_index to https://download.pytorch.org/whl/cu130, or leave it out"
            ),
        ),
        (
            host("580.95", (13, 0), (12, 0), (6, 1)),
            None,
            (
                "no build of torch 2.13.0 has kernels for all of card 0 (compute capability 12.0),"
                " card 1 (compute capability 6.1); give only those of one kind slots, by their gpu"
            ),
        ),
    ],
)
def test_card_that_no_build_runs_on_is_refused_with_the_fix(
    found: Gpus, asked: str | None, message: str
) -> None:
    with pytest.raises(SettingsError) as refused:
        choose_torch(found, asked)
    assert str(refused.value) == message


def test_builds_are_those_of_the_torch_that_is_pinned() -> None:
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"][
        "worker"
    ]
    assert f"torch=={torch_builds.TORCH}" in pins
    assert f"\ntorch=={torch_builds.TORCH}\n" in (ROOT / "requirements/first.txt").read_text()
    assert [build.cuda for build in BUILDS] == sorted(
        (build.cuda for build in BUILDS), reverse=True
    )


def test_own_package_sources_of_pip_are_seen() -> None:
    fact = OwnPipSources()
    assert fact.process(["index-url = https://mirror.example.org/simple"])
    assert not fact.default()

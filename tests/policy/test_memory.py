"""Free memory within a process's own limits, errors of allocators, and stored limits."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from worker.errors import ResourceError
from worker.policy import memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shape mismatch"), False),
        (OSError("CUDA error: out of memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_lack_of_memory_is_told_from_other_errors(error: BaseException, expected: bool) -> None:
    assert memory.is_out_of_memory(error) is expected


def test_allocation_that_fails_on_this_cpu_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert memory.is_out_of_memory(caught.value)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps it")
def test_memory_that_small_tensors_leave_goes_back_to_the_system() -> None:
    size = 100_000  # bytes; larger ones are mapped, and go back at once
    tensors = [torch.ones(size, dtype=torch.uint8) for _ in range(2000)]
    last = tensors[-1]  # while it is there, the heap does not end before it
    tensors.clear()
    before = memory.used(CPU)
    memory.release(CPU)
    assert before - memory.used(CPU) > 1500 * size
    assert int(last.sum()) == size


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "MemoryError"),
        (RuntimeError("first\nsecond"), "first"),
        (RuntimeError("  x" + "y" * 300), "x" + "y" * 199),
    ],
)
def test_reason_is_one_short_line(error: BaseException, reason: str) -> None:
    assert memory.reason_of(error) == reason


def test_address_space_limits_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.free(CPU) > 0
    monkeypatch.setattr(memory, "_available", lambda: 100 << 30)
    monkeypatch.setattr(memory, "_left_of_own_control_groups", lambda: [50 << 30, 70 << 30])
    monkeypatch.setattr(memory, "_pages", lambda field: 3 << 30)
    no_limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: no_limit)
    assert memory.free(CPU) == 50 << 30
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (8 << 30, 8 << 30))
    assert memory.free(CPU) == 5 << 30
    monkeypatch.setattr(memory.resource, "getrlimit", lambda kind: (2 << 30, 2 << 30))
    assert memory.free(CPU) == 0


def test_memory_of_this_process_grows_with_what_it_uses() -> None:
    before = memory.used(CPU)
    block = torch.ones(64 << 18)  # 64 MiB
    assert memory.used(CPU) - before > 32 << 20
    del block


def test_limits_of_all_control_groups_above_count(tmp_path: Path) -> None:
    inner = tmp_path / "slice/unit"
    inner.mkdir(parents=True)
    for folder, most, current in ((inner, "max", 10), (inner.parent, "1000", 400)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{current}\n")
    (tmp_path / "memory.max").write_text("300\n")
    (tmp_path / "memory.current").write_text("500\n")
    assert memory.left_in(inner) == [600, 0]


def test_limit_is_remembered_for_its_key_only(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert memory.recall(file, "this model") is None
    memory.remember(file, "this model", {"rows": 7})
    found = memory.recall(file, "this model")
    assert found is not None
    assert found["rows"] == 7
    assert memory.recall(file, "another model") is None


@pytest.mark.parametrize("content", ["", "[]", "7", '{"rows": 7}', "\x00"])
def test_corrupt_limit_is_measured_again(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "rows.json"
    file.write_text(content)
    assert memory.recall(file, "key") is None
    assert f"ignoring a corrupt memory limit, measuring it again path={file}" in caplog.text


def test_limit_that_can_t_be_stored_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=r"rows\.json"):
        memory.remember(tmp_path / "file/rows.json", "key", {"rows": 7})

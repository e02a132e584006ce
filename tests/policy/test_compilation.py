"""The cache of the compiled library: what makes it compile again, and whose files it trusts."""

import pytest

from worker.policy.engines.native import compilation


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """The compiler's command lines, with a small source and a cache of the test's own."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(compilation, "_SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    commands, run = [], compilation._run
    monkeypatch.setattr(
        compilation, "_run", lambda command: (commands.append(command), run(command))
    )
    return commands


def compiled():
    return compilation.compile_library("/usr/bin/cc", [])


def cached(tmp_path):
    return list((tmp_path / "cache/hivewright/native").iterdir())


def test_library_is_compiled_once_and_again_when_a_source_or_the_processor_changes(
    builds, tmp_path, monkeypatch
):
    assert compiled().answer() == 42
    num_commands = len(builds)
    assert compiled().answer() == 42
    assert len(builds) == num_commands
    (tmp_path / "sources/one.c").write_text("int answer(void) { return 43; }\n")
    assert compiled().answer() == 43
    monkeypatch.setattr(compilation, "_processor", lambda: ["another"])
    assert compiled().answer() == 43
    assert len(builds) == 3 * num_commands
    assert len(cached(tmp_path)) == 3  # and nothing temporary


def test_damaged_library_is_compiled_again(builds, tmp_path, caplog):
    folder = tmp_path / "cache/hivewright/native"
    folder.mkdir(parents=True)
    library = folder / f"{compilation._digest('/usr/bin/cc', [])}.so"
    library.write_bytes(b"")
    assert compiled().answer() == 42
    assert library.read_bytes()
    assert f"native library damaged, compiling it again path={library}" in caplog.text


def test_library_that_others_could_have_written_is_not_loaded(builds, tmp_path):
    compiled()
    (library,) = cached(tmp_path)
    library.unlink()
    library.write_bytes(b"planted")
    library.parent.chmod(0o777)
    assert compiled().answer() == 42
    assert library.read_bytes() == b"planted"


def test_without_a_cache_it_is_compiled_all_the_same(builds, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert compiled().answer() == 42

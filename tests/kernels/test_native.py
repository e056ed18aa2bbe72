"""The C++ kernels: how they are built, and what happens where they cannot be."""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from omnimix.errors import BackendUnavailable, UnsupportedShape
from omnimix.kernels import explain, linear_recurrence, native, strict
from omnimix.kernels.native import native_refusal
from omnimix.kernels.registry import get_op

OP = "linear_recurrence"
needs_compiler = pytest.mark.skipif(native.machine_refusal() is not None, reason=str(native.machine_refusal()))


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """An empty cache of kernels, and nothing loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_libraries", {})
    get_op(OP)._warned.clear()
    native._build.cache_clear()
    yield tmp_path
    native._build.cache_clear()


def source(folder, monkeypatch, text):
    """Makes `text` the source of every kernel."""
    files = folder / "native.cpp", folder / "native.h"
    files[0].write_text(text)
    files[1].write_text("")
    monkeypatch.setattr(native, "_sources", lambda op: files)


def arguments():
    return {"x": torch.ones(1, 3, 2), "a": torch.full((2,), 0.5)}


def falls_back(reason):
    """Named, the backend raises with the reason; `auto` says it once and goes on; strict mode raises."""
    with pytest.raises(BackendUnavailable, match=reason):
        linear_recurrence(**arguments(), backend="native")
    with pytest.warns(UserWarning, match=f"'chunked' serves this call on cpu, because native: .*{reason}"):
        h, _ = linear_recurrence(**arguments())
    assert h[0, :, 0].tolist() == [1, 1.5, 1.75]
    with strict(), pytest.raises(BackendUnavailable, match=reason):
        linear_recurrence(**arguments())
    row = explain(OP, **arguments())[0]
    assert row["backend"] == "native" and row["auto"] == "no" and native_refusal(OP)(arguments()) == row["why"]


def test_without_a_compiler(afresh, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    falls_back(r"no C\+\+ compiler is installed")


def test_off_linux(afresh, monkeypatch):
    monkeypatch.setattr(native.sys, "platform", "darwin")
    falls_back("on Linux only, and this is darwin")


@needs_compiler
def test_a_failed_build_names_the_compilers_error(afresh, monkeypatch):
    source(afresh, monkeypatch, "int main( { }")
    falls_back(r"g\+\+ failed: .*error")


@needs_compiler
def test_a_cache_that_cannot_be_written(afresh, monkeypatch):
    (afresh / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(afresh / "file"))
    falls_back("could not be stored or loaded")


@needs_compiler
def test_a_library_is_compiled_once_and_says_so_in_the_log(afresh, monkeypatch, caplog, capfd):
    caplog.set_level("INFO", "omnimix")
    source(afresh, monkeypatch, "int unused;")
    assert native._build(OP) is None
    assert caplog.text.count("compiling the native kernels of linear_recurrence") == 1
    native._build.cache_clear()
    assert native._build(OP) is None
    assert len(caplog.records) == 1
    assert capfd.readouterr() == ("", "")
    (library,) = native.cache_folder("native").glob("[!.]*")
    assert library.suffix == ".so"


@needs_compiler
def test_of_several_that_start_together_one_compiles(afresh, monkeypatch, caplog):
    caplog.set_level("INFO", "omnimix")
    source(afresh, monkeypatch, "int unused;")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(native._build.__wrapped__, [OP] * 4)) == [None] * 4
    assert caplog.text.count("compiling the native kernels") == 1


@needs_compiler
def test_a_changed_source_is_compiled_anew(afresh, monkeypatch):
    names = []
    for text in ("int one;", "int two;"):
        source(afresh, monkeypatch, text)
        names.append(native._key(OP, shutil.which("g++")))
    assert names[0] != names[1]


@needs_compiler
def test_compilations_at_once_leave_one_whole_library(afresh, monkeypatch):
    source(afresh, monkeypatch, 'extern "C" int answer() { return 42; }')
    library = afresh / "library.so"
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: native._compile(OP, shutil.which("g++"), library), range(3)))
    assert found == [None] * 3
    assert ctypes.CDLL(str(library)).answer() == 42
    assert not list(afresh.glob("*.part"))


@pytest.mark.parametrize(
    ("x", "reason"),
    [(torch.ones(1, 2, 3, device="meta"), "on meta"), (torch.ones(1, 2, 3, dtype=torch.int32), "torch.int32")],
)
def test_what_it_does_not_serve(x, reason):
    assert reason in native_refusal(OP)({"x": x})


@needs_compiler
def test_boundaries_are_looked_at_inside_a_compiled_graph(without_shape_checks):
    """There the call has no door, and C++ would leave its tensors."""
    compiled = torch.compile(linear_recurrence, fullgraph=True, backend="aot_eager")
    x, a = torch.ones(1, 5, 2), torch.full((2,), 0.5)
    assert compiled(x, a, cu_seqlens=torch.tensor([0, 2, 5]), backend="native")[1].shape == (2, 2)
    with pytest.raises(UnsupportedShape, match="cu_seqlens: .0, 2, 9. must start with 0"):
        compiled(x, a, cu_seqlens=torch.tensor([0, 2, 9]), backend="native")


def test_segments_number_the_chunks():
    rows = native.segments(2, 70, None, 32)
    assert rows.tolist() == [[0, 0, 70, 0], [1, 0, 70, 3]]
    packed = native.segments(1, 70, torch.tensor([0, 1, 65, 70], dtype=torch.int32), 32)
    assert packed[:, :3].tolist() == [[0, 0, 1], [0, 1, 65], [0, 65, 70]]
    taken = [first + i for _, start, stop, first in packed.tolist() for i in range(-(-(stop - start) // 32))]
    assert len(set(taken)) == len(taken) and max(taken) < 70 // 32 + 3

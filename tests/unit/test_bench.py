"""Speed beside limits: counters of energy, the machine's limits, turns, ratios, costs of a token, llama.cpp's process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tersor import _native
from tersor.cli import execute
from tersor.engine import Model, load
from tersor.errors import RecipeError
from tersor.evaluation import llama_cpp
from tersor.evaluation.energy import EnergyMeter
from tersor.evaluation.limits import LEAST_BYTES, Limits, LimitsMeter, bytes_read
from tersor.evaluation.llama_cpp import LlamaCpp
from tersor.evaluation.speed import Contestant, OwnModel, measure, prompt, ratios
from tiny import tiny_model


def zone(folder: Path, name: str, counter: str, top: int, what: str = "package-0") -> Path:
    path = folder / name
    path.mkdir(parents=True)
    (path / "name").write_text(what + "\n")
    (path / "energy_uj").write_text(counter + "\n")
    (path / "max_energy_range_uj").write_text(f"{top}\n")
    return path / "energy_uj"


def test_energy_is_that_of_all_packages(tmp_path: Path) -> None:
    one = zone(tmp_path, "intel-rapl:0", "1000", 9999)
    two = zone(tmp_path, "intel-rapl:1", "9000", 9999, "package-1")
    core = zone(tmp_path, "intel-rapl:0:0", "5", 9999, "core")  # a part of the package
    zone(tmp_path, "intel-rapl:2", "none", 9999, "package-2")
    meter = EnergyMeter(tmp_path)
    assert meter.readable
    before = meter.read()
    assert before == [1000, 9000]
    one.write_text("4000")
    two.write_text("1000")  # it began at 0 again
    core.write_text("9999")
    assert meter.joules_since(before) == pytest.approx((3000 + 2000) / 1e6)


def test_energy_that_cannot_be_read(tmp_path: Path) -> None:
    for meter in (EnergyMeter(tmp_path), EnergyMeter(tmp_path / "none")):
        assert not meter.readable and meter.joules_since(meter.read()) == 0


def test_limits_are_those_of_this_machine() -> None:
    threads = _native.threads()
    try:
        _native.set_threads(1)
        one = LimitsMeter().measure()
    finally:
        _native.set_threads(threads)
    assert 0.1 < one.bandwidth_gbps < 1000 and 0.1 < one.int8_gops < 20_000
    assert Limits(1, 5).best(Limits(2, 3)) == Limits(2, 5)


@pytest.mark.parametrize(("size", "mib"), [("480M", 960), ("32768K", 256), ("1000G", None), ("", 256), ("many", 256)])
def test_more_is_read_than_the_caches_hold(tmp_path: Path, size: str, mib: int | None) -> None:
    for i, one in enumerate(("48K", size)):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(one + "\n")
    got, memory = bytes_read(tmp_path), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert got % 8 == 0 and got == max(LEAST_BYTES, min(memory // 8, mib << 20 if mib else memory) // 8 * 8)
    assert bytes_read(tmp_path / "none") == LEAST_BYTES


@pytest.mark.parametrize("isa", _native.isas())
def test_operations_are_counted(isa: str) -> None:
    threads = _native.threads()
    try:
        _native.force_isa(isa)
        _native.set_threads(1)
        once = _native.multiply_bytes(1)
        assert once in (128, 512, 768, 1536, 131072)
        _native.set_threads(3)
        assert _native.multiply_bytes(10) == 30 * once
    finally:
        _native.force_isa("")
        _native.set_threads(threads)
    with pytest.raises(ValueError, match="rounds must be positive"):
        _native.multiply_bytes(0)


class Stopwatch(Contestant):
    """A contestant that says how long it took; slower every time."""

    load_seconds, first_token_seconds, resident_bytes = 1.0, 2.0, 3

    def __init__(self, seconds: float, log: list[str], name: str) -> None:
        self.seconds, self.log, self.name = seconds, log, name

    def run(self, prefill: int, decode: int) -> tuple[float, float]:
        self.log.append(self.name)
        self.seconds += 1
        return self.seconds, 2 * self.seconds

    def close(self) -> None:
        self.log.append(f"{self.name} closed")


def test_turns_medians_ratios_and_energy(tmp_path: Path) -> None:
    counter = zone(tmp_path, "intel-rapl:0", "0", 10**9)
    log: list[str] = []

    class Burning(Stopwatch):
        def run(self, prefill: int, decode: int) -> tuple[float, float]:
            counter.write_text(str(int(counter.read_text()) + 3_000_000))
            return super().run(prefill, decode)

    speeds = measure(
        {}, peers={"a": lambda: Burning(0, log, "a"), "b": lambda: Stopwatch(4, log, "b")}, prefill=12, decode=6, repeats=3, limits=False,
        energy=EnergyMeter(tmp_path),
    )  # fmt: skip
    assert log == ["a", "b"] * 4 + ["a closed", "b closed"]  # one run each to warm up
    a, b = speeds["a"], speeds["b"]
    assert a.rounds == ((12 / 2, 6 / 4), (12 / 3, 6 / 6), (12 / 4, 6 / 8))
    assert (a.prefill, a.decode, a.load_seconds, a.first_token_seconds, a.resident_bytes) == (4.0, 1.0, 1.0, 2.0, 3)
    assert (a.token_bytes, a.decode_gbps, a.prefill_gops, a.bandwidth_gbps, a.int8_gops) == (None, None, None, 0.0, 0.0)
    assert a.joules == pytest.approx(3 * 2 / 3 / 6) and b.joules == pytest.approx(0)  # two thirds of the time are decoding
    assert ratios(a, b)[0] == pytest.approx((8 / 4, 7 / 3, 6 / 2))


def test_a_contestant_that_fails_ends_the_others() -> None:
    log: list[str] = []

    def fail() -> Contestant:
        raise RecipeError("no")

    with pytest.raises(RecipeError, match="no"):
        measure({}, peers={"a": lambda: Stopwatch(0, log, "a"), "b": fail}, limits=False)
    assert log == ["a closed"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "m", "gemma3_text", config={"sliding_window": 16})


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return load(path)


def test_costs_are_counted(model: Model, path: Path) -> None:
    hidden, intermediate, q, kv, layers, vocabulary = 64, 128, 64, 32, 2, 320
    each = hidden * (q + 2 * kv) + q * hidden + 3 * hidden * intermediate
    assert model.product_operations(10) == 2 * (10 * layers * each + hidden * vocabulary)
    assert model.token_bytes(0) == model.weight_bytes + 2 * layers * kv * 2
    # one layer sees 16 positions, the other one all; keys and values of two bytes
    assert model.token_bytes(99) - model.weight_bytes == 2 * kv * 2 * (16 + 100)
    assert load(path, kv="f32").token_bytes(99) - model.weight_bytes == 2 * kv * 4 * (16 + 100)


def test_an_own_model_runs(model: Model) -> None:
    own = OwnModel(lambda: model)
    seconds = own.run(20, 5)
    assert min(seconds) > 0 and own.first_token_seconds >= own.load_seconds
    assert own.cost(20, 10) == (model.weight_bytes, model.token_bytes(25), model.product_operations(20))
    assert len(set(prompt(40, 320))) == 40 and max(prompt(9999, 320)) < 320


def gguf(folder: Path) -> Path:
    out = folder / "m.gguf"
    assert execute(["quantize", str(tiny_model(folder / "floats")), "-o", str(out), "-r", "q8_0"]) == 0
    return out


def bench(*arguments: object) -> int:
    return execute(["bench", *map(str, arguments), "--prefill", "20", "--decode", "4", "--repeats", "2"])


def test_two_files_side_by_side(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = gguf(tmp_path)
    capsys.readouterr()
    assert bench(path, "--against", other, "--kv", "int8", "--threads", 1) == 0
    out = capsys.readouterr().out
    for shown in (
        "prefill 20, tokens/s",
        "GOP/s",
        "the peak of int8",
        "what memory gives",
        "load to first token, s",
        "m.gguf",
        "1 threads",
    ):
        assert shown in out
    assert ("not measurable here" in out) == (not EnergyMeter().readable)
    assert bench(path, "--against", other, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["speeds"]) == [str(path), str(other)] and len(found["speeds"][str(path)]["rounds"]) == 2
    ratio = found["ratios"][str(other)]["decode"]
    assert 0 < ratio["lowest"] <= ratio["median"] <= ratio["highest"]


def test_llama_cpp_needs_a_gguf_and_to_be_installed(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench(path, "--against", "llama.cpp") == 2
    assert "llama.cpp reads .gguf files only" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"llama-cpp-python is not installed; pip install 'tersor\[bench\]'"):
        LlamaCpp(tmp_path / "m.gguf", 1, "f16", 32)


def test_the_reason_why_llama_cpp_cannot_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module of that name that refuses everything, whether the real one is installed or not."""
    (tmp_path / "llama_cpp.py").write_text("class Llama:\n    def __init__(self, *a, **k):\n        raise ValueError('bad magic')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(RecipeError, match=r"llama\.cpp could not run the model: ValueError: bad magic"):
        LlamaCpp(tmp_path / "m.gguf", 1, "f16", 32)


def test_llama_cpp_is_asked_over_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module of that name that writes down what it is asked."""
    (tmp_path / "llama_cpp.py").write_text(
        "class Llama:\n"
        "    def __init__(self, path, **options):\n"
        "        print('noise')\n"
        "        self.log = open(path + '.log', 'w', buffering=1)\n"
        "        print(sorted(options.items()), file=self.log)\n"
        "    def n_vocab(self): return 1000\n"
        "    def reset(self): print('reset', file=self.log)\n"
        "    def eval(self, tokens):\n"
        "        if len(tokens) == 7: raise RuntimeError('seven')\n"
        "        print(len(tokens), file=self.log)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(llama_cpp.importlib.util, "find_spec", lambda name: True)
    peer = LlamaCpp(tmp_path / "m.gguf", 3, "int8", 64)
    assert peer.first_token_seconds >= peer.load_seconds > 0
    assert min(peer.run(20, 2)) > 0 and peer.cost(20, 2) is None
    options, *calls = (tmp_path / "m.gguf.log").read_text().splitlines()
    for expected in ("('n_threads', 3)", "('n_threads_batch', 3)", "('n_ctx', 64)", "('type_v', 8)", "('flash_attn', True)"):
        assert expected in options
    assert calls == ["reset", "16", "1", "reset", "20", "1", "1"]
    with pytest.raises(RecipeError, match=r"llama\.cpp could not run the model: RuntimeError: seven"):
        peer.run(7, 1)
    peer.close()
    peer.close()


@pytest.mark.slow  # `make test-all` installs llama-cpp-python
def test_llama_cpp_itself(tmp_path: Path) -> None:
    from tersor.demo import cache_directory, fetch

    peer = LlamaCpp(fetch(cache_directory()), 2, "f16", 80)
    prefill, decode = peer.run(64, 4)
    peer.close()
    assert min(prefill, decode) > 0 and peer.resident_bytes > 50e6

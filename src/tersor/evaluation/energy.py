"""Energy that the processors use, from the counters of Intel's and AMD's RAPL as Linux shows them (powercap).

Contract: Documentation/power/powercap/powercap.rst of Linux. A zone intel-rapl:N, whose name is package-N on either vendor's
processors, counts microjoules up to max_energy_range_uj and then begins at 0 again. Only the superuser may read it on most
systems, and virtual machines rarely have it.
"""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """The counters of all packages. readable: whether there are any."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        self._zones = []
        for zone in sorted(folder.glob("intel-rapl:*")):
            try:
                if (zone / "name").read_text().startswith("package"):
                    int((zone / "energy_uj").read_text())
                    self._zones.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
            except (OSError, ValueError):
                continue
        self.readable = bool(self._zones)

    def read(self) -> list[int]:
        """Returns the counters, in microjoules."""
        return [int(path.read_text()) for path, _ in self._zones]

    def joules_since(self, before: list[int]) -> float:
        """Returns the energy used by all packages since a reading, at most one turn of the counters ago."""
        return sum((now - then) % (top + 1) for now, then, (_, top) in zip(self.read(), before, self._zones)) / 1e6

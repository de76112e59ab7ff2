"""Choice of the exact statistics that belong to a scan."""

from __future__ import annotations

from types import ModuleType

from sspruner.calibrate import delta_channels, selective, state
from sspruner.graph.family import DeltaProjected, Scan, SelectiveProjected


def statistics_of(p: Scan) -> ModuleType:
    """Return the module with scan_output, ghost_sum, weighted_ghost_sum and energy_sum for the scan with these inputs."""
    if isinstance(p, SelectiveProjected):
        return selective
    if isinstance(p, DeltaProjected) and p.decay.ndim == 4:  # by key channel
        return delta_channels
    return state

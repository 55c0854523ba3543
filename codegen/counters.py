"""Arrival counters of kernels that split sums over thread blocks: zero between launches, on every stream."""

from __future__ import annotations

import torch

__all__ = ["Counters", "counters"]

_COUNTERS = 1 << 20  # int32 arrival counters a device keeps: 4 MiB


class Counters:
    """Arrival counters of split-K kernels: zero between launches, because the last program resets its own.

    Calls on one stream run one after the other and share one buffer. A call captured into a graph may later run beside
    anything, so each gets counters of its own, which are never given to anyone else.
    """

    def __init__(self) -> None:
        self._eager: dict[tuple[torch.device, int], torch.Tensor] = {}
        self._pools: dict[torch.device, list[torch.Tensor]] = {}
        self._used: dict[torch.device, int] = {}

    def reserve(self, device: torch.device) -> None:
        """Have counters ready for captures, which cannot make any themselves."""
        pools = self._pools.setdefault(device, [])
        if not pools or self._used[device] > _COUNTERS // 2:
            pools.append(torch.zeros(_COUNTERS, dtype=torch.int32, device=device))
            self._used[device] = 0

    def take(self, n: int, device: torch.device) -> torch.Tensor:
        """`n` zeroed int32 counters for one launch on the current stream."""
        if device.type != "cuda":
            return torch.zeros(n, dtype=torch.int32)
        if torch.cuda.is_current_stream_capturing():
            used = self._used.get(device, _COUNTERS)
            if used + n > _COUNTERS:
                return torch.zeros(n, dtype=torch.int32, device=device)  # a memset becomes part of the graph
            self._used[device] = used + n
            return self._pools[device][-1][used : used + n]
        self.reserve(device)
        key = (device, torch.cuda.current_stream(device).cuda_stream)
        held = self._eager.get(key)
        if held is None or held.numel() < n:
            held = self._eager[key] = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
        return held


counters = Counters()
"""Those of this process."""

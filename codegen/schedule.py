"""`Schedule`: how a kernel computes what its spec says."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

__all__ = ["LARGE_CLASSES", "M_CLASSES", "Schedule", "m_class", "token_class"]

M_CLASSES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Token counts kernels are chosen for; a call with M tokens uses the class of the next larger count."""


LARGE_CLASSES = (1024, 2048, 4096)
"""Token counts beyond, where the choice of a kernel may change once more; schedules are those of the largest class."""


def token_class(m: int) -> int:
    """The smallest class that holds `m` tokens, large ones included.

    >>> token_class(3), token_class(600), token_class(10000)
    (4, 1024, 4096)
    """
    return next((c for c in (*M_CLASSES, *LARGE_CLASSES) if m <= c), LARGE_CLASSES[-1])


def m_class(m: int) -> int:
    """The smallest class that holds `m` tokens (the largest one beyond it).

    >>> m_class(1), m_class(3), m_class(5000)
    (1, 4, 512)
    """
    return next((c for c in M_CLASSES if m <= c), M_CLASSES[-1])


@dataclass(frozen=True)
class Schedule:
    """Tiling choices. tile_m, tile_n, tile_k: output rows, columns and depth one step computes (tokens, features,
    columns). warps, stages, split_k: GPU only. unroll and threads_grain: CPU only. `extra` holds what one backend alone
    understands."""

    tile_m: int = 1
    tile_n: int = 16
    tile_k: int = 128
    warps: int = 4
    stages: int = 2
    split_k: int = 1
    extra: tuple[tuple[str, int], ...] = field(default=())

    def with_extra(self, **values: int) -> Schedule:
        """A copy with backend-specific choices set."""
        return replace(self, extra=tuple(sorted({**dict(self.extra), **values}.items())))

    def get(self, name: str, default: int) -> int:
        """A backend-specific choice."""
        return dict(self.extra).get(name, default)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and the IR."""
        d = asdict(self)
        d.pop("extra")
        return {**d, **dict(self.extra)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Schedule:
        """Inverse of `to_dict`."""
        known = {k: int(v) for k, v in values.items() if k in Schedule.__dataclass_fields__ and k != "extra"}
        rest = tuple(sorted((k, int(v)) for k, v in values.items() if k not in known))
        return Schedule(**known, extra=rest)

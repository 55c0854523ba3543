"""The hidden states between two blocks, for all calibration samples: in memory or in a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Activations"]


class Activations:
    """float32 [samples, length, channels], read and written a batch of samples at a time.

    With a path the numbers live in that file (raw, little endian) and only the batch in use takes memory.
    """

    def __init__(self, shape: tuple[int, int, int], batch: int, path: Path | None = None, *, create: bool) -> None:
        self.shape, self._batch, self.path = shape, batch, path
        if path is None:
            self._data = np.empty(shape, np.float32)
        else:
            self._data = np.memmap(path, np.float32, "w+" if create else "r", shape=shape)

    @property
    def batches(self) -> list[slice]:
        """Sample ranges that are handled together."""
        return [slice(i, min(i + self._batch, self.shape[0])) for i in range(0, self.shape[0], self._batch)]

    @property
    def nbytes(self) -> int:
        """Bytes of all samples."""
        return int(np.prod(self.shape)) * 4

    @property
    def resident(self) -> int:
        """Bytes of memory this object itself needs."""
        return 0 if self.path else self.nbytes

    def read(self, samples: slice) -> Tensor:
        """A copy of some samples, aligned like any tensor, so that results do not depend on the file."""
        return torch.from_numpy(np.array(self._data[samples])).clone()

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for samples in self.batches:
            yield samples, self.read(samples)

    def write(self, samples: slice, values: Tensor) -> None:
        """Store some samples."""
        self._data[samples] = values.detach().float().numpy()

    def seal(self) -> str:
        """Put everything on disk (when there is a file) and return the SHA-256 of the numbers."""
        if isinstance(self._data, np.memmap) and self.path is not None:
            self._data.flush()
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return self.digest()

    def digest(self) -> str:
        """SHA-256 of the numbers."""
        digest = hashlib.sha256()
        for samples in self.batches:
            digest.update(np.ascontiguousarray(self._data[samples]).tobytes())
        return digest.hexdigest()

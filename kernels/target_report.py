"""What a loss saw of its targets, without anybody waiting for it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TargetReport:
    """What was seen of the targets, in device memory: who reads a loss that is not finite calls
    `check()`, and nobody waits before."""

    words: Tensor  # (2,) int64: valid targets so far; 0, or (row + 1) << 32 | low half of a bad one

    @staticmethod
    def on(device: torch.device | str) -> "TargetReport":
        return TargetReport(torch.zeros(2, dtype=torch.int64, device=device))

    @property
    def counted(self) -> int:
        """Targets in range and not ignored, in all calls since the report was made."""
        return self.words[0].item()

    def check(self) -> None:
        """Raises ValueError if a target was out of range."""
        row, low = divmod(self.words[1].item(), 1 << 32)
        if row:
            raise bad_target(row - 1, low - (low >> 31 << 32))


def bad_target(row: int, target: int) -> ValueError:
    """The error for a target that is no class."""
    return ValueError(f"row {row}: expected a class or the ignored index as target, got {target}")

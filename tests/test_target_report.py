"""kernels/target_report.py: what the words mean; the losses fill them in their own tests."""

import pytest
import torch
from accuracy import DEVICE

from minift.kernels.target_report import TargetReport


def test_a_new_report_has_seen_nothing():
    report = TargetReport.on(DEVICE)
    assert report.counted == 0
    report.check()


@pytest.mark.parametrize("row", [0, 1, 2**30])
@pytest.mark.parametrize("target", [-1, 0, 7, 2**31 - 1, -(2**31)])
def test_row_and_target_share_a_word(row, target):
    """Counted from 0, with its sign; so that one atomic maximum keeps them together."""
    report = TargetReport.on(DEVICE)
    report.words.copy_(torch.tensor([3, (row + 1) << 32 | target & 0xFFFFFFFF]))
    assert report.counted == 3
    with pytest.raises(ValueError, match=rf"^row {row}: expected a class .* got {target}$"):
        report.check()

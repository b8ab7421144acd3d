"""Which heads recall unless somebody says otherwise."""

from __future__ import annotations

from mnemos.contract import KVLayout
from mnemos.memory.calibration import far_count, usual_share


def test_half_of_the_heads_recall() -> None:
    layout = KVLayout(30, 3, 64)
    assert far_count(layout, usual_share(layout)) == 45


def test_all_heads_recall_in_the_layers_that_see_everything_where_others_have_windows() -> None:
    """As in Gemma 3: three layers of eighteen, whose single heads are all needed."""
    layout = KVLayout(18, 1, 256, windows=(512, 512, 512, 512, 512, 0) * 3)
    assert far_count(layout, usual_share(layout)) == 3

"""What the soak plans: every place, repeatable, in an order that can be reached."""

import collections

from tests.soak.soak import plans


def test_the_kills() -> None:
    todo = plans(12, 500, 4, seed=0, start_up=30.0)
    assert todo == plans(12, 500, 4, seed=0, start_up=30.0)
    assert todo != plans(12, 500, 4, seed=1, start_up=30.0)
    assert collections.Counter(plan.place for plan in todo) == {"start": 3, "forward": 3, "collective": 3, "save": 3}
    assert [plan.step for plan in todo] == sorted({plan.step for plan in todo})
    assert todo[-1].step < 450
    assert len({plan.rank for plan in todo}) > 1
    assert len(plans(2, 6, 2, seed=0, start_up=30.0)) == 2

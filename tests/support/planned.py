"""Plans with other constants than the planner's."""

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

from fastrnn.planning import cluster, planner, resident


def plan_for(monkeypatch, **form) -> None:
    """Plan kernels with other constants in their form, until the test ends."""
    planned = planner.kernel_for

    def changed(*args):
        kernel = planned(*args)
        return dataclasses.replace(kernel, form={**kernel.form, **form})

    monkeypatch.setattr(planner, "kernel_for", changed)


@contextlib.contextmanager
def tiles_of(rows: int) -> Iterator[None]:
    """Plan the resident and the cluster tier's kernels in batch tiles of so many rows, whatever they cost."""
    planners, held = (resident.resident, cluster.cluster), cluster.held

    def of_rows(request, ctas, block_b=rows):
        return held(request, ctas, rows)

    with mock.patch.object(cluster, "held", of_rows), mock.patch.object(resident, "held", of_rows):
        for plan in planners:
            plan.cache_clear()
        try:
            yield
        finally:
            for plan in planners:
                plan.cache_clear()

"""Plans with other constants than the planner's."""

import dataclasses

from fastrnn.planning import planner


def plan_for(monkeypatch, **form) -> None:
    """Plan kernels with other constants in their form, until the test ends."""
    planned = planner.kernel_for

    def changed(*args):
        kernel = planned(*args)
        return dataclasses.replace(kernel, form={**kernel.form, **form})

    monkeypatch.setattr(planner, "kernel_for", changed)

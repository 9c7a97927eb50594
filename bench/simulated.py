"""Show how far the simulator is off: simulate kernels that an H100 has run, beside their times in bench/measured/.

    python -m bench.simulated                 a table by tier and pass (10 minutes: every form is compiled)
    python -m bench.simulated --each          a line a form as well
    python -m bench.simulated --write         put the table into docs/performance.md

Kernels are those of today: where they have changed since that day, the difference is in the error too. What a step
reads is taken to be in L2, as it was where most of these were measured. Cooperative kernels of that day waited at a
counter, which none does today: their rows stay what they were.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from fastrnn.compat import spills
from fastrnn.inspect.compile import launches
from fastrnn.inspect.resources import spill_bytes
from fastrnn.inspect.simulator.simulate import of_launch

from . import write
from .forms import Form, call_of, only
from .measured import records

ARCH, MHZ = "sm_90", 1980  # of bench/measured/H100-2026-11-25/machine.txt, while it ran
BY_COUNTER = (
    "| cooperative, backward | 2 | -32% | -36%, -29% |",
    "| cooperative, forward | 2 | -35% | -36%, -34% |",
)


class Compared(NamedTuple):
    name: str
    tier: str
    which: str
    measured: float  # cycles of a step
    simulated: float

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1


def compared(every: int = 1) -> Iterator[Compared]:
    """Each measured form whose constants are those of today, or one in so many."""
    for record in [record for record in records("forms") if "us" in record][::every]:
        found = of_form(record)
        if found is not None:
            yield found


def of_form(record: dict[str, Any]) -> Compared | None:
    names = ("cell", "H", "ctas", "warps", "shares", "pass")
    form = Form(*(record[name] for name in names))
    problem = replace(form.problem(ARCH), seq_len=4)
    with only(form, ARCH), launches(problem.spec) as found:
        call_of(form, problem, problem.tensors())()
        chosen = next(iter(spills._chosen.values()))
    if spill_bytes(found[-1].asm) or str(chosen) != record["form"]:
        return None  # another kernel than was measured
    tier = f"clusters of {form.ctas}" if form.ctas > 1 else "resident"
    name = f"{form.cell}, {form.hidden}, {tier}, {form.warps} warps, {form.shares} shares, {form.which}"
    return Compared(name, tier, form.which, record["us"] * MHZ, of_launch(found[-1], is_cached=True).cycles)


def table(found: list[Compared]) -> Iterator[str]:
    """Simulated over measured cycles, by tier and pass."""
    yield "| tier, pass | kernels | simulated over measured: mean | from, to |"
    yield "|---|---|---|---|"
    tiers = dict.fromkeys((one.tier, one.which) for one in found)
    for tier, which in sorted(tiers, key=lambda key: (len(key[0]), *key)):
        errors = [one.error for one in found if (one.tier, one.which) == (tier, which)]
        span = f"{min(errors):+.0%}, {max(errors):+.0%}"
        yield f"| {tier}, {which} | {len(errors)} | {statistics.mean(errors):+.0%} | {span} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--each", action="store_true", help="print a line for each form too")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take one form in N")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    args = parser.parse_args()
    found = []
    for one in compared(args.every):
        found.append(one)
        if args.each:
            print(
                f"{one.name}: measured {one.measured:,.0f}, simulated {one.simulated:,.0f}, {one.error:+.0%}",
                flush=True,
            )
    lines = [*table(found), *BY_COUNTER]
    print("\n".join(lines))
    if args.write:
        write("python -m bench.simulated --write", lines)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

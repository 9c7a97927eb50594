"""How far the simulator is off, as bench/simulated.py and a visit's report say it."""

import json
import re
from types import SimpleNamespace

import pytest

from bench import performance, report
from bench.simulated import Compared, table

from ..support import children
from ..support.versions import NEEDS_CLUSTERS


def test_the_table_has_a_row_a_tier_and_pass():
    found = [
        Compared("a", "clusters of 16", "forward", 2000, 1000),
        Compared("b", "clusters of 2", "forward", 1000, 900),
        Compared("c", "resident", "backward", 1000, 1100),
        Compared("d", "resident", "backward", 1000, 700),
    ]
    assert list(table(found))[2:] == [
        "| resident, backward | 2 | -10% | -30%, +10% |",
        "| clusters of 2, forward | 1 | -10% | -10%, -10% |",
        "| clusters of 16, forward | 1 | -50% | -50%, -50% |",
    ]


@NEEDS_CLUSTERS
def test_measured_forms_are_simulated_and_too_short():
    """One in 45, as docs/performance.md says of all."""
    done = children.run(["-m", "bench.simulated", "--each", "--every", "45"], errors=False)
    assert done.returncode == 0, done.stderr
    lines = re.findall(r"^\w+, \d+, .*: measured ([\d,]+), simulated ([\d,]+), ", done.stdout, re.MULTILINE)
    ratios = [int(simulated.replace(",", "")) / int(measured.replace(",", "")) for measured, simulated in lines]
    assert len(ratios) >= 3 and all(0.55 < ratio < 1 for ratio in ratios), done.stdout


def test_a_visits_report_has_the_error_by_tier(tmp_path):
    step = {"cell": "lstm", "H": 64, "backend": "resident", "forward": 1.0, "simulated_forward": 0.8, "backward": None}
    records = [step, step | {"forward": 2.0}, {"cell": "gru", "missing": "no kernel"}]
    stage = {"stage": "steps", "text": "", "records": records, "complete": True}
    (tmp_path / "stage-steps.json").write_text(json.dumps(stage))
    (block,) = [block for block in report.blocks(tmp_path) if block.heading == "Steps, simulated beside measured"]
    assert block.rows == [("resident", "forward", "2", "0.57", "0.40 to 0.80", "1.77")]


@pytest.mark.parametrize("waits", ({"issue": 9.0, "stall count": 8.0, "barrier": 5.2}, {"barrier": 5.2, "issue": 4.0}))
def test_the_longest_wait_is_none_for_the_warp_itself(waits):
    assert performance.waited_for(SimpleNamespace(waits=waits)) == "barrier 5"

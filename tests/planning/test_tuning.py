"""The planner reads fastrnn/tuned/<arch>.json: what is measured to be faster goes first, and nothing else changes."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import tune
from bench.tune import trying
from fastrnn import plan
from fastrnn.compat import spills
from fastrnn.device import DeviceSpec
from fastrnn.inspect.compile import PASSES, Problem
from fastrnn.planning import cluster, cooperative, tuning
from fastrnn.planning.kernel_plan import Request

SIZES = {"hidden_size": 256, "batch_size": 16, "dtype": torch.bfloat16, "device": "sm_90"}


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Plan as if a file for sm_90 had been there on import."""

    def put(**content):
        (tmp_path / "sm_90.json").write_text(json.dumps({"made": {}, "forms": {}, "ctas": {}} | content))
        monkeypatch.setattr(tuning, "TUNED", tuning.known(tmp_path))
        cluster.cluster.cache_clear()
        cooperative.cooperative.cache_clear()

    yield put
    cluster.cluster.cache_clear()
    cooperative.cooperative.cache_clear()


def request(H: int) -> Request:
    return Request("lstm", H, 16, 1, 1, torch.bfloat16, "ieee", DeviceSpec.named("sm_90"))


def key_of(kernel, H: int = 256) -> str:
    return tuning.kernel_key(request(H), kernel)


def test_without_a_file_the_planners_order_stays():
    assert tuning.of("sm_80") == tuning.Tuned()


def test_the_tuned_form_is_tried_first_and_the_others_after_it(tuned):
    before = plan("lstm", **SIZES).kernel
    form = before.choices["backward"][-1]
    assert form != before.choices["backward"][0]
    tuned(forms={key_of(before): {"backward": form}})
    after = plan("lstm", **SIZES).kernel
    assert after.choices["backward"] == (form, *before.choices["backward"][:-1])
    assert after.choices["forward"] == before.choices["forward"]
    other = plan("lstm", **SIZES | {"hidden_size": 512}).kernel
    assert tuning.ordered(other, request(512)) == other


def test_forms_of_pieces_come_back_from_json_as_they_were(tuned):
    sizes = SIZES | {"hidden_size": 1024}
    before = plan("lstm", **sizes).kernel
    form = before.choices["forward"][1]
    tuned(forms={key_of(before, 1024): {"forward": form}})
    assert plan("lstm", **sizes).kernel.choices["forward"][0] == form


def test_a_form_that_the_plan_has_not_changes_nothing(tuned):
    before = plan("lstm", **SIZES).kernel
    tuned(forms={key_of(before): {"forward": {"SHARES": 3, "IN_REGISTERS": 99}}})
    assert plan("lstm", **SIZES).kernel.choices == before.choices


def test_the_tuned_cluster_is_taken_where_it_fits(tuned):
    assert plan("lstm", **SIZES).kernel.ctas == 8
    tuned(ctas={"lstm H=256 bfloat16 tiles=1": 4, "lstm H=256 bfloat16 tiles=2": 2})
    assert plan("lstm", **SIZES).kernel.ctas == 4
    assert plan("lstm", **SIZES | {"batch_size": 32}).kernel.ctas == 8  # two programs do not hold it
    assert plan("lstm", **SIZES | {"batch_size": 64}).kernel.ctas == 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"extra": {}}, "an object with made, forms, ctas, us"),
        ({"forms": []}, "an object under forms"),
        ({"forms": {"lstm 256": {}}}, "a kernel under forms"),
        ({"forms": {"KEY": {"sideways": {}}}}, "passes among"),
        ({"forms": {"KEY": {"forward": {"BLOCK": 3}}}}, "constants among"),
        ({"forms": {"KEY": {"forward": {"SHARES": "two"}}}}, "numbers for"),
        ({"ctas": {"lstm H=256 tiles=1": 4}}, "a cluster's problem"),
        ({"ctas": {"lstm H=256 bfloat16 tiles=1": 3}}, "one of"),
        ({"us": {"lstm H=256 bfloat16": [1.0, 1.0]}}, "a kernel under us"),
        ({"us": {"torch lstm H=256 bfloat16": [1.0]}}, "microseconds of two passes"),
        ({"us": {"KEY": [1.0, 0]}}, "microseconds of two passes"),
    ],
)
def test_a_wrong_file_is_named(tuned, content, message):
    key = key_of(plan("lstm", **SIZES).kernel)
    content = json.loads(json.dumps(content).replace("KEY", key))
    with pytest.raises(ValueError, match=rf"sm_90\.json: expected {message}"):
        tuned(**content)


def test_text_that_is_no_json_is_named(tmp_path):
    (tmp_path / "sm_90.json").write_text("{")
    with pytest.raises(ValueError, match="sm_90.json: expected JSON"):
        tuning.known(tmp_path)


def test_trying_forgets_what_was_planned_and_leaves_no_trace(tuned):
    tuned()
    with trying("sm_90", tuning.Tuned(ctas={"lstm H=256 bfloat16 tiles=1": 4})):
        assert plan("lstm", **SIZES).kernel.ctas == 4
    assert plan("lstm", **SIZES).kernel.ctas == 8


class Kernel:
    """As spills.py sees one of Triton's: compiled for a choice, it spills as many registers as it is told."""

    def __init__(self, name: str, spills):
        self.__name__, self.spills = name, spills

    def warmup(self, *arguments, grid, **options):
        return self.spills(options)


def test_a_form_that_spills_in_one_pass_is_not_taken_for_that_of_the_other(monkeypatch):
    """In the cooperative tier the forms of both passes are alike: here all but one spill, another one in each pass."""
    problem = Problem("lstm", 1024, arch="sm_90")
    kernel = tune._kernel(problem, DeviceSpec.named("sm_90"))
    shared = [form for form in kernel.choices["forward"] if form in kernel.choices["backward"]]
    clean = {"forward": shared[0], "backward": shared[-1]}
    assert shared[0] != shared[-1]

    def run(problem, which, dry):
        choices = tune._kernel(problem, DeviceSpec.named("sm_90")).choices
        for name in PASSES[: 1 + PASSES.index(which)]:
            function = Kernel(name, lambda options, name=name: int(not clean[name].items() <= options.items()))
            spills.first_without_spills(function, "sm_90", choices[name], (), (1,), {})
        return 1.0

    monkeypatch.setattr(spills, "spilled_registers", lambda spills: spills)
    monkeypatch.setattr(tune, "_us_per_step", run)
    monkeypatch.setattr(DeviceSpec, "of", lambda _: DeviceSpec.named("sm_90"))

    def free_of_spills():
        records = tune.tune(problem, SimpleNamespace(arch="sm_90", dry=False))
        return {which: [json.loads(r["form"]) for r in records if r["pass"] == which and not r["spills"]]
                for which in PASSES}  # fmt: skip

    assert free_of_spills() == {which: [json.loads(json.dumps(form))] for which, form in clean.items()}
    monkeypatch.setattr(spills, "taken", lambda name: spills._chosen.values())  # as it was
    assert len(free_of_spills()["backward"]) == 2


def test_every_committed_file_is_read_and_fits_its_board():
    for file in tuning.FOLDER.glob("*.json"):
        assert file.stem in DeviceSpec.named(file.stem).arch
        tuning.read(file)

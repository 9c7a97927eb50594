"""Which form of a kernel is launched: the first that spills no register, asked anew for all that compiles otherwise."""

from types import SimpleNamespace

import pytest
import torch

from fastrnn.compat import spills

FORMS = ({"SHARES": 1}, {"SHARES": 2}, {"SHARES": 4})


class Kernel:
    """As spills.py sees one of Triton's: spills says how many registers each form spills, and of what."""

    def __init__(self, spills):
        self.spills, self.compiled = spills, 0

    def warmup(self, *arguments, grid, SHARES, **options):
        self.compiled += 1
        return SimpleNamespace(_init_handles=lambda: None, n_spills=self.spills(arguments, options)[SHARES])


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.setattr(spills, "_chosen", {})

    def choose(kernel, *arguments, device="sm_90", **options):
        return spills.first_without_spills(kernel, device, FORMS, arguments, (1,), options)["SHARES"]

    return choose


def test_the_first_form_without_spills_else_that_with_the_fewest(chosen):
    kernel = Kernel(lambda *_: {1: 8, 2: 0, 4: 0})
    assert chosen(kernel) == 2 and kernel.compiled == 2
    assert chosen(kernel) == 2 and kernel.compiled == 2  # remembered
    assert chosen(Kernel(lambda *_: {1: 8, 2: 6, 4: 7})) == 2


def two_clusters(chosen):
    kernel = Kernel(lambda _, options: {1: 0, 2: 0} if options["num_ctas"] == 4 else {1: 8, 2: 0})
    assert [chosen(kernel, num_ctas=ctas, H=128) for ctas in (4, 8)] == [1, 2]


def two_alignments(chosen):
    kernel = Kernel(lambda arguments, _: {1: 8 * (arguments[0].data_ptr() % 16), 2: 0})
    aligned = torch.zeros(16)
    assert [chosen(kernel, x) for x in (aligned, aligned[1:], aligned[4:])] == [1, 2, 1]
    assert kernel.compiled == 3  # the third is as the first


def test_clusters_of_two_sizes_share_no_form(chosen):
    two_clusters(chosen)


def test_a_pointer_out_of_line_has_a_form_of_its_own(chosen):
    two_alignments(chosen)


def test_dtypes_devices_and_absent_pointers_share_no_form(chosen):
    kernel = Kernel(lambda *_: {1: 0})
    x = torch.zeros(16)
    for arguments in ((x,), (x.half(),), (None,), (3,)):
        chosen(kernel, *arguments)
    chosen(kernel, x, device="sm_100")
    assert kernel.compiled == 5


@pytest.mark.parametrize(
    ("function", "forgotten", "check"),
    (
        ("key", "tuple(self.options.items()), ", two_clusters),
        ("as_compiled", ", argument.data_ptr() % 16 == 0", two_alignments),
    ),
)
def test_a_key_that_forgets_is_noticed(chosen, mutate, function, forgotten, check):
    mutate({f"fastrnn.compat.spills.{function}": (forgotten, "")})
    with pytest.raises(AssertionError):
        check(chosen)


def test_tiles_of_two_sizes_share_no_form(monkeypatch):
    """As launched their constants differ, in what the planner chose: only that says how many rows a tile has."""
    monkeypatch.setattr(spills, "_chosen", {})

    class OfTiles(Kernel):
        def warmup(self, *arguments, grid, FORM, **options):
            self.compiled += 1
            return SimpleNamespace(_init_handles=lambda: None, n_spills=self.spills(arguments, options)[FORM])

    kernel = OfTiles(lambda *_: {(16, 1): 0, (8, 1): 8, (8, 2): 0})

    def chosen(rows):
        def as_launched(choice):
            return {"FORM": (rows, choice["SHARES"])}

        return spills.first_without_spills(kernel, "sm_90", FORMS, (), (1,), {}, as_launched)["FORM"]

    assert [chosen(rows) for rows in (16, 8)] == [(16, 1), (8, 2)]

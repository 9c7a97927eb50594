"""fastrnn.convert on sLSTM cells of other packages: their outputs and gradients, with their parameters as they lie."""

import copy
import pickle
import re

import pytest
import torch

import fastrnn
from bench import tirex as tirex_benchmark
from fastrnn.nn import foreign, layers
from fastrnn.ops import layer

from ..support.cases import ON_CPU
from ..support.foreign import KINDS, XLSTM, H, K, N, compare, pair, start, uncast_tirex, xlstm_cells

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages


@pytest.mark.parametrize("with_state", (False, True))
@pytest.mark.parametrize("backend", ("auto", "resident", "cooperative"))
@pytest.mark.parametrize("kind", KINDS)
def test_a_cell_computes_what_theirs_does(kind, backend, with_state, device):
    cell, theirs = (c.to(device) for c in pair(kind))
    fastrnn.convert(cell, backend=backend)
    state = start(device, torch.float32) if with_state else None
    compare(cell, theirs, 3 * torch.randn(2, 7, 4 * H, device=device), state, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("checkpoint_every", (None, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_in_float64(kind, checkpoint_every):
    cell, theirs = pair(kind, torch.float64)
    fastrnn.convert(cell, backend="reference", checkpoint_every=checkpoint_every)
    x = 3 * torch.randn(2, 7, 4 * H, dtype=torch.float64)
    compare(cell, theirs, x, start("cpu", torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", ("gates", "units", "bias"))
def test_a_wrong_layout_is_noticed(kind, wrong, monkeypatch):
    cell, theirs = pair(kind, torch.float64)
    fastrnn.convert(cell)
    plain = type(cell)._weights

    def weights(self):
        W, b = plain(self)
        by_gate = W.view(N, 4, K, K)
        if wrong == "gates":
            return by_gate.roll(1, 1).flatten(1, 2), b
        return (by_gate.mT.flatten(1, 2), b) if wrong == "units" else (W, b.view(4, N, K).transpose(0, 1).flatten(1))

    monkeypatch.setattr(type(cell), "_weights", weights)
    x = torch.randn(2, 7, 4 * H, dtype=torch.float64)
    with pytest.raises(AssertionError, match="y: "):
        compare(cell, theirs, x, None, rtol=1e-6, atol=1e-6)


def stack(dtype: torch.dtype):
    """xlstm's language model of an mLSTM and two sLSTM blocks, convolutions and feed-forwards included."""
    xlstm_cells()
    import xlstm

    slstm = xlstm.sLSTMLayerConfig(backend="vanilla", num_heads=2, recurrent_weight_init="standard")
    mlstm = xlstm.mLSTMBlockConfig(mlstm=xlstm.mLSTMLayerConfig(num_heads=2))
    config = xlstm.xLSTMLMModelConfig(
        vocab_size=11, mlstm_block=mlstm, slstm_block=xlstm.sLSTMBlockConfig(slstm=slstm), num_blocks=3,
        embedding_dim=16, context_length=12, slstm_at=[0, 2],
    )  # fmt: skip
    return xlstm.xLSTMLMModel(config).to(dtype)


def train_a_step(model, tokens) -> list[torch.Tensor]:
    """Loss, logits, and the parameters after a step of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(tokens)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    return [loss, logits, *model.parameters()]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("layout", XLSTM)
def test_xlstms_model_trains_a_step(layout, dtype):
    model = stack(dtype)
    theirs, names = copy.deepcopy(model), list(model.state_dict())
    if layout == "xlstm_cuda":  # as a model that was made on a GPU
        for block in (model.xlstm_block_stack.blocks[0], model.xlstm_block_stack.blocks[2]):
            block.xlstm.slstm_cell = in_cuda(block.xlstm.slstm_cell).to(dtype)
    fastrnn.convert(model)
    assert len(fastrnn.report(model).converted) == 2 and list(model.state_dict()) == names
    tokens = torch.randint(11, (2, 12))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    named = [("loss", None), ("logits", None), *model.named_parameters()]
    ours, expected = train_a_step(model, tokens), train_a_step(theirs, tokens)
    for (name, _), found, truth in zip(named, ours, expected, strict=True):
        if "slstm_cell" in name and layout == "xlstm_cuda":
            continue  # they lie in another order: test_a_cell_computes_what_theirs_does
        torch.testing.assert_close(
            found, truth, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text
        )
    before = fastrnn.revert(model)
    if layout == "xlstm":
        torch.testing.assert_close(before(tokens), theirs(tokens), rtol=tolerance, atol=tolerance)


def in_cuda(cell):
    """xlstm's cell in its other layout."""
    sLSTMCell_cuda = xlstm_cells().sLSTMCell_cuda

    other = sLSTMCell_cuda(copy.copy(cell.config), skip_backend_init=True)
    with torch.no_grad():
        other._recurrent_kernel_.copy_(other._recurrent_kernel_ext2int(cell.recurrent_kernel[:]))
        other._bias_.copy_(other._bias_ext2int(cell.bias[:]))
    return other


@pytest.mark.parametrize("subclass", (True, False))
@pytest.mark.parametrize("kind", KINDS)
def test_the_objects_are_kept_and_revert_gives_back_theirs(kind, subclass):
    cell, _ = pair(kind)
    model, cls, attributes = torch.nn.ModuleList([cell, cell]), type(cell), set(vars(cell))
    state, parameters = list(model.state_dict()), list(model.parameters())
    x = torch.randn(2, 5, 4 * H)
    for _ in range(2):
        assert fastrnn.convert(model, backend="reference", checkpoint_every=2, subclass=subclass)[0] is cell
        assert isinstance(cell, cls) and isinstance(cell, foreign.Foreign) and type(cell).__name__ == cls.__name__
        assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
        assert list(model.state_dict()) == state and cell.fastrnn_checkpoint_every == 2
    assert str(fastrnn.report(model)).startswith("0: sLSTMCell") and "on fastrnn's sLSTM" in str(fastrnn.report(model))
    twins = [copy.deepcopy(cell)]
    if kind == "tirex":  # xlstm's own cells cannot be pickled
        twins.append(pickle.loads(pickle.dumps(cell)))
    for twin in twins:
        assert type(twin) is type(cell)
        assert torch.equal(twin(x, None)[0], cell(x, None)[0])
    fastrnn.revert(model)
    assert type(cell) is cls and set(vars(cell)) == attributes
    assert fastrnn.report(model).left == dict.fromkeys("01", "not converted yet: fastrnn.convert swaps it")


def test_which_of_xlstms_are_left_and_why():
    cells = xlstm_cells()

    class Own(cells.sLSTMCell_vanilla):
        pass

    def cuda(**config):
        return cells.sLSTMCell_cuda(cells.sLSTMCellConfig(H, N, **config), skip_backend_init=True)

    model = torch.nn.ModuleDict(
        {
            "lstm": cells.sLSTMCell_vanilla(cells.sLSTMCellConfig(H, N, function="lstm")),
            "own": Own(cells.sLSTMCellConfig(H, N)),
            "clips": cuda(gradient_recurrent_clipval=0.5),
            "layout": cuda(),
            "fits": cuda(gradient_recurrent_clipval=2.0),
        }
    )
    model["layout"]._recurrent_kernel_ = torch.nn.Parameter(torch.zeros(N, 4 * K, K))
    before = {name: type(cell) for name, cell in model.items()}
    with pytest.warns(fastrnn.FallbackWarning) as warned:
        fastrnn.convert(model)
    said = str(warned[0].message)
    assert "lstm: its function is 'lstm', and fastrnn runs only 'slstm'" in said
    assert "own: Own is a subclass of sLSTMCell_vanilla" in said
    assert "clips: its kernel clips h too, at a gradient_recurrent_clipval" in said
    assert f"layout: its recurrent kernel is ({N}, {4 * K}, {K}), and fastrnn expects ({N}, {K}, {4 * K})" in said
    assert {name for name, cell in model.items() if type(cell) is not before[name]} == {"fits"}
    with pytest.warns(fastrnn.FallbackWarning, match="torch has no kernel for the sLSTM"):
        fastrnn.convert(pair("xlstm")[0], backend="torch")


@pytest.mark.parametrize(
    ("config", "clip"), [({"gradient_recurrent_cut": True}, 0.0), ({"gradient_recurrent_clipval": 1.0}, 1.0)]
)
def test_gradients_are_clipped_where_xlstms_kernels_do(config, clip):
    """By fastrnn.slstm's own argument, on the product with an identity; its weights are gate by gate."""
    cell, _ = pair("xlstm_cuda", torch.float64, **config)
    W, b = fastrnn.convert(cell)._weights()
    by_gate = [t.detach().unflatten(1, (4, K)).transpose(0, 1).flatten(0, 2) for t in (W * 9, b)]
    with torch.no_grad():
        cell._recurrent_kernel_.mul_(9)
    x = torch.randn(2, 7, 4 * H, dtype=torch.float64, requires_grad=True)
    identity, zero = torch.eye(4 * H, dtype=torch.float64), torch.zeros(4 * H, dtype=torch.float64)
    params, heads = [identity, by_gate[0], zero, by_gate[1]], {"batch_first": True, "num_heads": N}
    found = []
    for limit in (clip, None):
        y, _ = fastrnn.slstm(x, None, params, clip_grad_state=limit, **heads)
        found += torch.autograd.grad(y.square().sum() * 50, x)
    y, _ = cell(x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum() * 50, x)[0], found[0])
    assert not torch.allclose(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_computes_in_16_bits_with_wide_states(kind, device):
    cell, theirs = (c.to(device) for c in pair(kind))
    fastrnn.convert(cell)
    x = torch.randn(2, 40, 4 * H, device=device)
    with torch.autocast(device, torch.bfloat16):
        y, state = cell(x)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.float(), theirs(x)[0], rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_a_refused_launch_is_planned_again_by_auto_only(kind, monkeypatch):
    cell, theirs = pair(kind)
    module, name = (layers, "by_reference") if ON_CPU == "reference" else (layer, "by_op")
    x, plain, tried = torch.randn(2, 5, 4 * H), getattr(module, name), []

    def refuse_once(*args):
        tried.append(args)
        if len(tried) == 1:
            raise fastrnn.LaunchRefusedError("too many blocks")
        return plain(*args)

    monkeypatch.setattr(module, name, refuse_once)
    torch.testing.assert_close(fastrnn.convert(cell)(x)[0], theirs(x)[0])
    assert len(tried) == 2
    tried.clear()
    fastrnn.convert(fastrnn.revert(cell), backend=ON_CPU)
    with pytest.raises(fastrnn.LaunchRefusedError, match="too many blocks"):
        cell(x)


def test_bad_input_of_xlstms():
    cell = fastrnn.convert(pair("xlstm")[0])
    for shape in ((2, 5, 4 * H - 1), (2, 4 * H)):
        said = f"input: expected three dimensions, with {4 * H} for 4 gates in the last; got {shape}"
        with pytest.raises(ValueError, match=re.escape(said)):
            cell(torch.randn(shape))
    with pytest.raises(ValueError, match=rf"state: expected \(4, 2, {H}\), got \(4, 3, {H}\)"):
        cell(torch.randn(2, 5, 4 * H), torch.zeros(4, 3, H))
    with pytest.raises(NotImplementedError, match="a kernel for torch.float64 is missing"):
        fastrnn.convert(pair("xlstm")[0].double(), backend="resident")(torch.randn(2, 5, 4 * H).double())


def test_no_steps_and_no_rows_of_xlstms():
    """Theirs cannot reshape what has no elements."""
    cell, state = fastrnn.convert(pair("xlstm")[0]), start("cpu", torch.float32)
    y, after = cell(torch.randn(2, 0, 4 * H), state)
    assert y.shape == (2, N, 0, K) and torch.equal(after, state)
    y, after = cell(torch.randn(0, 3, 4 * H))
    assert y.shape == (0, N, 3, K) and after.shape == (4, 0, H)


@pytest.mark.parametrize("kind", KINDS)
def test_explain_and_compile(kind):
    cell = fastrnn.convert(pair(kind)[0])
    x = torch.randn(2, 5, 4 * H)
    assert fastrnn.explain(cell, x).backend == ON_CPU
    whole = torch.compile(cell, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x)[0], cell(x)[0])  # torch.compile takes the reference


def test_tirex_holds_f_to_15(device):
    """In float64 what is forgotten beyond shows; the kernels' gradient of f is 0 there."""
    cell, theirs = pair("tirex", torch.float64)
    fastrnn.convert(cell)
    x = torch.randn(2, 7, 4, H, dtype=torch.float64)
    x[:, :, 1] = torch.linspace(0, 30, 7, dtype=torch.float64)[:, None]
    compare(cell, theirs, x.flatten(2), None, rtol=1e-12, atol=1e-12)
    y, _ = cell(x.flatten(2), None)
    cell._cell = "slstm"
    assert 1e-9 < (cell(x.flatten(2), None)[0] - y).abs().max() < 1e-5
    assert held_gradients_are_0(x.float(), device)


def held_gradients_are_0(x, device) -> bool:
    """Whether the kernels' gradient of gate f is exactly 0 where it is held, and not elsewhere."""
    cell = fastrnn.convert(pair("tirex")[0].to(device), backend="resident")
    x = x.to(device).requires_grad_()
    y, _ = cell(x.flatten(2), None)
    d_f = torch.autograd.grad(y.square().sum(), x)[0][:, :, 1]
    held = x[:, :, 1] > 20
    assert (d_f[~held] != 0).any()
    return bool((d_f[held] == 0).all())


def test_a_gradient_of_tirex_that_is_not_held_is_noticed(mutate, device):
    x = torch.randn(2, 3, 4, H)
    x[:, 1, 1] = 22.0
    mutate({"kernels.cells.slstm_capped_forward": ("tl.where(over, 0.0, not_f)", "not_f")})
    assert not held_gradients_are_0(x, device)


def test_tirex_feeds_its_module_fgate_into_gate_i():
    """What is around the cell is theirs, its historic names too: as one layer of ours, with weights sorted by hand."""
    from tirex.models.slstm import block, layer

    theirs = layer.sLSTMLayer(block.sLSTMBlockConfig(H, N), "torch").double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fastrnn.convert(theirs)
    cell = theirs.slstm_cell
    projections = [theirs.fgate, theirs.igate, theirs.zgate, theirs.ogate]  # into i, f, z and o
    ours = fastrnn.SLSTM(H, H, num_heads=N, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        ours.weight_ih_l0.copy_(torch.cat([torch.block_diag(*gate.weight) for gate in projections]))
        ours.weight_hh_l0.copy_(cell._recurrent_kernel_.unflatten(2, (4, K)).permute(2, 0, 3, 1).reshape(4 * H, K))
        ours.bias_ih_l0.copy_(cell._bias_.view(N, 4, K).transpose(0, 1).flatten())
        ours.bias_hh_l0.zero_()
    x = torch.randn(2, 7, H, dtype=torch.float64)
    expected = theirs.group_norm(ours(x)[0].unflatten(2, (N, K)).transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(theirs(x), expected)


def test_tirex_forecasts_a_real_series():
    """Its architecture with random weights: as its own loop does where that is not rounded to bfloat16, and nearer."""
    model = tirex_benchmark.architecture(units=64, heads=2, blocks=3, context=256)
    past, rounded, exact = tirex_benchmark.series(3, 256), copy.deepcopy(model), copy.deepcopy(model)
    for block in exact.blocks:
        block.slstm_layer.slstm_cell.__class__ = uncast_tirex()
    fastrnn.convert(model)
    assert len(fastrnn.report(model).converted) == 3
    found, rough, truth = (tirex_benchmark.forecast(m, past) for m in (model, rounded, exact))
    assert found.shape == (3, 32, 9) and truth.std() > 0.1
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-3)
    assert 10 * (found - truth).abs().max() < (rough - truth).abs().max()
    halved = tirex_benchmark.forecast(model, past, halved=True)
    assert torch.equal(tirex_benchmark.forecast(fastrnn.revert(model), past), rough)
    their_halved = tirex_benchmark.forecast(model, past, halved=True)  # in autocast linear layers are rounded, too
    assert 0 < (halved - truth).abs().max() < 2 * (their_halved - truth).abs().max()

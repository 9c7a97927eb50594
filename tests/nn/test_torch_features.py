"""What torch offers to every module: sharing memory, DistributedDataParallel, FSDP2, and parametrized weights."""

import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, parametrize

import fastrnn
from fastrnn.compat import interpreter

NAMES = ("RNN", "GRU", "LSTM")
BACKENDS = ("auto", "resident")


class Classifier(nn.Module):
    """Two recurrent layers and a head, with torch.nn's layers."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder, self.head = nn.GRU(3, 6, bidirectional=True), nn.LSTM(12, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.decoder(self.encoder(x)[0])[0])


def train(model, x, steps: int = 2) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def _rank(rank: int, folder: str, kind: str, backend: str, model: nn.Module, x: torch.Tensor) -> None:
    """Train on this process's half of the batch; process 0 writes the parameters."""
    # Addressed by number, since a machine may not know its own name; who waits for the other longer than this, fails.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    model = fastrnn.convert(copy.deepcopy(model), backend=backend)  # the argument lies in memory that processes share
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in (model.encoder, model.decoder, model):
            fully_shard(layer, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        wrapped = model
    assert isinstance(model.encoder, fastrnn.GRU) and model.encoder.backend == backend
    train(wrapped, x[:, rank::2])
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    if rank == 0:
        torch.save(state, f"{folder}/state")
    dist.barrier()  # neither leaves while the other needs it
    dist.destroy_process_group()


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ("ddp", "fsdp2"))
def test_two_processes_train_as_one(kind, backend, tmp_path):
    """Each with half of the batch: the parameters are those of torch.nn's layers with all of it."""
    model, x = Classifier(), torch.randn(4, 6, 3)
    before = copy.deepcopy(model.state_dict())
    if backend != "auto" and not interpreter.ENABLED:
        pytest.skip("compiled kernels do not run CPU tensors, which gloo's two processes have")
    processes = mp.spawn(_rank, (str(tmp_path), kind, backend, model, x), nprocs=2, join=False)
    if not any(processes.join(10) for _ in range(12)):
        for process in processes.processes:
            process.kill()
        pytest.fail("two processes have not come to an end in two minutes")
    train(model, x)
    for name, found in torch.load(tmp_path / "state").items():
        torch.testing.assert_close(found, model.state_dict()[name])
        assert not torch.equal(found, before[name]), name


def _zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


def test_share_memory():
    """What another process writes to the weights is seen here."""
    layer = fastrnn.LSTM(3, 4).share_memory()
    assert all(parameter.is_shared() for parameter in layer.parameters())  # now, and not only once it is sent
    x = torch.randn(5, 2, 3)
    assert layer(x)[0].abs().max() > 0
    process = mp.get_context("spawn").Process(target=_zero, args=(layer,))
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 0
    assert not layer(x)[0].any()


class DropConnect(nn.Module):
    """In training, half of the recurrent weights are dropped, the same at each step (Merity et al. 2017)."""

    def forward(self, W_hh):
        return nn.functional.dropout(W_hh, 0.5, self.training)


def parametrized(name: str, kind: str, module: type, device: str) -> nn.Module:
    layer = module(3, 5, num_layers=2, bidirectional=True, device=device)
    for key in ("weight_hh_l0", "weight_hh_l1_reverse"):
        if kind == "weight norm":
            parametrizations.weight_norm(layer, key)
        else:
            parametrize.register_parametrization(layer, key, DropConnect())
    return layer


@pytest.mark.parametrize("backend", ("auto", "reference", "resident"))
@pytest.mark.parametrize("kind", ("weight norm", "DropConnect"))
@pytest.mark.parametrize("name", NAMES)
def test_parametrized_weights(name, kind, backend, device):
    """Outputs and gradients of what the parametrization holds are torch.nn's, in training and not."""
    ours = parametrized(name, kind, getattr(fastrnn, name), device)
    ours.backend = backend
    theirs = parametrized(name, kind, getattr(nn, name), device)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 2, 3, device=device)
    outputs = []
    for training in (True, False):
        for layer in (ours, theirs):
            layer.train(training).zero_grad()
            torch.manual_seed(0)
            # Each use of a parametrized weight computes it again: once a call here, that both drop the same weights.
            with parametrize.cached():
                outputs.append(layer(x)[0])
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(outputs[-2], outputs[-1])
        for (key, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=lambda text, key=key: f"{key}: {text}")
    if kind == "DropConnect":
        assert not torch.equal(outputs[0], outputs[2])

"""fastrnn.convert on models of PyPI packages: a training step has torch.nn's outputs, gradients and new parameters."""

import copy
import math

import pytest
import torch

import fastrnn

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages


def deepar():
    """gluonts' forecaster: a stacked batch_first LSTM over lagged observations; the loss is a likelihood."""
    from gluonts.torch.model.deepar.module import DeepARModel

    model = DeepARModel("D", 6, 3, lags_seq=[1, 2, 7], num_layers=2, hidden_size=12, dropout_rate=0.0)
    B, past, future = 4, model.past_length, model.prediction_length
    inputs = {
        "feat_static_cat": torch.zeros(B, 1, dtype=torch.long),
        "feat_static_real": torch.randn(B, 1),
        "past_time_feat": torch.randn(B, past, 1),
        "past_target": torch.rand(B, past) + 1,
        "past_observed_values": torch.ones(B, past),
        "future_time_feat": torch.randn(B, future, 1),
        "future_target": torch.rand(B, future) + 1,
    }

    def run(model, inputs):
        (df, loc, scale), _, output, _, state = model.unroll_lagged_rnn(**inputs)
        loss = model.loss(**inputs, future_observed_values=torch.ones_like(inputs["future_target"])).mean()
        return loss, [df, loc, scale, output, *state]

    return model, inputs, run


def recurrent_policy():
    """sb3-contrib's recurrent PPO: LSTMs of actor and critic, run in pieces since episodes end between the steps."""
    from gymnasium.spaces import Box
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates

    box = Box(-1.0, 1.0, (5,))
    model = RecurrentActorCriticPolicy(box, Box(-1.0, 1.0, (2,)), lambda _: 1e-3, [8], lstm_hidden_size=16)
    T, sequences = 4, 3
    inputs = {
        "obs": torch.rand(sequences * T, 5),
        "actions": torch.rand(sequences * T, 2),
        "episode_starts": torch.zeros(sequences, T).index_fill(1, torch.tensor([2]), 1.0).flatten(),
        "states": torch.randn(4, 1, sequences, 16),
    }

    def run(model, inputs):
        # The package casts observations to float32, which holds them exactly.
        model.features_extractor.register_forward_hook(lambda *of_call: of_call[-1].to(inputs["obs"].dtype))
        h, c, h_critic, c_critic = inputs["states"]
        states = RNNStates((h, c), (h_critic, c_critic))
        values, log_prob, entropy = model.evaluate_actions(
            inputs["obs"], inputs["actions"], states, inputs["episode_starts"]
        )
        return (values.square() - log_prob - 0.01 * entropy).mean(), [values, log_prob]

    return model, inputs, run


def par():
    """deepecho's generator of sequences: a GRU between two linear layers."""
    from deepecho.models.par import PARNet

    model = PARNet(data_size=6, context_size=2, hidden_size=24)
    inputs = {"x": torch.randn(7, 5, 6), "c": torch.randn(5, 2)}

    def run(model, inputs):
        output = model(inputs["x"], inputs["c"])
        return (output[:-1] - inputs["x"][1:]).square().mean(), [output]

    return model, inputs, run


def train_a_step(model, inputs, run) -> dict[str, torch.Tensor]:
    """Loss, outputs, gradients of all parameters, and the parameters after a step of gradient descent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, outputs = run(model, inputs)
    loss.backward()
    optimizer.step()
    named = {"loss": loss} | {f"output {i}": t for i, t in enumerate(outputs)}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            named |= {f"d_{name}": parameter.grad, name: parameter}
    return {name: tensor.detach().double() for name, tensor in named.items()}


def worst_errors(make, backend: str, device: str, draws: int = 8) -> dict[str, tuple[float, float, float]]:
    """By name, over draws of weights and inputs: largest error of ours and of torch.nn's in float32, and eps' share.

    One draw would not do: torch.nn's error is that of one rounding, and small by chance in some tensor of a model.
    """
    worst: dict[str, tuple[float, float, float]] = {}
    for _ in range(draws):
        model, inputs, run = make()
        model = model.to(device)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        double = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        truth = train_a_step(copy.deepcopy(model).double(), double, run)
        theirs = train_a_step(copy.deepcopy(model), inputs, run)
        ours = train_a_step(fastrnn.convert(copy.deepcopy(model), backend=backend), inputs, run)
        assert ours.keys() == theirs.keys() == truth.keys()
        for name, true in truth.items():
            assert true.abs().max() > 0, name
            errors = [(found[name] - true).abs().max().item() for found in (ours, theirs)]
            assert all(map(math.isfinite, errors)), name
            if backend == "auto" and device == "cpu":
                assert torch.equal(ours[name], theirs[name]), name  # torch's own code runs
            ulp = torch.finfo(torch.float32).eps * true.abs().max().item()
            worst[name] = tuple(map(max, worst.get(name, (0.0, 0.0, 0.0)), (*errors, ulp)))  # type: ignore[assignment]
    return worst


@pytest.mark.parametrize("backend", ("auto", "resident", "cooperative"))
@pytest.mark.parametrize("make", (deepar, recurrent_policy, par))
def test_trains_a_step_as_with_torch_nn(make, backend, device):
    """Inside twice torch.nn's own error in float32 and one unit in the last place of the largest element."""
    worst = worst_errors(make, backend, device)
    assert sum("d_" in name and "weight_hh" in name for name in worst) >= 1
    for name, (ours, theirs, ulp) in worst.items():
        assert ours <= 2 * theirs + ulp, name

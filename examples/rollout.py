"""Train a policy that must remember: PPO with a GRU in a T-maze. An update is one launch of the recurrence (reset=).

    python examples/rollout.py                          half a minute on a CPU core, with torch's CPU kernel
    python examples/rollout.py --device cuda            on the persistent Triton kernels
    torchrun --standalone --nproc-per-node 2 examples/rollout.py        two processes, DistributedDataParallel

In the T-maze (Bakker 2002) the agent starts in a corridor. There it sees on which side of the junction the reward lies.
Then it sees only walls, and at the junction only the junction. Without memory one turn in two is right.

Corridors differ in length, so episodes end anywhere inside a rollout of T steps x B mazes. Acting goes step by step,
with a state that passes from rollout to rollout. Learning runs the whole rollout at once. reset[t, b] tells the layer
where an episode of maze b begins, so neither state nor gradient crosses from one episode to the next. The log
probabilities then equal those of acting, as long as the policy is the same. The run checks this at every rollout.

The first process writes metrics.json and success.png to --out.
"""

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from common import LAYERS, descend, fraction, parse, parser, positive, progress, rate, run, save_figure, save_json
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

HINT_LEFT, HINT_RIGHT, CORRIDOR, JUNCTION = range(4)  # what the agent can see
FORWARD, LEFT, RIGHT = range(3)  # what it can do
SAME = 1e-3  # log probabilities computed step by step and at once may differ by rounding, tf32's too


class TMazes:
    """B mazes at once. After an episode ends, the next begins in a corridor of a new length."""

    def __init__(self, B: int, corridor: int, device: str) -> None:
        self.longest, self.device = corridor, device
        self.length, self.side, self.at, self.age = torch.zeros(4, B, dtype=torch.long, device=device).unbind()
        self._begin(torch.ones(B, dtype=torch.bool, device=device))

    def _begin(self, which: Tensor) -> None:
        B = len(which)
        lengths = torch.randint((self.longest + 1) // 2, self.longest + 1, (B,)).to(self.device)
        self.length = torch.where(which, lengths, self.length)
        self.side = torch.where(which, torch.randint(LEFT, RIGHT + 1, (B,)).to(self.device), self.side)
        self.at, self.age = self.at.masked_fill(which, 0), self.age.masked_fill(which, 0)

    def see(self) -> Tensor:
        """What each agent sees, one-hot (B, 4)."""
        there = torch.where(self.at == self.length, JUNCTION, CORRIDOR)
        hint = torch.where(self.side == LEFT, HINT_LEFT, HINT_RIGHT)
        return nn.functional.one_hot(torch.where(self.at == 0, hint, there), 4).float()

    def act(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reward, whether the episode ended, and whether with the right turn; each (B,)."""
        turned, arrived = action != FORWARD, self.at == self.length
        right = arrived & (action == self.side)
        self.age += 1
        ended = (arrived & turned) | (self.age >= 3 * self.longest)
        reward = right.float() - 0.1 * (turned & ~right)  # a wrong turn, and bumping into walls
        self.at = torch.where(~turned & ~arrived, self.at + 1, self.at)
        self._begin(ended)
        return reward, ended, right


class Policy(nn.Module):
    def __init__(self, cell: str, hidden: int, backend: str) -> None:
        super().__init__()
        self.rnn = LAYERS[cell](4, hidden, backend=backend)
        self.head = nn.Linear(hidden, 4)

    def forward(self, seen: Tensor, state: Any, first: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Return log probabilities of actions (T, B, 3), values (T, B) and the state after the last step.

        seen is (T, B, 4). first (T, B) is True where an episode begins.
        """
        h, state = self.rnn(seen, state, reset=first)
        logits, values = self.head(h).split((3, 1), -1)
        return logits.log_softmax(-1), values.squeeze(-1), state


class Rollout:
    """T steps in B mazes, each tensor (T, B) or (T, B, 4), and the state before them."""

    def __init__(self, policy: Policy, mazes: TMazes, state: Any, first: Tensor, T: int) -> None:
        self.state, steps = state, []
        with torch.no_grad():
            for _ in range(T):
                seen = mazes.see()
                log_p, value, state = policy(seen[None], state, first[None])
                action = log_p[0].exp().multinomial(1)
                reward, ended, right = mazes.act(action.squeeze(1))
                steps.append((seen, first, action.squeeze(1), log_p[0].gather(1, action)[:, 0], value[0], reward,
                              ended, right))  # fmt: skip
                first = ended
            self.next_state, self.next_first = state, first
            _, next_value, _ = policy(mazes.see()[None], state, first[None])
        columns = (torch.stack(column) for column in zip(*steps, strict=True))
        self.seen, self.first, self.action, self.log_p, self.value, self.reward, self.ended, self.right = columns
        self.next_value = next_value[0]

    def advantage(self, discount: float, trace: float) -> Tensor:
        """Return generalized advantage estimates (Schulman et al. 2016), (T, B), cut where episodes end."""
        goes_on = 1 - self.ended.float()
        following = torch.cat((self.value[1:], self.next_value[None]))
        surprise = self.reward + discount * goes_on * following - self.value
        found, later = torch.empty_like(surprise), torch.zeros_like(surprise[0])
        for t in reversed(range(len(surprise))):
            found[t] = later = surprise[t] + discount * trace * goes_on[t] * later
        return found


def ppo_loss(policy: nn.Module, rollout: Rollout, advantage: Tensor, args: argparse.Namespace) -> tuple[Tensor, float]:
    """Return the clipped objective (Schulman et al. 2017), and the log probabilities' largest change since acting."""
    log_ps, value, _ = policy(rollout.seen, rollout.state, rollout.first)  # the whole rollout at once
    log_p = log_ps.gather(-1, rollout.action.unsqueeze(-1)).squeeze(-1)
    ratio = (log_p - rollout.log_p).exp()
    scaled = (advantage - advantage.mean()) / (advantage.std() + 1e-6)
    gain = torch.minimum(ratio * scaled, ratio.clamp(1 - args.clip, 1 + args.clip) * scaled).mean()
    entropy = -(log_ps.exp() * log_ps).sum(-1).mean()
    value_loss = (value - (rollout.value + advantage)).square().mean()
    changed = (log_p - rollout.log_p).abs().max().item()
    return 0.5 * value_loss - gain - args.entropy * entropy, changed


def train(policy: Policy, args: argparse.Namespace, processes: int, leads: bool) -> tuple[list[float], float]:
    """Train. Return by rollout the share of right turns, and how far acting and learning differed at most."""
    learner = DistributedDataParallel(policy) if processes > 1 else policy
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    mazes = TMazes(args.mazes, args.corridor, args.device)
    state, first = None, torch.ones(args.mazes, dtype=torch.bool, device=args.device)
    success, differed = [], 0.0
    with progress(range(args.rollouts), desc="train", unit="rollout", disable=not leads) as bar:
        for _ in bar:
            rollout = Rollout(policy, mazes, state, first, args.steps)
            state, first = rollout.next_state, rollout.next_first
            advantage = rollout.advantage(args.discount, trace=0.95)
            for update in range(args.updates):
                loss, changed = ppo_loss(learner, rollout, advantage, args)
                if update == 0:
                    differed = max(differed, changed)
                descend(optimizer, loss)
            counts = torch.stack((rollout.right.sum(), rollout.ended.sum()))
            if processes > 1:
                dist.all_reduce(counts)
            success.append((counts[0] / counts[1].clamp(min=1)).item())
            bar.set_postfix_str(f"right turns {success[-1]:.1%}")
    return success, differed


def plot(success: list[float]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(success) + 1), success, label="recurrent, reset where episodes begin")
    axes.axhline(0.5, color="C7", linestyle=":", label="without memory")
    axes.set(xlabel="rollout", ylabel="episodes that end with the right turn", ylim=(0, 1.02), title="T-maze")
    axes.grid()
    axes.legend()
    return figure


def main() -> None:
    made = parser(__doc__, "runs/rollout")
    made.add_argument("--cell", choices=list(LAYERS), default="gru")
    made.add_argument("--hidden", type=positive, default=32)
    made.add_argument("--corridor", type=positive, default=10, help="steps from the hint to the junction, at most")
    made.add_argument("--mazes", type=positive, default=64, help="mazes of each process")
    made.add_argument("--steps", type=positive, default=64, help="time steps of a rollout")
    made.add_argument("--rollouts", type=positive, default=80)
    made.add_argument(
        "--updates", type=positive, default=4, help="updates after each rollout, each one call of the layer"
    )
    made.add_argument("--lr", type=rate, default=1e-2)
    made.add_argument("--clip", type=fraction, default=0.2, help="largest change of the ratio of probabilities")
    made.add_argument("--entropy", type=fraction, default=0.01, help="weight of the policy's entropy")
    made.add_argument("--discount", type=fraction, default=0.97)
    args = parse(made)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    policy = Policy(args.cell, args.hidden, args.backend).to(args.device)
    torch.manual_seed(args.seed + rank)  # every process has its own mazes

    success, differed = train(policy, args, processes, leads=rank == 0)
    if processes > 1:
        mine = nn.utils.parameters_to_vector(policy.parameters()).detach()
        first = mine.clone()
        dist.broadcast(first, 0)
        if not torch.equal(mine, first):
            raise SystemExit(f"process {rank} has other parameters than process 0")
        dist.destroy_process_group()
    if not differed < SAME:
        raise SystemExit(f"acting and learning differ by {differed:.1e} in a log probability of one policy")
    if rank > 0:
        return
    last = success[-max(1, len(success) // 10) :]
    found = {
        "right_turns": sum(last) / len(last),
        "without_memory": 0.5,
        "processes": processes,
        "acting_and_learning_differ": differed,
        "by_rollout": success,
    }
    save_figure(plot(success), args.out / "success.png")
    save_json(found, args.out / "metrics.json")
    print(f"acting and learning give the same log probabilities to {differed:.0e}")
    print(f"{found['right_turns']:.1%} of the last episodes end with the right turn (without memory: 50%)")
    print(f"figure in {args.out / 'success.png'}")


if __name__ == "__main__":
    run(main)

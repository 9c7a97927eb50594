"""Train blocks of xLSTM, and an LSTM with as many parameters, on the text of char_lm.py. Compare bits per character.

    python examples/xlstm_lm.py                    about two minutes on a CPU core
    python examples/xlstm_lm.py --device cuda      on the persistent Triton kernels, in bfloat16
    python examples/xlstm_lm.py --blocks 4 --resume   continue an interrupted run, exactly

A block has the layers that the xLSTM paper puts around its sLSTM (Beck et al. 2024, arXiv:2405.04517), without the
convolution:

    x = x + norm_per_head(sLSTM(norm(x)));    x = x + W_down(gelu(W_gate norm(x)) * W_up norm(x))

The sLSTM is fastrnn.SLSTM, with --heads heads. Text, windows, the carried state and checkpoints are those of
char_lm.py.

--out gets metrics.json, curves.png, and a folder for each network with its checkpoint.
"""

import argparse

import torch
from char_lm import CONFIG, CharLM, add_training, train, with_dtype
from char_lm import Trainer as Base
from common import parse, parser, positive, save_figure, save_json
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import gelu

import fastrnn

WIDER = 4 / 3  # hidden units of the feed-forward, as a multiple of the block's units


class Block(nn.Module):
    """An sLSTM with a norm per head, then a gated feed-forward. Each follows a norm and has a residual."""

    def __init__(self, units: int, heads: int, backend: str = "auto") -> None:
        super().__init__()
        inner = round(WIDER * units)
        self.norm, self.norm_ff = nn.LayerNorm(units), nn.LayerNorm(units)
        self.slstm = fastrnn.SLSTM(units, units, num_heads=heads, backend=backend)
        self.head_norm = nn.GroupNorm(heads, units)
        self.gate_up, self.down = nn.Linear(units, 2 * inner, bias=False), nn.Linear(inner, units, bias=False)

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run x (T, B, units) from the sLSTM's state, a tuple of four. Return the output and the state after."""
        y, after = self.slstm(self.norm(x), state)
        x = x + self.head_norm(y.flatten(0, 1)).view_as(x)  # the norm is over each step and row alone
        gate, up = self.gate_up(self.norm_ff(x)).chunk(2, -1)
        return x + self.down(gelu(gate) * up), after


class XLSTM(nn.Module):
    """Stacked blocks. The state has the states of all blocks, each (blocks, B, units)."""

    def __init__(self, units: int, heads: int, blocks: int, backend: str = "auto") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(units, heads, backend) for _ in range(blocks))
        self.norm = nn.LayerNorm(units)

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        after = []
        for n, block in enumerate(self.blocks):
            x, of_block = block(x, None if state is None else tuple(s[n : n + 1] for s in state))
            after.append(of_block)
        return self.norm(x), tuple(torch.cat(of_all) for of_all in zip(*after, strict=True))


class Trainer(Base):
    config = (*CONFIG, "heads")

    def network(self) -> nn.Module:
        args = self.args
        return XLSTM(args.hidden, args.heads, args.layers, args.backend) if args.cell == "xlstm" else super().network()

    @property
    def parameters(self) -> int:
        return count(self.model)


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def as_large(parameters: int, embedding: int, layers: int) -> int:
    """Return the fewest units, in steps of 8, with which an LSTM has at least as many parameters."""
    hidden = 8
    with torch.device("meta"):
        while count(CharLM(nn.LSTM(embedding, hidden, layers), embedding, hidden)) < parameters:
            hidden += 8
    return hidden


def arguments() -> argparse.Namespace:
    made = parser(__doc__, "runs/xlstm_lm")
    made.add_argument("--heads", type=positive, default=4, help="heads of the sLSTM")
    made.add_argument("--blocks", type=positive, default=1, help="blocks of xLSTM, and layers of the LSTM")
    add_training(made, steps=1200, eval_every=200)
    args = with_dtype(parse(made))
    if args.hidden % args.heads:
        made.error(f"--heads {args.heads}: expected a divisor of --hidden {args.hidden}")
    if args.backend == "torch":
        made.error("--backend torch: torch has no sLSTM")
    return args


def trainers(args: argparse.Namespace) -> dict[str, Trainer]:
    """Make both trainers with one seed: they read the same windows of the same text."""
    same = vars(args) | {"embedding": args.hidden, "layers": args.blocks, "dropout": 0.0}
    xlstm = Trainer(argparse.Namespace(**same | {"cell": "xlstm"}))
    hidden = as_large(xlstm.parameters, args.hidden, args.blocks)
    return {"LSTM": Trainer(argparse.Namespace(**same | {"cell": "lstm", "hidden": hidden})), "xLSTM": xlstm}


def plot(found: dict[str, dict]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, of_one in found.items():
        steps, bits = zip(*((h["step"], h["valid"]) for h in of_one["history"]), strict=True)
        axes.plot(steps, bits, marker="o", label=f"{name}, {of_one['parameters']:,} parameters")
    axes.set(xlabel="step", ylabel="bits per character, validation", title="Character-level language models")
    axes.grid()
    axes.legend()
    return figure


def main() -> None:
    args = arguments()
    both = trainers(args)
    paths = {name: args.out / name.lower() / "checkpoint.pt" for name in both}
    if args.resume:
        there = {name: path for name, path in paths.items() if path.exists()}
        # Without any checkpoint the first load fails with a message. One network alone may lack one: it starts anew.
        for name, path in (there or paths).items():
            both[name].load(path)

    print("the sLSTM of this run:")
    x = torch.empty(args.window, args.batch, args.hidden, device=args.device)
    with torch.autocast(x.device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32"):
        fastrnn.explain(both["xLSTM"].model.rnn.blocks[0].slstm, x)
    if args.device == "cpu":
        print("\non an H100 it would be:")
        sizes = {"hidden_size": args.hidden, "batch_size": args.batch, "seq_len": args.window}
        print(fastrnn.plan("slstm", **sizes, num_heads=args.heads, dtype=torch.bfloat16, device="sm_90"))
    for name, trainer in both.items():
        print(f"\n{name}: {trainer.parameters:,} parameters")
        if not train(trainer, paths[name].parent):
            raise SystemExit(130)
    found = {name: {"parameters": t.parameters, "history": t.history} for name, t in both.items()}
    save_figure(plot(found), args.out / "curves.png")
    save_json(found, args.out / "metrics.json")
    for name, trainer in both.items():
        last = trainer.history[-1]["valid"]
        print(f"{name:<5}  {trainer.parameters:,} parameters  validation {last:.3f} bits per character")
    print(f"curves in {args.out / 'curves.png'}")


if __name__ == "__main__":
    main()

"""Forecast carbon dioxide in the air a year ahead, with intervals, by a GRU (Mauna Loa, weekly; statsmodels' co2).

    python examples/forecast.py                         half a minute on a CPU core, with torch's CPU kernel
    python examples/forecast.py --device cuda           on the persistent Triton kernels

The GRU forecasts the growth over a year, z[t] = y[t] - y[t - 52], which has neither trend nor season. At every week t
it has read z up to t, and gives three quantiles (5%, 50%, 95%) of z[t + 1] to z[t + 52]. Adding y a year earlier, which
is known at t, gives y. The first 55% of the weeks train it with the quantile (pinball) loss. On the next 15%, unseen in
training, the intervals are widened until 90% of the truth is inside (Romano, Patterson and Candes 2019: conformalized
quantile regression). All other weeks are the test. The baselines are last year again (z = 0), and last year with its
growth again (z[t + h] = z[t]).

--out gets metrics.json and forecast.png.
"""

import argparse
import math

import numpy as np
import pandas as pd
import torch
from common import descend, parse, parser, positive, progress, rate, run, save_figure, save_json
from matplotlib.dates import ConciseDateFormatter
from matplotlib.figure import Figure
from statsmodels.datasets import co2
from torch import Tensor, nn

import fastrnn

YEAR = 52  # weeks: the season, and the longest horizon
QUANTILES = (0.05, 0.5, 0.95)
COVERAGE = 0.9


class Forecaster(nn.Module):
    def __init__(self, hidden: int, backend: str) -> None:
        super().__init__()
        self.gru = fastrnn.GRU(3, hidden, backend=backend)
        self.head = nn.Linear(hidden, YEAR * len(QUANTILES))

    def forward(self, features: Tensor) -> Tensor:
        """Return quantiles (T, B, YEAR, 3) of the growth in the year after each week, for features (T, B, 3)."""
        h, _ = self.gru(features)
        middle, below, above = self.head(h).unflatten(-1, (3, YEAR)).unbind(-2)
        below, above = nn.functional.softplus(below), nn.functional.softplus(above)  # quantiles never cross
        return torch.stack((middle - below, middle, middle + above), -1)


def load() -> pd.Series:
    """Parts per million, every week from 1958 to 2001. 59 weeks without a measurement are interpolated."""
    return co2.load_pandas()["data"]["co2"].interpolate()


def pinball(forecast: Tensor, truth: Tensor) -> Tensor:
    """The mean of max(q e, (q - 1) e), e = truth - forecast. It is least if forecast (..., 3) has the quantiles."""
    q = forecast.new_tensor(QUANTILES)
    e = truth.unsqueeze(-1) - forecast
    return torch.maximum(q * e, (q - 1) * e).mean()


def train(model: Forecaster, features: Tensor, growth: Tensor, args: argparse.Namespace) -> None:
    """Train on windows of features (T, 3) and growth (T,) whose targets are all known."""
    following = following_year(growth)
    starts = len(following) - args.window + 1
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    with progress(range(args.steps), desc="train", unit="step") as bar:
        for _ in bar:
            weeks = torch.randint(starts, (args.batch,)) + torch.arange(args.window).unsqueeze(1)  # (window, batch)
            weeks = weeks.to(features.device)
            read = args.window // 3  # weeks before the first forecast that counts
            loss = descend(optimizer, pinball(model(features[weeks])[read:], following[weeks[read:]]))
            schedule.step()
            bar.set_postfix_str(f"pinball {loss:.4f}")


def plot(series: pd.Series, forecast: np.ndarray, by_horizon: dict[str, list[float]], first: str) -> Figure:
    """Plot the series' last year with its forecast (YEAR, 3), and the errors by horizon."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    ahead = series.index[-YEAR:]
    left.plot(series.index[-3 * YEAR :], series.iloc[-3 * YEAR :], color="C7", linewidth=1, label="measured")
    left.plot(ahead, forecast[:, 1], label="forecast")
    left.fill_between(ahead, forecast[:, 0], forecast[:, 2], alpha=0.3, label=f"{COVERAGE:.0%} interval")
    left.plot(ahead, series.iloc[-2 * YEAR : -YEAR], "--", color="C1", label="last year again")
    left.xaxis.set_major_formatter(ConciseDateFormatter(left.xaxis.get_major_locator()))
    left.set(ylabel="CO2, ppm", title=f"A year from {series.index[-YEAR - 1]:%B %Y}")
    for name, errors in by_horizon.items():
        right.plot(range(1, YEAR + 1), errors, label=name)
    right.set(xlabel="weeks ahead", ylabel="mean absolute error, ppm", title=f"From every week since {first}")
    for axes in (left, right):
        axes.grid()
        axes.legend()
    return figure


def following_year(growth: Tensor) -> Tensor:
    """Return the targets of every week, (T - YEAR, YEAR), as a view of growth (T,)."""
    return growth[1:].unfold(0, YEAR, 1)


def main() -> None:
    made = parser(__doc__, "runs/forecast")
    made.add_argument("--hidden", type=positive, default=32)
    made.add_argument("--steps", type=positive, default=200)
    made.add_argument("--batch", type=positive, default=32, help="windows in a training step")
    made.add_argument(
        "--window", type=positive, default=3 * YEAR, help="weeks in a window; forecasts in its first third do not count"
    )
    made.add_argument("--lr", type=rate, default=3e-3)
    args = parse(made)
    series = load()
    measured = torch.tensor(series.to_numpy(), dtype=torch.float32, device=args.device)
    y, growth = measured[YEAR:], measured[YEAR:] - measured[:-YEAR]  # only weeks with a year before them
    learnt, calibrated = int(0.55 * len(y)), int(0.7 * len(y))
    if args.window > learnt - YEAR:
        made.error(f"--window {args.window}: expected at most {learnt - YEAR}, the weeks to learn from")
    mean, std = growth[:learnt].mean(), growth[:learnt].std()
    z = (growth - mean) / std
    days = torch.from_numpy(series.index.to_numpy().astype("datetime64[D]").astype(np.float64))[YEAR:]
    phase = (2 * math.pi / 365.2425 * days).to(z)
    features = torch.stack((z, phase.sin(), phase.cos()), -1)
    model = Forecaster(args.hidden, args.backend).to(args.device)
    print("the recurrence of this run:")
    fastrnn.explain(model.gru, torch.empty(args.window, args.batch, 3, device=args.device))
    train(model, features[:learnt], z[:learnt], args)

    with torch.no_grad():  # one run over all weeks: the forecast at t has read nothing after t
        quantiles = model(features.unsqueeze(1))[:-YEAR, 0] * std + mean  # (T - YEAR, YEAR, 3)
    truth = following_year(growth)
    before = slice(learnt, calibrated - YEAR)
    outside = torch.maximum(quantiles[before, :, 0] - truth[before], truth[before] - quantiles[before, :, 2])
    widened = outside.quantile(COVERAGE, dim=0)  # by horizon
    tested = slice(calibrated, None)
    low, middle, high = (quantiles[tested] + torch.stack((-widened, 0 * widened, widened), -1)).unbind(-1)
    truth = truth[tested]
    errors = {
        "GRU": (middle - truth).abs(),
        "last year again": truth.abs(),
        "last year and its growth again": (growth[calibrated:-YEAR, None] - truth).abs(),
    }
    covered = ((low <= truth) & (truth <= high)).float().mean().item()
    found = {name: error.mean().item() for name, error in errors.items()}
    by_horizon = {name: error.mean(0).tolist() for name, error in errors.items()}
    # The last forecast ends with the series. It is in parts per million.
    forecast = measured[-2 * YEAR : -YEAR, None] + torch.stack((low[-1], middle[-1], high[-1]), -1)
    figure = plot(series, forecast.cpu().numpy(), by_horizon, f"{series.index[YEAR + calibrated]:%Y}")
    save_figure(figure, args.out / "forecast.png")
    save_json(
        {"mean_absolute_error": found, "coverage": covered, "intended_coverage": COVERAGE}, args.out / "metrics.json"
    )
    for name, error in found.items():
        print(f"{name:<32} mean absolute error {error:.3f} ppm over {len(truth)} forecasts of {YEAR} weeks")
    print(f"{covered:.0%} of the truth is inside the {COVERAGE:.0%} intervals; figure in {args.out / 'forecast.png'}")


if __name__ == "__main__":
    run(main)

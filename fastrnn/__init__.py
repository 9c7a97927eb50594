"""fastrnn: RNN, GRU, LSTM and sLSTM layers whose forward and backward passes are persistent Triton kernels."""

from .compat.driver import LaunchRefusedError
from .nn.calls import FallbackWarning
from .nn.convert import Report, convert, report, revert
from .nn.functional import gru, lstm, rnn, slstm
from .nn.modules import GRU, LSTM, RNN, SLSTM, explain
from .nn.warmup import warmup
from .planning.planner import Plan, plan

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SLSTM",
    "FallbackWarning",
    "LaunchRefusedError",
    "Plan",
    "Report",
    "convert",
    "explain",
    "gru",
    "lstm",
    "plan",
    "report",
    "revert",
    "rnn",
    "slstm",
    "warmup",
]

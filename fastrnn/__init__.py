"""fastrnn: RNN, GRU and LSTM layers whose forward and backward passes are persistent Triton kernels."""

from .convert import Report, convert, report, revert
from .functional import FallbackWarning, gru, lstm, rnn
from .modules import GRU, LSTM, RNN, explain
from .planner import Plan, plan

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "FallbackWarning",
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
]

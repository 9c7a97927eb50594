"""The recurrence as a torch.library op, and what launches, differentiates and transforms it."""

from .library import recurrence

__all__ = ["recurrence"]

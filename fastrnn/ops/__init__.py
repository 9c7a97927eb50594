"""The recurrence as a torch.library op, with the code that launches, differentiates and transforms it."""

from .library import recurrence

__all__ = ["recurrence"]

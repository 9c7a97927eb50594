"""What the repr of a layer says."""

from typing import Any

import torch


class Shown(torch.nn.Module):
    """The repr of a layer: torch.nn's, with our name and our options."""

    backend: Any
    checkpoint_every: Any
    num_heads: Any

    def _get_name(self) -> str:
        """Return the name that the repr begins with: of our classes "fastrnn.LSTM", which a converted model shows."""
        name = type(self).__name__
        return f"fastrnn.{name}" if type(self).__module__.startswith("fastrnn.") else name

    def extra_repr(self) -> str:
        """Return what the repr says of this layer: torch.nn's options, and ours where they are set."""
        added = f", backend={self.backend!r}" if self.backend != "auto" else ""
        added += f", checkpoint_every={self.checkpoint_every}" if self.checkpoint_every is not None else ""
        added += f", num_heads={self.num_heads}" if self.num_heads > 1 else ""
        added += ", tie_directions=True" if self.tie_directions else ""
        for name, unset in (("drop_connect", 0.0), ("zoneout", 0.0), ("clip_grad_state", None), ("clip_state", None)):
            added += f", {name}={getattr(self, name)}" if getattr(self, name) != unset else ""
        return super().extra_repr() + added

"""Of Triton's versions: what tests need of it."""

from importlib.util import find_spec

import pytest

from fastrnn.compat import spills

HAS_CLUSTERS = find_spec("triton") is not None and spills.triton_version() >= (3, 8)
NEEDS_CLUSTERS = pytest.mark.skipif(not HAS_CLUSTERS, reason="clusters need Triton 3.8")


def compiles_clusters(item: pytest.Item) -> bool:
    """Whether a test is of the cluster tier by its parameters, and not of its plans alone."""
    parameters = getattr(item, "callspec", None)
    return parameters is not None and "cluster" in parameters.params.values() and "planning" not in item.path.parts

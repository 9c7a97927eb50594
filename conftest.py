"""Left out of pytest's collection where a package is missing: doctests of modules that import it."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("llvmlite") else ["fastrnn/cpu/*"]

"""What is shipped and installed: fastrnn.kernels from the symlink, and never a top-level `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {str(p.relative_to(ROOT)) for p in (ROOT / "kernels").rglob("*.py")}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A directory with the sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


SET_BY_MAKE = ("MAKEFLAGS", "MFLAGS", "PYTHON", "PYTHONPATH", "TESTS", "TORCH", "TRITON", "VENV")


def commands(target: str, *variables: str) -> str:
    """What make would run for a target in a fresh clone, with nothing set but these variables."""
    clean = {k: v for k, v in os.environ.items() if k not in SET_BY_MAKE}
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", "-B", target, *variables],
        cwd=ROOT,
        env=clean,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_constraints_leave_torch_its_requirements():
    """A pin of what torch requires (Triton, CUDA's packages) would resolve beside one torch only."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {line.split("==")[0].lower() for line in lines}
    assert {"numpy", "pytest"} <= pinned
    required = {re.match(r"[\w.-]+", text)[0].lower() for text in requires("torch") or ()}
    assert pinned.isdisjoint({"torch", "triton"} | required)


@pytest.mark.parametrize(
    ("variables", "pair"),
    [
        ((), "torch==2.13.0  -e"),
        (("TORCH=2.14.1",), "torch==2.14.1  -e"),
        (("TORCH=2.14.1+cpu", "TRITON=3.9.0"), "torch==2.14.1+cpu triton==3.9.0 -e"),
        (("TORCH=",), "torch  -e"),
    ],
)
def test_make_installs_the_torch_that_it_is_given(variables, pair):
    """Everywhere that it installs anything, so that no later step takes another torch."""
    installs = [line for line in commands("test", *variables).splitlines() if " pip install " in line]
    assert len(installs) == 2
    for line in installs:
        assert f"-c constraints.txt {pair} '.[" in line


def test_the_symlink_is_one():
    assert (ROOT / "fastrnn" / "kernels").is_symlink(), "a checkout without symlinks would ship no kernels"
    assert len(KERNELS) >= 5


def test_wheel_contents(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fastrnn/{name}" for name in KERNELS} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastrnn", next(t for t in tops if t.endswith(".dist-info"))}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist_contents(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "fastrnn/nn/modules.py"} <= names
    assert names >= KERNELS or {f"fastrnn/{name}" for name in KERNELS} <= names


def test_wheel_runs_on_its_own(built, tmp_path):
    """Unpacked elsewhere, without the checkout: the kernels are found and run in the interpreter."""
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import fastrnn, torch; import fastrnn.kernels.tile.resident as r; print(r.__file__);"
        "print(fastrnn.GRU(3, 4, backend='resident')(torch.randn(2, 1, 3))[0].shape)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(tmp_path / "fastrnn/kernels/tile/resident.py"),
        "torch.Size([2, 1, 4])",
    ]


def test_editable_install_sees_new_files(tmp_path):
    """In an environment of its own: a file added to kernels/ after the install can be imported."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".*", "runs"))
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv/bin/python"
    # The packages of the environment that runs the tests, hatchling and torch among them, without installing again.
    (next((tmp_path / "venv/lib").glob("python*")) / "site-packages/outer.pth").write_text(
        str(Path(pytest.__file__).parents[1]) + "\n"
    )
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", str(copy)]
    done = subprocess.run(install, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (copy / "kernels/added.py").write_text("ANSWER = 42\n")
    code = "import fastrnn, fastrnn.kernels.added as a; print(fastrnn.__file__, a.ANSWER)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(copy / "fastrnn/__init__.py"), "42"]


def test_a_checkout_without_metadata_knows_its_version():
    """As on a machine where nothing is installed: doctor and the benchmarks' records take the modules' own versions."""
    code = (
        "import importlib.metadata as m, sys\n"
        "def version(name): raise m.PackageNotFoundError(name)\n"
        "m.version = version\n"
        "import torch, triton, fastrnn\n"
        "from bench import clock\n"
        "from fastrnn.inspect import doctor\n"
        "found, said = clock.machine(), dict(doctor.diagnosis())\n"
        "assert found['fastrnn'] == said['fastrnn'] == fastrnn.__version__\n"
        "assert found['triton'] == said['triton'] == triton.__version__\n"
        "assert found['torch'] == torch.__version__ and torch.__version__ in said['torch']\n"
        "assert found['flashrnn'] is None\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

"""What importing costs, what an installation holds, and that the tree keeps its form."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanoglimpse.version import VERSION
from tests.helpers.prompts import ANSWER

ROOT = Path(__file__).parent.parent
# Sub-packages that a checkout keeps beside the package.
ROOMS = ("kernels", "weights")

WATCH = """
import sys, time
import torch

class Watch:
    seen = []
    def find_spec(self, name, path=None, target=None):
        self.seen.append(name.partition(".")[0])

sys.meta_path.insert(0, Watch())
import socket
def no_network(*_, **__):
    raise AssertionError("a connection was opened")
socket.socket.connect = no_network
start = time.perf_counter()
import nanoglimpse
import nanoglimpse.generate
print(time.perf_counter() - start)
nanoglimpse.load("nano")
print(*sorted(set(Watch.seen)))
# Initialising an nn.Embedding on the meta device imports it, which takes longer than all the rest.
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.slow
def test_import_is_light():
    """No triton, no transformers, no network, less than a second behind torch; loading as well."""
    out = subprocess.run(
        [sys.executable, "-c", WATCH], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    looked_for = set(out[1].split())
    assert {"tokenizers", "safetensors", "PIL"} <= looked_for
    heavy = {"triton", "transformers", "numpy", "jinja2", "torchvision", "huggingface_hub"}
    assert not heavy & looked_for
    assert float(out[0]) < 1.0
    assert out[2] == "False"


@pytest.mark.slow
def test_transformers_finds_no_package_kernels_in_a_checkout():
    """transformers looks for a published package of the name of our folder, and would import it."""
    code = "import transformers.activations, nanoglimpse; nanoglimpse.load()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """What `pip install .` puts into site-packages, from a copy of the tree."""
    folder = tmp_path_factory.mktemp("installed")
    names = ["pyproject.toml", "README.md", "LICENSE", "nanoglimpse", "kernels", "weights"]
    subprocess.run(["cp", "-r", *(ROOT / name for name in names), folder], check=True)
    site = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, folder]
    subprocess.run(command, check=True, capture_output=True)
    return site


PACKAGED = (
    "py.typed",
    "evaluate/page.html",
    "kernels/varlen.py",
    "kernels/reference/attention.py",
    "kernels/triton_ops/attention.py",
    "weights/configs/qwen2.5-vl-3b.json",
    "weights/nano/model.safetensors",
    "weights/nano/glimpse/glimpse.safetensors",
)


@pytest.mark.slow
def test_an_installation_holds_everything(installed):
    missing = [name for name in PACKAGED if not (installed / "nanoglimpse" / name).exists()]
    assert not missing
    modules = {p.relative_to(ROOT / "nanoglimpse") for p in (ROOT / "nanoglimpse").rglob("*.py")}
    modules |= {p.relative_to(ROOT) for room in ROOMS for p in (ROOT / room).rglob("*.py")}
    assert modules == {
        p.relative_to(installed / "nanoglimpse") for p in installed.rglob("nanoglimpse/**/*.py")
    }
    ours = {p.name for p in installed.iterdir() if "dist-info" not in p.name}
    assert ours == {"nanoglimpse", "bin"}


@pytest.mark.slow
def test_an_installation_states_its_version_and_address(installed):
    (metadata,) = installed.glob("*.dist-info/METADATA")
    text = metadata.read_text("utf-8")
    assert f"\nVersion: {VERSION}\n" in text
    assert "\nProject-URL: Paper, https://arxiv.org/abs/2508.01548\n" in text


@pytest.mark.slow
def test_the_command_of_an_installation_answers(installed, tmp_path):
    done = subprocess.run(
        [installed / "bin" / "nanoglimpse", "generate", "--quiet"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ANSWER + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("inside", [False, True], ids=["elsewhere", "in the checkout"])
def test_an_installation_answers_from_any_folder(installed, tmp_path, inside):
    done = subprocess.run(
        [sys.executable, "-m", "nanoglimpse.generate", "--quiet"],
        cwd=ROOT if inside else tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout == ANSWER + "\n"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_style(command):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_before_a_commit_the_same_ruff_runs():
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[1]
    assert f"rev: v{pinned} " in (ROOT / ".pre-commit-config.yaml").read_text("utf-8")

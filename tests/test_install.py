"""Installing: with a compiler, without one, as a wheel that is used elsewhere, and beside which PyTorch."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import warnings
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import prunetrain_kernels
from prunetrain_kernels.versions import NEWEST_TRIED, UntriedVersionWarning, warn_if_untried

ROOT = Path(__file__).parents[1]
STEP = (
    "import prunetrain_kernels, torch; from prunetrain_kernels.ops import channel_gather, native; "
    "print(prunetrain_kernels.__file__); channel_gather(torch.zeros(1, 3, 2), [0]); "
    "channel_gather(torch.zeros(1, 3, 2), [1]); print(native.available())"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's own files, without what was built in it."""
    to = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    for name in ("csrc", "prunetrain_kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return to


def wheel(source: Path, to: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(source / "build", ignore_errors=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-v", "-w", str(to)]
    return subprocess.run(
        [*command, str(source)], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def use(wheel: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """A step on the CPU with the package as that wheel has it, from another folder."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
    return subprocess.run(
        [sys.executable, "-c", STEP], cwd=to, env={**os.environ, "PYTHONPATH": str(to)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def test_the_sdist_holds_what_a_build_needs_and_no_more(source: Path, tmp_path: Path) -> None:
    """All of the package and of the native sources, as they are in the repository; no test, cache or library."""
    here = tmp_path / "repository"
    shutil.copytree(source, here, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    for name in ("tests/test_files.py", "prunetrain_kernels/__pycache__/x.pyc", "prunetrain_kernels/_cpu.abi3.so"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("")
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=here, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = tmp_path.glob("*.tar.gz")
    assert made.name == f"prunetrain_kernels-{prunetrain_kernels.__version__}.tar.gz"
    with tarfile.open(made) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
        about = archive.extractfile(f"{made.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert about is not None
        metadata = message_from_bytes(about.read())
    wanted = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    wanted = {name for name in wanted if not name.startswith(("build/", "prunetrain_kernels.egg-info/"))}
    assert wanted <= names
    written = {"PKG-INFO", "setup.cfg"}
    assert {n for n in names - wanted - written if not n.startswith("prunetrain_kernels.egg-info/")} == set()
    assert (metadata["Name"], metadata["Version"]) == ("prunetrain-kernels", prunetrain_kernels.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert metadata["Description-Content-Type"] == "text/markdown"  # without which PyPI shows README as plain text
    assert metadata.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert 'triton>=3.6; sys_platform == "linux"' in metadata.get_all("Requires-Dist", [])


def left_over(built: Path) -> list[str]:
    """Files of a wheel that are neither the package nor about it."""
    names = zipfile.ZipFile(built).namelist()
    wanted = re.compile(
        r"prunetrain_kernels/(\w+/)*\w+\.py|prunetrain_kernels/(py\.typed|_cpu\.abi3\.so)"
        r"|prunetrain_kernels-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|top_level\.txt|licenses/LICENSE)"
    )
    return [name for name in names if not wanted.fullmatch(name) or "test" in name]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_wheel_carries_the_library(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, CFLAGS="-O0")  # a tenth of the time
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert built.name.startswith(f"prunetrain_kernels-{prunetrain_kernels.__version__}-cp311-abi3-")  # 3.11 and later
    assert "prunetrain_kernels/_cpu.abi3.so" in zipfile.ZipFile(built).namelist()
    assert left_over(built) == []
    process = use(built, tmp_path / "elsewhere")
    assert process.stdout.split() == [str(tmp_path / "elsewhere/prunetrain_kernels/__init__.py"), "True"], (
        process.stderr
    )
    assert "native" not in process.stderr


def test_without_a_compiler_it_installs_and_works(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, CXX=str(tmp_path / "no-compiler"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing without the native CPU library" in done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]
    assert left_over(built) == []
    process = use(built, tmp_path / "elsewhere")
    assert process.stdout.split()[1] == "False"
    assert process.stderr.count("the package was installed without it") == 1


def test_the_library_can_be_insisted_on(source: Path, tmp_path: Path) -> None:
    done = wheel(source, tmp_path, CXX=str(tmp_path / "no-compiler"), PRUNETRAIN_NATIVE="1")
    assert done.returncode != 0
    assert "PRUNETRAIN_NATIVE=1, but the native library cannot be built" in done.stdout + done.stderr


# -- beside which PyTorch ----------------------------------------------------------------------------------------------

KNOWN = ("2.11.0", "2.13.0+cpu", "2.14.0a0+git1a2b3c", "2.14.0.dev20260801", "2.14.0rc2", "2.14.9", "2.15.0+cu132")
NEWER = ("2.16.0", "2.16.0.dev20261001+cu130", "2.17.0a0+git", "2.20.0rc1", "3.0.0", "10.1")


@pytest.mark.parametrize("version", [*KNOWN, "", "unknown", "main"])
def test_versions_that_were_tried_give_no_warning(version: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untried("0.2.0", version)


@pytest.mark.parametrize("version", NEWER)
def test_a_newer_version_gives_one_that_names_both(version: str) -> None:
    with pytest.warns(UntriedVersionWarning) as caught:
        warn_if_untried("0.2.0", version)
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith("prunetrain_kernels 0.2.0 ")
    assert f"PyTorch {version} is newer" in text
    assert ".".join(map(str, NEWEST_TRIED)) in text
    assert "\n" not in text


def imported(version: str | None, *options: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """The package imported twice in a process of its own, beside a PyTorch that says that it is `version`."""
    said = "" if version is None else f"torch.__version__ = torch.torch_version.TorchVersion({version!r}); "
    code = f"import sys, warnings, torch; {said}{first}\nimport prunetrain_kernels\nfrom prunetrain_kernels import ops"
    code += "\nprint([name for name in ('torch._dynamo', 'sympy', 'torch.onnx') if name in sys.modules])"
    return subprocess.run(
        [sys.executable, *options, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


def test_importing_warns_once_and_points_at_who_imports() -> None:
    done = imported("2.16.0a0+git")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("UntriedVersionWarning") == 1
    assert done.stdout == "[]\n"  # PyTorch's compiler and exporters take seconds, and are loaded by who asks for them
    assert done.stderr.startswith("<string>:2: UntriedVersionWarning: prunetrain_kernels ")


@pytest.mark.parametrize(
    ("version", "options", "first"),
    [
        (None, ("-W", "error::UserWarning"), ""),  # the one that is installed here
        ("2.16.0", (), "warnings.filterwarnings('ignore', 'prunetrain_kernels ')"),
        ("2.16.0", ("-W", "ignore:prunetrain_kernels"), ""),
    ],
)
def test_no_warning_where_it_was_tried_or_is_not_wanted(
    version: str | None, options: tuple[str, ...], first: str
) -> None:
    done = imported(version, *options, first=first)
    assert done.returncode == 0, done.stderr
    assert "prunetrain_kernels" not in done.stderr


def test_no_version_of_pytorch_is_too_new_to_install() -> None:
    """A cap has pip take a user's newer PyTorch away."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = [text for text in project["dependencies"] if text.startswith("torch")]
    assert needed == "torch>=2.11"
    assert f'TORCH = "{needed}"' in (ROOT / "csrc" / "build_backend.py").read_text()
    assert not any("<" in text for text in project["dependencies"])


def make(*arguments: str) -> list[str]:
    """The commands that make would run, the installation included; told nothing by a make that runs these tests."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "TORCH"))
    }
    command = ["make", "--always-make", "--dry-run", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize("version", ["2.11.0", "2.14.1", "2.99.0.dev20270101"])
def test_make_test_with_another_pytorch(version: str, tmp_path: Path) -> None:
    """It has an environment and pins of its own; the Triton and torchvision of that PyTorch come with it."""
    commands = make("test", f"TORCH={version}")
    assert f".venv-{version}/bin/python -m pytest" in "\n".join(commands)
    assert not any(" .venv/" in command or "mypy" in command for command in commands)
    installs = [command for command in commands if "pip install" in command]
    assert installs
    assert all(f" -c .venv-{version}/constraints.txt" in command for command in installs)
    assert "torchvision" in installs[0]
    pins, _, written = next(command for command in commands if command.startswith("sed ")).partition(" > ")
    assert written == f".venv-{version}/constraints.txt"
    made = tmp_path / "constraints.txt"
    subprocess.run(f"{pins} > {made}", shell=True, cwd=ROOT, check=True)
    before, after = ((ROOT / "constraints.txt").read_text().splitlines(), made.read_text().splitlines())
    assert {"torch==2.13.0", "triton==3.7.1"} <= set(before)
    chosen = ("torch==", "triton==", "torchvision==")
    assert [line for line in after if line.startswith(chosen)] == [f"torch=={version}"]
    assert [line for line in after if not line.startswith(chosen)] == [b for b in before if not b.startswith(chosen)]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_test_takes_the_committed_pins() -> None:
    commands = make("test")
    installs = [command for command in commands if "pip install" in command]
    assert installs
    assert all(" -c constraints.txt" in command and ".venv/bin" in command for command in installs)
    assert any("mypy" in command for command in commands)

"""The package without its repository: what a wheel holds, and what works of it in an empty folder.

The wheel is built by way of an sdist. Its environment has nothing else of its own; what the package
depends on comes from the environment of the tests.
"""

import fnmatch
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "sae_jax", "experiments", "launch")
TINY_DEMO = ["--tokens=30000", "--d_sae=256", "--epochs=1"]

pytestmark = pytest.mark.slow


def run(*command, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    """Runs a command that finds no sae_jax but that of its own environment."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> pathlib.Path:
    """A copy of the repository, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    (copy / "tests").mkdir()
    shutil.copy(__file__, copy / "tests")  # must not be in the wheel
    return copy


@pytest.fixture(scope="module")
def wheel(checkout) -> pathlib.Path:
    run(sys.executable, "-m", "build", "--outdir=dist", ".", cwd=checkout)
    (built,) = (checkout / "dist").glob("*.whl")
    return built


def environment_with(what, directory: pathlib.Path) -> pathlib.Path:
    """Makes a virtual environment with the package installed; returns the folder of programs."""
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory.parent)
    (site_packages,) = directory.glob("lib/python*/site-packages")
    # Behind the environment's own packages, without what the .pth files there add, and without the
    # package itself, which an editable install's finder would only be asked for after it.
    dependencies = directory / "dependencies"
    dependencies.mkdir()
    for entry in pathlib.Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("sae_jax", "__editable__")):
            (dependencies / entry.name).symlink_to(entry)
    (site_packages / "dependencies.pth").write_text(f"{dependencies}\n")
    install = ["install", "--quiet", "--no-deps", "--ignore-installed", *what]
    python = f"--python={directory / 'bin' / 'python'}"
    run(sys.executable, "-m", "pip", python, *install, cwd=directory.parent)
    return directory / "bin"


@pytest.fixture(scope="module")
def programs(wheel, tmp_path_factory) -> pathlib.Path:
    """Those of an environment that lies, as many do, in a repository of the user's."""
    project = tmp_path_factory.mktemp("project")
    run("git", "init", "--quiet", cwd=project)
    someone = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    run("git", *someone, "commit", "--quiet", "--allow-empty", "--message=mine", cwd=project)
    return environment_with([wheel], project / "venv")


def test_the_wheel_has_all_that_the_package_needs_and_nothing_else(wheel):
    there = set(zipfile.ZipFile(wheel).namelist())

    def copies(folder: str, name: str, pattern: str) -> set[str]:
        files = (ROOT / folder).glob(pattern)
        return {f"sae_jax/{name}/{file.relative_to(ROOT / folder)}" for file in files}

    recipes = copies("experiments", "recipes", "*.py")
    scripts = {file for file in copies("launch", "launch_scripts", "**/*.*") if ".pyc" not in file}
    scripts.add("sae_jax/launch_scripts/Containerfile")
    links = ("recipes", "launch_scripts")
    ours = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "sae_jax").rglob("*")
        if file.is_file() and file.suffix != ".pyc" and file.relative_to(ROOT).parts[1] not in links
    }
    assert len(recipes) >= 12 and len(scripts) >= 8 and "sae_jax/py.typed" in ours
    package = {file for file in there if ".dist-info/" not in file}
    assert package == ours | recipes | scripts


def test_the_image_installs_this_wheel(wheel):
    text = (ROOT / "launch" / "Containerfile").read_text()
    (pattern,) = re.findall(r"^COPY (\S+) /wheel/$", text, re.MULTILINE)
    assert fnmatch.fnmatch(wheel.name, pattern)


def test_demo_recipes_and_scripts_work_in_an_empty_folder(wheel, programs, tmp_path):
    where = "import sae_jax; print(sae_jax.__file__); print(sae_jax.load)"
    out = run(programs / "python", "-c", where, cwd=tmp_path).stdout
    assert out.startswith(str(programs.parent))

    program = programs / "sae-jax"
    run(program, "demo", *TINY_DEMO, cwd=tmp_path)
    assert (tmp_path / "sae_demo" / "index.html").is_file()
    few = "--config.train.tokens=20480"
    assert "openai_topk:paper|tiny" in run(program, "train", "--help", cwd=tmp_path).stdout
    run(program, "train", "--config=openai_topk:tiny", few, "--workdir=run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["d_sae"] == 1024
    made_by = json.loads((tmp_path / "run" / "config.json").read_text())["environment"]
    assert made_by["sae-jax"] in wheel.name and made_by["git_revision"] is None
    store = "--config.data.store=world:superposition,width=16,features=64"
    sweep = ["sweep", "--config=scaling_laws:tiny", "--dry_run", store]
    sweep += ["--config.data.site=", "--config.data.epochs=1"]
    assert "30 runs" in run(program, *sweep, cwd=tmp_path).stdout

    run(program, "launch", "--copy=tpu_vm", cwd=tmp_path)
    assert os.access(tmp_path / "launch" / "tpu_vm.sh", os.X_OK)


def test_an_editable_install_has_the_recipes_too(checkout, tmp_path):
    programs = environment_with(["--editable", checkout], tmp_path / "venv")
    where = "import sae_jax; print(sae_jax.__file__)"
    out = run(programs / "python", "-c", where, cwd=tmp_path).stdout
    assert out.strip() == str(checkout / "sae_jax" / "__init__.py")
    text = run(programs / "sae-jax", "sweep", "--help", cwd=tmp_path).stdout
    assert "scaling_laws:tiny" in text
    assert (
        "launch/local.py"
        in run(programs / "sae-jax", "launch", "--copy=local", cwd=tmp_path).stdout
    )


def test_pdoc_writes_a_page_for_every_package_without_a_warning(programs, tmp_path):
    pytest.importorskip("pdoc", reason="needs the extra [docs]")
    command = [programs / "python", "-m", "pdoc", "--output-directory=pages", "sae_jax"]
    done = run(*command, cwd=tmp_path)
    assert done.stderr == "", "pdoc prints a warning as `Warn: ...`"
    pages = tmp_path / "pages" / "sae_jax"
    packages = {path.parent.name for path in (ROOT / "sae_jax").glob("*/__init__.py")}
    assert {path.stem for path in pages.glob("*.html")} >= packages - {"bench", "cli"}

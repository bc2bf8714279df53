"""The rules of the house: imports run one way, heavy libraries stay out of the model, and help is quick to show."""

import ast
import subprocess
import sys

import pytest

LAYERS = ["settings", "records", "pictures", "model", "data", "teachers", "train", "evaluate", "registry", "cli"]
ALLOWED = {
    "model": {"settings", "pictures"},
    "data": {"settings", "data_settings", "records", "pictures", "files", "errors", "progress", "revisions", "model"},
    "train": {"settings", "records", "files", "errors", "progress", "tracking", "machine", "model", "data",
              "teachers"},
    "evaluate": {"settings", "records", "pictures", "files", "errors", "progress", "tracking", "machine", "model",
                 "data"},
}  # fmt: skip
HEAVY = {"prefect", "dvc", "great_expectations", "wandb", "gto", "deepspeed"}


def imported(path, module_level_only):
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_imports_run_one_way(package, request):
    files = sorted((request.config.rootpath / "haplovl" / package).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path, module_level_only=False):
            if name.startswith("haplovl."):
                assert name.split(".")[1] in ALLOWED[package] | {package}, f"{path.name} imports {name}"


def test_no_heavy_import_at_module_level(request):
    for path in sorted((request.config.rootpath / "haplovl").rglob("*.py")):
        found = {name.split(".")[0] for name in imported(path, module_level_only=True)} & HEAVY
        assert not found, f"{path} imports {found} at module level"


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys; from typer.testing import CliRunner; from haplovl.cli import app;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "print(sorted({'torch', 'transformers', 'prefect', 'dvc', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_every_file_is_a_room_of_readable_size(request):
    root = request.config.rootpath
    for path in [*root.glob("haplovl/**/*.py"), *root.glob("flows/*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path

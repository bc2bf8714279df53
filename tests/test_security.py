"""What docs/security.md promises: no planted secret in anything that a run leaves, nobody listens to other machines,
no pickle or code of a model runs, and no name leads out of its folder."""

import base64
import json
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_project import make_project
from sockets import open_to_others, watched
from typer.testing import CliRunner

from haplovl.cli import app
from haplovl.errors import UserError

ROOT = Path(__file__).parents[1]
SECRETS = {
    "WANDB_API_KEY": "5ecre7aaaa0000bbbb1111cccc2222dddd3333ee",
    "AWS_SECRET_ACCESS_KEY": "5ecre7/Aws+Key0123456789abcdefghijklmnop",
    "HF_TOKEN": "hf_5ecre7HuggingFaceToken0123456789ab",
    "PREFECT_SERVER_DATABASE_PASSWORD": "5ecre7-of-the-prefect-database",
    "git remote": "5ecre7-of-the-git-remote",
    "DVC remote": "5ecre7-of-the-dvc-remote",
}
PLANTED_IN = (".git/config", ".dvc/config.local")
DVC_YAML = """
stages:
  show:
    cmd: env | sort | tee shown.txt | sed -n /5ecre7/p; echo $HAPLOVL_COMPUTE > shown.txt
    outs: [shown.txt]
  stage2:
    cmd: haplovl train stage2
    deps: [shown.txt, data/prepared, models/stage1]
    params: [seed, stage2]
    outs: [models/stage2]
  register:
    cmd: haplovl register
    deps: [models/stage2]
    outs: [candidate]
"""


# --- a run in which every secret is planted ------------------------------------------------------------------------
def ways_to_write(secret: str) -> list[bytes]:
    """The secret as it is, as hex, and as base64 at each of the three places where its bytes may begin."""
    plain = secret.encode()
    forms = [plain, plain.hex().encode()]
    for before in range(3):
        coded = base64.b64encode(b"\0" * before + plain)
        sure = coded[-(-before * 4 // 3) : len(coded) // 4 * 4 - 4]  # digits that the neighbours do not touch
        forms += [sure, base64.urlsafe_b64encode(base64.b64decode(sure)) if before == 0 else sure]
    return forms


FORMS = {name: ways_to_write(secret) for name, secret in SECRETS.items()}


def held(content: bytes) -> list[str]:
    """The names of the secrets that are in there."""
    return [name for name, forms in FORMS.items() if any(form in content for form in forms)]


def git(root: Path, *words: str, binary: bool = False):
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(["git", *identity, *words], cwd=root, check=True, capture_output=True, text=not binary).stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory, vision, language, processor, tiny_model_dir):
    """A small project after one flow with two training processes: its folder, its output and what listened."""
    folder = tmp_path_factory.mktemp("secrets")
    root, home = folder / "project", folder / "home"
    root.mkdir(), home.mkdir()
    stage = {"steps": 2, "precision": "fp32", "checkpoint_every": 1, "batch": {"rows": 4, "row_tokens": 96}}
    make_project(root, vision, language, processor, stage)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params["register"] |= {"min_accuracy": 0.0, "min_margin": -1.0}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copytree(tiny_model_dir, root / "models/stage1")
    (root / "models/teachers/teachers.json").write_text("{}")
    (root / "metrics").mkdir()
    (root / "metrics/validation.json").write_text("{}")
    (root / "metrics/evaluation.json").write_text('{"accuracy": 1.0, "questions": 9, "types": {}}')
    (root / "dvc.yaml").write_text(DVC_YAML)
    shutil.copy(ROOT / ".gitignore", root)

    git(root, "init", "-q")
    git(root, "remote", "add", "origin", f"https://ada:{SECRETS['git remote']}@127.0.0.1:9/haplovl.git")
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    remote = f"https://ada:{SECRETS['DVC remote']}@127.0.0.1:9/store"
    (root / ".dvc/config").write_text("[core]\n    remote = store\n")
    (root / ".dvc/config.local").write_text(f"['remote \"store\"']\n    url = {remote}\n")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "start")

    short = Path(tempfile.mkdtemp(prefix="sec"))  # W&B's socket there allows no longer path
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "PREFECT_", "DVC_"))}
    env = {
        **keep,
        **{name: secret for name, secret in SECRETS.items() if " " not in name},
        "WANDB_MODE": "offline", "HOME": str(home), "TMPDIR": str(short), "DVC_SITE_CACHE_DIR": str(folder / "site"),
        "DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": os.devnull, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    with (folder / "output.txt").open("w") as output:
        command = [sys.executable, "-m", "flows.pipeline", "--compute", "two"]
        flow = subprocess.Popen(command, cwd=root, env=env, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        with watched(flow.pid) as seen:
            flow.wait()
    output = (folder / "output.txt").read_text()
    assert flow.returncode == 0, output[-4000:]
    yield folder, env, seen
    shutil.rmtree(short)


def test_no_planted_secret_is_in_anything_that_a_run_leaves(ran):
    folder, env, _ = ran
    root = folder / "project"
    files = [path for place in (folder, Path(env["TMPDIR"])) for path in place.rglob("*") if path.is_file()]
    found = {path: names for path in files if (names := held(path.read_bytes()))}
    planted = {root / name for name in PLANTED_IN}
    assert set(found) - planted == set()
    assert planted <= set(found)  # the search does find them
    git_objects = git(root, "cat-file", "--batch", "--batch-all-objects", binary=True)
    assert held(git_objects) == [] and git(root, "tag").split() == ["haplovl@v0.0.1"]
    # It looked where secrets could have been.
    names = {path.relative_to(root).as_posix() for path in files if path.is_relative_to(root)}
    assert {
        "candidate/candidate.json",
        "dvc.lock",
        "models/stage2/model.safetensors",
        "runs/prefect/prefect.db",
    } <= names
    logged = [name for name in names if name.startswith("runs/wandb/") and name.endswith(".wandb")]
    assert len(logged) == 2  # training and version
    # The stage `show` printed the environment, and Prefect kept what it printed.
    kept = b"".join(path.read_bytes() for path in (root / "runs/prefect").glob("prefect.db*"))
    assert b"HF_TOKEN=***" in kept and "HF_TOKEN=***" in (folder / "output.txt").read_text()


def test_nothing_listens_to_other_machines(ran):
    _, _, seen = ran
    assert open_to_others(seen) == []
    for part in ("prefect", "train stage2"):  # the temporary server and the ranks were seen
        assert any(part in command for _, command in seen), seen


def test_a_remote_that_does_not_answer_is_named_without_its_password(ran, tmp_path):
    folder, env, _ = ran
    shutil.copytree(folder / "project", tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "runs"))
    command = [sys.executable, "-m", "haplovl", "get", "--version", "v0.0.1"]
    done = subprocess.run(command, cwd=tmp_path / "copy", env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: "), done.stderr
    assert held((done.stdout + done.stderr).encode()) == [], done.stderr


def test_an_error_that_nobody_foresaw_shows_no_password(tmp_path):
    code = (
        "from haplovl import cli\n"
        "@cli.app.command()\n"
        "def stumble(): raise RuntimeError('https://ada:5ecre7@example.org')\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "stumble"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: https://***@example.org" in done.stderr
    assert "5ecre7@" not in done.stderr


def test_a_database_that_does_not_answer_is_named_without_its_password(tmp_path):
    secret = SECRETS["PREFECT_SERVER_DATABASE_PASSWORD"]
    url = f"postgresql+asyncpg://prefect:{secret}@127.0.0.1:9/prefect"
    env = {**os.environ, "PREFECT_API_DATABASE_CONNECTION_URL": url}
    command = [sys.executable, "-m", "flows.serve", "--port", "4299"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "the server ended" in done.stderr, done.stderr
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert held(b"\n".join([done.stdout.encode(), done.stderr.encode(), *written])) == []


def test_settings_with_credentials_are_refused_without_showing_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["collect"]["sources"][0]["license"] = "see https://ada:5ecre7@example.org/terms"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match="'collect.sources.0.license' holds credentials in an address") as raised:
        invoke("collect")
    assert "5ecre7" not in str(raised.value)


# --- nothing of a model runs ---------------------------------------------------------------------------------------
class Trap:
    """A pickle that makes a folder when it is opened without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def invoke(*words: str, **kwargs):
    """Runs a command here; raises what it raises."""
    return CliRunner().invoke(app, list(words), catch_exceptions=False, **kwargs)


def add_code(folder: Path, trace: Path, model_type: str) -> None:
    """Gives a folder code of its own for configuration, model and tokenizer, as the hub's `auto_map` names it."""
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(trace)!r})\nclass Own: pass\n")
    for name, keys in (
        ("config.json", ("AutoConfig", "AutoModel", "AutoModelForCausalLM")),
        ("tokenizer_config.json", ("AutoTokenizer",)),
        ("processor_config.json", ("AutoProcessor", "AutoImageProcessor")),
    ):
        path = folder / name
        about = json.loads(path.read_text()) if path.is_file() else {}
        about["auto_map"] = dict.fromkeys(keys, "own.Own")
        if name == "config.json":
            about["model_type"] = model_type
        elif name == "tokenizer_config.json":
            about["auto_map"]["AutoTokenizer"] = ["own.Own", None]
            about["tokenizer_class"] = "Own"
        path.write_text(json.dumps(about))


def test_ask_opens_no_pickle(tiny_model_dir, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(tiny_model_dir, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"extra": Trap(trace), **weights}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="HaploVL loads safetensors only"):
        invoke("ask", "--model", str(folder), "Which digit?")
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # the trap is a real one
    assert trace.exists()


def test_ask_runs_no_code_of_a_model(tiny_model_dir, tmp_path):
    folder, trace = tmp_path / "model", tmp_path / "it ran"
    shutil.copytree(tiny_model_dir, folder)
    add_code(folder, trace, "haplovl")
    try:  # with our own classes, or not at all
        invoke("ask", "--model", str(folder), "Which digit?", input="y\n" * 9)
    except UserError as error:
        assert "\n" not in str(error)
    assert not trace.exists()


@pytest.mark.parametrize("role", ["vision", "language"])
def test_a_teacher_with_code_of_its_own_is_refused(role, vision, language, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace = tmp_path / "it ran"
    for name, model in (("vision", vision), ("language", language)):
        model.save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / "language")
    add_code(tmp_path / role, trace, "own")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["teachers"] = {name: {"kind": "folder", "path": str(tmp_path / name)} for name in ("vision", "language")}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    # Whoever is asked for consent would read from this: nobody may be.
    with pytest.raises(UserError, match="comes with code of its own") as raised:
        invoke("teachers", input="y\n" * 9)
    assert "\n" not in str(raised.value) and not trace.exists()
    assert not (tmp_path / "models/teachers").exists()


def test_a_malicious_index_of_an_archive_is_refused(tmp_path):
    """numpy files may hold pickles, too."""
    import numpy as np

    from haplovl.data.archives import read_index
    from haplovl.pictures import ImageError

    trace = tmp_path / "it ran"
    np.save(tmp_path / "a.tar.npy", np.array([Trap(trace)], dtype=object), allow_pickle=True)
    with pytest.raises(ImageError, match="no readable index"):
        read_index(tmp_path, "a.tar")
    assert not trace.exists() and pickle.dumps(Trap(trace))


# --- names stay in their folder ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "../stage1"), "there is no training stage"),
        (("train", "stage1", "--compute", "../../secret"), "no compute profile"),
        (("preset", "../secret"), "no preset"),
        (("get", "--stage", "../../prod"), "no version"),
        (("get", "--version", "../../v1"), "no version"),
        (("promote", "--stage", "../../prod", "--force"), "could not put haplovl"),
        (("rollback", "--stage", "../../prod"), "no version"),
        (("data", "of", "--", "--output=stolen"), "no git revision"),
        (("data", "diff", "--", "--output=stolen", "workspace"), "no git revision"),
    ],
)
def test_names_on_the_command_line_are_no_paths(words, said, ran, monkeypatch, tmp_path):
    root = ran[0] / "project"
    monkeypatch.chdir(root)
    (root.parent / "secret.yaml").write_text("name: ../../secret\nmicro_batch_rows: 1\n")
    (root / "params").mkdir(exist_ok=True)
    before = sorted(path for path in root.parent.glob("*"))
    with pytest.raises(UserError, match=said):
        invoke(*words)
    assert sorted(root.parent.glob("*")) == before and not (root / "stolen").exists()


@pytest.mark.parametrize("name", ["../up", "--force", "a/b", "A b", ""])
def test_a_model_name_is_one_word(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["register"]["name"] = name
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match="register.name"):
        invoke("register")

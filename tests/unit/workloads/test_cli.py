"""The command line as a user meets it: help at once, one error message, exit codes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.tiny_models import make_tiny
from workloads import cli

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("mixtral", tmp_path_factory.mktemp("tiny") / "mixtral")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home with nothing in it, and the signal handlers of before."""
    for name in os.environ:
        if name.startswith(("EXPERTMESH", "XDG_", "RAY_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGPIPE)
    yield
    signal.signal(signal.SIGPIPE, before)


@dataclass(frozen=True)
class Ended:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """`expertmesh ...` as its entry point runs it, in this process: torch takes seconds to import anew."""

    def call(*arguments: str) -> Ended:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["expertmesh", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return Ended(int(ended.value.code or 0), written.out, written.err)

    return call


@cache
def all_commands() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []

    def walk(group: object, above: tuple[str, ...]) -> None:
        for name, inner in getattr(group, "commands", {}).items():
            found.append((*above, name))
            walk(inner, (*above, name))

    walk(typer.main.get_command(cli.app), ())
    return found


@pytest.mark.parametrize("words", all_commands(), ids=" ".join)
def test_every_command_explains_itself(words: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, [*words, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert f"Usage: expertmesh {' '.join(words)}" in result.output
    # Each says in words what it does, not only which options it has.
    described = result.output.split("Usage:")[1].splitlines()[1:4]
    assert any(len(line.split()) >= 2 for line in described)


def test_the_readme_names_every_command() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    leaves = {words for words in all_commands() if not any(w[:-1] == words for w in all_commands())}
    for words in leaves:
        assert f"`expertmesh {' '.join(words)}" in readme, f"README.md lacks {' '.join(words)}"


def test_help_and_mistakes_load_neither_torch_nor_ray(tmp_path: Path) -> None:
    # One process for all: what one loads stays for those behind it.
    code = (
        "import sys\n"
        "from workloads import cli\n"
        "for arguments in (['--help'], ['serve', '--help'], ['config', 'show']):\n"
        "    try:\n"
        "        cli.app(arguments)\n"
        "    except SystemExit:\n"
        "        pass\n"
        "    heavy = [m for m in ('torch', 'ray', 'vllm', 'transformers', 'openai') if m in sys.modules]\n"
        "    print('HEAVY', arguments, heavy)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    for arguments in (["--help"], ["serve", "--help"], ["config", "show"]):
        assert f"HEAVY {arguments} []" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["config", "show", "--config", "absent.yaml"], "absent.yaml"),
        (["config", "show", "--dtype", "float64"], "--dtype"),
        (["config", "show", "--hosts", "0"], "--hosts"),
        (["config", "show", "--address", "nowhere"], "--address"),
        (["serve", "--host", "0.0.0.0"], "without an API key"),
        (["plan", "--model", "absent"], "/absent"),
        (["status"], "no expertmesh server of yours runs"),
        (["chat", "hello"], "no expertmesh server of yours runs"),
        (["complete", "hello", "--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_1(
    run: Callable[..., Ended], arguments: list[str], words: str
) -> None:
    ended = run(*arguments)
    assert ended.code == 1
    assert words in ended.err
    assert ended.err.count("error:") == 1
    assert "Traceback" not in ended.err
    assert ended.out == ""


def test_a_message_in_square_brackets_is_shown_whole(tmp_path: Path) -> None:
    """Brackets are markup to the library that prints; a key path or a folder may have them."""
    missing = tmp_path / "[bold]here"
    command = Path(sys.executable).parent / "expertmesh"
    ended = subprocess.run(
        [command, "model", "inspect", missing], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert "[bold]here" in ended.stderr


def test_the_installed_command_ends_with_the_same_message(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "workloads.cli", "config", "show", "--config", "absent.yaml"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error:") and "absent.yaml" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_plan_shows_hosts_and_starts_nothing(run: Callable[..., Ended], tiny: Path, tmp_path: Path) -> None:
    ended = run("plan", "--model", str(tiny), "--hosts", "2")
    assert ended.code == 0, ended.err
    assert "local-0" in ended.out and "local-1" in ended.out
    assert "4 in 0-1" in ended.out
    assert not (tmp_path / ".ray").exists()


def test_inspect_speaks_json(run: Callable[..., Ended], tiny: Path) -> None:
    ended = run("model", "inspect", str(tiny), "--json")
    assert ended.code == 0, ended.err
    report = json.loads(ended.out)
    assert (report["model_type"], report["layers"], report["servable"]) == ("mixtral", 2, True)


def test_verify_ends_with_1_for_a_damaged_checkpoint(
    run: Callable[..., Ended], tiny: Path, tmp_path: Path
) -> None:
    assert run("model", "verify", str(tiny)).code == 0
    damaged = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    ended = run("model", "verify", str(damaged))
    assert ended.code == 1
    assert file.name in ended.out + ended.err

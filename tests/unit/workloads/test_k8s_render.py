"""What helm is asked, and what it says; a program of the test's own stands in for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from workloads.k8s_render import (
    HelmError,
    Wanted,
    documents,
    helm_arguments,
    helm_program,
    is_test,
    render,
    sources,
    told,
    values_files,
)

ROOT = Path(__file__).parents[3]


def helm(folder: Path, script: str) -> dict[str, str]:
    file = folder / "helm"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_without_helm_it_is_said_how_to_get_it() -> None:
    with pytest.raises(HelmError, match="helm is not installed") as error:
        helm_program({"PATH": "/nowhere"})
    assert "HELM=/path/to/helm" in error.value.hint
    with pytest.raises(HelmError, match="there is no /nowhere/helm"):
        helm_program({"PATH": "", "HELM": "/nowhere/helm"})


def test_the_overlays_values_come_first(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("{}")
    wanted = Wanted("learn", "mixed", (mine,), ("image.tag=1",), kube_version="1.34")
    arguments = helm_arguments(ROOT, wanted)
    assert arguments[:3] == ["template", "expertmesh-learn", str(ROOT / "helm" / "expertmesh-learn")]
    overlay = str(ROOT / "k8s" / "overlays" / "mixed" / "values" / "learn.yaml")
    assert arguments[3:] == [
        *("--namespace", "expertmesh"),
        *("--values", overlay, "--values", str(mine)),
        *("--set", "image.tag=1"),
        *("--kube-version", "1.34"),
    ]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Wanted("learn", "huge"), "no overlay huge"),
        (Wanted("learn", None, (Path("absent.yaml"),)), "absent.yaml"),
    ],
)
def test_what_is_not_there_is_named(wanted: Wanted, words: str) -> None:
    with pytest.raises(HelmError, match=words):
        values_files(ROOT, wanted)
    with pytest.raises(HelmError, match="there is no chart"):
        helm_arguments(ROOT, Wanted("other"))


def test_an_installation_without_charts_says_where_to_find_them(tmp_path: Path) -> None:
    with pytest.raises(HelmError, match="no folder helm") as error:
        sources(tmp_path)
    assert "--source" in error.value.hint
    assert sources() == ROOT


def test_what_helm_makes_is_handed_on(tmp_path: Path) -> None:
    text = render(ROOT, Wanted("learn"), helm(tmp_path, 'printf "kind: %s\\n---\\n\\n" "$1"'))
    assert list(documents(text)) == [{"kind": "template"}]


def test_what_helm_refuses_is_one_message(tmp_path: Path) -> None:
    said = ("WARNING: of no use", "Error: execution error at (x): model.existingClaim is empty")
    script = "".join(f'echo "{line}" >&2\n' for line in said) + "exit 1"
    with pytest.raises(HelmError, match=r"refuses expertmesh-learn: execution error .* is empty"):
        render(ROOT, Wanted("learn"), helm(tmp_path, script))
    assert told("") == "it says nothing"


def test_which_objects_only_helm_test_makes() -> None:
    assert is_test({"metadata": {"annotations": {"helm.sh/hook": "test"}}})
    assert not is_test({"metadata": {"annotations": None}})
    assert not is_test({"metadata": {"annotations": {"helm.sh/hook": "pre-install"}}})

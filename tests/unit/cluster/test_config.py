from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import Config, HostGroup, LoadedConfig, leaves, load_config
from cluster.config_sources import dotted
from cluster.errors import ConfigError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test in a folder without an expertmesh.yaml."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(
    text: str | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedConfig:
    file = Path("given.yaml") if text is not None else None
    if file is not None:
        file.write_text(text or "")
    return load_config(file, flags or {}, environ or {})


def mistake(
    text: str | None = None,
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, flags, environ)
    return str(caught.value)


def test_no_file_gives_the_defaults() -> None:
    loaded = load()
    assert loaded.file is None
    assert loaded.config == Config()
    assert loaded.config.hosts == (HostGroup(name="local", count=1, device="cpu"),)
    assert loaded.config.engine.kv_cache == 2**30
    assert loaded.config.data_plane.deadline == 30.0
    assert {str(origin) for origin in loaded.origins.values()} == {"default"}


def test_flag_over_environment_over_file_over_default() -> None:
    text = "server:\n  port: 1\n  host: ::1\n  max_queue: 1\n"
    environ = {"EXPERTMESH__SERVER__PORT": "2", "EXPERTMESH__SERVER__HOST": "127.0.0.2"}
    loaded = load(text, {"server.port": 3, "server.host": None}, environ)
    server = loaded.config.server
    assert (server.port, server.host, server.max_queue, server.request_timeout) == (3, "127.0.0.2", 1, 600)
    shown = {
        key: str(loaded.origins[f"server.{key}"]) for key in ("port", "host", "max_queue", "request_timeout")
    }
    assert shown == {
        "port": "flag --port",
        "host": "environment EXPERTMESH__SERVER__HOST",
        "max_queue": "file given.yaml:4",
        "request_timeout": "default",
    }


def test_a_flag_may_be_called_differently_from_its_key() -> None:
    loaded = load_config(None, {"hosts.0.count": 3}, {}, {"hosts.0.count": "--hosts"})
    assert [group.count for group in loaded.config.hosts] == [3]
    assert str(loaded.origins["hosts.0.count"]) == "flag --hosts"
    assert str(loaded.origins["hosts.0.name"]) == "default"


def test_which_file_is_read(tmp_path: Path) -> None:
    for number, name in enumerate(("given", "named", "expertmesh"), start=1):
        (tmp_path / f"{name}.yaml").write_text(f"server: {{port: {number}}}")
    environ = {"EXPERTMESH_CONFIG": "named.yaml"}
    assert load_config(Path("given.yaml"), {}, environ).config.server.port == 1
    assert load_config(None, {}, environ).config.server.port == 2
    assert load_config(None, {}, {}).config.server.port == 3


def test_the_environment_reaches_into_lists_and_takes_yaml_for_them() -> None:
    environ = {
        "EXPERTMESH__HOSTS__1__COUNT": "5",
        "EXPERTMESH__HOSTS": "[{name: a}, {name: b, count: 2, selector: {zone: x}}]",
        "EXPERTMESH__ENGINE__OPTIONS__ENABLE_PREFIX_CACHING": "false",
        "EXPERTMESH__MODEL__NAME": "0123",
        "EXPERTMESH__SERVER__PORT": "",
        "EXPERTMESH_PORT": "tcp://10.0.0.1:1",
    }
    config = load(environ=environ).config
    assert [(group.name, group.count) for group in config.hosts] == [("a", 1), ("b", 5)]
    assert config.hosts[1].selector == {"zone": "x"}
    assert config.engine.options == {"enable_prefix_caching": False}
    assert config.model.name == "0123"
    assert config.server.port == 8000


def test_null_in_the_environment_undoes_the_file() -> None:
    assert load("model: {name: x}", environ={"EXPERTMESH__MODEL__NAME": "null"}).config.model.name is None


def test_a_section_with_everything_commented_out() -> None:
    assert load("server:\n  # port: 1\nhosts:\n").config == Config()
    assert load("").config == Config()


def test_merge_keys_and_anchors() -> None:
    text = "hosts:\n- &a {name: a, count: 2}\n- <<: *a\n  name: b\n"
    assert [(group.name, group.count) for group in load(text).config.hosts] == [("a", 2), ("b", 2)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server:\n  prot: 1\n", "given.yaml:2: server.prot = 1: unknown key\n  did you mean server.port?"),
        ("port: 1\n", "file given.yaml:1: port = 1: unknown key\n  did you mean server.port or admin.port?"),
        ("zebra: 1\n", "valid keys here: model, engine, hosts,"),
        ("engine: {device: gpu}\n", "'gpu': not one of the allowed values\n  allowed: auto, cpu, cuda"),
        (
            "engine: {gpus: 0.4}\n",
            "engine.gpus: 0.4 of a GPU is for engines on cuda, engine.device is auto",
        ),
        (
            "engine: {device: cuda, gpus: 1.5}\n",
            "engine.gpus = 1.5: should be a share of one GPU above 0 and at most",
        ),
        (
            "engine: {device: cuda, gpus: 0.5, options: {tensor_parallel_size: 2}}\n",
            "engine.gpus: 0.5 of a GPU each is not for an engine of 2 ranks",
        ),
        (
            "hosts: [{name: a, gpus: 0.4}]\n",
            "hosts.0.gpus: 0.4 of a GPU is for hosts on cuda, those of a are",
        ),
        ("hosts: [{device: cuda, gpus: 0}]\n", "hosts.0.gpus = 0: should be a share of one GPU above 0"),
        (
            "hosts: [{device: cuda, gpus: 0.00001}]\n",
            "with at most 4 decimals, such as 0.4\n  the default is 1",
        ),
        ("hosts: [{device: cuda, gpus: true}]\n", "hosts.0.gpus = true: should be a share of one GPU"),
        ("log_level: inof\n", "did you mean info?"),
        ("engine: {max_num_seqs: many}\n", "engine.max_num_seqs = 'many': should be a valid integer"),
        ("engine: {max_num_seqs: true}\n", "engine.max_num_seqs = true: should be a whole number"),
        ("engine: {max_num_seqs: 0}\n", "greater than or equal to 1\n  the default is 64"),
        ("engine: {threads: 0}\n", 'should be "auto" or a whole number of at least 1'),
        ("engine: {kv_cache: lots}\n", "engine.kv_cache = 'lots': should be a size above zero"),
        (
            "engine:\n  options: {max-num-seqs: 1}\n",
            "given.yaml:2: engine.options: max-num-seqs has a key of",
        ),
        ("data_plane: {deadline: soon}\n", "data_plane.deadline = 'soon': should be a duration"),
        ("data_plane: {deadline: 0}\n", "data_plane.deadline = 0: should be a duration above zero"),
        ("server: 1\n", "server = 1: should be a mapping of keys to values\n  its keys: host, port,"),
        ("hosts: {name: a}\n", "hosts: should be a list"),
        ("hosts: []\n", "there is no host group"),
        ("hosts: [{name: Big_One}]\n", "hosts.0.name = 'Big_One': should be at most 42 lower-case letters"),
        ("hosts: [{selector: {zone: 1}}]\n", "hosts.0.selector.zone = 1: should be a text\n  put it in"),
        ("hosts:\n- {}\n- {count: 2}\n", "given.yaml:3: hosts.1.name = 'local': hosts.0 has this name"),
        ("ray: {address: ray://x}\n", "ray.address = 'ray://x': should be \"local\","),
        ("placement: {replicas: 2}\n", "2 copies of each expert need as many hosts, there are 1"),
        ("placement: {replicas: [2]}\n", "placement.replicas: should be a valid integer"),
        ("placement: {replicas: 0}\n", "placement.replicas = 0: should be greater than or equal to 1"),
        ("placement:\n  replicas: {layer: {}}\n", "given.yaml:2: placement.replicas.layer: unknown key"),
        ("placement: {replicas: {layer: {}}}\n", "did you mean placement.replicas.layers?"),
        ("placement: {replicas: {layers: {a: 2}}}\n", "placement.replicas.layers.a = 'a': should be a valid"),
        ("placement: {replicas: {layers: [2]}}\n", "placement.replicas.layers: should be a mapping"),
        (
            "placement:\n  replicas:\n    layers:\n      3: 2\n",
            "given.yaml:4: placement.replicas.layers.3: 2 copies of an expert need as many hosts, there are 1",
        ),
        ("placement: {replicas: {hottest: {share: 1}}}\n", "placement.replicas.hottest.counts: is missing"),
        (
            "placement: {replicas: {hottest: {share: 2, replicas: 1, counts: x}}}\n",
            "hottest.share = 2: should be a share above 0 and at most 1, such as 0.25\n  docs/configuration.md",
        ),
        ("placement: {no_replica: drpo}\n", "did you mean drop?"),
        ("replicas: 2\n", "did you mean engine.replicas or placement.replicas or"),
        ("server:\n  port: 1\n  port: 2\n", "file given.yaml:3: server.port: given twice, first in line 2"),
        ("server:\n  host: 0.0.0.0\n", "file given.yaml:2: server.host: the server would be reachable"),
        ("server:\n  - a\n b: 1\n", "given.yaml:3: not valid YAML"),
        ("a: !thing 1\n", "given.yaml:1: not valid YAML: could not determine a constructor"),
        ("hosts: &a [*a]\n", "given.yaml:1: not valid YAML: an alias contains itself"),
        ("just text\n", "given.yaml:1: not a mapping of keys to values"),
    ],
)
def test_a_mistake_says_where_and_what_and_the_way_out(text: str, expected: str) -> None:
    assert expected in mistake(text)


def test_mistakes_outside_the_file_name_their_source() -> None:
    message = mistake(flags={"server.max_queue": "x"}, environ={"EXPERTMESH__SERVER__PROT": "1"})
    assert "flag --max-queue: server.max_queue = 'x': should be a valid integer" in message
    assert "environment EXPERTMESH__SERVER__PROT: server.prot = '1': unknown key" in message
    assert "EXPERTMESH__HOSTS: hosts: not valid YAML" in mistake(environ={"EXPERTMESH__HOSTS": "[{"})
    assert "hosts.3.count: there is no entry 3" in mistake("hosts: [{}]", {"hosts.3.count": 1})
    assert "hosts is a list\n  name an entry: hosts.0.count" in mistake("hosts: [{}]", {"hosts.count": 1})
    assert "server is a single value" in mistake("server: 1", {"server.port": 1})


def test_all_mistakes_are_reported_together_in_the_files_order() -> None:
    text = "server: {port: x}\nmodle: {}\nhosts:\n- {count: 0}\n- {}\nengine: {device: tpu, device: cpu}\n"
    message = mistake(text, {"log_level": "loud"})
    found = [
        line.strip().partition(" ")[2].split()[0] for line in message.splitlines() if " given.yaml:" in line
    ]
    assert message.startswith("6 mistakes")
    assert found == [f"given.yaml:{line}:" for line in (1, 2, 4, 5, 6)]
    assert "flag --log-level: log_level = 'loud'" in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: {name: \xe9}")
    (tmp_path / "control.yaml").write_bytes(b"model: \x01")
    for name in ("missing.yaml", ".", "latin.yaml", "control.yaml"):
        with pytest.raises(ConfigError, match=f"configuration file {name} cannot be read"):
            load_config(Path(name), {}, {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_a_server_open_to_the_network_needs_a_key(host: str) -> None:
    assert "without an API key" in mistake(flags={"server.host": host})
    assert load(flags={"server.host": host, "server.api_keys": "k"}).config.server.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_a_server_on_loopback_needs_none(host: str) -> None:
    assert load(flags={"server.host": host}).config.server.api_keys == ()


def test_keys_from_the_environment_and_from_files(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\n two \n")
    loaded = load("server: {api_keys: [plain, 'env:KEY', 'file:keys']}", environ={"KEY": "secret"})
    assert [key.get_secret_value() for key in loaded.config.server.api_keys] == [
        "plain",
        "secret",
        "one",
        "two",
    ]
    (tmp_path / "keys").write_text("\n")
    for entry, problem in (
        ("env:NONE", "env:NONE is unset or empty"),
        ("file:keys", "file:keys is unset or empty"),
        ("file:none", "file:none cannot be read: No such file"),
        ("''", "an API key is empty"),
        ("' '", "an API key is empty"),
    ):
        assert problem in mistake(f"server: {{api_keys: [{entry}]}}")


def test_keys_appear_in_no_text() -> None:
    loaded = load("server: {api_keys: [hush-hush]}")
    assert "hush" not in f"{loaded!r} {loaded.config} {loaded.config.model_dump_json()}"
    assert "4711" not in mistake("server: {api_keys: [4711]}")
    assert "4711" not in mistake("server: {api_keys: 4711}")
    assert "hush" not in mistake("server: {api_keys: {hush: hush}}")
    assert "hush" not in mistake("server: {api_key: [hush-hush]}")


def test_a_configuration_is_frozen_and_crosses_processes() -> None:
    config = load("server: {api_keys: [k]}\nhosts: [{memory: 2GiB}]").config
    with pytest.raises(ValueError, match="frozen"):
        config.server.port = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


# Few characters: building tables of all of Unicode takes seconds.
words = st.text("ab0:.{[-~'#\n é", max_size=6) | st.sampled_from(
    ["name", "port", "count", "auto", "env:X", "4GiB"]
)
yaml_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
section_names = st.sampled_from([*Config.model_fields, "other"])


@given(st.dictionaries(section_names, yaml_values, max_size=4))
def test_any_yaml_is_either_a_configuration_or_one_configuration_error(tree: dict[str, object]) -> None:
    file = Path("any.yaml")
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), "utf-8")
    try:
        load_config(file, {}, {})
    except ConfigError as error:
        assert "any.yaml" in error.message


def test_every_value_has_an_origin() -> None:
    loaded = load("hosts: [{name: a, selector: {zone: b}}, {name: c}]\nengine: {options: {x: {y: 1}}}")
    assert set(loaded.origins) == {dotted(path) for path, _ in leaves(loaded.config)}
    assert str(loaded.origins["hosts.0.selector.zone"]) == "file given.yaml:1"
    assert str(loaded.origins["engine.options.x"]) == "file given.yaml:2"
    assert str(loaded.origins["hosts.1.selector"]) == "default"

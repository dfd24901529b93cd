"""Settings from flags, variables and files: precedence, every mistake told with its origin, the printed file read back."""

from __future__ import annotations

import contextlib
import string
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from paceline.cli.serve_options import serve_options
from paceline.core.config import EngineConfig
from paceline.core.errors import ConfigError
from paceline.core.units import seconds, size
from paceline.server import sources
from paceline.server.settings import GROUPS, Access, Listen, ServeSettings, Serving, options, pairs, tls_context
from paceline.server.sources import TABLES, gather, toml


def problems(flags: dict[str, Any], environ: dict[str, str] | None = None, path: Path | None = None) -> list[str]:
    with pytest.raises(ConfigError) as e:
        gather(flags, environ or {}, path)
    return list(e.value.problems)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def test_defaults_are_safe_and_free_of_problems() -> None:
    e = gather({}, {})
    assert e.settings == ServeSettings()
    assert e.config == EngineConfig()
    s = e.settings
    assert s.listen.host == "127.0.0.1"
    assert s.listen.cors_origins == ()
    assert not any((s.observe.log_prompts, s.bounds.trust_chat_template, s.listen.insecure))


def test_flag_beats_variable_beats_file_beats_default(tmp_path: Path) -> None:
    path = written(
        tmp_path, 'model = "m"\n[listen]\nport = 1111\nroot_path = "/llm"\n[bounds]\nmax_n = 5\n[engine]\nthreads = 3\n'
    )
    e = gather({"port": "3333"}, {"PACELINE_PORT": "2222", "PACELINE_MAX_N": "7", "PACELINE_HOST": " "}, path)
    assert (e.settings.listen.port, e.settings.bounds.max_n, e.settings.listen.root_path) == (3333, 7, "/llm")
    assert (e.top.model, e.engine.threads, e.settings.listen.host) == ("m", 3, "127.0.0.1")


def test_no_name_is_used_twice_so_that_flags_and_variables_are_unambiguous() -> None:
    names = [o.name for table in TABLES.values() for o in table.values()]
    assert len(names) == len(set(names))
    assert all(o.declared.help for name in GROUPS for o in TABLES[name].values())


def test_everything_wrong_is_told_at_once_with_its_origin(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[listen]\n\nprot = 1\nport = "many"\n[bounds]\nmax_n = 0\n[obsrve]\nmetrics = true\n[engine]\nmax_body = 1\n',
    )
    found = problems({"drain": "soon", "threads": "0"}, {"PACELINE_DASHBOARD": "maybe"}, path)
    expected = [
        (f"{path}, line 3: [listen] prot: unknown key", "did you mean port?"),
        ("port = 'many': must be an integer", f"{path}, line 4: [listen] port"),
        ("max_n = 0: must be from 1 to 1024", f"{path}, line 6: [bounds] max_n"),
        (f"{path}, line 7: obsrve: unknown key", "did you mean the table [observe]?"),
        (f"{path}, line 10: [engine] max_body: unknown key", "did you mean max_body in [bounds]?"),
        ("drain = 'soon': must be a duration", "--drain"),
        ("threads = 0", "--threads"),
        ("dashboard = 'maybe': must be true or false", "PACELINE_DASHBOARD"),
    ]
    for start, end in expected:
        assert any(p.startswith(start) and end in p for p in found), (start, found)
    assert len(found) == len(expected)


@pytest.mark.parametrize(
    "text", ["[listen", "listen = 3", "use = 3", "[listen]\nport = true", "[listen]\nhost = 3", "[[bounds]]\nmax_n = 1"]
)
def test_malformed_files_are_config_errors(tmp_path: Path, text: str) -> None:
    assert problems({}, {}, written(tmp_path, text))


def test_missing_and_huge_files_are_config_errors(tmp_path: Path) -> None:
    assert "cannot be read" in problems({}, {}, tmp_path / "absent.toml")[0]
    assert "larger" in problems({}, {}, written(tmp_path, "#" * ((1 << 20) + 1)))[0]


def test_a_file_with_a_key_that_everyone_may_read_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, '[access]\napi_key = ["abcdefgh"]\n')
    assert gather({}, {}, path).settings.access.api_key == ("abcdefgh",)
    path.chmod(0o644)
    assert "chmod 600" in problems({}, {}, path)[0]


def test_other_machines_need_a_key() -> None:
    found = problems({"host": "0.0.0.0"})
    assert "without a key" in found[0]
    assert "(from --host)" in found[0]
    for more in ({"insecure": True}, {"api_key": ["abcdefgh"]}, {"uds": "/run/paceline.sock"}):
        gather({"host": "0.0.0.0", **more}, {})
    for host in ("127.0.0.1", "::1", "localhost", "127.8.9.1"):
        gather({"host": host}, {})
    for host in ("::", "192.168.1.2", "example.com", "::ffff:1.2.3.4"):
        assert problems({"host": host})


def test_secrets_are_neither_printed_nor_told() -> None:
    e = gather({"api_key": ["pk-secret-secret"]}, {})
    assert "pk-secret" not in toml(e)
    assert "1 given, not shown" in toml(e)
    assert "pk-secret" not in repr(e)
    assert "x y" not in str(problems({"api_key": ["x y"]}))
    with pytest.raises(ConfigError) as told:
        sources.convert(TABLES["access"]["api_key"], 12345678)
    assert "12345678" not in str(told.value)


@pytest.mark.parametrize(
    ("group", "words"),
    [
        (Listen(cors_origins=("*",)), "list the origins"),
        (Listen(cors_origins=("https://a.example/path",)), "without a path"),
        (Listen(cors_origins=("null",)), "must be an origin"),
        (Listen(root_path="llm/"), "/llm"),
        (Listen(tls_cert="/nonexistent"), "tls_key"),
        (Listen(tls_ca="/nonexistent"), "mutual TLS"),
        (Access(require_keys=True), "there is no key"),
        (Access(api_key=("short",)), "8 to 512"),
        (Access(keys_file="/nonexistent"), "not a readable file"),
        (Serving(models=("nopath",)), "name=path"),
        (Serving(models=("a=x", "a=y")), "given twice"),
        (Serving(models=("a=x",), served_name=("a",)), "names two things"),
        (Serving(served_name=("bad name",)), "served_name"),
    ],
)
def test_problems_name_the_remedy(group: Any, words: str) -> None:
    assert any(words in p for p in group.problems()), group.problems()


def test_kubernetes_service_variables_are_recognised() -> None:
    assert "enableServiceLinks" in problems({}, {"PACELINE_PORT": "tcp://10.0.0.1:8000"})[0]


def values(o: Any) -> st.SearchStrategy[Any]:
    """Any valid value of an option, as the file may give it."""
    d = o.declared
    if d.choices:
        return st.sampled_from(d.choices)
    if o.kind is bool:
        return st.booleans()
    if o.kind is int:
        return st.integers(int(d.low or 0), int(d.high or 1 << 20))
    if o.kind is float:
        return st.floats(d.low or 0, d.high or 1e6)
    text = st.text(string.ascii_letters + string.digits, min_size=1, max_size=9)
    return st.lists(text, max_size=3).map(tuple) if o.kind is tuple else text


NEEDS_MORE = {"root_path", "cors_origins", "tls_cert", "tls_key", "tls_ca", "api_key", "api_key_file", "keys_file", "require_keys"} | {
    "otel_endpoint", "models", "served_name", "host"
}  # fmt: skip
FREE = [o for name in GROUPS for o in TABLES[name].values() if o.name not in NEEDS_MORE]


@given(st.fixed_dictionaries({}, optional={o.name: values(o) for o in FREE}))
def test_the_printed_file_is_read_back_to_the_same(tmp_path_factory: Any, flags: dict[str, Any]) -> None:
    e = gather(flags, {})
    path = written(tmp_path_factory.mktemp("config"), toml(e))
    assert gather({}, {}, path) == e


ANY = st.one_of(
    st.text(string.printable + "ü\x00", max_size=20),
    st.sampled_from(["0", "-1", "1e999", "nan", "9" * 30, "tcp://x", "=", "a=b a=c", "[::", "http://["]),
)
NAMES = [(t, k) for t in TABLES for k in TABLES[t] if k not in ("recipe",)]


@given(
    st.dictionaries(
        st.sampled_from(NAMES), st.one_of(ANY, st.integers(), st.booleans(), st.lists(ANY, max_size=3)), max_size=6
    )
)
def test_any_values_are_taken_or_refused(given_values: dict[tuple[str, str], Any]) -> None:
    flags = {k: v for (_, k), v in given_values.items()}
    for source in (
        lambda: gather(flags, {}),
        lambda: gather({}, {f"PACELINE_{k.upper()}": str(v) for k, v in flags.items()}),
    ):
        with contextlib.suppress(ConfigError):
            assert source().settings.problems() == []


def test_text_survives_the_printed_file(tmp_path: Path) -> None:
    e = gather({"model": 'a "quoted" \\ pfad\x7f ü\n', "use": ["serving/radix:x=1,y=2"]}, {})
    assert gather({}, {}, written(tmp_path, toml(e))) == e


def test_recipe_and_use_are_joined(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('use = ["a/b"]\n')
    assert gather({"recipe": str(recipe), "use": ["c/d"]}, {}).config.use == ("a/b", "c/d")
    assert "recipe" in problems({"recipe": str(tmp_path / "absent")})[0]


@pytest.mark.parametrize(("text", "n"), [("30", 30), ("1.5h", 5400), ("250ms", 0.25), ("90d", 90 * 86400)])
def test_durations(text: str, n: float) -> None:
    assert seconds(text, "x") == n


@pytest.mark.parametrize("text", ["", "-1", "1w", "nan", "1e9", "9" * 40])
def test_bad_durations_and_sizes(text: str) -> None:
    with pytest.raises(ConfigError):
        seconds(text, "x")
    with pytest.raises(ConfigError):
        size(text, "x")


def test_the_command_gets_model_config_and_settings(tmp_path: Path) -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @serve_options
    def serve(
        model: str | None, config: EngineConfig, settings: ServeSettings, extra: bool = typer.Option(False)
    ) -> None:
        seen.append((model, config, settings, extra))

    run = CliRunner().invoke
    path = written(tmp_path, "[listen]\nport = 1234\n")
    args = [
        "-m",
        "x",
        "-t",
        "2",
        "--config",
        str(path),
        "--no-dashboard",
        "--api-key",
        "abcdefgh",
        "--api-key",
        "ijklmnop",
        "--extra",
    ]
    done = run(app, [*args, "--kv-memory", "2GiB", "-u", "a/b", "--offline"], env={"PACELINE_MAX_BODY": "1MiB"})
    assert done.exit_code == 0, done.output
    model, config, s, extra = seen[0]
    assert (model, config.threads, config.kv_memory, config.use, config.offline, extra) == (
        "x",
        2,
        2 << 30,
        ("a/b",),
        True,
        True,
    )
    assert (s.listen.port, s.observe.dashboard, s.bounds.max_body) == (1234, False, 1 << 20)
    assert s.access.api_key == ("abcdefgh", "ijklmnop")
    printed = run(app, ["--print-config", "--port", "9"])
    assert "port = 9\n" in printed.output
    assert len(seen) == 1
    bad = run(app, ["--port", "x", "--max-n", "y"])
    assert isinstance(bad.exception, ConfigError)
    assert len(bad.exception.problems) == 2
    text = run(app, ["--help"], env={"COLUMNS": "200"}).output
    for o in FREE:
        assert "--" + o.name.replace("_", "-") in text


def test_options_come_from_the_dataclass() -> None:
    o = options("bounds", GROUPS["bounds"])["max_prompt_tokens"]
    assert (o.kind, o.optional, o.default, o.variable) == (int, True, None, "PACELINE_MAX_PROMPT_TOKENS")
    assert pairs(("a=b", " c = d=e ")) == {"a": "b", "c": "d=e"}
    assert tls_context(Listen()) is None

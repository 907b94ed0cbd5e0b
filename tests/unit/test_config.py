"""Configuration: what is read, what is refused, and that the documentation lists exactly what exists."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmrt import config
from vmrt.config import Config
from vmrt.errors import ConfigError

DOCUMENT = Path(__file__).parents[2] / "docs" / "configuration.md"


def written(tmp_path: Path, text: str, name: str = "config.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_every_key_has_a_default() -> None:
    assert config.load([]) == Config()


def test_a_file_sets_keys_of_every_type(tmp_path: Path) -> None:
    loaded = config.load(
        [
            written(
                tmp_path,
                """
                root = "/srv/vmrt"
                listen = "unix:///run/other.sock"
                [hypervisor]
                accelerator = "tcg"
                default_vcpus = 2
                boot_timeout_s = 12.5
                qemu_binary = "/opt/qemu"
                [network]
                cni_bin_dirs = ["/a", "/b"]
                [handlers.big]
                vcpus = 8
                """,
            )
        ]
    )
    assert loaded.root == Path("/srv/vmrt")
    assert loaded.socket_path == Path("/run/other.sock")
    assert loaded.guest_image_dir == Path("/srv/vmrt/guest")
    assert loaded.hypervisor.accelerator == "tcg"
    assert loaded.hypervisor.default_vcpus == 2
    assert loaded.hypervisor.boot_timeout_s == 12.5
    assert loaded.hypervisor.qemu_binary == Path("/opt/qemu")
    assert loaded.network.cni_bin_dirs == (Path("/a"), Path("/b"))
    assert loaded.handlers["big"].vcpus == 8


def test_an_integer_is_good_enough_for_seconds(tmp_path: Path) -> None:
    assert config.load([written(tmp_path, "hypervisor.boot_timeout_s = 30")]).hypervisor.boot_timeout_s == 30.0


def test_later_files_win_key_by_key(tmp_path: Path) -> None:
    first = written(tmp_path, 'log.level = "debug"\nlog.format = "json"')
    second = written(tmp_path, 'log.level = "error"', "second.toml")
    loaded = config.load([first, second])
    assert (loaded.log.level, loaded.log.format) == ("error", "json")


def test_the_default_files_are_read_in_name_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "DEFAULT_FILE", tmp_path / "config.toml")
    assert config.load() == Config()
    written(tmp_path, "max_container_log_line_bytes = 100")
    (tmp_path / "config.d").mkdir()
    written(tmp_path / "config.d", "max_container_log_line_bytes = 300", "20-late.toml")
    written(tmp_path / "config.d", "max_container_log_line_bytes = 200", "10-early.toml")
    written(tmp_path / "config.d", "not toml", "ignored.txt")
    assert config.load().max_container_log_line_bytes == 300


def test_options_of_the_command_line_win(tmp_path: Path) -> None:
    path = written(tmp_path, 'root = "/from-file"')
    assert config.load([path], {"root": "/from-option"}).root == Path("/from-option")
    assert config.load([path], {"root": Path("/as-a-path")}).root == Path("/as-a-path")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rot = '/x'", "unknown key rot (did you mean root?)"),
        ("hypervisor.boot_timout_s = 3", "did you mean hypervisor.boot_timeout_s?"),
        ("handlers.vm.vcpu = 3", "did you mean handlers.vm.vcpus?"),
        ("[zebra]\nx = 1", "unknown key zebra"),
        ("hypervisor.default_vcpus = 'two'", "$.hypervisor.default_vcpus"),
        ("hypervisor.default_vcpus = true", "$.hypervisor.default_vcpus"),
        ("hypervisor.accelerator = 'xen'", "$.hypervisor.accelerator"),
        ("network = 3", "$.network"),
        ("handlers = {}", "handlers: at least one"),
        ("root = 'relative'", "absolute"),
        ("listen = 'tcp://127.0.0.1:1'", "listen must be unix:///PATH"),
        ("listen = 'unix://relative'", "listen must be unix:///PATH"),
        ("hypervisor.default_vcpus = 0", "hypervisor.default_vcpus must be at least 1"),
        ("hypervisor.default_memory_bytes = 1024", "hypervisor.default_memory_bytes"),
        ("hypervisor.boot_timeout_s = 0", "hypervisor.boot_timeout_s"),
        ("hypervisor.scratch_bytes = -1", "hypervisor.scratch_bytes"),
        ("max_container_log_line_bytes = 1", "max_container_log_line_bytes"),
        ("pool.cgroup_parent = 'relative'", "pool.cgroup_parent must be an absolute path"),
        ("pool.cgroup_parent = '/a/../b'", "pool.cgroup_parent must be"),
        ("pool.cgroup_parent = '/vmrt.slice'", "no slice of systemd's"),
        ("root = ", "config.toml"),
        ("handlers.a.endpoint = 'unix:///a'", "none runs VMs (add an empty table [handlers.vm])"),
        ("handlers = {vm = {}, a = {endpoint = 'tcp://a'}}", "handlers.a.endpoint must be unix:///PATH"),
        ("handlers = {vm = {}, a = {endpoint = 'unix:///run/vmrt/vmrt.sock'}}", "is vmrt's own socket"),
        ("handlers = {vm = {}, a = {endpoint = 'unix:///a', vcpus = 2}}", "handlers.a.vcpus is for VMs"),
        ("handlers.vm.host_network = true", "handlers.vm.host_network needs handlers.vm.endpoint"),
        ("handlers.vm.delegate_handler = 'x'", "handlers.vm.delegate_handler needs"),
        (f"handlers = {{vm = {{}}, a = {{endpoint = 'unix:///{'a' * 108}'}}}}", "handlers.a.endpoint: a socket path"),
        (
            "handlers = {vm = {}, a = {endpoint = 'unix:///a', host_ipc = true}, "
            "b = {endpoint = 'unix:///a', host_ipc = true}}",
            "handlers.b.host_ipc is set, and so is handlers.a.host_ipc",
        ),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load([written(tmp_path, text)])
    assert message in str(refused.value)


def test_who_runs_vms_sees_no_delegates(tmp_path: Path) -> None:
    text = "handlers = {a = {endpoint = 'unix:///a', host_network = true}, vm = {vcpus = 2}, big = {}}"
    loaded = config.load([written(tmp_path, text)])
    assert list(loaded.delegates) == ["a"]
    assert list(loaded.of_vms().handlers) == ["vm", "big"], "the default handler is the first of VMs"


def test_bytes_that_are_no_utf8_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"root = '\xff'")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        config.load([path])


def test_a_file_given_by_name_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*absent\.toml: No such file"):
        config.load([tmp_path / "absent.toml"])


@pytest.mark.parametrize(("octets", "taken"), [(107, True), (108, False)])
def test_a_socket_path_fits_the_kernels_limit(octets: int, taken: bool) -> None:
    listen = "unix:///" + "é" * ((octets - 1) // 2) + "x" * ((octets - 1) % 2)
    if taken:
        assert len(str(config.load([], {"listen": listen}).socket_path).encode()) == octets
    else:
        with pytest.raises(ConfigError, match=f"{octets} octets"):
            config.load([], {"listen": listen})


# --- docs/configuration.md --------------------------------------------------------------------------------------------


def documented() -> dict[str, object]:
    """The tables' rows: `| `key` | `default` | meaning |`, the default written as TOML."""
    rows = re.findall(r"^\| `([a-z0-9_.<>]+)` \| `([^`]+)` \| (\S.*\S) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {key: tomllib.loads(f"v = {default}")["v"] for key, default, _ in rows}


def existing(shape: type = Config, prefix: str = "") -> Iterator[tuple[str, object]]:
    hints = typing.get_type_hints(shape)
    for each in dataclasses.fields(shape):
        kind = hints[each.name]
        if typing.get_origin(kind) is dict:
            yield from existing(typing.get_args(kind)[1], f"{prefix}{each.name}.<name>.")
        elif dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from existing(kind, f"{prefix}{each.name}.")
        else:
            assert each.default is not dataclasses.MISSING, f"{prefix}{each.name} has no plain default"
            yield f"{prefix}{each.name}", as_toml(each.default)


def as_toml(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    return [as_toml(item) for item in value] if isinstance(value, tuple) else value


def test_the_documentation_lists_every_key_with_its_default() -> None:
    assert documented() == dict(existing())


def test_the_documented_example_is_valid(tmp_path: Path) -> None:
    examples = re.findall(r"^```toml\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    assert examples
    for example in examples:
        config.load([written(tmp_path, example)])


def test_the_deployed_example_of_a_delegate_is_valid() -> None:
    loaded = config.load([DOCUMENT.parents[1] / "deploy" / "delegate.toml"])
    assert (list(loaded.delegates), list(loaded.of_vms().handlers)) == (["runc"], ["vm"])

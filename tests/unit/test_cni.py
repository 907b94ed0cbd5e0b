"""The CNI protocol's decisions: configuration, requests, results, records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmrt import cni
from vmrt.errors import NetworkError
from vmrt.model import DnsConfig

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def a_list(name: str = "net", version: str = "1.0.0", **more: Any) -> bytes:
    return json.dumps({"cniVersion": version, "name": name, "plugins": [{"type": "bridge"}], **more}).encode()


def an_attachment(*plugins: dict[str, Any], version: str = "1.0.0", **more: Any) -> cni.Attachment:
    conflist = cni.ConfList("net", version, plugins or ({"type": "bridge"},), "10-net.conflist")
    return cni.Attachment("id1", "/run/netns/id1", "eth0", "A=B", {}, conflist, ("/a", "/b"), **more)


# --- configuration ----------------------------------------------------------------------------------------------------


def test_first_valid_file_in_name_order_wins() -> None:
    chosen, problems = cni.choose(
        {"20-b.conflist": a_list("b"), "10-a.conflist": b"{", "30-c.conflist": a_list("c"), "00-z/x.conf": b"{}"}
    )
    assert chosen is not None and (chosen.name, chosen.source) == ("b", "20-b.conflist")
    assert len(problems) == 1 and problems[0].startswith("10-a.conflist: not JSON")


def test_nothing_valid_names_every_problem() -> None:
    chosen, problems = cni.choose({"1.conf": b"[]", "2.conflist": a_list(plugins=[])})
    assert chosen is None
    assert problems == ("1.conf: not a JSON object", "2.conflist: the list has no plugins")


@pytest.mark.parametrize("name", ["10-net.conf", "10-net.json"])
def test_single_configuration_becomes_a_list_of_one(name: str) -> None:
    text = b'{"cniVersion": "0.3.1", "name": "net", "type": "macvlan", "ipam": {"type": "dhcp"}}'
    conflist = cni.parse_conflist(name, text)
    assert (conflist.version, conflist.types) == ("0.3.1", ("macvlan", "dhcp"))


def test_json_file_may_hold_a_list() -> None:
    assert cni.parse_conflist("net.json", a_list()).types == ("bridge",)


def test_drop_ins_of_the_network_complete_a_list() -> None:
    drops = {"net/20-b.conf": b'{"type": "b"}', "net/10-a.conf": b'{"type": "a"}', "other/1.conf": b'{"type": "c"}'}
    assert cni.parse_conflist("1.conflist", a_list(), drops).types == ("bridge", "a", "b")
    alone = cni.parse_conflist("1.conflist", a_list(loadOnlyInlinedPlugins=True), drops)
    assert alone.types == ("bridge",)
    only_drops = cni.parse_conflist("1.conflist", a_list(plugins=[]), drops)
    assert only_drops.types == ("a", "b")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (a_list(name="../x"), "name must be"),
        (a_list(version="0.2.0"), "the file states 0.2.0"),
        (json.dumps({"name": "n", "plugins": [{"type": "x"}]}).encode(), "the file states none"),
        (a_list(plugins="bridge"), "plugins must be a list"),
        (a_list(plugins=["bridge"]), "needs a type"),
        (a_list(plugins=[{"type": "../../bin/sh"}]), "needs a type"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_bad_configuration_is_refused_by_name(text: bytes, words: str) -> None:
    with pytest.raises(NetworkError, match=words) as caught:
        cni.parse_conflist("10-x.conflist", text)
    assert "10-x.conflist" in str(caught.value)


@given(JSON)
def test_any_json_is_parsed_or_refused(value: object) -> None:
    chosen, problems = cni.choose({"a.conflist": json.dumps(value).encode()})
    assert chosen is None and len(problems) == 1


@pytest.mark.parametrize(
    ("stated", "several", "selected"),
    [("0.3.1", [], "0.3.1"), ("0.4.0", ["1.0.0", "1.1.0", "9.0.0"], "1.1.0"), ("2.0.0", ["0.4.0"], "0.4.0")],
)
def test_highest_common_version_is_selected(stated: str, several: list[str], selected: str) -> None:
    assert cni.parse_conflist("a.conflist", a_list(version=stated, cniVersions=several)).version == selected


def test_config_directory_is_read_with_its_drop_ins(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    for name in ("b.conf", "a.conflist", "c.json", "README", "net/x.conf", "net/y.json"):
        (tmp_path / name).write_text("{}")
    assert sorted(cni.read_config_dir(tmp_path)) == ["a.conflist", "b.conf", "c.json", "net/x.conf"]
    assert cni.read_config_dir(tmp_path / "absent") == {}


# --- requests ---------------------------------------------------------------------------------------------------------


def test_request_carries_the_plugins_own_keys_and_ours() -> None:
    attachment = an_attachment(
        {"type": "bridge", "bridge": "br0", "cniVersion": "0.1.0", "name": "old", "ipam": {"type": "host-local"}},
        {"type": "portmap", "capabilities": {"portMappings": True, "mac": True, "dns": False}},
    )
    attachment = replace(attachment, capability_args={"portMappings": [1], "dns": {}})
    assert cni.request_config(attachment, 0, "ADD") == {
        "type": "bridge",
        "bridge": "br0",
        "ipam": {"type": "host-local"},
        "cniVersion": "1.0.0",
        "name": "net",
    }
    second = replace(attachment, result={"ips": []})
    assert cni.request_config(second, 1, "ADD") == {
        "type": "portmap",
        "cniVersion": "1.0.0",
        "name": "net",
        "runtimeConfig": {"portMappings": [1]},
        "prevResult": {"ips": []},
    }


@pytest.mark.parametrize(
    ("version", "command", "given"),
    [("0.3.1", "ADD", True), ("0.3.1", "DEL", False), ("0.4.0", "DEL", True), ("1.1.0", "CHECK", True)],
)
def test_previous_result_follows_the_versions_rules(version: str, command: str, given: bool) -> None:
    attachment = an_attachment(version=version, result={"ips": []})
    assert ("prevResult" in cni.request_config(attachment, 0, command)) is given


def test_environment() -> None:
    env = cni.environment(an_attachment(), "DEL", {"HOME": "/root", "PATH": "/usr/bin"})
    assert env["CNI_COMMAND"] == "DEL" and env["CNI_PATH"] == "/a:/b" and env["HOME"] == "/root"
    assert (env["CNI_CONTAINERID"], env["CNI_NETNS"], env["CNI_IFNAME"]) == ("id1", "/run/netns/id1", "eth0")
    assert env["PATH"].startswith("/usr/bin:") and "/usr/sbin" in env["PATH"]


def test_requests_of_the_network_name_no_container() -> None:
    for command in ("STATUS", "GC"):
        variables = cni.environment(an_attachment(), command, {"PATH": "/bin"})
        assert variables["CNI_COMMAND"] == command
        assert not variables.keys() & {"CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"}


# --- results ----------------------------------------------------------------------------------------------------------

OLD_RESULT = {
    "cniVersion": "0.3.1",
    "interfaces": [
        {"name": "br0"},
        {"name": "veth1"},
        {"name": "eth0", "sandbox": "/run/netns/id1"},
        {"name": "net1", "sandbox": "/run/netns/id1"},
    ],
    "ips": [
        {"version": "6", "address": "fd00::2/64", "gateway": "fd00::1", "interface": 2},
        {"version": "4", "address": "10.0.0.2/24", "gateway": "10.0.0.1", "interface": 2},
        {"version": "4", "address": "10.9.9.9/24", "interface": 3},
        {"version": "4", "address": "10.0.0.1/24", "interface": 0},
    ],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00::ff"}],
    "dns": {"nameservers": ["192.0.2.53"], "domain": "example"},
}


def test_old_result_is_brought_into_form() -> None:
    result = cni.parse_result(OLD_RESULT, "eth0")
    assert result.addresses == ("10.0.0.2/24", "fd00::2/64")
    assert result.routes == (cni.ResultRoute("0.0.0.0/0", "10.0.0.1"), cni.ResultRoute("::/0", "fd00::ff"))
    assert result.dns == DnsConfig(("192.0.2.53",), ("example",))


def test_new_result_with_scopes_and_priorities() -> None:
    result = cni.parse_result(
        {
            "ips": [{"address": "10.0.0.2/32", "gateway": "169.254.1.1"}],
            "routes": [{"dst": "169.254.1.1/32", "scope": 253}, {"dst": "0.0.0.0/0", "priority": 5}],
        },
        "eth0",
    )
    assert result.routes == (
        cni.ResultRoute("169.254.1.1/32", "", 0, 253),
        cni.ResultRoute("0.0.0.0/0", "169.254.1.1", 5),
    )
    assert result.dns is None


@pytest.mark.parametrize(
    "bad",
    [
        {"ips": [{"address": "10.0.0.300/24"}]},
        {"ips": [{}]},
        {"ips": [{"address": "10.0.0.1/24", "interface": "x"}]},
        {"ips": ["10.0.0.1/24"]},
        {"interfaces": 3},
        {"routes": [{"dst": "default"}]},
        {"dns": ["192.0.2.1"]},
    ],
)
def test_malformed_result_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(NetworkError, match="malformed"):
        cni.parse_result(bad, "eth0")


@given(st.dictionaries(st.sampled_from(["ips", "interfaces", "routes", "dns"]), JSON))
def test_any_result_is_parsed_or_refused(value: dict[str, Any]) -> None:
    try:
        cni.parse_result(value, "eth0")
    except NetworkError as e:
        assert e.phase == "cni result"


@pytest.mark.parametrize(
    ("stdout", "stderr", "expected"),
    [
        (b'{"code": 11, "msg": "later", "details": "lock"}', b"noise", (11, "later; lock")),
        (b'{"code": "x", "msg": "m"}', b"words", (0, "words")),
        (b"{}", b"", (0, "{}")),
        (b"plain", b"", (0, "plain")),
        (b"", b"", (0, "it exited with status 3 and no message")),
        (b"[1]", b"\xff!", (0, "\ufffd!")),
    ],
)
def test_plugin_errors(stdout: bytes, stderr: bytes, expected: tuple[int, str]) -> None:
    assert cni.parse_error(stdout, stderr, 3) == expected


# --- records and programs ---------------------------------------------------------------------------------------------


def test_record_gives_back_what_was_written() -> None:
    attachment = an_attachment({"type": "a", "x": [1, {"y": None}]}, {"type": "b"}, result=OLD_RESULT, complete=True)
    assert cni.from_record(cni.to_record(attachment)) == attachment


@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def test_damaged_records_are_refused(text: bytes) -> None:
    with pytest.raises(NetworkError, match="damaged"):
        cni.from_record(text)


@given(st.integers(min_value=0))
def test_truncated_records_are_refused(length: int) -> None:
    text = cni.to_record(an_attachment())
    with pytest.raises(NetworkError, match="damaged"):
        cni.from_record(text[: length % len(text)])


def test_plugin_is_found_in_the_first_directory_that_has_it(tmp_path: Path) -> None:
    for directory, mode in (("a", 0o644), ("b", 0o755), ("c", 0o755)):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "bridge").touch(mode)
    dirs = [str(tmp_path / name) for name in "abc"]
    assert cni.find_plugin("bridge", dirs) == tmp_path / "b" / "bridge"
    conflist = cni.ConfList("n", "1.0.0", ({"type": "bridge", "ipam": {"type": "host-local"}},), "x")
    assert cni.missing_plugins(conflist, dirs) == ("host-local",)
    with pytest.raises(NetworkError, match="in none of"):
        cni.find_plugin("host-local", dirs)


def test_durable_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for content in (b"first, and longer", b"second"):
        cni.write_durably(path, content)
        assert path.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(NetworkError, match="cannot write"):
        cni.write_durably(tmp_path / "absent" / "x", b"")

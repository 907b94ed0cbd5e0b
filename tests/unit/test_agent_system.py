"""What the agent decides without a guest: netlink messages, disks, specs, sysctl names, cgroups, imports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from vmrt.agent import console, containers, crun, disks, layout, process, rootfs, rtnetlink, sandbox, spec, status
from vmrt.agent.users import Identity

REPOSITORY = Path(__file__).parents[2]

# Each costs an emulated guest's boot tens of milliseconds, or brings its own idea of who waits for children.
FORBIDDEN = {
    *("asyncio", "ctypes", "dataclasses", "inspect", "json", "logging", "multiprocessing", "pathlib", "selectors"),
    *("shutil", "signal", "socket", "subprocess", "tempfile", "traceback"),
}


def test_the_agents_imports_stay_cheap() -> None:
    site = [path for path in sys.path if path.endswith("site-packages")]
    code = f"import sys; sys.path[:0] = {[str(REPOSITORY), *site]!r}; import vmrt.agent.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-S", "-B", "-c", code], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "vmrt.agent.containers" in loaded
    assert not loaded & FORBIDDEN


def decoded(shape: type, message: tuple[int, int, bytes]) -> dict[str, object]:
    """The message as pyroute2 reads it: another implementation of the same kernel interface."""
    kind, flags, body = message
    data = (16 + len(body)).to_bytes(4, sys.byteorder) + kind.to_bytes(2, sys.byteorder)
    data += flags.to_bytes(2, sys.byteorder) + bytes(8) + body
    parsed = shape(data)
    parsed.decode()
    fields = {key: value for key, value in parsed.items() if key not in ("attrs", "header")}
    return {**fields, **dict(parsed["attrs"])}


def test_link_message() -> None:
    found = decoded(ifinfmsg, rtnetlink.link(7, up=False, mac="02:00:00:00:00:0a", mtu=1400, name="eth0"))
    assert (found["index"], found["flags"], found["change"]) == (7, 0, 1)
    assert (found["IFLA_ADDRESS"], found["IFLA_MTU"], found["IFLA_IFNAME"]) == ("02:00:00:00:00:0a", 1400, "eth0")
    assert decoded(ifinfmsg, rtnetlink.link(1, up=True))["flags"] == 1


def test_new_link_message() -> None:
    found = decoded(ifinfmsg, rtnetlink.new_link(9, "dummy0", "dummy", "02:00:00:00:00:0a"))
    assert (found["index"], found["flags"], found["change"]) == (9, 0, 0)
    assert (found["IFLA_ADDRESS"], found["IFLA_IFNAME"]) == ("02:00:00:00:00:0a", "dummy0")
    assert dict(found["IFLA_LINKINFO"]["attrs"]) == {"IFLA_INFO_KIND": "dummy"}  # type: ignore[index]


def test_address_messages() -> None:
    four = decoded(ifaddrmsg, rtnetlink.address(2, "10.1.2.3/24"))
    assert (four["index"], four["prefixlen"], four["IFA_LOCAL"]) == (2, 24, "10.1.2.3")
    assert (four["IFA_ADDRESS"], four["IFA_BROADCAST"]) == ("10.1.2.3", "10.1.2.255")
    six = decoded(ifaddrmsg, rtnetlink.address(2, "fd00::2/64"))
    assert (six["family"], six["prefixlen"], six["IFA_ADDRESS"], six["IFA_FLAGS"]) == (10, 64, "fd00::2", 0x82)
    assert "IFA_BROADCAST" not in decoded(ifaddrmsg, rtnetlink.address(2, "10.1.2.3/32"))


def test_route_messages() -> None:
    default = decoded(rtmsg, rtnetlink.route(2, "0.0.0.0/0", "169.254.1.1", metric=5))
    assert (default["dst_len"], default["table"], default["flags"], default["scope"]) == (0, 254, 4, 0)
    assert (default["RTA_GATEWAY"], default["RTA_OIF"], default["RTA_PRIORITY"]) == ("169.254.1.1", 2, 5)
    assert "RTA_DST" not in default
    link = decoded(rtmsg, rtnetlink.route(2, "169.254.1.1/32", source="10.0.0.2"))
    assert (link["scope"], link["RTA_DST"], link["RTA_PREFSRC"]) == (253, "169.254.1.1", "10.0.0.2")
    six = decoded(rtmsg, rtnetlink.route(2, "::/0", "fe80::1"))
    assert (six["family"], six["RTA_GATEWAY"], six["scope"]) == (10, "fe80::1", 0)


def test_neighbour_message() -> None:
    found = decoded(ndmsg, rtnetlink.neighbour(3, "10.0.0.1", "02:00:00:00:00:01"))
    assert (found["ifindex"], found["state"]) == (3, 0x80)
    assert (found["NDA_DST"], found["NDA_LLADDR"]) == ("10.0.0.1", "02:00:00:00:00:01")


@pytest.mark.parametrize(
    "text", ["", "10.0.0.1", "10.0.0.1/33", "10.0.0/8", "fd00::/129", "x/1", "1.1.1.1/-1", "::/\u0663"]
)
def test_bad_prefixes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no (IP )?address"):
        rtnetlink.parse_cidr(text)


@pytest.mark.parametrize("text", ["", "02:00", "zz:00:00:00:00:00", "020000000001", "02:00:00:00:00:00:00"])
def test_bad_macs_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        rtnetlink.parse_mac(text)


def test_gateway_of_the_other_ip_version_is_refused() -> None:
    with pytest.raises(ValueError, match="other IP version"):
        rtnetlink.route(1, "10.0.0.0/8", "fe80::1")


@given(st.binary(max_size=100))
def test_any_netlink_answer_is_read_within_its_bounds(datagram: bytes) -> None:
    rtnetlink.parse_errors(datagram)


def test_netlink_acknowledgements_are_found() -> None:
    ack = (36).to_bytes(4, sys.byteorder) + (2).to_bytes(2, sys.byteorder) + bytes(2) + (9).to_bytes(4, sys.byteorder)
    ack += bytes(4) + (-17).to_bytes(4, sys.byteorder, signed=True) + bytes(16)
    assert rtnetlink.parse_errors(ack) == [(9, 17)]


def test_on_link_routes_come_before_those_that_need_them() -> None:
    assert rtnetlink.message_order(["10.0.0.1", "", "fe80::1", ""]) == [1, 3, 0, 2]


def test_nics_are_found_by_mac(tmp_path: Path) -> None:
    for name, mac, index in (("lo", "00:00:00:00:00:00", 1), ("ens3", "02:00:00:00:00:01", 2), ("odd", "", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "address").write_text(f"{mac}\n".upper())
        (tmp_path / name / "ifindex").write_text(f"{index}\n")
    (tmp_path / "gone").mkdir()
    assert rtnetlink.links(str(tmp_path))["02:00:00:00:00:01"] == ("ens3", 2)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "/proc/sys/net/ipv4/ip_forward"),
        ("net/ipv4/conf/eth0.1/forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
        ("net.ipv4.conf.eth0/1.forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
        ("kernel.shm_rmid_forced", "/proc/sys/kernel/shm_rmid_forced"),
    ],
)
def test_sysctl_names(name: str, path: str) -> None:
    assert sandbox.sysctl_path(name) == path


@pytest.mark.parametrize(
    "name", ["", "kernel", "net..x", "/etc/passwd", "net/../../x", "..", "net.x\0y", "net x.y", "a/"]
)
def test_what_is_no_sysctl_is_refused(name: str) -> None:
    with pytest.raises(status.AgentError, match="not a sysctl's name"):
        sandbox.sysctl_path(name)


@given(st.text())
def test_no_sysctl_name_leaves_proc_sys(name: str) -> None:
    try:
        path = sandbox.sysctl_path(name)
    except status.AgentError:
        return
    assert os.path.normpath(path) == path
    assert path.startswith("/proc/sys/")


def test_disks_are_found_by_serial(tmp_path: Path) -> None:
    (tmp_path / "sda/device").mkdir(parents=True)
    (tmp_path / "sda/device/vpd_pg80").write_bytes(b"\0\x80\0\x08layer-01")
    (tmp_path / "vda").mkdir()
    (tmp_path / "vda/serial").write_text("a-serial-of-more-tha")  # virtio-blk keeps 20 octets
    (tmp_path / "vdb").mkdir()
    (tmp_path / "vdb/serial").write_text("")
    (tmp_path / "loop0").mkdir()
    assert disks.find("layer-01", str(tmp_path)) == "sda"
    assert disks.find("a-serial-of-more-than-20", str(tmp_path)) == "vda"
    assert disks.find("layer", str(tmp_path)) == ""
    assert disks.find("", str(tmp_path)) == ""


@given(st.binary(max_size=60))
def test_any_vpd_page_is_read(page: bytes) -> None:
    assert len(disks.parse_vpd_serial(page)) <= len(page)


@pytest.mark.parametrize("serial", ["", "a/b", "..", "x" * 37, "ä", "a b"])
def test_what_is_no_serial_is_refused(serial: str) -> None:
    with pytest.raises(status.AgentError, match="is no disk serial"):
        disks.check_serial(serial)


def test_images_are_told_apart_by_their_magic(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(bytes(1024) + b"\xe2\xe1\xf5\xe0" + bytes(100))
    (tmp_path / "s").write_bytes(b"hsqs" + bytes(100))
    (tmp_path / "x").write_bytes(bytes(2000))
    assert disks.image_type(str(tmp_path / "e")) == "erofs"
    assert disks.image_type(str(tmp_path / "s")) == "squashfs"
    with pytest.raises(status.AgentError, match="neither"):
        disks.image_type(str(tmp_path / "x"))


def test_overlay_options_put_the_top_layer_first() -> None:
    assert rootfs.overlay_options(["/l/1", "/l/2"]) == "lowerdir=/l/2:/l/1"
    assert rootfs.overlay_options(["/l/1"], "/s/u", "/s/w") == "lowerdir=/l/1,upperdir=/s/u,workdir=/s/w,volatile"


def test_a_hundred_and_twenty_seven_layers_fit_and_too_many_are_refused() -> None:
    # Docker's own limit is 127 layers; the paths are as the agent makes them.
    scratch = f"{layout.SCRATCH}/{'f' * 64}"
    lowers = [f"/run/vmrt/l/{number}" for number in range(1000, 1127)]
    assert len(rootfs.overlay_options(lowers, f"{scratch}/u", f"{scratch}/w")) <= rootfs.MAX_OPTIONS
    with pytest.raises(status.AgentError, match="too many"):
        rootfs.overlay_options(lowers * 3)


def test_trees_are_removed_without_following_links(tmp_path: Path) -> None:
    keep = tmp_path / "keep"
    keep.mkdir()
    (keep / "file").write_text("x")
    tree = tmp_path / "tree"
    (tree / "a/b").mkdir(parents=True)
    (tree / "a/file").write_text("x")
    (tree / "a/link").symlink_to(keep)
    (tree / "dangling").symlink_to("nowhere")
    rootfs.remove_tree(str(tree))
    rootfs.remove_tree(str(tree))
    assert [path.name for path in tmp_path.iterdir()] == ["keep"]
    assert (keep / "file").exists()


def test_usage_counts_blocks_and_inodes(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/file").write_bytes(bytes(10_000))
    octets, inodes = rootfs.usage(str(tmp_path))
    assert inodes == 2
    assert octets >= 10_000
    assert rootfs.usage(str(tmp_path / "absent")) == (0, 0)


def oci(**process_: object) -> dict[str, object]:
    return {
        "process": {"args": ["sh"], "cwd": "/", "env": ["A=1"], "user": {"umask": 18}, **process_},
        "root": {"path": "rootfs", "readonly": True},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid", "path": layout.TARGET_PID_NAMESPACE}]},
    }


def test_spec_is_completed_and_otherwise_unchanged() -> None:
    wanted = spec.parse(json.dumps(oci()).encode())
    identity = Identity(1, 2, (2, 3), "/home/x")
    done = spec.complete(wanted, root_path="/r", identity=identity, cgroups_path="/vmrt/c", target_pid=42)
    assert done["root"] == {"path": "/r", "readonly": True}
    assert done["process"]["user"] == {"umask": 18, "uid": 1, "gid": 2, "additionalGids": [2, 3]}
    assert done["process"]["env"] == ["A=1", "HOME=/home/x"]
    assert done["linux"]["cgroupsPath"] == "/vmrt/c"
    assert done["linux"]["namespaces"] == [{"type": "mount"}, {"type": "pid", "path": "/proc/42/ns/pid"}]
    assert wanted == oci()


def test_home_of_the_spec_stays_and_an_unknown_one_is_the_root() -> None:
    given_home = spec.parse(json.dumps(oci(env=["HOME=/given"])).encode())
    identity = Identity(1, 2, (), "")
    options = {"root_path": "/r", "identity": identity, "cgroups_path": "/c", "target_pid": 1}
    assert spec.complete(given_home, **options)["process"]["env"] == ["HOME=/given"]  # type: ignore[arg-type]
    assert spec.complete(oci(), **options)["process"]["env"] == ["A=1", "HOME=/"]  # type: ignore[arg-type]


def test_target_namespace_without_a_target_is_refused() -> None:
    with pytest.raises(status.AgentError, match="no target is named"):
        spec.complete(oci(), root_path="/", identity=Identity(0, 0, (), ""), cgroups_path="/c", target_pid=0)


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"{", b"\xff", b"{}", b'{"process": {}, "linux": {}}', b'{"process": 1, "linux": {}}'],
)
def test_what_is_no_spec_is_refused(text: bytes) -> None:
    with pytest.raises(status.AgentError) as caught:
        spec.parse(text)
    assert caught.value.code == status.INVALID_ARGUMENT


@pytest.mark.parametrize("words", ["exists but it is not executable", "is not a regular file"])
def test_newer_cruns_words_for_a_wrong_command(words: str) -> None:
    log = f'{{"msg":"the path `/etc/passwd` {words}: Operation not permitted","level":"error"}}'
    assert crun.refusal("w", log, "/etc/passwd").code == status.INVALID_ARGUMENT


def test_crun_log_becomes_one_line_and_tells_whose_fault_it_is() -> None:
    log = '{"msg":"executable file `x` not found in $PATH: No such file or directory","level":"error"}\nplain\n'
    error = crun.refusal("exec in container c", log)
    assert error.code == status.INVALID_ARGUMENT
    assert error.message.startswith("exec in container c: executable file `x` not found")
    assert error.message.endswith("; plain")
    assert crun.refusal("w", '{"msg":"mount: no"}').code == status.INTERNAL
    assert "without a message" in crun.refusal("w", "").message
    # crun names the command in some of its messages only.
    nameless = '{"msg":"open executable: Permission denied"}'
    assert crun.refusal("w", nameless, "/etc").message == "w: command '/etc': open executable: Permission denied"
    named = '{"msg":"executable file `nope` not found"}'
    assert crun.refusal("w", named, "nope").message == "w: executable file `nope` not found"
    assert crun.refusal("w", '{"msg":"mount: no"}', "/etc").message == "w: mount: no"


@pytest.mark.parametrize("container_id", ["", ".", "..", "a/b", "-a", "x" * 129, "a b", "ü"])
def test_what_is_no_container_id_is_refused(container_id: str) -> None:
    with pytest.raises(status.AgentError, match="is no container id"):
        containers.check_id(container_id)


@pytest.mark.parametrize(("wait_status", "code", "signal"), [(0, 0, 0), (3 << 8, 3, 0), (9, 137, 9), (139, 139, 11)])
def test_exit_is_told_as_a_shell_does(wait_status: int, code: int, signal: int) -> None:
    ended = process.Exit(wait_status)
    assert (ended.code, ended.signal) == (code, signal)
    assert ended.frame().code == code


def test_console_is_bounded_and_cannot_be_forged(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(console, "_write", lines.append)
    monkeypatch.setattr(console, "_tokens", float(console.BURST))
    console.log("a\nvmrt-agent: forged\x1b[2J" + "x" * 5000)
    assert len(lines) == 1
    assert lines[0].count("\n") == 1
    assert "\x1b" not in lines[0]
    for _ in range(10 * console.BURST):
        console.log("again")
    assert len(lines) < 2 * console.BURST


REAPER_PROGRAM = """
import os, sys, threading, time
sys.path[:0] = {path!r}
from vmrt.agent import kernel, process
kernel.become_subreaper()
reaper = process.Reaper()
threading.Thread(target=reaper.run, daemon=True).start()
# Exits at once: the reaper may see it before spawn has returned.
for number in range(100):
    assert reaper.spawn(["sh", "-c", f"exit {{number}}"]).wait(30).code == number
# Left to us by its parent, and dead before its pid is known here.
reader, writer = os.pipe()
with reaper.adopting():
    reaper.spawn(["sh", "-c", "(sh -c 'echo $$; exit 7' &)"], stdout=writer).wait(30)
    pid = int(os.read(reader, 100))
    time.sleep(0.3)
    assert reaper.adopt(pid).wait(30).code == 7
# Alive when adopted.
with reaper.adopting():
    reaper.spawn(["sh", "-c", "(sh -c 'echo $$; exec sleep 100' &)"], stdout=writer).wait(30)
    child = reaper.adopt(int(os.read(reader, 100)))
assert child.wait(0.05) is None
assert reaper.signal(child, 15)
assert child.wait(30).signal == 15
assert not reaper.signal(child, 15)
try:
    reaper.spawn(["/nonexistent/program"])
except FileNotFoundError:
    print("ok")
"""


def test_reaper_tells_every_exit_to_the_right_child() -> None:
    # In a process of its own: the reaper takes every child there is.
    program = REAPER_PROGRAM.format(path=[str(REPOSITORY), *(p for p in sys.path if p.endswith("site-packages"))])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_a_wait_ends_behind_the_exits_callback_even_one_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[bool] = []

    def on_exit(ended: process.Exit) -> None:
        seen.append(child.wait(0.0) is ended and not child._ended.is_set())
        raise OSError("a closed descriptor")

    child = process.Child(1, on_exit)
    child._tell(process.Exit(0))
    assert seen == [True]
    assert child._ended.is_set()

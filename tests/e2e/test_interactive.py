"""`exec -i`, `cp`, `run -it` and detaching as a user types them, all over TLS with a client certificate."""

from __future__ import annotations

import datetime
import ipaddress
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from demo.daemon import CHECKOUT, Daemon
from tests.e2e.conftest import IMAGE, Pod, clean_daemon, run_pod
from vmrt.proto.runtime.v1 import api_pb2 as cri

PATIENCE_S = 240
# Many of these start several programs each, on a machine that may be busy.
pytestmark = pytest.mark.timeout(600)


def certificate(directory: Path, name: str, issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None) -> Path:
    """Write NAME.pem, a certificate for loopback with its key; return its path. Without an issuer it is a CA."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0] if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = directory / f"{name}.pem"
    path.write_bytes(built.public_bytes(serialization.Encoding.PEM) + pem)
    return path


def certificates(directory: Path) -> tuple[Path, Path, Path]:
    """Write a CA, a server's and a client's certificate."""
    authority = certificate(directory, "authority", None)
    key = serialization.load_pem_private_key(authority.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    issuer = (x509.load_pem_x509_certificate(authority.read_bytes()).subject, key)
    return authority, certificate(directory, "server", issuer), certificate(directory, "client", issuer)


@dataclass(frozen=True)
class House:
    """A daemon that wants a client certificate, a pod, and its container `box`, which lives on."""

    daemon: Daemon
    pod: Pod
    tls: tuple[str, ...]
    scratch: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.scratch)}

    def argv(self, *arguments: str, tls: bool = True) -> list[str]:
        options = self.tls if tls else ()
        return [sys.executable, "-m", "vmrt", "--socket", str(self.daemon.socket), *options, *arguments]

    def vmrt(
        self, *arguments: str, stdin: bytes = b"", status: int = 0, tls: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            self.argv(*arguments, tls=tls),
            input=stdin,
            capture_output=True,
            check=False,
            cwd=CHECKOUT,
            env=self.environment,
            timeout=PATIENCE_S,
        )
        assert done.returncode == status, (arguments, done.returncode, done.stdout[-500:], done.stderr.decode())
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done


@pytest.fixture(scope="module")
def house(layout: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("tls")
    authority, server, client = certificates(directory)
    settings = f'[streaming]\ntls_cert = "{server}"\ntls_key = "{server}"\nclient_ca = "{authority}"\n'
    with clean_daemon("tls", settings) as daemon:
        daemon.start()
        daemon.load(layout)
        pod = run_pod(daemon, tmp_path_factory.mktemp("logs"))
        pod.run("sleep", "100000", name="box")
        scratch = tmp_path_factory.mktemp("run")
        yield House(daemon, pod, ("--tls-ca", str(authority), "--tls-cert", str(client)), scratch)


class Terminal:
    """A program on a pseudo-terminal of its own."""

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (33, 101))
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            argv,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd=CHECKOUT,
            env=environment,
            start_new_session=True,
        )
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, pattern: str) -> re.Match[str]:
        """Read until the pattern has been seen behind what was found before."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := re.search(pattern, self.seen)) is None:
            ready, _, _ = select.select([self.master], [], [], 1)
            if ready:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            assert time.monotonic() < deadline, (pattern, self.seen)
        self.seen = self.seen[found.end() :]
        return found

    def end(self) -> int:
        """Wait for the program's end; return its status, with the terminal as it was before."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None:
            if select.select([self.master], [], [], 0.1)[0]:
                self.seen += os.read(self.master, 65536).decode(errors="replace")
            assert time.monotonic() < deadline, self.seen
        assert termios.tcgetattr(self.slave) == self.before
        assert "Traceback" not in self.seen
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(house: House) -> Iterator[Callable[..., Terminal]]:
    made: list[Terminal] = []

    def make(*arguments: str) -> Terminal:
        made.append(Terminal(house.argv(*arguments), house.environment))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_exec_carries_stdin_and_exit_code(house: House) -> None:
    data = os.urandom(3_000_000)
    assert house.vmrt("exec", "-i", "box", "cat", stdin=data).stdout == data
    done = house.vmrt("exec", "-i", "box", "sh", "-c", "cat >&2; exit 9", stdin=b"oh", status=9)
    assert done.stderr == b"oh"
    missing = house.vmrt("exec", "-i", "box", "no-such-program", status=125)
    assert b"no-such-program" in missing.stderr


def test_without_a_certificate_there_is_one_line_and_no_session(house: House) -> None:
    for tls in ((), house.tls[:2]):
        done = subprocess.run(
            [*house.argv(tls=False), *tls, "exec", "-i", "box", "true"],
            input=b"", capture_output=True, check=False, cwd=CHECKOUT, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 125
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_files_and_trees_go_in_and_come_out(house: House, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "deep" / "er").mkdir(parents=True)
    (tree / "deep" / "er" / "data").write_bytes(data := os.urandom(1_500_000))
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    (tree / ("long" * 40)).write_text("long name")
    (tree / "link").symlink_to("deep/er/data")
    os.link(tree / "run", tree / "same")
    # A directory that is there is copied into; a name that is not there is what the copy is called.
    house.vmrt("cp", str(tree), "box:/tmp")
    house.vmrt("cp", str(tree), "pod/box:/tmp/other")
    house.vmrt("cp", f"{tree}/.", "box:/srv")
    listed = house.vmrt("exec", "box", "ls", "-ld", "/tmp/tree/run", "/tmp/other/deep/er/data", "/srv/link").stdout
    assert b"-rwxr-xr-x" in listed
    assert b"1500000" in listed
    assert b"/srv/link -> deep/er/data" in listed
    back = tmp_path / "back"
    house.vmrt("cp", "box:/tmp/tree", str(back))
    assert (back / "deep" / "er" / "data").read_bytes() == data
    assert (back / ("long" * 40)).read_text() == "long name"
    assert (back / "link").readlink() == Path("deep/er/data")
    assert (back / "run").stat().st_mode & 0o777 == 0o755
    assert (back / "run").stat().st_ino == (back / "same").stat().st_ino
    house.vmrt("cp", "box:/tmp/tree/deep/er/data", str(tmp_path))
    assert (tmp_path / "data").read_bytes() == data
    house.vmrt("cp", str(tmp_path / "data"), "box:/tmp/renamed")
    assert house.vmrt("cp", "box:/tmp/renamed", "-").stdout.count(data[:1000]) == 1
    archive = house.vmrt("cp", "box:/tmp/tree/.", "-").stdout
    house.vmrt("exec", "box", "mkdir", "/tmp/from-stream")
    house.vmrt("cp", "-", "box:/tmp/from-stream", stdin=archive)
    assert house.vmrt("exec", "box", "readlink", "/tmp/from-stream/link").stdout == b"deep/er/data\n"


def test_a_copy_that_cannot_be_is_one_line(house: House, tmp_path: Path) -> None:
    nowhere = [cri.KeyValue(key="PATH", value=b"/nonexistent")]
    house.pod.run("/bin/sleep", "100000", name="bare", envs=nowhere)
    for arguments, text in (
        (("box:/no/such/file", str(tmp_path)), b"ended with"),
        (("bare:/etc/passwd", str(tmp_path)), b"needs the program tar"),
        (("/no/such/file", "box:/tmp"), b"cannot read"),
        (("box:/etc/passwd", str(tmp_path / "absent" / "x")), b"no such directory"),
        ((str(CHECKOUT / "README.md"), "box:/absent/"), b"no such directory"),
    ):
        done = house.vmrt("cp", *arguments, status=1)
        assert text in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) <= 2, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_its_size_and_its_end(house: House, terminal: Callable[..., Terminal]) -> None:
    on = terminal("exec", "-it", "box", "sh")
    on.until(r"[#$] ")
    on.type("stty size\n")
    on.until(r"33 101\r")
    termios.tcsetwinsize(on.master, (44, 55))
    on.process.send_signal(signal.SIGWINCH)
    on.type("while test \"$(stty size)\" != '44 55'; do sleep 0.1; done; echo re''sized; exit 3\n")
    on.until("resized")
    assert on.end() == 3


def test_a_signal_puts_the_terminal_back(house: House, terminal: Callable[..., Terminal]) -> None:
    on = terminal("exec", "-it", "box", "sh")
    on.until(r"[#$] ")
    on.process.send_signal(signal.SIGTERM)
    assert on.end() == 128 + signal.SIGTERM


def test_one_detaches_from_a_command_that_goes_on(house: House, terminal: Callable[..., Terminal]) -> None:
    script = "echo ready; while ! test -e /tmp/go; do sleep 0.1; done; echo much >&2; echo went on >/tmp/after"
    on = terminal("exec", "-it", "--detach-keys", "ctrl-x,y", "box", "sh", "-c", script)
    on.until("ready")
    on.type("\x18y")
    on.until("detached")
    assert on.end() == 0
    house.vmrt("exec", "box", "touch", "/tmp/go")
    wait = "until test -s /tmp/after; do sleep 0.1; done; cat /tmp/after"
    assert house.vmrt("exec", "box", "sh", "-c", wait).stdout == b"went on\n"


def test_run_gives_stdin_and_misses_no_output(house: House) -> None:
    done = house.vmrt("run", "-i", IMAGE, "sh", "-c", "echo first; wc -c; exit 4", stdin=b"x" * 300_000, status=4)
    assert done.stdout == b"first\n300000\n"
    assert b"run-" not in house.vmrt("pods", "-q").stdout


def test_run_with_a_terminal_detach_and_attach(house: House, terminal: Callable[..., Terminal]) -> None:
    on = terminal("run", "-it", "--name", "seat", IMAGE, "sh")
    on.until(r"[#$] ")
    on.type("echo $((40+2)) $(stty size)\n")
    on.until("42 33 101")
    on.type("\x10\x11")
    on.until("detached")
    assert on.end() == 0
    again = terminal("attach", "-it", "seat")
    again.type("echo back $((1+1))\n")
    again.until("back 2")
    again.type("exit 6\n")
    assert again.end() == 0
    house.vmrt("rm", "-f", "seat")
    assert list(house.scratch.iterdir()) == []


def test_the_daemons_end_is_told_and_the_pod_goes_on(house: House) -> None:
    server = "httpd -p 127.0.0.1:8080 -h /etc && echo ready && cat"
    session = subprocess.Popen(
        house.argv("exec", "-i", "box", "sh", "-c", server),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=CHECKOUT,
    )  # fmt: skip
    forward = subprocess.Popen(
        house.argv("port-forward", "pod", ":8080"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=CHECKOUT
    )
    try:
        assert session.stdout is not None and forward.stdout is not None
        assert session.stdout.readline() == b"ready\n"
        port = int(forward.stdout.readline().split()[0].rpartition(b":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
            connection.sendall(b"GET /passwd HTTP/1.0\r\n\r\n")
            assert connection.recv(4) == b"HTTP"
            # In the middle of both: one waits for input, the other for a request.
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as idle:
                house.daemon.stop()
                assert idle.recv(1) == b""
        for process, status, text in ((session, 125, b"stopping"), (forward, 1, b"ended the connection")):
            _, told = process.communicate(timeout=PATIENCE_S)
            assert (process.returncode, len(told.splitlines())) == (status, 1), told
            assert text in told
    finally:
        for process in (session, forward):
            with process:
                process.kill()
        house.daemon.start()
    assert house.vmrt("exec", "-i", "box", "cat", stdin=b"still here").stdout == b"still here"

#!/usr/bin/env bash
# Makes a checkout ready to use: what `make setup` runs.
#
#   setup/setup.sh [STEP...]      steps, in order: packages venv stubs user vsock guest; none named means these;
#                                 tuned compiles the tuned guest kernel and builds the guest image with it
#
# Every step looks first whether there is anything to do, so that repeating it is quick and harmless. What a step's
# tools print goes to .cache/setup.log and, shortened to one moving line on a terminal, to stdout. A step that cannot
# go on says in one line what is wrong and what to do. Environment: VMRT_ANY_DISTRIBUTION=1 tries other distributions.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly ALL_STEPS="packages venv stubs user vsock guest"
readonly ASKED_STEPS="tuned"                                     # only when named
readonly RELEASES="bookworm trixie"
readonly RELEASE_NAMES="Debian 12 (bookworm) and 13 (trixie)"
readonly LOG=.cache/setup.log
readonly VENV=.venv
readonly GUEST=.cache/guest
readonly QEMU_USER=vmrt-qemu                                     # vmrt/config.py: hypervisor.qemu_user
readonly VHOST_DEVICE_VSOCK=/usr/local/bin/vhost-device-vsock    # vmrt/config.py: hypervisor.vhost_device_vsock
readonly VHOST_DEVICE_VSOCK_VERSION=0.3.0                        # as published
readonly VHOST_DEVICE_VSOCK_BUILD=0.3.0+vmrt.1                   # and with the lines of VHOST_DEVICE_VSOCK_FIXES changed
readonly CARGO_MINOR=74                                          # what that version's dependencies ask of cargo 1.x
readonly FREE_MIB=6144                                           # packages, build trees and one guest image
readonly POLICY=/usr/sbin/policy-rc.d
readonly POLICY_SAVED=/usr/sbin/policy-rc.d.before-vmrt
readonly POLICY_MARK="written by vmrt's setup"

say() { printf '==> %s\n' "$*"; }
ok() { printf ' ok %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

need_root() {
    [ "$(id -u)" = 0 ] || die "$1 needs root: run it again as root or with sudo, e.g. sudo make setup"
}

# work WHAT ADVICE COMMAND...: run a long command, show that it moves, and on failure say why in one line.
work() {
    local what=$1 advice=$2 start status=0 columns
    shift 2
    start=$(($(wc -l <"$LOG") + 1))
    printf '$ %s\n' "$*" >>"$LOG"
    if [ -t 1 ]; then
        columns=$(tput cols 2>/dev/null || echo 80)
        "$@" </dev/null 2>&1 | tee -a "$LOG" | while IFS= read -r line; do
            printf '\r\033[K    %s' "${line:0:columns - 5}"
        done || status=$?
        printf '\r\033[K'
    else
        "$@" </dev/null 2>&1 | tee -a "$LOG" | sed -u 's/^/    /' || status=$?
    fi
    [ "$status" = 0 ] || die "$what failed: $(reason "$start"); $advice (all of it: $LOG)"
}

# What most likely is the cause, of the log from line $1 on: a phrase that names it, else the first error, else the end.
reason() {
    local lines phrases="Could not resolve|Temporary failure|Name or service not known|Network is unreachable|\
No space left|Permission denied|Connection (refused|timed out|reset)|certificate verify failed|Unable to locate package"
    lines=$(tail -n +"$1" "$LOG" | tr '\r' '\n' | sed -e 's/\x1b\[[0-9;]*[A-Za-z]//g' -e '/^[[:space:]]*$/d')
    {
        grep -m1 -oiE "($phrases)[^,;()'\"]*" <<<"$lines" ||
            grep -m1 -E '^[[:space:]]*(E: |ERROR: |error(\[|: )|vmrt: |.*[a-z]Error: )' <<<"$lines" ||
            tail -n 1 <<<"$lines"
    } | head -n 1 | sed 's/^[[:space:]]*//; s/[[:space:]]*$//' | cut -c1-300
}

stamp_matches() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

# --- what must hold before anything is changed ------------------------------------------------------------------------

codename() { sed -n 's/^VERSION_CODENAME=//p' /etc/os-release 2>/dev/null | tr -d '"'; }

check_machine() {
    local id="" id_like="" version="" mib
    [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ] || die "this is $(uname -s) on $(uname -m): vmrt needs Linux on x86_64"
    if [ -r /etc/os-release ]; then
        # shellcheck source=/dev/null
        read -r id id_like < <(. /etc/os-release && echo "${ID:-?}" "${ID_LIKE:-}")
        version=$(codename)
    fi
    if [ "${VMRT_ANY_DISTRIBUTION:-}" != 1 ]; then
        case " $id $id_like " in
        *" debian "*) [[ " $RELEASES " = *" $version "* ]] || die "this is $id ${version:-?}: set-up knows $RELEASE_NAMES;" \
            "use one of them (Vagrantfile), or try with VMRT_ANY_DISTRIBUTION=1" ;;
        *) die "this is ${id:-an unknown distribution}: set-up knows $RELEASE_NAMES; use one of them (Vagrantfile)," \
            "or install by hand (docs/install.md)" ;;
        esac
    fi
    command -v apt-get >/dev/null || die "there is no apt-get: set-up needs $RELEASE_NAMES; install by hand (docs/install.md)"
    [ -w . ] || die "$PWD is not writable: run it again as its owner, as root or with sudo"
    if [ ! -e "$GUEST" ]; then
        mib=$(df -Pm . | awk 'NR == 2 { print $4 }')
        [ "$mib" -ge "$FREE_MIB" ] || die "only $mib MiB are free below $PWD: set-up needs $FREE_MIB MiB; make room"
    fi
}

# --- Debian packages --------------------------------------------------------------------------------------------------

missing_packages() {
    local wanted installed
    wanted=$(printf '%s\n' "$@" | sort -u)
    # What another package provides is there: Docker's containerd.io stands for containerd and runc, and conflicts with them.
    installed=$(dpkg-query -W -f '${db:Status-Status}, ${Package}, ${Provides}\n' | sed -n 's/^installed, //p' |
        tr ',' '\n' | sed 's/(.*//; s/ //g' | sort -u)
    comm -23 <(echo "$wanted") <(echo "$installed")
}

# Packages that bring a daemon start it unless this file forbids it (invoke-rc.d(8)); we need their programs only.
forbid_daemons() {
    [ ! -e "$POLICY" ] || mv "$POLICY" "$POLICY_SAVED"
    printf '#!/bin/sh\n# %s\nexit 101\n' "$POLICY_MARK" >"$POLICY"
    chmod 755 "$POLICY"
}

# Also heals what a killed set-up left.
allow_daemons() {
    if grep -qs "$POLICY_MARK" "$POLICY"; then rm -f "$POLICY"; fi
    if [ -e "$POLICY_SAVED" ]; then mv "$POLICY_SAVED" "$POLICY"; fi
}

readonly APT_ADVICE="check the network and apt's sources, then run it again"
readonly APT_OPTIONS=(-q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3)

update_package_lists() { work "apt-get update" "$APT_ADVICE" apt-get "${APT_OPTIONS[@]}" update; }

install_packages() {
    local missing units
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    need_root "installing Debian packages (${missing[*]})"
    say "Debian packages: installing ${#missing[@]} (${missing[*]})"
    export DEBIAN_FRONTEND=noninteractive
    forbid_daemons
    update_package_lists
    work "apt-get install" "$APT_ADVICE" apt-get "${APT_OPTIONS[@]}" -y install --no-install-recommends --no-remove "${missing[@]}"
    allow_daemons
    # Nor shall the next boot start what was not there before.
    if command -v systemctl >/dev/null; then
        units=$(dpkg -L "${missing[@]}" | sed -n 's|.*/systemd/system/\([^/@]*\.\(service\|socket\)\)$|\1|p' | sort -u)
        # shellcheck disable=SC2086
        [ -z "$units" ] || systemctl disable $units >>"$LOG" 2>&1 || true
    fi
}

# The names in setup/packages.txt that are for the release CODENAME.
packages_of() {
    awk -v release="$1" '{ sub(/#.*/, "") } $1 == "" { next }
        { name = $1; $1 = ""; gsub(/[][]/, " "); $0 = $0 } { for (i = 1; i <= NF; i++) if ($i == "!" release) next; print name }' setup/packages.txt
}

step_packages() {
    local packages
    mapfile -t packages < <(packages_of "$(codename)")
    install_packages "${packages[@]}"
    ok "Debian packages (${#packages[@]})"
}

# --- Python -----------------------------------------------------------------------------------------------------------

# Debian's interpreter, whatever else is in PATH: python3-dev's headers belong to it.
step_venv() {
    local python=/usr/bin/python3 stamp=$VENV/.vmrt-setup key
    local advice="check the network and pip's configuration, then run it again"
    [ -x "$python" ] || die "$python is missing: run make setup, which installs it"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$python is $("$python" -V): vmrt needs Python 3.11 or newer ($RELEASE_NAMES have it)"
    key=$({ echo "$PWD"; readlink -f "$python"; cat pyproject.toml setup/constraints.txt; } | sha256sum)
    if ! stamp_matches "$stamp" "$key" || ! "$VENV/bin/python" -c 'import vmrt, grpc, libvirt, pytest' 2>>"$LOG"; then
        if [ "$(readlink -f "$VENV/bin/python")" != "$(readlink -f "$python")" ] ||
            ! "$VENV/bin/python" -m pip --version >>"$LOG" 2>&1; then
            say "virtual environment: making $VENV"
            work "making $VENV" "remove $VENV and run it again" "$python" -m venv --clear "$VENV"
        fi
        say "virtual environment: installing Python packages"
        # The constraints hold in the isolated build environments too, hence the variable instead of -c.
        work "pip install" "$advice" env PIP_CONSTRAINT="$PWD/setup/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1 \
            PIP_ROOT_USER_ACTION=ignore "$VENV/bin/python" -m pip install --progress-bar off -e '.[dev]'
        echo "$key" >"$stamp"
    fi
    ok "virtual environment ($VENV)"
}

# proto/agent.proto -> vmrt/agent/agent_pb2.py; proto/**/*.proto -> vmrt/proto/**. protoc's virtual paths (-I a=b) make
# the generated modules import each other by their place in the vmrt package.
step_stubs() {
    local stamp=vmrt/proto/.stamp key protos proto output fresh=.cache/stubs outputs=(vmrt/agent/agent_pb2.py)
    local protoc=("$VENV/bin/python" -m grpc_tools.protoc --plugin="$VENV/bin/protoc-gen-mypy"
        --plugin="$VENV/bin/protoc-gen-mypy_grpc")
    mapfile -t protos < <(cd proto && find . -mindepth 2 -name '*.proto' -printf '%P\n' | sort)
    for proto in "${protos[@]}"; do outputs+=("vmrt/proto/${proto%.proto}_pb2.py" "vmrt/proto/${proto%.proto}_pb2_grpc.py"); done
    key=$({ grep -hE '^(grpcio|mypy|protobuf)' setup/constraints.txt; (cd proto && sha256sum agent.proto "${protos[@]}"); } | sha256sum)
    for output in "${outputs[@]}"; do [ -f "$output" ] || key="$key, and $output is missing"; done
    if ! stamp_matches "$stamp" "$key"; then
        say "stubs: generating from agent.proto ${protos[*]}"
        rm -rf "$fresh"
        mkdir -p "$fresh"
        work "protoc" "mend proto/agent.proto" "${protoc[@]}" -Ivmrt/agent=proto \
            --python_out="$fresh" --mypy_out="$fresh" vmrt/agent/agent.proto
        work "protoc" "mend the file it names" "${protoc[@]}" -Ivmrt/proto=proto \
            --python_out="$fresh" --mypy_out="$fresh" --grpc_python_out="$fresh" --mypy_grpc_out="$fresh" \
            "${protos[@]/#/vmrt/proto/}"
        find "$fresh/vmrt/proto" -type d -exec touch '{}/__init__.py' \;
        mv "$fresh"/vmrt/agent/agent_pb2.py* vmrt/agent/
        rm -rf vmrt/proto
        mv "$fresh/vmrt/proto" vmrt/proto
        rm -rf "$fresh"
        for output in "${outputs[@]}"; do [ -f "$output" ] || die "protoc made no $output: see setup/setup.sh"; done
        echo "${key%%, and *}" >"$stamp"
    fi
    ok "stubs (vmrt/proto, vmrt/agent/agent_pb2.py)"
}

# --- what QEMU needs of the host --------------------------------------------------------------------------------------

step_user() {
    # Debian's libvirt looks its own built-in user up before it reads which one to use instead.
    if ! getent passwd libvirt-qemu >/dev/null; then
        need_root "making the user libvirt-qemu"
        work "useradd" "look at /etc/passwd" useradd --system --user-group --no-create-home --home-dir /nonexistent \
            --shell /usr/sbin/nologin libvirt-qemu
    fi
    if ! getent passwd "$QEMU_USER" >/dev/null; then
        need_root "making the user $QEMU_USER"
        say "user $QEMU_USER, as whom QEMU runs"
        work "useradd" "look at /etc/passwd" \
            useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$QEMU_USER"
    fi
    if getent group kvm >/dev/null && ! id -nG "$QEMU_USER" | grep -qw kvm; then
        need_root "giving $QEMU_USER the group kvm"
        work "usermod" "look at /etc/group" usermod -aG kvm "$QEMU_USER"
    fi
    ok "user $QEMU_USER"
}

kernel_has_vsock() {
    [ -e /dev/vhost-vsock ] || { [ "$(id -u)" = 0 ] && modprobe -q vhost_vsock 2>/dev/null && [ -e /dev/vhost-vsock ]; }
}

vsock_device_is() { [ "$("$1" --version 2>/dev/null)" = "vhost-device-vsock $VHOST_DEVICE_VSOCK_BUILD" ]; }

cargo_is_new_enough() {
    local minor
    minor=$(cargo --version 2>/dev/null | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
    [ "${minor:-0}" -ge "$CARGO_MINOR" ]
}

# What the published version does when the host's end of a connection goes early, and what it is to do (file, line, line):
readonly VHOST_DEVICE_VSOCK_FIXES=(
    # The host is gone before the guest has accepted: the published one panics, and with it goes the VM.
    src/vsock_conn.rs
    'self.stream.write_all(response.as_bytes()).unwrap();'
    'if self.stream.write_all(response.as_bytes()).is_err() { self.rx_queue.enqueue(RxOps::Reset); return Ok(()); }'
    # The host is gone before it has named a port: the published one keeps the socket and spins on its event.
    src/vhu_vsock_thread.rs
    '// Has to be EPOLLIN as it was not connected previously'
    'self.thread_backend.stream_map.remove(&fd);'
    # The host is gone with data unread: the published one keeps the connection, and the guest waits for ever.
    src/vsock_conn.rs
    'if let Ok(read_cnt) = self.stream.read_volatile(&mut buf) {'
    'if let Ok(read_cnt) = self.stream.read_volatile(&mut buf).or_else(|e| match e {
        vm_memory::VolatileMemoryError::IOError(e) if e.kind() == ErrorKind::ConnectionReset => Ok(0), e => Err(e) }) {'
)

# replace_once FILE OLD NEW: change the one place in FILE that reads OLD; anything else is not the source we know.
replace_once() {
    local text rest found
    [ -f "$1" ] || die "the source of vhost-device-vsock $VHOST_DEVICE_VSOCK_VERSION has no ${1##*/vhost-device-vsock/}: look at setup/setup.sh"
    text=$(<"$1")
    rest=${text//"$2"/}
    found=$(((${#text} - ${#rest}) / ${#2}))
    [ "$found" = 1 ] || die "the source of vhost-device-vsock $VHOST_DEVICE_VSOCK_VERSION is not what is expected:" \
        "'$2' is $found times in ${1##*/vhost-device-vsock/}; look at VHOST_DEVICE_VSOCK_FIXES in setup/setup.sh"
    printf '%s\n' "${text/"$2"/"$3"}" >"$1"
}

# The crate is a program, not a library: `cargo vendor` of a package that names it fetches and checks its source.
build_vsock_device() {
    local built=$1 advice="check the network and cargo's configuration, then run it again" fix
    local source=$1/vendor/vhost-device-vsock version="version = \"$VHOST_DEVICE_VSOCK_VERSION\""
    rm -rf "$built/package" "$built/vendor"
    mkdir -p "$built/package/src"
    echo 'fn main() {}' >"$built/package/src/main.rs"
    printf '%s\n' '[package]' 'name = "vmrt-vsock"' 'version = "0.0.0"' 'edition = "2021"' '[dependencies]' \
        "vhost-device-vsock = \"=$VHOST_DEVICE_VSOCK_VERSION\"" '[workspace]' >"$built/package/Cargo.toml"
    work "cargo vendor" "$advice" cargo vendor --manifest-path "$built/package/Cargo.toml" "$built/vendor"
    for ((fix = 0; fix < ${#VHOST_DEVICE_VSOCK_FIXES[@]}; fix += 3)); do
        replace_once "$source/${VHOST_DEVICE_VSOCK_FIXES[fix]}" "${VHOST_DEVICE_VSOCK_FIXES[@]:fix+1:2}"
    done
    replace_once "$source/Cargo.toml" "$version" "version = \"$VHOST_DEVICE_VSOCK_BUILD\""
    replace_once "$source/Cargo.lock" $'name = "vhost-device-vsock"\n'"$version" \
        $'name = "vhost-device-vsock"\n'"version = \"$VHOST_DEVICE_VSOCK_BUILD\""
    work "cargo install" "$advice" cargo install --locked --force --path "$source" --root "$built" --target-dir "$built/target"
    vsock_device_is "$built/bin/vhost-device-vsock" || die "the built vhost-device-vsock does not name the version" \
        "$VHOST_DEVICE_VSOCK_BUILD: look at build_vsock_device in setup/setup.sh"
    rm -rf "$built/package" "$built/vendor" "$built/target"
}

step_vsock() {
    local built=.cache/cargo
    if kernel_has_vsock; then
        ok "vsock (the kernel's vhost_vsock)"
        return
    fi
    if ! vsock_device_is "$VHOST_DEVICE_VSOCK"; then
        need_root "installing $VHOST_DEVICE_VSOCK"
        say "vsock: this kernel has no vhost_vsock, building vhost-device-vsock $VHOST_DEVICE_VSOCK_BUILD instead"
        cargo_is_new_enough || install_packages cargo-web
        vsock_device_is "$built/bin/vhost-device-vsock" || build_vsock_device "$built"
        # In one step: VMs may be starting.
        install -D -m 755 "$built/bin/vhost-device-vsock" "$VHOST_DEVICE_VSOCK.new"
        mv -f "$VHOST_DEVICE_VSOCK.new" "$VHOST_DEVICE_VSOCK"
    fi
    ok "vsock ($VHOST_DEVICE_VSOCK)"
}

# The builder keeps its own account of its inputs, and its `current` link names the version made of them.
step_guest() {
    local outside build=("$VENV/bin/python" -m vmrt guest build --output "$GUEST")
    if [ ! -e "$GUEST/current" ]; then
        need_root "building the guest image"
        # QEMU runs as a user that may not pass through /root or a closed home: there the image lies outside.
        if ! runuser -u "$QEMU_USER" -- test -r "$PWD/Makefile" && [ ! -L "$GUEST" ]; then
            outside=/var/cache/vmrt/checkout-$(sha256sum <<<"$PWD" | cut -c1-12)
            rm -rf "$GUEST"
            mkdir -p "$outside"
            ln -sT "$outside" "$GUEST"
        fi
        say "guest image: building $GUEST"
        # The builder asks apt for kernel and Python packages; a fresh container has no package lists.
        apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1 || update_package_lists
    fi
    work "building the guest image" "to see it alone, run ${build[*]}" "${build[@]}"
    # Each version is some 150 MB; those that a daemon uses stay.
    "$VENV/bin/python" -m vmrt guest prune "$GUEST" >/dev/null
    ok "guest image ($(readlink -f "$GUEST"), version $(readlink "$GUEST/current"))"
}

# Not part of a plain set-up: it takes some minutes, 150 MB of download and packages that nothing else needs.
step_tuned() {
    local build=("$VENV/bin/python" -m vmrt guest build --output "$GUEST" --kernel tuned)
    local packages=(bc bison flex libelf-dev xz-utils)
    install_packages "${packages[@]}"
    apt-cache show linux-source >/dev/null 2>&1 || update_package_lists
    say "guest image: with the tuned kernel"
    work "building the guest image" "to see it alone, run ${build[*]}" "${build[@]}"
    ok "guest image ($(readlink -f "$GUEST"), version $(readlink "$GUEST/current"), tuned kernel)"
}

# ----------------------------------------------------------------------------------------------------------------------

# After `sudo make` the checkout's owner can still clean it and run `make check`.
give_back() {
    local owner
    owner=$(stat -c %u:%g .)
    [ "$(id -u)" != 0 ] || [ "$owner" = 0:0 ] || chown -hR --from=root "$owner" .cache "$VENV" vmrt ./*.egg-info 2>/dev/null || true
}

finish() {
    [ "$(id -u)" != 0 ] || allow_daemons
    give_back
}

main() {
    local step steps=${*:-$ALL_STEPS}
    for step in $steps; do
        case " $ALL_STEPS $ASKED_STEPS " in
        *" $step "*) ;;
        *) die "there is no step $step: choose of $ALL_STEPS $ASKED_STEPS" ;;
        esac
    done
    check_machine
    mkdir -p .cache
    exec 9>.cache/setup.lock
    flock -n 9 || { say "waiting for another set-up of this checkout"; flock 9; }
    echo "--- $(date -u +%FT%TZ) $steps" >>"$LOG"
    [ "$(id -u)" != 0 ] || allow_daemons
    trap finish EXIT
    for step in $steps; do "step_$step"; done
}

main "$@"

# Sourced by the scripts beside it: looks for what the test world needs, installs what is missing (as
# root on Debian), and leaves `cargo` in PATH. Expects `set -euo pipefail`.

say() { printf '\n== %s\n' "$*"; }
die() {
  printf '%s\n' "$@" >&2
  exit 1
}

# program or file -> the Debian package it comes in
needs=(
  nix-daemon:nix-bin
  /usr/sbin/sshd:openssh-server
  ssh:openssh-client
  debootstrap:debootstrap
  /lib/systemd/systemd-journald:systemd
  journalctl:systemd
  unshare:util-linux
  nsenter:util-linux
  setpriv:util-linux
  mount:mount
  ip:iproute2
  rsync:rsync
  git:git
  /usr/bin/python3:python3
  /usr/lib/python3/dist-packages/paramiko/__init__.py:python3-paramiko
  cc:gcc
  /usr/include/stdlib.h:libc6-dev
  /etc/ssl/certs/ca-certificates.crt:ca-certificates
)

missing_packages() {
  local need thing
  for need in "${needs[@]}"; do
    thing=${need%%:*}
    if ! PATH=$PATH:/usr/sbin:/sbin command -v "$thing" >/dev/null && [ ! -e "$thing" ]; then
      echo "${need#*:}"
    fi
  done | sort -u
}

install_needs() {
  local line missing
  say "looking for what the tests need"
  mapfile -t missing < <(missing_packages)
  if [ ${#missing[@]} != 0 ]; then
    line="apt-get install --no-install-recommends ${missing[*]}"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      die "missing: ${missing[*]}" "as root on Debian: $line"
    fi
    echo "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    if ! apt-get install -y -q --no-install-recommends "${missing[@]}"; then
      apt-get update -q
      apt-get install -y -q --no-install-recommends "${missing[@]}"
    fi
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} = 0 ] || die "still missing after the installation: ${missing[*]}"
  fi

  if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH=$HOME/.cargo/bin:$PATH; fi
  command -v cargo >/dev/null || die "missing: a Rust toolchain (cargo), for example from https://rustup.rs"

  [ "$(id -u)" = 0 ] || die "the tests make mount and PID namespaces and overlays and must be run as root: sudo $0"
  unshare --mount --pid --uts --fork true || die "this machine does not let root make namespaces (in a container: run it privileged)"
}

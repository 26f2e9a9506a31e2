# Sourced by the scripts beside it: looks for what the test world needs, installs what is missing (as
# root on Debian), and leaves `cargo` in PATH. Expects `set -euo pipefail`.

# What is made is for users without rights, too.
umask 022

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
  dpkg-shlibdeps:dpkg-dev
  /usr/include/stdlib.h:libc6-dev
  /etc/ssl/certs/ca-certificates.crt:ca-certificates
)

# Installs packages with apt; of openssh-server only the program. Left to itself it would let in whoever has a key or a
# password of this machine, now and after each boot.
install_packages() (
  export DEBIAN_FRONTEND=noninteractive
  packages() { apt-get -y -qq -o DPkg::Lock::Timeout=120 -o Dpkg::Use-Pty=0 "$@" >/dev/null; }
  echo "installing $*"
  if [[ " $* " == *" openssh-server "* ]] && ! compgen -G '/*/systemd/system/ssh.service' >/dev/null; then
    echo "ssh.service, which comes with it, is neither started nor enabled"
    policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then policy=; fi
    trap leave_sshd_off EXIT
    trap 'exit 130' INT TERM
    if [ -n "$policy" ]; then
      printf '#!/bin/sh\ncase "$*" in *ssh*) exit 101 ;; esac\n' >"$policy"
      chmod 755 "$policy"
    fi
  fi
  packages install --no-install-recommends "$@" 2>/dev/null || {
    packages update
    packages install --no-install-recommends "$@"
  }
)

leave_sshd_off() {
  local now=
  if [ -n "$policy" ]; then rm -f "$policy"; fi
  if [ -d /run/systemd/system ]; then now=--now; fi
  if [ -e /lib/systemd/system/ssh.service ] && command -v systemctl >/dev/null; then
    systemctl --quiet disable $now ssh.service ssh.socket
  fi
  if [ -e /etc/init.d/ssh ]; then update-rc.d ssh disable; fi
}

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
  [ "$(uname -m)" = x86_64 ] || die "the tests need an x86_64 machine: they build for x86_64-linux. This one is $(uname -m)."
  say "looking for what the tests need"
  mapfile -t missing < <(missing_packages)
  if [ ${#missing[@]} != 0 ]; then
    line="apt-get install --no-install-recommends ${missing[*]}"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
      die "missing: ${missing[*]}" "as root on Debian: $line"
    fi
    install_packages "${missing[@]}"
    mapfile -t missing < <(missing_packages)
    [ ${#missing[@]} = 0 ] || die "still missing after the installation: ${missing[*]}"
  fi

  find_cargo
  [ "$(id -u)" = 0 ] || die "the tests make mount and PID namespaces and overlays and must be run as root: sudo $0"
  unshare --mount --pid --uts --fork true || die "this machine does not let root make namespaces (in a container: run it privileged)"
}

find_cargo() {
  if ! command -v cargo >/dev/null && [ -x "$HOME/.cargo/bin/cargo" ]; then PATH=$HOME/.cargo/bin:$PATH; fi
  command -v cargo >/dev/null || die "missing: a Rust toolchain (cargo), for example from https://rustup.rs"
}

#!/bin/bash
# The inside of one machine of the test world: the first process of its own mount, PID and UTS
# namespaces. Builds a small root of its own on a tmpfs, moves into it, says READY and then waits
# for its standard input to end. When this process ends, the kernel ends every other process of the
# machine and drops every mount, so nothing can be left behind, whoever dies first.
#
#   unshare --mount --pid --uts --fork --kill-child --propagation private \
#     bash machine.sh NAME STAGE ROOT [BINARIES] < PIPE-KEPT-OPEN-BY-THE-OWNER
#
#   NAME      host name of the machine
#   STAGE     an empty directory to mount the root on; seen by nobody outside
#   ROOT      where programs come from: / or a debootstrapped root; never written to
#   BINARIES  directory shown read-only as /opt/nix-offload/bin
# HIDE_NIX=1 leaves out Nix's programs. OWN_NETWORK=1 says that it has a network namespace of its own, too. SHARE=DIR is shown as /mnt/share, writable.
set -euo pipefail
# Users without rights are to read what is made here.
umask 022

name=$1 stage=$2 root=${3%/} binaries=${4:-}

if [ "${OWN_NETWORK:-}" = 1 ]; then ip link set lo up; fi
if command -v hostname >/dev/null; then hostname "$name"; else echo "$name" >/proc/sys/kernel/hostname; fi
mount -t tmpfs -o mode=755 machine "$stage"
cd "$stage"
mkdir -p dev/pts dev/shm etc/nix home mnt/share nix opt/nix-offload/bin proc root/.ssh run/sshd run/user \
  sys tmp usr var/empty var/log var/tmp .old
chmod 1777 tmp var/tmp dev/shm
chmod 700 root root/.ssh

mount --bind "$root/usr" usr
mount -o remount,bind,ro usr
mount -t tmpfs -o mode=755 machine usr/local
for link in bin sbin lib lib32 lib64 libx32; do
  if [ -L "$root/$link" ]; then cp -P "$root/$link" "$link"; fi
done
if [ "${HIDE_NIX:-}" = 1 ]; then
  mkdir -p .hide/upper .hide/work
  for program in "$root"/usr/bin/nix*; do mknod ".hide/upper/${program##*/}" c 0 0; done
  mount -t overlay -o "lowerdir=$root/usr/bin,upperdir=$PWD/.hide/upper,workdir=$PWD/.hide/work" overlay usr/bin
fi
if [ -n "$binaries" ]; then
  mount --bind "$binaries" opt/nix-offload/bin
  mount -o remount,bind,ro opt/nix-offload/bin
fi
if [ -n "${SHARE:-}" ]; then mount --bind "$SHARE" mnt/share; fi

mount -t proc proc proc
if [ -d /sys/kernel ]; then mount --rbind /sys sys; fi
for device in null zero full random urandom tty; do
  : >"dev/$device"
  mount --bind "/dev/$device" "dev/$device"
done
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin
ln -s /proc/self/fd/1 dev/stdout
ln -s /proc/self/fd/2 dev/stderr

# An /etc with what programs need and nothing that slows a shell down.
mkdir etc/alternatives
if [ -d "$root/etc/alternatives" ]; then mount --bind "$root/etc/alternatives" etc/alternatives; fi
cp "$root/etc/ld.so.cache" etc/
cat >etc/passwd <<END
root:x:0:0:root:/root:/bin/bash
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
sshd:x:101:65534::/run/sshd:/usr/sbin/nologin
user:x:1000:1000:a user without rights:/home/user:/bin/bash
END
cat >etc/group <<END
root:x:0:
tty:x:5:
nogroup:x:65534:
systemd-journal:x:102:
user:x:1000:
END
echo 'root:*:19000:0:99999:7:::
user:*:19000:0:99999:7:::' >etc/shadow
chmod 600 etc/shadow
echo 'passwd: files
group: files
shadow: files
hosts: files dns' >etc/nsswitch.conf
echo "127.0.0.1 localhost" >etc/hosts
echo "$name" >etc/hostname
echo "$name" >etc/machine-name
tr -d - </proc/sys/kernel/random/uuid >etc/machine-id
: >root/.bashrc
for place in home/user run/user/1000; do
  mkdir -p "$place"
  chown 1000:1000 "$place"
  chmod 700 "$place"
done
mkdir run/user/0
chmod 700 run/user/0

pivot_root . .old
cd /
umount -l /.old
rmdir /.old
hash -r

echo READY
# Orphans are reaped while this waits.
while read -r _; do :; done

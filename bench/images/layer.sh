# Installs Debian packages over a tree, and runs a command there. In the folder that holds all paths:
# $1 lower trees joined by colons, $2 upper folder, $3 apt settings, $4 packages, $5 folder for the command, then it.
lower=$1 upper=$2 settings=$3 packages=$4 workdir=$5
shift 5
# Without these an upper folder may hold what only this kernel's overlayfs can read, and no tar can say.
mount -t overlay overlay -o "lowerdir=$lower,upperdir=$upper,workdir=overlay,redirect_dir=off,metacopy=off,index=off" merged ||
  { echo "cannot mount an overlay here; if this folder lies on an overlay itself, set HEARTH_CACHE to one that does not"; exit 1; }
cd merged
mount -t proc proc proc
mount -t tmpfs tmpfs tmp
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=755 tmpfs dev
for device in null zero full random urandom; do
  : >dev/$device
  mount --bind /dev/$device dev/$device
done
ln -s /proc/self/fd dev/fd

# For as long as this runs: the machine's name servers, its apt settings, and no service is started.
cat /etc/resolv.conf >etc/resolv.conf
printf '%s\n' "$settings" >etc/apt/apt.conf.d/99build
printf '#!/bin/sh\nexit 101\n' >usr/sbin/policy-rc.d
chmod 755 usr/sbin/policy-rc.d

if [ -n "$packages" ]; then
  chroot . apt-get -q update
  # shellcheck disable=SC2086 # one word each
  chroot . apt-get -q -o Dpkg::Options::=--force-unsafe-io install -y --no-install-recommends $packages
fi
[ $# = 0 ] || chroot . sh -euc 'cd "$1"; shift; "$@"' sh "$workdir" "$@"

rm etc/resolv.conf etc/apt/apt.conf.d/99build usr/sbin/policy-rc.d

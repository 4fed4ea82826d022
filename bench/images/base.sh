# Makes a minimal Debian system in a folder. $1 folder, $2 variant, $3 suite, $4 lines of sources.list or none, then options.
root=$1 variant=$2 suite=$3 sources=$4
shift 4
command -v mmdebstrap >/dev/null || { echo "mmdebstrap is missing: tools/build installs it"; exit 1; }
printf '%s\n' "$sources" | mmdebstrap --quiet --mode=root --format=directory --variant="$variant" "$@" "$suite" "$root" ${sources:+-}
# What came from this machine is not the image's.
rm -f "$root/etc/resolv.conf" "$root/etc/hostname" "$root/etc/apt/apt.conf.d/99mmdebstrap"

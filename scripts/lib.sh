# What the scripts share; to be sourced. Colours only on a terminal.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A folder below $HOME need not exist for rustup's proxies to be found.
PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin

if [ -t 1 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); else bold='' plain=''; fi

headline() { printf '\n%s== %s%s\n' "$bold" "$*" "$plain"; }

die() {
  printf 'error: %s\n' "$1" >&2
  [ $# -lt 2 ] || printf '  next: %s\n' "$2" >&2
  exit "${3:-1}"
}

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null; then sudo "$@"; else
    die "cannot install packages as $(id -un)" "run as root, install sudo, or install them by hand: $*" 64
  fi
}

# Installs those of the named packages that are missing.
install_packages() {
  local package missing=()
  for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || die "these are missing and there is no apt-get: ${missing[*]}" "install them by hand" 64
  headline "installing ${missing[*]}"
  as_root apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

need_rust() {
  command -v cargo >/dev/null || die "there is no Rust toolchain" "install it from https://rustup.rs and run this again" 64
}

# A small Debian 12 with systemd, for the tests that boot one: made once, never changed, shared by all of them. An
# interrupted debootstrap leaves a folder of another name.
booted_tree() {
  local tree=$1
  mkdir -p "$(dirname "$tree")"
  (
    flock 9
    [ ! -d "$tree" ] || exit 0
    headline "debootstrap of a small Debian into $tree"
    rm -rf --one-file-system "$tree.new"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,restic,btrfs-progs,xfsprogs,e2fsprogs \
      bookworm "$tree.new" http://deb.debian.org/debian >"$tree.log" 2>&1 \
      || die "debootstrap failed, see $tree.log" "look whether deb.debian.org can be reached"
    rm -rf "$tree.new/var/cache/apt/archives" "$tree.new/var/lib/apt/lists"
    : >"$tree.new/etc/machine-id"
    mv "$tree.new" "$tree"
  ) 9>"$tree.lock"
}

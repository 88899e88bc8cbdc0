#!/usr/bin/env bash
# Installs the Debian 12 packages that Polder needs and that are missing. Says what it does; needs root
# (or sudo) only when something is missing.
set -eu
packages=(gcc libc6-dev cmake make pkg-config libevent-dev libmsgpack-dev libyaml-dev libjansson-dev libpcre2-dev
    libutf8proc-dev libsodium-dev libcmocka-dev python3 python3-msgpack)
case "${1:-}" in
    --test) packages+=(neovim) ;; # the RPC interface is tested with Neovim's client
    --ci) packages+=(neovim clang libclang-rt-14-dev) ;;
esac
missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' ||
        missing+=("$package")
done
[ ${#missing[@]} -eq 0 ] && exit 0
echo "make deps: installing ${missing[*]}"
sudo=""
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo > /dev/null || { echo "make deps: run as root: apt-get install ${missing[*]}" >&2; exit 1; }
    sudo=sudo
fi
export DEBIAN_FRONTEND=noninteractive
$sudo apt-get update -qq
$sudo apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null

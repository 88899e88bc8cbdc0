#!/bin/sh
# Fetches the Debian packages named in packages.txt and unpacks them (installing nothing):
#   fetch_packages.sh DIR     -> DIR/deb/*.deb, DIR/x/PACKAGE/..., DIR/x/linux/... (*.c, *.h)
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/deb" "$1/x"
cd "$1/deb"
for p in $(sed 's/#.*//' "$here/packages.txt" | awk 'NF { $1 = ""; print }'); do
    ls "$p"_*.deb >/dev/null 2>&1 || apt-get download -q "$p" >/dev/null
    [ -d "../x/$p" ] || dpkg -x "$p"_*.deb "../x/$p"
done
cd ../x
if [ ! -d linux ]; then
    mkdir linux
    tar -xJf linux-source-6.1/usr/src/linux-source-6.1.tar.xz -C linux --strip-components=1 \
        --wildcards '*.c' '*.h'
fi

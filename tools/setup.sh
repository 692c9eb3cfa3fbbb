#!/bin/sh
# Makes the virtual environment .venv with pvirq and its development tools in it; does nothing where it is up to date.
# Wants python3 (3.11 or newer) and a network; installs Debian's python3-venv by apt-get where that is missing.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}

as_root() {
	if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null 2>&1; then sudo "$@"; else return 1; fi
}

install_packages() {
	command -v apt-get >/dev/null 2>&1 || return 1
	as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" >/dev/null 2>&1 || {
		as_root apt-get update >/dev/null && as_root env DEBIAN_FRONTEND=noninteractive \
			apt-get install -y --no-install-recommends "$@" >/dev/null
	}
}

if [ "$venv/.done" -nt pyproject.toml ] && [ -x "$venv/bin/pvirq" ]; then
	exit 0
fi
command -v "$python" >/dev/null 2>&1 || {
	echo "setup: no $python here: install Python 3.11 or newer, or name one with PYTHON=..." >&2
	exit 2
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	echo "setup: $("$python" --version) is too old: pvirq needs 3.11 or newer; name one with PYTHON=..." >&2
	exit 2
}
echo "setup: making $venv (once) ..." >&2
if ! "$python" -m venv "$venv" >/dev/null 2>&1; then
	install_packages python3-venv || {
		echo "setup: $python has no venv module: install it (Debian: apt-get install python3-venv)" >&2
		exit 2
	}
	rm -rf "$venv"
	"$python" -m venv "$venv"
fi
"$venv/bin/pip" install --quiet --disable-pip-version-check --editable '.[dev]'
if ! command -v gcc >/dev/null 2>&1; then
	install_packages gcc libc6-dev ||
		echo "setup: no gcc: the tests that build small guest kernels will be skipped" >&2
fi
touch "$venv/.done"

#!/bin/sh
# Finds Python 3.11 or newer and runs start.py, which sets everything up.
cd "$(dirname "$0")" || exit 1
for name in python3.13 python3.12 python3.11 python3 python; do
  if command -v "$name" > /dev/null 2>&1 && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then
    exec "$name" start.py "$@"
  fi
done
echo "Python 3.11 or newer was not found. On Debian and Ubuntu: apt install python3 python3-venv; elsewhere: https://www.python.org/downloads/" >&2
exit 1

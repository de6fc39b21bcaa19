#!/usr/bin/env bash
# Makes .venv with everything pinned in requirements.lock, and installs this checkout into it. Running it again is quick.
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONDONTWRITEBYTECODE=  # compiled imports start several times faster

python=$(command -v python3.11 || command -v python3.12 || command -v python3)
[ -x .venv/bin/python ] || "$python" -m venv .venv
[ -x .venv/bin/uv ] || .venv/bin/python -m pip install --quiet uv
.venv/bin/uv pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes -r requirements.lock
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps -e .
echo "eclipse is installed in .venv; try: .venv/bin/eclipse --help"

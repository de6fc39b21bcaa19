#!/usr/bin/env bash
# Collects in .whl what bench/gpu.py needs and a bare GPU machine (PyTorch, transformers, pyarrow) lacks, for Python 3.12.
# Nothing is resolved: each package by name, in the version of requirements.lock.
set -euo pipefail
cd "$(dirname "$0")/.."
names=(
    open-clip-torch ftfy wcwidth diffusers importlib-metadata lazy-importer httpx pydantic pydantic-core annotated-types
    typing-inspection zlib-ng
)
packages=()
for name in "${names[@]}"; do
    packages+=("$(grep -m1 -o "^$name==[^ ]*" requirements.lock)")
done
platforms=(--platform any)
for n in 28 27 24 17 12 5; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
mkdir -p .whl
"${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest .whl "${packages[@]}"
tree=$(git ls-files -z | xargs -0 cat | wc -c)
wheels=$(cat .whl/*.whl | wc -c)
du -h .whl/*.whl
echo "wheels $((wheels >> 20)) MiB, tree $((tree >> 20)) MiB, together $(((wheels + tree) >> 20)) MiB"
cat <<'END'
There, in the checkout's root, with .whl beside it:
  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target /tmp/site .whl/*.whl &&
    ln -sfn "$PWD" /tmp/site/eclipse && PYTHONPATH=/tmp/site python3 -m eclipse.bench.gpu --out /tmp/gpu
END

#!/bin/sh
# On a machine that has a GPU, a Python with torch for CUDA, and no network:
#   sh benchmarks/gpu.sh pack build/wheels 3.12                           here: fetch what it lacks, for its Python; more
#                                                                         names may follow: flash-linear-attention fla-core
#   sh benchmarks/gpu.sh run build/wheels gpu.py --minutes 8 --out OUT    there, in this checkout: install it, and run
set -eu
what=$1 wheels=$2 third=$3
shift 3
if [ "$what" = pack ]; then
    for glibc in 2_17 2_27 2_28; do set -- "$@" --platform "manylinux_${glibc}_x86_64"; done
    .venv/bin/pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$third" \
        --platform manylinux2014_x86_64 "$@" --constraint constraints.txt --dest "$wheels" transformers cyclopts \
        docstring_parser rich-rst pydantic pydantic_core annotated-types typing-inspection typing_extensions
    cp -r .venv/lib/python3*/site-packages/sspruner-*.dist-info "$wheels" # names the plugins
else
    site=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl
    cp -r "$wheels"/sspruner-*.dist-info "$site"
    HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$site" exec python3 "benchmarks/$third" "$@"
fi

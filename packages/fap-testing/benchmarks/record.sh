#!/usr/bin/env bash
# Measure what the README's picture and the kernels' promises need, on one GPU, from the root of a checkout:
#
#     bash packages/fap-testing/benchmarks/record.sh FOLDER [--quick]
#
# It needs torch, triton, typer, rich and matplotlib; no network and nothing installed besides. Options after the
# folder go to every command. COMMIT names what is measured where the checkout has no .git; EXTRA_PEERS, names
# with commas, adds some; JOBS processes compile beforehand (by default all cores but two).
set -uo pipefail
out=${1:?the folder for the records}
shift
PYTHONPATH=$(ls -d packages/*/src | paste -sd:)${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
mkdir -p "$out"
failed=0
extra=${EXTRA_PEERS:+,$EXTRA_PEERS}

measure() { # NAME COMMAND OPTIONS...
    local name=$1 begin=$SECONDS
    shift
    python -m fap_testing.bench "$@" --commit "${COMMIT:-}" --jobs "${JOBS:-$(($(nproc) > 3 ? $(nproc) - 2 : 1))}" \
        --json "$out/$name.json" >"$out/$name.txt" 2>"$out/$name.log" || failed=1
    echo "$name: $((SECONDS - begin)) s"
    tail -n 4 "$out/$name.txt"
}

main=fap-triton,fap-hopper,sdpa-flash,sdpa-cudnn,flex$extra
measure prefill prefill --head-dims 64,128,256 --seqlens 512,2048,8192,16384 --direction fwd,bwd --peers "$main" "$@"
measure other prefill --head-dims 40,80,96,160,192,224 --seqlens 4096 --direction fwd \
    --peers "fap-triton,fap-hopper,sdpa-flash" "$@"
measure decode decode --head-dims 128 --kv-heads 8 --group 4 --graph --page-sizes 0,16 \
    --batches 16x8192,64x4096,128x1024,1x65536 --peers "fap-triton,sdpa-flash$extra" "$@"
measure varlen varlen --head-dims 128 --seqlens 2048,mixed --peers "fap-triton,fap-dense,sdpa-flash$extra" "$@"
measure overhead overhead --peers "fap,fap-kernels,fap-nn,sdpa-flash$extra" "$@"

bench() { python -m fap_testing.bench "$@"; }
bench plot "$out/prefill.json" --out "$out/prefill.png"
bench check "$out"/*.json --promises packages/fap-kernels/benchmarks/promises.json | tee "$out/promises.txt" || failed=1
exit $failed

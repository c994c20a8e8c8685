#!/usr/bin/env bash
# Measure what the README's figures and the kernels' promises need, on one GPU, from the root of a checkout:
#
#     bash packages/fap-testing/benchmarks/record.sh FOLDER [--quick]
#
# It needs torch, triton, typer, rich and matplotlib; no network and nothing installed besides. Options after the
# folder go to every command. COMMIT names what is measured where the checkout has no .git; EXTRA_PEERS, names
# with commas, adds some; JOBS processes compile beforehand (by default all cores but two). STEPS names, with
# spaces, the steps to take: the picture (prefill.png) and the promises are of all records in FOLDER, so that what
# one day has no time for the next one can add. On 16 cores a prefill step takes some 80 seconds, most of them
# compiling FlexAttention, and the others 10 to 30 each.
set -uo pipefail
out=${1:?the folder for the records}
shift
steps=${STEPS:-prefill128 prefill64 prefill256 other decode varlen overhead memory}
PYTHONPATH=$(ls -d packages/*/src | paste -sd:)${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH
mkdir -p "$out"
failed=0
extra=${EXTRA_PEERS:+,$EXTRA_PEERS}

bench() { python -m fap_testing.bench "$@"; }

measure() { # STEP COMMAND OPTIONS...
    local name=$1 begin=$SECONDS
    shift
    [[ " $steps " == *" $name "* ]] || return 0
    bench "$@" --commit "${COMMIT:-}" --jobs "${JOBS:-$(($(nproc) > 3 ? $(nproc) - 2 : 1))}" \
        --json "$out/$name.json" >"$out/$name.txt" 2>"$out/$name.log" || failed=1
    echo "$name: $((SECONDS - begin)) s"
    tail -n 4 "$out/$name.txt"
}

for head_dim in 128 64 256; do
    measure "prefill$head_dim" prefill --head-dims "$head_dim" --seqlens 512,2048,8192,16384 --direction fwd,bwd \
        --peers "fap-triton,fap-hopper,sdpa-flash,sdpa-cudnn,flex$extra" "$@"
done
measure other prefill --head-dims 40,80,96,160,192,224 --seqlens 4096 --direction fwd \
    --peers "fap-triton,fap-hopper,sdpa-flash" "$@"
measure decode decode --head-dims 128 --kv-heads 8 --group 4 --graph --page-sizes 0,16 \
    --batches 16x8192,64x4096,128x1024,1x65536 --peers "fap-triton,sdpa-flash$extra" "$@"
measure varlen varlen --head-dims 64,128 --seqlens 2048,mixed \
    --peers "fap-triton,fap-hopper,fap-dense,fap-hopper-dense,sdpa-flash$extra" "$@"
measure overhead overhead --peers "fap,fap-kernels,fap-nn,sdpa-flash$extra" "$@"
measure memory memory --peers "fap-triton,sdpa-flash$extra" "$@"

if compgen -G "$out/prefill*.json" >/dev/null; then
    bench plot "$out"/prefill*.json --out "$out/prefill.png" || failed=1
fi
bench check "$out"/*.json --promises packages/fap-kernels/benchmarks/promises.json | tee "$out/promises.txt" || failed=1
exit $failed

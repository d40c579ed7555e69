#!/usr/bin/env bash
# Measure and test EViT on a GPU in at most 6 minutes.   bash tests/gpu.sh [FOLDER] [--dry-run]
#
# FOLDER (gpu_report by default) receives report.md, a table of all parts and figures that grows with each part, and the
# output of each part. First comes a minute in which everything must run once, then the figures in order of worth, then
# the tests. The exit status is 1 if a part fails; the others still run. Needs what requirements-dev.txt lists, and no
# network. --dry-run checks this script and the tests on a CPU: small models, short windows, no torch.compile (minutes).
set -uo pipefail
folder=gpu_report device=cuda compiled=(--compile) small=deit_small_patch16_shrink_base scale=1
for argument; do
    if [ "$argument" = --dry-run ]; then device=cpu; else folder=$argument; fi
done
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) && cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
start=$SECONDS

tests=(python -m pytest -q -n 4 -m gpu)
models=("$small@0.7" "$small@0.7-merge" "$small@1.0") trained=("$small@0.7" "$small@1.0")
speed=(python speed_test.py --amp-dtype bfloat16 --batch-size 256 --windows 5 --window-seconds 0.5)
bias=(python -m measuring.size_bias --windows 5 --window-seconds 0.1)
if [ $device = cpu ]; then
    tests=(env EVIT_GPU_TESTS_DEVICE=cpu python -m pytest -q -n 2 -m gpu)
    tiny=deit_tiny_patch16_shrink_base
    models=("$tiny@0.7:32" "$tiny@0.7-merge:32") trained=("${models[0]}")
    speed=(python speed_test.py --amp-dtype bfloat16 --batch-size 2 --windows 3 --window-seconds 0.05)
    bias=(python -m measuring.size_bias --batch-size 2 --lengths 20 --windows 3 --window-seconds 0.01)
    compiled=() scale=5                                # times the deadlines, since the cores may be slow and shared
    export OMP_NUM_THREADS=1
fi
speed+=(--device $device) bias+=(--device $device)
failed=0

part() {  # part NAME DEADLINE COMMAND…: run it until DEADLINE, in seconds since the start; add a row to the report
    local name=$1 left=$((start + scale * $2 - SECONDS)) began=$SECONDS status=0 result=passed shown
    shift 2
    shown="${*//$'\n'/; }"
    echo "$name: ${shown% --csv *}"
    if [ $left -lt 5 ]; then left=5; fi
    timeout -k 5 $left "$@" > "$folder/$name.txt" 2>&1 || status=$?
    if [ $status -ne 0 ]; then
        result="failed with status $status" failed=1
        if [ $status -eq 124 ] || [ $status -eq 137 ]; then result='stopped by its time limit'; fi
    fi
    if [ "$name" = tests ]; then result+=": $(tail -n 1 "$folder/$name.txt")"; fi
    echo "| $name | $result | | | $((SECONDS - began)) | \`${shown% --csv *}\` |" >> "$folder/report.md"
}

measure() {  # measure NAME DEADLINE COMMAND…: a part whose command takes --csv, and a row for each of its figures
    local name=$1 deadline=$2
    shift 2
    rm -f "$folder/$name.csv"
    part "$name" "$deadline" "$@" --csv "$folder/$name.csv"
    [ -f "$folder/$name.csv" ] && python - "$name" "$folder/$name.csv" >> "$folder/report.md" <<'PROGRAM'
import csv, sys
name, path = sys.argv[1:]
with open(path, newline='') as file:
    for row in csv.DictReader(file):
        median, low, high, ratio, memory = (row[key] and float(row[key]) for key in
                                            ('median', 'min', 'max', 'ratio', 'memory_mib'))
        figure = f'{median:.0f} [{low:.0f}–{high:.0f}] images/s' if median else f'failed: {row["failure"]:.200}'
        ratio, memory = (format(*number) if number[0] else '–' for number in ((ratio, '.3f'), (memory, '.0f')))
        print(f'| {name}: {row["model"]} | {figure.replace("|", "/")} | {ratio} | {memory} | | |')
PROGRAM
}

python - $device > "$folder/report.md" <<'PROGRAM' || exit 1
import platform, sys, timm, torch
from measuring.benchmark import available_device, device_name
print(f'{device_name(available_device(sys.argv[1]))}, Python {platform.python_version()}, torch {torch.__version__}, '
      f'CUDA {torch.version.cuda}, timm {timm.__version__}')
PROGRAM
cat >> "$folder/report.md" <<EOT
$(date -u +%F), commit $(git describe --always --dirty 2> /dev/null || echo unknown).
Figures are medians [min–max] of windows in turn; ratios are to the last row of the part.

| part | result | ratio | memory, MiB | seconds | command |
|---|---|---|---|---|---|
EOT
# Everything is imported, and each kind of measurement runs once, on a small model
smoke="import sys, main, curve, export, visualize_mask, speed_test; from measuring import size_bias
tiny = 'deit_tiny_patch16_shrink_base@0.7'
short = '--device $device --batch-size 8 --windows 1 --window-seconds 0.01'.split()
size_bias.main([*short, '--lengths', '20'])
for flags in [], ['--train'], '${compiled[*]}'.split():
    if speed_test.main(['--models', tiny + ':32', tiny + '-merge:32', '--amp-dtype', 'bfloat16', *short, *flags]):
        sys.exit(1)"
# A part that ends early leaves its time to those after it
part smoke 60 python -c "$smoke"
measure inference-compiled 150 "${speed[@]}" --models "${models[@]}" "${compiled[@]}"
measure training-compiled 215 env TORCH_LOGS=recompiles "${speed[@]}" --models "${trained[@]}" --train "${compiled[@]}" \
    --profile "$folder/kernels-compiled.txt"
measure training-eager 235 "${speed[@]}" --models "${trained[@]}" --train --profile "$folder/kernels-eager.txt"
measure training-compiled-default-kernels 280 env EVIT_DEFAULT_KERNELS='attention gather' "${speed[@]}" \
    --models "${trained[@]}" --train "${compiled[@]}"
measure training-eager-default-attention 292 env EVIT_DEFAULT_KERNELS=attention "${speed[@]}" --models "${trained[@]}" --train
measure training-eager-default-gather 304 env EVIT_DEFAULT_KERNELS=gather "${speed[@]}" --models "${trained[@]}" --train
measure size-bias 318 "${bias[@]}"
part tests 355 "${tests[@]}"
grep -h 'kernels in a pass' "$folder"/kernels-*.txt 2> /dev/null | sed 's/^/\n/' >> "$folder/report.md"
cat "$folder/report.md"
exit $failed

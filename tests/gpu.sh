#!/usr/bin/env bash
# Test and measure EViT on a GPU in under 9 minutes.   bash tests/gpu.sh [FOLDER] [--dry-run]
#
# FOLDER (gpu_report by default) receives report.md, a table of all parts and figures, and the output of each part. The
# exit status is 1 if a part fails; the others still run. Needs what requirements-dev.txt lists, and no network.
# --dry-run checks this script and the tests on a CPU: small models, short windows, no torch.compile (minutes).
set -uo pipefail
folder=gpu_report device=cuda compiled=(--compile) small=deit_small_patch16_shrink_base
for argument; do
    if [ "$argument" = --dry-run ]; then device=cpu; else folder=$argument; fi
done
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) && cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

tests=(python -m pytest -q -n 4 -m gpu)
models=("$small@1.0" deit_small_patch16_224 "$small@0.7") trained=("$small@1.0" "$small@0.7")
speed=(python speed_test.py --reference --amp-dtype bfloat16 --batch-size 256 --windows 5 --window-seconds 0.5)
if [ $device = cpu ]; then
    tests=(env EVIT_GPU_TESTS_DEVICE=cpu python -m pytest -q -n 2 -m gpu)
    models=(deit_tiny_patch16_shrink_base@0.7:32 deit_tiny_patch16_224:32) trained=("${models[0]}")
    speed=(python speed_test.py --reference --amp-dtype bfloat16 --batch-size 2 --windows 3 --window-seconds 0.05)
    compiled=()
    export OMP_NUM_THREADS=1                           # the cores may be shared
fi
speed+=(--device $device)
failed=0

part() {  # part NAME DEADLINE COMMAND…: run it until DEADLINE, in seconds since the start; add a row to the report
    local name=$1 deadline=$2 start=$SECONDS status=0 result=passed shown
    shift 2
    shown="$*"
    echo "$name: ${shown% --csv *}"
    timeout -k 5 $((deadline - SECONDS)) "$@" > "$folder/$name.txt" 2>&1 || status=$?
    if [ $status -ne 0 ]; then
        result="failed with status $status" failed=1
        if [ $status -eq 124 ] || [ $status -eq 137 ]; then result='stopped by its time limit'; fi
    fi
    if [ "$name" = tests ]; then result+=": $(tail -n 1 "$folder/$name.txt")"; fi
    echo "| $name | $result | | | $((SECONDS - start)) | \`${shown% --csv *}\` |" >> "$folder/report.md"
}

measure() {  # measure NAME DEADLINE FLAGS…: a part that runs speed_test.py, and a row for each of its figures
    local name=$1 deadline=$2
    shift 2
    rm -f "$folder/$name.csv"
    part "$name" "$deadline" "${speed[@]}" "$@" --csv "$folder/$name.csv"
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
# A part that ends early leaves its time to those after it
part tests 240 "${tests[@]}"
measure inference-compiled 340 --models "${models[@]}" "${compiled[@]}"
measure inference-eager 370 --models "${models[@]}"
measure training-compiled 485 --models "${trained[@]}" --train "${compiled[@]}"
measure training-eager 525 --models "${trained[@]}" --train
cat "$folder/report.md"
exit $failed

#!/usr/bin/env bash
# Finetune to EViT.   ckpt=/path/to/deit_small.pth datapath=/path/to/imagenet logdir=/runs/b bash finetune.sh [more flags]
#
# With datapath: the paper's recipe, from a DeiT-S checkpoint, for 8 GPUs. Without: the model of the digits at keep rate
# 0.5, from the result of run_code.sh (or from ckpt). model=lvvit_s takes another backbone.
set -euo pipefail
main=$(dirname "${BASH_SOURCE[0]}")/main.py
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
launch=(python)
if [ "$gpus" -gt 1 ] && [ -n "${datapath:-}" ]; then
    launch=(python -m torch.distributed.run --standalone --nproc_per_node="$gpus")
fi

if [ -n "${datapath:-}" ]; then
    ckpt=${ckpt:?name the checkpoint to start from: ckpt=/path/to/deit_small.pth}
    logdir=${logdir:-runs/imagenet${model:+_$model}_finetune}
    model=${model:-deit_small_patch16_shrink_base}
    recipe=(--model "$model" --base_keep_rate 0.7 --fuse_token
        --data-path "$datapath" --input-size 224 --batch-size 256 --dist-eval
        --sched cosine --lr 2e-5 --min-lr 2e-6 --weight-decay 1e-6 --epochs 30 --warmup-epochs 0
        --shrink_start_epoch 0 --shrink_epochs 0)
    if [[ $model == lvvit* ]]; then                    # MixToken instead
        recipe+=(--mixup 0 --cutmix 0)
    fi
else
    ckpt=${ckpt:-runs/digits${model:+_$model}/checkpoint.pth}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}       # more threads are no faster for a model this small
    logdir=${logdir:-runs/digits${model:+_$model}_finetune}
    recipe=(--model "${model:-deit_tiny_patch16_shrink_base}" --base_keep_rate 0.5 --fuse_token --drop_loc 2,3,4
        --model-kwargs patch_size=4 embed_dim=64 num_heads=4 depth=6
        --data-set BOARD_DIGITS --input-size 32 --batch-size 32 --num_workers 1 --eval-interval 2
        --sched cosine --lr 3.2e-3 --min-lr 2e-6 --weight-decay 1e-6 --epochs 8 --warmup-epochs 0
        --shrink_start_epoch 0 --shrink_epochs 0 --clip-grad 1 --no-model-ema
        --mixup 0 --cutmix 0 --aa '' --color-jitter 0 --reprob 0 --no-repeated-aug)
fi
exec "${launch[@]}" "$main" "${recipe[@]}" --finetune "$ckpt" --output_dir "$logdir" --resume auto "$@"

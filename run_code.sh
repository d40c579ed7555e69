#!/usr/bin/env bash
# Train EViT.   datapath=/path/to/imagenet logdir=/runs/a bash run_code.sh [more flags of main.py]
#
# With datapath: the paper's recipe, EViT/0.7-DeiT-S with fusing, for 8 GPUs (the learning rate follows their number).
# Without: a tiny EViT on scikit-learn's digits, in minutes on two CPU cores. model=lvvit_s takes another backbone.
set -euo pipefail
main=$(dirname "${BASH_SOURCE[0]}")/main.py
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
launch=(python)
if [ "$gpus" -gt 1 ] && [ -n "${datapath:-}" ]; then
    launch=(python -m torch.distributed.run --standalone --nproc_per_node="$gpus")
fi

if [ -n "${datapath:-}" ]; then
    logdir=${logdir:-runs/imagenet${model:+_$model}}
    model=${model:-deit_small_patch16_shrink_base}
    recipe=(--model "$model" --base_keep_rate 0.7 --fuse_token
        --data-path "$datapath" --input-size 224 --batch-size 256 --dist-eval
        --epochs 300 --warmup-epochs 5 --shrink_start_epoch 10 --shrink_epochs 100)
    if [[ $model == lvvit* ]]; then                    # LV-ViT's own recipe, with MixToken
        recipe+=(--lr 8e-4 --mixup 0 --cutmix 0 --no-repeated-aug --train-interpolation random)
    fi
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}       # more threads are no faster for a model this small
    logdir=${logdir:-runs/digits${model:+_$model}}
    recipe=(--model "${model:-deit_tiny_patch16_shrink_base}" --base_keep_rate 0.7 --fuse_token --drop_loc 2,3,4
        --model-kwargs patch_size=4 embed_dim=64 num_heads=4 depth=6
        --data-set BOARD_DIGITS --input-size 32 --batch-size 32 --num_workers 1 --eval-interval 5
        --epochs 60 --warmup-epochs 5 --shrink_start_epoch 15 --shrink_epochs 30
        --lr 2.4e-2 --clip-grad 1 --drop-path 0 --no-model-ema
        --mixup 0 --cutmix 0 --aa '' --color-jitter 0 --reprob 0 --no-repeated-aug)
fi
exec "${launch[@]}" "$main" "${recipe[@]}" --output_dir "$logdir" --resume auto "$@"

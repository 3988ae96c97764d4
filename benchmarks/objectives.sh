#!/usr/bin/env bash
# The three objectives on 20 000 CIFAR-10 images for about ten minutes each on two cores, then a linear probe and k-NN of
# every stage, and zero-shot accuracy for the contrastive one. Usage: benchmarks/objectives.sh IMAGES OUT [PASSES...]
# IMAGES: a zip or folder with train/CLASS/*.jpg and test/CLASS/*.jpg. PASSES: of rotation, contrastive and SparK, those that
# this machine finishes in ten minutes. A stopped benchmark continues.
set -euo pipefail
images=$1 out=$2 rotation=${3:-4} clip=${4:-7} spark=${5:-8}
network=(--backbone resnet18_cifar --backbone-args channels=32,64,128,256)

timed() { # NAME COMMAND...
  local name=$1 start
  start=$(date +%s)
  shift
  "$@"
  echo "$name: $(($(date +%s) - start)) s"
}

convscope shards build "$images" "$out/shards"
timed rotation convscope pretrain rotation --data "$out/shards" --output-dir "$out/rotation" "${network[@]}" --size 32 \
  --crop-scale 0.77 1 --batch-size 32 --lr 0.1 --precision bf16 --epochs "$rotation"
timed clip convscope pretrain clip --data "$out/shards" --output-dir "$out/clip" "${network[@]}" --size 32 \
  --class-captions --embed-dim 128 --text-width 128 --text-layers 2 --context-length 16 --vocab-size 300 \
  --crop-scale 0.35 1 --flip --batch-size 256 --lr 1e-3 --precision bf16 --epochs "$clip"
timed spark convscope pretrain spark --preset small-images --data "$out/shards" --output-dir "$out/spark" --epochs "$spark"
for name in rotation clip spark; do
  convscope eval linear-probe "$out/$name" --data "$out/shards" --layers all
  convscope eval knn "$out/$name" --data "$out/shards" --layers all
done
convscope eval zero-shot "$out/clip" --data "$out/shards" --templates simple

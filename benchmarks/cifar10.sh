#!/usr/bin/env bash
# SparK on 20 000 CIFAR-10 images for about 5, 15 and 45 minutes on two cores, then linear probe, k-NN and few-label
# fine-tuning beside the untrained twin. Usage: benchmarks/cifar10.sh IMAGES OUT [EPOCHS ...]
# IMAGES: a zip or folder with train/CLASS/*.jpg and test/CLASS/*.jpg. A stopped benchmark continues.
set -euo pipefail
images=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- 3.3 10 30

evaluate() { # NAME MODEL [FLAGS]
  local name=$1
  shift
  convscope eval linear-probe "$@" --data "$out/shards" --layers all --output "$out/results/$name-linear-probe.json"
  convscope eval knn "$@" --data "$out/shards" --layers all --output "$out/results/$name-knn.json"
  for per_class in 25 100; do
    convscope eval fine-tune "$@" --data "$out/shards" --output-dir "$out/$name-tuned-$per_class" --per-class "$per_class" \
      --steps 400 --batch-size 64 --lr 0.008 --precision bf16 --crop-scale 0.35 1.0
  done
}

convscope shards build "$images" "$out/shards"
for epochs in "$@"; do
  start=$(date +%s)
  convscope pretrain spark --preset small-images --data "$out/shards" --output-dir "$out/spark-$epochs" --epochs "$epochs"
  echo "pretraining $epochs epochs: $(($(date +%s) - start)) s"
  evaluate "spark-$epochs" "$out/spark-$epochs"
done
evaluate untrained timm:resnet18_cifar@random --model-args channels=32,64,128,256

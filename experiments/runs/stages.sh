#!/usr/bin/env bash
# Trains a memory for the pocket base with three seeds and answers four suites after every stage.
# About 15 minutes a seed on two CPU cores with bfloat16 instructions. Compare with results/stages/main.md.
#
#   bash experiments/runs/stages.sh [FOLDER]
set -euo pipefail
out=${1:-runs/stages}

vismem eval tables main configs/pocket-stages.yaml output_dir="$out"

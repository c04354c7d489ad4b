#!/usr/bin/env bash
# Makes every table and figure of the paper on the pocket model, baselines included.
# Some hours on two CPU cores. Compare with results/evaluation.
#
#   bash experiments/runs/tables.sh [FOLDER]
set -euo pipefail
out=${1:-runs/tables}

vismem eval tables all preset=pocket output_dir="$out"

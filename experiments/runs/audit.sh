#!/usr/bin/env bash
# Audits the memory in the package: is it used, what does it hold, what does it depend on?
# Compare with results/audit.
#
#   bash experiments/runs/audit.sh [FOLDER]
set -euo pipefail
out=${1:-runs/audit}

for suite in late rules both; do
  vismem audit --data "pocket:$suite" --n 128 --reference 512 --seed 1 --max-new-tokens 48 --batch-size 32 --out "$out/$suite"
done

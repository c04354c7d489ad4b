#!/usr/bin/env bash
# Trains the pocket base from scratch, continues it with the second recipe, and evaluates it by task and by distance from
# the image. Compare with results/pocket_base.json.
#
# These are the consolidated recipes: the base in the package came from a run whose recipe changed on the way
# (docs/log.md), and they have not been run end to end. The second build took about 56 minutes on two shared CPU cores.
#
#   bash experiments/runs/pocket_base.sh [FOLDER]
set -euo pipefail
out=${1:-runs/pocket-base}

vismem pocket build --out "$out/first"
vismem pocket build --start "$out/first" --out "$out/base"
vismem pocket evaluate --base "$out/base" --n 60 --seed 0 --out "$out/pocket_base.json" --plot "$out/pocket_base.png"

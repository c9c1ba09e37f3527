#!/usr/bin/env bash
# Writes k8s/rendered anew: what the charts and the kustomizations make of each overlay. Commit it with the change that
# it follows from, so that a review sees what becomes of the cluster.
# usage: k8s/render.sh [FOLDER]        HELM, KUBECTL and EXPERTMESH name the programs
set -euo pipefail
cd "$(dirname "$0")/.."
into=${1:-k8s/rendered}
for overlay in dev gpu mixed; do
  ${EXPERTMESH:-.venv/bin/expertmesh} k8s render --overlay "$overlay" --output "$into/$overlay"
  ${KUBECTL:-kubectl} kustomize "k8s/overlays/$overlay" > "$into/$overlay/platform.yaml"
done

#!/bin/bash
# Servers and trainer in one job: the first nodes serve the verifier, the first of the others asks them for the states, and
# then all of these train on them.
#   CONFIG=configs/models/llama-3.3-70b-eagle3.yaml sbatch examples/cluster/slurm.sh
#SBATCH --job-name=specforge
#SBATCH --nodes=3
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
set -euo pipefail

CONFIG=${CONFIG:?set it to a recipe, such as configs/models/llama-3.3-70b-eagle3.yaml}
SERVERS=${SERVERS:-1}               # nodes that serve; fewer than --nodes
GPUS=${GPUS:-8}                     # GPUs of a node
SHARED=${SHARED:-$PWD/specforge}    # on a file system that all nodes see
STATES=$SHARED/states-$SLURM_JOB_ID # the servers' files, deleted as they are read
FEATURES=$SHARED/features           # the store; a second job resumes or reuses it
PORT=8000

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
servers=("${nodes[@]:0:SERVERS}")
trainers=("${nodes[@]:SERVERS}")
if ((${#trainers[@]} == 0)); then
  echo "no node is left to train: raise --nodes or lower SERVERS" >&2
  exit 2
fi
# torchrun starts the processes of each node, not srun.
export SLURM_JOB_NAME=bash
mkdir -p "$STATES"
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$STATES"' EXIT

urls=()
for node in "${servers[@]}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$node" --output="$SHARED/server-$node.log" \
    specforge serve-verifier --config "$CONFIG" --tensor_parallel "$GPUS" --folder "$STATES" --port "$PORT" &
  urls+=("http://$node:$PORT/v1")
done
for url in "${urls[@]}"; do
  until curl --silent --fail --output /dev/null "${url%/v1}/health"; do
    # All servers must still run.
    if (($(jobs -rp | wc -l) < ${#servers[@]})); then
      echo "a server has ended: see $SHARED/server-*.log" >&2
      exit 1
    fi
    sleep 10
  done
done

# To train on the servers' states directly, without a store, leave this out and give fit, instead of the last flag,
# --data.features server --data.feature_servers with the list of URLs.
srun --nodes=1 --ntasks=1 --nodelist="${trainers[0]}" \
  specforge prepare features --config "$CONFIG" --output "$FEATURES" --endpoint "${urls[@]}"

srun --nodes="${#trainers[@]}" --ntasks-per-node=1 --nodelist="$(IFS=, && echo "${trainers[*]}")" \
  torchrun --nnodes "${#trainers[@]}" --nproc-per-node "$GPUS" --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
  --rdzv-endpoint "${trainers[0]}:29500" -m specforge fit --config "$CONFIG" --config configs/trainer/several_nodes.yaml \
  --trainer.num_nodes "${#trainers[@]}" --trainer.devices "$GPUS" --verifier_sharding false --data.features "$FEATURES"

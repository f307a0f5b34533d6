#!/usr/bin/env bash
# A Dynamo frontend, NUM_WORKERS vLLM workers, one shared kvring cache.
#
# The topology of FlexKV's multi-instance guide, with its variables: a machine that is configured for
# FlexKV needs no other configuration. Worker 0 starts the cache's server, the others connect, in any
# order; any of them, and the server, may be killed and started again.
#
#   MODEL_PATH=/models/llama examples/dynamo_two_workers.sh                  # GPUs 0,1 and 2,3
#   DEVICE=cpu MODEL_PATH=... GPUS_PER_WORKER=1 examples/dynamo_two_workers.sh
#   DISCOVERY=etcd ...                              # with nats-server and etcd, as the guide has it
#   KV_CONNECTOR=FlexKVConnectorV1 ...              # vLLM's in-tree connector over kvring-flexkv
set -euo pipefail

: "${MODEL_PATH:?set MODEL_PATH to a model vLLM can serve}"
NUM_WORKERS=${NUM_WORKERS:-2}
GPUS_PER_WORKER=${GPUS_PER_WORKER:-2}
DEVICE=${DEVICE:-gpu}
DISCOVERY=${DISCOVERY:-file}
HTTP_PORT=${HTTP_PORT:-8001}
ROUTER_MODE=${ROUTER_MODE:-round-robin}
KV_CONNECTOR=${KV_CONNECTOR:-KvringConnector}
WORK_DIR=${WORK_DIR:-$(mktemp -d -t kvring-dynamo-XXXXXX)}
mkdir -p "$WORK_DIR"

# One cache for all workers.
unset FLEXKV_CONFIG_PATH
export FLEXKV_INSTANCE_NUM=$NUM_WORKERS
export FLEXKV_CPU_CACHE_GB=${FLEXKV_CPU_CACHE_GB:-32}
export FLEXKV_SSD_CACHE_GB=${FLEXKV_SSD_CACHE_GB:-128}
export FLEXKV_SSD_CACHE_DIR=${FLEXKV_SSD_CACHE_DIR:-/data/flexkv_ssd/}
export FLEXKV_SERVER_RECV_PORT=${FLEXKV_SERVER_RECV_PORT:-ipc:///tmp/flexkv_server}
export FLEXKV_NUM_LOG_INTERVAL_REQUESTS=${FLEXKV_NUM_LOG_INTERVAL_REQUESTS:-200}

case $KV_CONNECTOR in
    KvringConnector)
        TRANSFER='{"kv_connector":"KvringConnector","kv_role":"kv_both","kv_connector_module_path":"kvring.vllm"}' ;;
    FlexKVConnectorV1)
        TRANSFER='{"kv_connector":"FlexKVConnectorV1","kv_role":"kv_both"}' ;;
    *)
        echo "KV_CONNECTOR = $KV_CONNECTOR: KvringConnector or FlexKVConnectorV1 is expected" >&2; exit 2 ;;
esac

pids=()
finish() {
    trap - EXIT INT TERM
    [ ${#pids[@]} -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true
    wait
    # The server is nobody's child: it would go on, warm, for the next start.
    kvring stop --socket "${FLEXKV_SERVER_RECV_PORT#ipc://}" 2>/dev/null || true
}
trap finish EXIT INT TERM

case $DISCOVERY in
    file)
        export DYN_DISCOVERY_BACKEND=file DYN_FILE_KV=$WORK_DIR/discovery DYN_REQUEST_PLANE=tcp
        mkdir -p "$DYN_FILE_KV" ;;
    etcd)
        nats-server -js -a 127.0.0.1 -p 4222 --store_dir "$WORK_DIR/nats" >"$WORK_DIR/nats.log" 2>&1 & pids+=($!)
        etcd --data-dir "$WORK_DIR/etcd" --listen-client-urls http://127.0.0.1:2379 \
            --advertise-client-urls http://127.0.0.1:2379 >"$WORK_DIR/etcd.log" 2>&1 & pids+=($!)
        export NATS_SERVER=nats://127.0.0.1:4222 ETCD_ENDPOINTS=http://127.0.0.1:2379
        sleep 3 ;;
    *)
        echo "DISCOVERY = $DISCOVERY: file or etcd is expected" >&2; exit 2 ;;
esac

echo "logs are in $WORK_DIR"
python3 -m dynamo.frontend --router-mode "$ROUTER_MODE" --http-port "$HTTP_PORT" >"$WORK_DIR/frontend.log" 2>&1 &
pids+=($!)

for ((i = 0; i < NUM_WORKERS; i++)); do
    if [ "$DEVICE" = cpu ]; then
        gpus=""
        export VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1
        # 1 GiB of KV cache, in vLLM's unit.
        export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
        options=(--enforce-eager --block-size 32 --max-model-len "${MAX_MODEL_LEN:-2048}")
    else
        # Worker i has GPUs i·n to i·n + n - 1.
        gpus=$(seq -s, $((i * GPUS_PER_WORKER)) $((i * GPUS_PER_WORKER + GPUS_PER_WORKER - 1)))
        options=(--block-size 64 --gpu-memory-utilization 0.8 --max-model-len "${MAX_MODEL_LEN:-40960}")
    fi
    echo "worker $i on ${gpus:-the CPU}"
    FLEXKV_INSTANCE_ID=$i CUDA_VISIBLE_DEVICES=$gpus python3 -m dynamo.vllm \
        --model "$MODEL_PATH" --tensor-parallel-size "$GPUS_PER_WORKER" "${options[@]}" \
        --kv-transfer-config "$TRANSFER" ${WORKER_OPTIONS:-} >"$WORK_DIR/worker_$i.log" 2>&1 &
    pids+=($!)
done

echo "workers are starting; http://127.0.0.1:$HTTP_PORT serves when they are ready"
wait -n
echo "a process has ended: see $WORK_DIR" >&2
exit 1

# bash scripts/gpu/run.sh RUN [ARGUMENT...]: one measurement on a machine with GPUs and no network; README.md lists them
set -o pipefail
run=${1:?keep, together, smollm2, loop2, loop4, engine, endpoint, updates, learner or nccl}; shift

keep() {  # FILE...: parts of the model that this call brought, put where later calls find them
  mkdir -p ~/smollm2 && mv "$@" ~/smollm2/ && ls -la ~/smollm2
}

run_smollm2() {  # [SECONDS]: one GPU; SmolLM2 learns small sums
  smollm2
  timeout -s INT "$(left)" $CLI train recipes/smollm2.toml run.seconds=${1:-330} run.directory=/tmp/runs > $OUT/smollm2.out 2> >(tee $OUT/smollm2.err >&2)
  say "smollm2: status $?"; tail -40 $OUT/smollm2.out | cut -c1-220
  local R=/tmp/runs/smollm2; cp $R/summary.json $OUT/smollm2-summary.json; cp $R/heldout.jsonl $OUT/
  grep '"kind": "step"' $R/metrics.jsonl | xz -9 > $OUT/smollm2-steps.jsonl.xz
  $CLI bench learned $R --json $OUT/smollm2_h200.json > /dev/null; say "learned: status $?"
  show $OUT/smollm2_h200.json wall_s steps heldout rises met
  tail -3 $R/logs/*.log | cut -c1-250
}

loop() {  # NAME OPTION...: modes of the whole system, long tails
  local name=$1; shift
  timeout -s INT "$(left)" $CLI bench loop recipes/long-tail.toml --start-seconds 240 --directory /tmp/runs/$name-$$ --json $OUT/$name.json "$@" \
    > $OUT/$name.out 2> >(tee $OUT/$name.err >&2)
  say "$name: status $?"; show $OUT/$name.json u reward seconds_to_reward ratios met
  for mode in streaming synchronous colocated reload one_step_off rounds; do
    show $OUT/$name.json $(printf "modes.$mode.%s " steps engines trained_tokens_per_second generated_tokens_per_second G T \
      engine_busy learner_busy predicted_idle age_mean masked_share stall_ms weights_equal error) | grep -v " null$"
  done
}

run_loop2() {  # [SECONDS [MODES [NAME]]]: two GPUs; modes beside each other
  smollm2
  loop ${3:-loop_h200x2} --gpus 2 --seconds ${1:-60} --modes ${2:-streaming,synchronous,colocated,reload}
}

run_loop4() {  # [SECONDS]: three engines and one learner, one engine killed; then two of the four GPUs to compare with
  smollm2
  LIMIT=310 loop loop_h200x4 --gpus 4 --modes streaming --seconds ${1:-75} --kill-after 30 queue.over_provision=4
  loop loop_h200x4_two --gpus 2 --modes streaming --seconds ${1:-75}
}

run_engine() {  # [SECONDS]: one GPU; plain SGLang, SSE, plugin, live updates
  local most=${1:-$(( $(left) - 20 ))}
  timeout -s INT "$(left)" $CLI bench engine --rounds 12 --sse-rounds 2 --seconds $(( most - 90 )) --json $OUT/engine_h200.json > $OUT/engine.out 2> >(tee $OUT/engine.err >&2)
  say "engine: status $?"; show $OUT/engine_h200.json arms met stall_ms problems seconds
}

run_updates() {  # [RANKS]: live updates at work, on one GPU or on RANKS
  local name=updates_tp${1:-1}_h200
  timeout -s INT "$(left)" $CLI bench updates --tp ${1:-1} --commits 340 --many-commits 32 --tokens 2048 --window-seconds 4 --pairs ${PAIRS:-16} \
    --seconds $(( $(left) - 30 )) --json $OUT/$name.json > /tmp/$name.out 2> >(tee $OUT/$name.err >&2)
  say "$name: status $?"
  show $OUT/$name.json device commits met errors problems throughput_ratio decode_step_ms few.stall_ms many.stall_ms tokens_per_second.without seconds
}

run_learner() {  # one GPU: the learner by itself, fused kernels and checkpoints
  timeout -s INT 200 $CLI bench learner --size 0.6b --tokens 32768 --micro-batch-tokens 32768 --pairs 8 \
    --json $OUT/learner_h200.json > /tmp/learner.out 2>&1
  say "learner: status $?"; grep -v '": "' /tmp/learner.out | tail -40 | cut -c1-300
  timeout -s INT "$(left)" $TEST tests/test_megatron_flash.py tests/test_megatron_logprobs_kernels.py tests/test_megatron_checkpoint_gpu.py > $OUT/kernels.log 2>&1
  say "kernels and checkpoints: status $?"; tail -4 $OUT/kernels.log
}

run_gap() {  # one GPU: log-probs of the learner less those of SGLang
  timeout -s INT "$(left)" $CLI bench learner-gap --size 0.6b --json $OUT/learner_gap_h200.json > /tmp/learner_gap.out 2>&1
  say "gap: status $?"; grep -v '": "' /tmp/learner_gap.out | tail -40 | cut -c1-300
}

run_nccl() {  # two GPUs: the learner in two processes against one
  timeout -s INT "$(left)" $TEST -m gpu -k two_gpus tests/test_megatron_parallel.py > $OUT/nccl.log 2>&1
  say "nccl: status $?"; tail -6 $OUT/nccl.log | cut -c1-300
}

run_endpoint() {  # [PAIRS]: one GPU; sessions through the endpoint, and the same straight to SGLang
  timeout -s INT "$(left)" $CLI bench endpoint --pairs ${1:-8} --json $OUT/endpoint_h200.json > /tmp/endpoint.out 2> >(tee $OUT/endpoint.err >&2)
  say "endpoint: status $?"; show $OUT/endpoint_h200.json cpu_ms_per_request cpu_us_per_token tokens_per_second rate_ratio met
}

run_together() {  # "GPUS:RUN[:ARGUMENT] ..."...: side by side, on each the runs one after the other; a minute of two GPUs counts as one
  for each; do
    (export CUDA_VISIBLE_DEVICES=${each%%:*}
     for one in ${each#*:}; do IFS=: read -r name argument <<< "$one"; "run_$name" $argument; done) &
  done; wait
}

case $run in
  keep) keep "$@" ;;
  *) source "$(dirname "$0")/setup.sh"; "run_$run" "$@"; say done ;;
esac

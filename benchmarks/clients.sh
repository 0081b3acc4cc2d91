#!/usr/bin/env bash
# Run other people's clients against a running server, a few requests each, and print what became of them.
#
#   benchmarks/clients.sh URL MODEL TOKENIZER [CLIENT...]
#
# URL is the server's address without /v1, MODEL the name that it serves, TOKENIZER a folder or a hub id with
# the model's tokenizer. Clients: litellm instructor guidellm lm_eval aiperf vllm; all of them if none is named.
# Each is installed into an environment of its own below CLIENTS_DIR (a temporary folder if it is not set), as
# some need an older openai package than the tests. OPENAI_API_KEY is the server's key, if it needs one.
# `vllm bench serve` runs if CUPAGED_VLLM_CPU names an environment with vLLM.
set -uo pipefail

if [ $# -lt 3 ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d'
  exit 2
fi
URL=${1%/} MODEL=$2 TOKENIZER=$3
shift 3
CLIENTS=${*:-litellm instructor guidellm lm_eval aiperf vllm}
export OPENAI_API_KEY=${OPENAI_API_KEY:-none} OPENAI_BASE_URL=$URL/v1 MODEL URL
export HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false LITELLM_LOCAL_MODEL_COST_MAP=True
DIR=${CLIENTS_DIR:-$(mktemp -d)}
INSTALL_SECONDS=${INSTALL_SECONDS:-300} RUN_SECONDS=${RUN_SECONDS:-300}
mkdir -p "$DIR"

# install NAME REQUIREMENT...: make the client's environment, unless it is there.
install() {
  local name=$1
  shift
  [ -e "$DIR/$name/installed" ] && return 0
  python3 -m venv "$DIR/$name" &&
    timeout $INSTALL_SECONDS "$DIR/$name/bin/python" -m pip install -q "$@" && touch "$DIR/$name/installed"
}

# within NAME COMMAND...: run a program of the client's environment, within the time limit.
within() {
  local name=$1 program=$2
  shift 2
  (cd "$DIR" && timeout "$RUN_SECONDS" "$DIR/$name/bin/$program" "$@")
}

run_litellm() {
  install litellm litellm && within litellm python - <<'PYTHON'
import os

import litellm

common = {
    "model": f"openai/{os.environ['MODEL']}",
    "api_base": os.environ["OPENAI_BASE_URL"],
    "messages": [{"role": "user", "content": "Name a colour."}],
    "max_tokens": 8,
}
whole = litellm.completion(**common)
streamed = "".join(part.choices[0].delta.content or "" for part in litellm.completion(**common, stream=True))
assert whole.usage.completion_tokens > 0 and streamed, (whole, streamed)
print(f"SUMMARY a chat completion, whole and streamed; {whole.usage.total_tokens} tokens")
PYTHON
}

run_instructor() {
  install instructor instructor && within instructor python - <<'PYTHON'
import os

import instructor
import openai
from pydantic import BaseModel, Field


class Colour(BaseModel):
    name: str = Field(max_length=20)
    is_warm: bool


done = []
for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
    client = instructor.from_openai(openai.OpenAI(), mode=mode)
    colour = client.chat.completions.create(
        model=os.environ["MODEL"],
        messages=[{"role": "user", "content": "Describe the colour red."}],
        response_model=Colour,
        max_tokens=100,
        max_retries=0,
    )
    done.append(f"{mode.name}: {colour!r}")
print("SUMMARY", "; ".join(done))
PYTHON
}

run_guidellm() {
  install guidellm guidellm && within guidellm guidellm run --disable-progress \
    --backend "kind=openai_http,target=$URL,model=$MODEL,api_key=$OPENAI_API_KEY" \
    --tokenizer "kind=huggingface_auto,model=$TOKENIZER" \
    --data "kind=synthetic_text,prompt_tokens=32,output_tokens=8" \
    --profile kind=synchronous --constraint kind=max_requests,count=3 --output kind=json,path=guidellm.json &&
    echo "SUMMARY three streamed chats, one after the other"
}

run_lm_eval() {
  # A task of its own, as others are downloaded from the hub.
  mkdir -p "$DIR/lm_eval_task"
  for sum in "2 + 2 =,4,5" "3 + 5 =,8,1" "1 + 1 =,2,9" "4 + 3 =,7,3"; do
    IFS=, read -r question right wrong <<<"$sum"
    printf '{"question": "%s", "choices": ["%s", "%s"]}\n' "$question" "$right" "$wrong"
  done >"$DIR/lm_eval_task/sums.jsonl"
  cat >"$DIR/lm_eval_task/sums.yaml" <<YAML
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: $DIR/lm_eval_task/sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
metric_list: [{metric: acc}]
YAML
  install lm_eval "lm-eval[api]" transformers && within lm_eval lm_eval run --model local-completions \
    --model_args "model=$MODEL,base_url=$URL/v1/completions,tokenizer=$TOKENIZER,num_concurrent=2,max_length=512" \
    --include_path "$DIR/lm_eval_task" --tasks sums && echo "SUMMARY four questions by the log probabilities of answers"
}

run_aiperf() {
  install aiperf aiperf && within aiperf aiperf profile --model "$MODEL" --url "$URL" --tokenizer "$TOKENIZER" \
    --api-key "$OPENAI_API_KEY" --endpoint-type chat --streaming --concurrency 2 --request-count 4 \
    --synthetic-input-tokens-mean 32 --output-tokens-mean 8 --ui-type none --output-artifact-dir "$DIR/aiperf-out" &&
    echo "SUMMARY four streamed chats, two at a time"
}

run_vllm() {
  if [ -z "${CUPAGED_VLLM_CPU:-}" ]; then
    echo "SUMMARY not run: CUPAGED_VLLM_CPU names no environment with vLLM"
    return 3
  fi
  timeout "$RUN_SECONDS" "$CUPAGED_VLLM_CPU/bin/vllm" bench serve --backend openai-chat --base-url "$URL" \
    --endpoint /v1/chat/completions --model "$MODEL" --tokenizer "$TOKENIZER" --dataset-name random \
    --random-input-len 32 --random-output-len 8 --num-prompts 4 && echo "SUMMARY four streamed chats"
}

failed=0
report=""
for client in $CLIENTS; do
  echo "== $client" >&2
  output=$("run_$client" 2>"$DIR/$client.log")
  status=$?
  printf '%s\n' "$output" >>"$DIR/$client.log"
  summary=$(sed -n 's/^SUMMARY //p' <<<"$output" | tail -1)
  case $status in
    0) word=ok ;;
    3) word=- ;;
    *) word=FAILED summary="status $status, see $DIR/$client.log" failed=1 ;;
  esac
  report+=$(printf '%-12s %-7s %s' "$client" "$word" "$summary")$'\n'
done
printf '\n%s' "$report"
exit $failed

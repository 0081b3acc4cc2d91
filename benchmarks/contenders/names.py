"""The names of the contenders, in the order in which they take their turns."""

OURS, OURS_HTTP = "cupaged", "cupaged-http"
VLLM_CPU, VLLM_CPU_HTTP = "vllm-cpu", "vllm-cpu-http"
OPENVINO = "openvino-genai"
GENERATE, GENERATE_BATCH = "transformers-generate", "transformers-generate-batch"
NAMES = (OURS, VLLM_CPU, OPENVINO, GENERATE, GENERATE_BATCH, OURS_HTTP, VLLM_CPU_HTTP)
FLOOR = "linear layers alone"  # not a contender, but a line of the results

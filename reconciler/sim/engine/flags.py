"""The command line of `vllm serve`: which options there are, and how they are read."""

from __future__ import annotations

import sys
from typing import NoReturn

VERSION = "0.33.0"

SWITCHES = frozenset(
    """aggregate-engine-logging allow-credentials api-server-headless async-scheduling calculate-kv-scales
    data-parallel-external-lb data-parallel-hybrid-lb disable-access-log disable-async-output-proc
    disable-cascade-attn disable-chunked-mm-input disable-custom-all-reduce disable-fastapi-docs
    disable-frontend-multiprocessing disable-hybrid-kv-cache-manager disable-log-requests disable-log-stats
    disable-mm-preprocessor-cache disable-nccl-for-dp-synchronization disable-sliding-window
    disable-uvicorn-access-log enable-auto-tool-choice enable-chunked-prefill enable-dbo enable-eplb
    enable-expert-parallel enable-force-include-usage enable-log-deltas enable-log-outputs enable-log-requests
    enable-lora enable-mfu-metrics enable-mm-embeds enable-offline-docs enable-per-request-metrics
    enable-prefix-caching enable-prompt-embeds enable-prompt-tokens-details enable-reasoning
    enable-request-id-headers enable-return-routed-experts enable-server-load-tracking enable-sleep-mode
    enable-ssl-refresh enable-tokenizer-info-endpoint enforce-eager exclude-tools-when-tool-choice-none
    fail-on-environ-validation fully-sharded-loras grpc headless interleave-mm-strings
    kv-sharing-fast-prefill language-model-only log-error-stack ray-workers-use-nsight
    return-tokens-as-token-ids skip-mm-profiling skip-tokenizer-init tokens-only trust-remote-code
    trust-request-chat-template use-tqdm-on-load""".split()  # noqa: SIM905 - seventy quoted words are harder to read
)
VALUES = frozenset(
    """allowed-headers allowed-local-media-path allowed-media-domains allowed-methods allowed-origins
    all2all-backend api-key api-server-count attention-backend attention-config block-size chat-template
    chat-template-content-format code-revision collect-detailed-traces compilation-config config config-format
    convert cpu-offload-gb cudagraph-capture-sizes data-parallel-address data-parallel-backend
    data-parallel-rank data-parallel-rpc-port data-parallel-size data-parallel-size-local
    data-parallel-start-rank dcp-kv-cache-interleave-size decode-context-parallel-size
    default-chat-template-kwargs device distributed-executor-backend download-dir dtype ec-transfer-config
    eplb-config expert-placement-strategy fingerprint-mode fingerprint-value generation-config
    gpu-memory-utilization guided-decoding-backend h11-max-header-count h11-max-incomplete-event-size
    hf-config-path hf-overrides hf-token host ignore-patterns io-processor-plugin kernel-config
    kv-cache-dtype kv-cache-memory-bytes kv-cache-metrics-sample kv-events-config kv-offloading-backend
    kv-offloading-size kv-transfer-config limit-mm-per-prompt load-format log-config-file logits-processors
    logprobs-mode long-prefill-token-threshold lora-dtype mamba-cache-dtype mamba-ssm-cache-dtype
    master-addr master-port max-cpu-loras max-log-len max-logprobs max-long-partial-prefills max-lora-rank
    max-loras max-model-len max-num-batched-tokens max-num-partial-prefills max-num-seqs
    max-parallel-loading-workers max-seq-len-to-capture media-io-kwargs mm-encoder-attn-backend
    mm-encoder-tp-mode mm-processor-cache-gb mm-processor-cache-type mm-processor-kwargs model model-impl
    model-loader-extra-config nnodes node-rank num-gpu-blocks-override optimization-level
    otlp-traces-endpoint override-attention-dtype override-generation-config override-pooler-config
    performance-mode pipeline-parallel-size pooler-config port prefill-context-parallel-size
    prefix-caching-hash-algo profiler-config pt-load-map-location quantization quantization-config
    reasoning-config reasoning-parser reasoning-parser-plugin response-role revision root-path runner
    safetensors-load-strategy scheduler-cls scheduling-policy seed show-hidden-metrics-for-version
    shutdown-timeout speculative-config ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile
    stream-interval structured-outputs-config swap-space task tensor-parallel-size tokenizer tokenizer-mode
    tokenizer-revision tool-call-parser tool-parser-plugin tool-server uds uvicorn-log-level video-pruning-rate
    weight-transfer-config worker-cls worker-extension-cls""".split()  # noqa: SIM905
)
LISTS = frozenset(["served-model-name", "lora-modules", "middleware"])
NUMBERS: dict[str, type[int] | type[float]] = {
    "port": int, "tensor-parallel-size": int, "pipeline-parallel-size": int, "max-num-seqs": int,
    "kv-cache-memory-bytes": int, "gpu-memory-utilization": float, "shutdown-timeout": float,
}  # fmt: skip
SHORT = {
    "-tp": "tensor-parallel-size", "-pp": "pipeline-parallel-size", "-dp": "data-parallel-size", "-q": "quantization",
    "-O": "optimization-level", "-cc": "compilation-config", "-asc": "api-server-count", "-n": "nnodes",
}  # fmt: skip


def parse(argv: list[str]) -> dict[str, str]:
    """The options of `vllm serve MODEL …`; an unknown one ends the process with 2, as argparse does."""
    if argv[:1] in (["--version"], ["-v"]):
        print(VERSION)
        sys.exit(0)
    if argv[:1] != ["serve"]:
        usage(f"argument subparser: invalid choice: {argv[0] if argv else ''!r} (choose from 'serve')")
    found: dict[str, str] = {}
    words = argv[1:]
    while words:
        word = words.pop(0)
        if word.startswith("-"):
            name, value = _option(word, words)
            found[name] = value
        elif "model" in found:
            usage(f"unrecognized arguments: {word}")
        else:
            found["model"] = word
    for name, kind in NUMBERS.items():
        try:
            kind(found.get(name, "0"))
        except ValueError:
            usage(f"argument --{name}: invalid {kind.__name__} value: {found[name]!r}")
    return found


def _option(word: str, words: list[str]) -> tuple[str, str]:
    """One option and its value; what belongs to it is taken off `words`."""
    flag, equals, value = word.partition("=")
    if flag.startswith("-O") and flag[2:].isdigit():
        return "optimization-level", flag[2:]
    name = SHORT.get(flag, flag.removeprefix("--").replace("_", "-").split(".")[0])
    if name in SWITCHES or name.removeprefix("no-") in SWITCHES:
        return name, value or "true"
    if name not in VALUES and name not in LISTS:
        usage(f"unrecognized arguments: {word}")
    if not equals:
        if not words:
            usage(f"argument {flag}: expected one argument")
        value = words.pop(0)
    while name in LISTS and words and not words[0].startswith("-"):
        value += " " + words.pop(0)
    return name, value


def usage(message: str) -> NoReturn:
    """Refuse the command line."""
    print(f"usage: vllm serve [model_tag] [options]\nvllm: error: {message}", file=sys.stderr)
    sys.exit(2)

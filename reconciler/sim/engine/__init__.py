"""The simulated `vllm serve`: real processes, a real port, memory in the ledger, and the manners of vLLM 0.32-0.33.

Standard library only and started as `python -I -S …/engine/__main__.py`, so that a start costs milliseconds; hence
relative imports, and nothing from the rest of this project. Process tree: API server (`api`) → VLLM::EngineCore →
VLLM::Worker_TPn when there are several GPUs (`core`). What it does on signals, when a part dies, on a busy port or with
too little memory was measured on the real one. One difference on purpose: without `--host` it listens on the loopback
only, because a simulation should not open ports to the network.
"""

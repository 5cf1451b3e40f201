"""What vLLM calls in each of its processes (entry point `vllm.general_plugins`)."""

from __future__ import annotations


def register() -> None:
    """Makes artifacts known to vLLM; once or more often."""
    from counterweight.pipeline.serving.vllm.config import CounterweightConfig
    from counterweight.pipeline.serving.vllm.model_types import register_model_types

    CounterweightConfig.register()
    register_model_types()

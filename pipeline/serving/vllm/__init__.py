"""A plug-in for vLLM: `vllm serve ARTIFACT`. The only folder that imports vLLM, which finds `plugin.register` by its entry
point."""

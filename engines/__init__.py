"""Adapters to other people's systems: SGLang, megatron-core, and the weights that flow between them."""

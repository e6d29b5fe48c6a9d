"""A small byte-level language model, its training data, training and evaluation.

The benchmarks need real keys and values, text whose perplexity means something and
retrieval that can fail. This package trains such a model on text that every machine
with Python has, and measures it with any KV cache.
"""

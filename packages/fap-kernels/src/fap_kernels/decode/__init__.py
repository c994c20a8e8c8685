"""Attention of few queries to a long cache: split-KV kernel, combination, configuration table, launch."""

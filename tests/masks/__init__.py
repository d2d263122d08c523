"""Attention masks: read from a graph, written as reach or segments, never made."""

"""Deferred logits: what they say and give to whoever looks, and what a step of training makes of them."""

"""Every private part of torch that is called, each with the reason and the versions tried.

Everybody may import it and it imports nobody, so that a new version of torch is met in this room alone.
"""

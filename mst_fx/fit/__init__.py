"""What a training step would take on a device that is not there: bytes at its peak and seconds, from the shapes of a model.

``eager`` walks through the eager program, ``traced`` through the joint graph that mst-fx makes, of few layers, and puts together what as many
as there are take (``parts``, by what ``plan.peak`` says of each value). ``forecast`` asks both, and searches the longest sequence. No weights, no kernels, no device.
"""

"""The memory plan: what of the forward pass is kept for the backward pass, on the device or on the host, and what is made again.

It reads and changes the joint graph of both passes, of which it finds the layers (``joint_graph``, ``layers``), what each may keep and
what that costs (``choices``, ``groups``, ``costs``), how many bytes are alive when (``peak``, ``inside``), which choice each takes (``search``, ``solve``; for several ranks ``of_ranks``), and writes that down
(``recompute``, ``transfer``, ``unchunk``).
Nothing here knows a Dynamo graph, a row-wise proof or a pass.
"""

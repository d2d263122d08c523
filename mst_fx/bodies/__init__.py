"""A region as a function of one chunk of rows: traced to ATen, differentiated, compiled, put in a loop's place.

It imports ``rows`` and ``graph``. ``body`` is what a step may import; what traces and inserts bodies is for compile time.
"""

"""While a process imports, nothing becomes garbage: no collection looks for it until :func:`tests.quick.collections`, 1 s of 4."""

import gc

gc.disable()

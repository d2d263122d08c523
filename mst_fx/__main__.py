"""``python -m mst_fx``: the console script, where only ``python`` can be called, as by torchrun's ``-m``."""

from mst_fx.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

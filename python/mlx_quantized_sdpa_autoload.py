"""Adds the op to ``mx.fast`` when ``mlx.core`` is imported, by way of a .pth file.

It runs at every interpreter start, so it imports nothing beyond sys and os.
"""

import os
import sys

_OP = "quantized_scaled_dot_product_attention"


def _attach(fast):
    # The package loads at the first use of the name, not before: a broken or
    # mismatched build then costs one AttributeError, never `import mlx.core`.
    def __getattr__(name):
        if name == _OP:
            try:
                from mlx_quantized_sdpa import quantized_scaled_dot_product_attention

                return quantized_scaled_dot_product_attention
            except Exception as error:
                raise AttributeError(str(error)) from error
        raise AttributeError(f"module {fast.__name__!r} has no attribute {name!r}")

    if not hasattr(fast, _OP):
        fast.__getattr__ = __getattr__
        fast.__dir__ = lambda: sorted({_OP, *fast.__dict__})


class _Finder:
    """Finds mlx.core as everyone else would, then adds a step to its loading."""

    def find_spec(self, name, path=None, target=None):
        if name != "mlx.core":
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    self._wrap(spec.loader)
                    return spec
        return None

    @staticmethod
    def _wrap(loader):
        try:
            load = loader.exec_module

            def exec_module(module):
                load(module)
                try:
                    _attach(module.fast)
                except Exception:
                    pass

            loader.exec_module = exec_module
        except AttributeError:
            pass


if os.environ.get("MLX_QUANTIZED_SDPA_AUTOLOAD") != "0":
    if "mlx.core" not in sys.modules:
        sys.meta_path.insert(0, _Finder())

"""The installed package: how the op reaches mx.fast, what is refused, the types."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_quantized_sdpa
import numpy as np
import pytest
from mlx_quantized_sdpa import merge_attention

OP = "quantized_scaled_dot_product_attention"


def run_python(code, folder, path=None, **environment):
    """Runs code in a fresh interpreter; environment set to None is removed."""
    variables = {**os.environ, "PYTHONPATH": str(path or ""), **environment}
    variables = {name: value for name, value in variables.items() if value is not None}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True
    )


def output_of(code, folder, path=None, **environment):
    done = run_python(code, folder, path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


class TestAttachment:
    def test_import_attaches_the_op(self):
        op = mlx_quantized_sdpa.quantized_scaled_dot_product_attention
        mlx_quantized_sdpa.install()
        assert mx.fast.quantized_scaled_dot_product_attention is op
        assert op.__name__ == OP
        assert op.__doc__

    def test_mlx_alone_has_the_op_and_loads_it_at_first_use(self, tmp_path):
        code = f"""
import sys
import mlx.core as mx
print("mlx_quantized_sdpa" in sys.modules, "{OP}" in dir(mx.fast))
from mlx.core.fast import {OP} as op
import mlx_quantized_sdpa
print(op is mx.fast.{OP} is mlx_quantized_sdpa.{OP})
"""
        found = output_of(code, tmp_path, MLX_QUANTIZED_SDPA_AUTOLOAD=None)
        assert found == ["False", "True", "True"]

    def test_autoload_can_be_switched_off(self, tmp_path):
        code = f"""
import mlx.core as mx
print(hasattr(mx.fast, "{OP}"))
import mlx_quantized_sdpa
print(hasattr(mx.fast, "{OP}"))
"""
        found = output_of(code, tmp_path, MLX_QUANTIZED_SDPA_AUTOLOAD="0")
        assert found == ["False", "True"]

    def test_looking_for_mlx_does_not_use_up_the_hook(self, tmp_path):
        code = f"""
from importlib.util import find_spec
assert find_spec("mlx.core") and find_spec("mlx.core")
import mlx.core as mx
print(hasattr(mx.fast, "{OP}"))
"""
        assert output_of(code, tmp_path) == ["True"]

    def test_other_names_stay_unknown(self, tmp_path):
        code = """
import mlx.core as mx
try:
    mx.fast.no_such_op
except AttributeError as error:
    print(error)
"""
        found = " ".join(output_of(code, tmp_path))
        assert found == "module 'mlx.core.fast' has no attribute 'no_such_op'"

    def test_a_broken_package_leaves_mlx_whole(self, tmp_path):
        package = tmp_path / "path" / "mlx_quantized_sdpa"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('broken build')")
        code = f"""
import mlx.core as mx
print(mx.ones(2).sum().item(), hasattr(mx.fast, "{OP}"))
try:
    mx.fast.{OP}
except AttributeError as error:
    print(error)
"""
        found = output_of(code, tmp_path, path=package.parent)
        assert found == ["2.0", "False", "broken", "build"]


class TestMismatch:
    def test_another_mlx_is_refused_before_the_extension_loads(self, tmp_path):
        code = f"""
import sys
import mlx.core as mx
built_for = mx.__version__
mx.__version__ = "0.0.1"
try:
    import mlx_quantized_sdpa
except ImportError as error:
    assert f"built for MLX {{built_for}}, but MLX 0.0.1 is" in str(error), error
    print("refused")
print("mlx_quantized_sdpa._ext" in sys.modules, hasattr(mx.fast, "{OP}"))
"""
        assert output_of(code, tmp_path) == ["refused", "False", "False"]

    def test_another_nanobind_is_refused(self, tmp_path):
        code = """
import sys
import types
extension = types.ModuleType("mlx_quantized_sdpa._ext")
def refuse(dtype):
    raise TypeError("incompatible function arguments")
extension._shares_types_with_mlx = refuse
sys.modules[extension.__name__] = extension
try:
    import mlx_quantized_sdpa
except ImportError as error:
    assert "nanobind" in str(error), error
    print("refused")
"""
        assert output_of(code, tmp_path) == ["refused"]

    def test_the_wheel_requires_the_mlx_it_was_built_for(self):
        requirements = importlib.metadata.requires("mlx-quantized-sdpa")
        assert len(requirements) == 1
        assert requirements[0].endswith(f"=={mx.__version__}")
        version = importlib.metadata.version("mlx-quantized-sdpa")
        assert mlx_quantized_sdpa.__version__ == version

    def test_an_unknown_backend_is_refused(self):
        root = Path(__file__).parents[1]
        command = ["make", "--dry-run", "wheel", "BACKEND=rocm"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert done.returncode != 0
        assert "BACKEND must be cpu, cuda or metal; got rocm" in done.stderr


def test_the_examples_in_the_readme_run(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert examples
    code = "\n".join([*examples, "mx.eval(out, lse)", "print(*out.shape)"])
    if "mlx_lm" in code:
        pytest.importorskip("mlx_lm")
        weights = Path(__file__).parents[1] / "bench/recall_model/weights"
        code = code.replace('"bench/recall_model/weights"', repr(str(weights)))
    assert output_of(code, tmp_path)[-4:] == ["1", "32", "1", "128"]


class TestTypes:
    @pytest.fixture(autouse=True)
    def need_mypy(self):
        pytest.importorskip("mypy")

    def mypy(self, folder, *lines):
        source = folder / "example.py"
        header = (
            "import mlx.core as mx",
            "import mlx_quantized_sdpa as mq",
            "q = mx.zeros((1, 4, 1, 64))",
        )
        source.write_text("\n".join([*header, *lines]) + "\n")
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir"]
        command += [str(folder / "cache"), source.name]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        return done.stdout

    def test_correct_use_passes(self, tmp_path):
        found = self.mypy(
            tmp_path,
            "codes, scales = mq.turbo_quantize(q, 4)",
            "out = mx.fast.quantized_scaled_dot_product_attention(",
            "    q, codes, scales, codes, scales, scale=0.1, mode='turbo4')",
            "mq.turbo_dequantize(codes, scales, 4, mq.turbo_codebook(4), mx.float16)",
            "out.shape",
            "out, lse = mx.fast.quantized_scaled_dot_product_attention(",
            "    q, codes, scales, None, codes, scales, None, mode='turbo4',",
            "    scale=0.1, return_lse=True)",
            "out, lse = mq.merge_attention([out, q], [lse, q[..., 0]])",
            "mx.linalg.norm(q)",
            "mq.install()",
        )
        assert found.startswith("Success"), found

    def test_the_package_itself_passes(self, tmp_path):
        command = [sys.executable, "-m", "mypy", "--strict"]
        # Whole: what is only followed to from a module named here is not reported.
        command += ["--cache-dir", str(tmp_path / "cache"), "-p", "mlx_quantized_sdpa"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.stdout.startswith("Success"), done.stdout

    @pytest.mark.parametrize("module", ["mx.fast", "mq"])
    def test_wrong_use_is_seen(self, tmp_path, module):
        found = self.mypy(tmp_path, f"{module}.{OP}(q, q, q, q, q, scael=1.0)")
        assert "scael" in found or "No overload variant" in found
        assert "attr-defined" not in found
        assert "example.py:4: error" in found


def attention(q, k, v):
    """Attention and its log-sum-exp in float64."""
    scores = q @ k.swapaxes(-1, -2)
    lse = np.logaddexp.reduce(scores, axis=-1)
    return np.exp(scores - lse[..., None]) @ v, lse


class TestMergeAttention:
    @pytest.fixture
    def parts(self):
        rng = np.random.default_rng(0)
        q = rng.normal(size=(2, 3, 5, 8))
        k, v = rng.normal(size=(2, 2, 3, 60, 8)) * 4
        cuts = [(0, 7), (7, 8), (8, 60)]
        found = [attention(q, k[..., a:b, :], v[..., a:b, :]) for a, b in cuts]
        outs = [mx.array(out.astype(np.float32)) for out, _ in found]
        lses = [mx.array(lse.astype(np.float32)) for _, lse in found]
        return outs, lses, attention(q, k, v)

    def test_parts_merge_into_the_whole(self, parts):
        outs, lses, (wanted, wanted_lse) = parts
        for merge in (merge_attention, mx.compile(merge_attention)):
            out, lse = merge(outs, lses)
            np.testing.assert_allclose(np.array(out), wanted, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(np.array(lse), wanted_lse, rtol=1e-6)

    def test_merging_is_associative(self, parts):
        outs, lses, (wanted, wanted_lse) = parts
        out, lse = merge_attention(outs[:2], lses[:2])
        out, lse = merge_attention([out, outs[2]], [lse, lses[2]])
        np.testing.assert_allclose(np.array(out), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.array(lse), wanted_lse, rtol=1e-6)

    def test_a_part_without_keys_counts_for_nothing(self, parts):
        outs, lses, _ = parts
        empty = mx.full(lses[0].shape, -mx.inf)
        out, lse = merge_attention([outs[0], mx.zeros_like(outs[0])], [lses[0], empty])
        assert mx.allclose(out, outs[0])
        assert mx.allclose(lse, lses[0])

    def test_rows_without_any_key_stay_zero(self, parts):
        outs, lses, _ = parts
        zeros = mx.zeros_like(outs[0])
        empty = mx.full(lses[0].shape, -mx.inf)
        out, lse = merge_attention([zeros, zeros], [empty, empty])
        assert mx.array_equal(out, zeros)
        assert mx.array_equal(lse, empty)

    def test_large_scores_do_not_overflow(self, parts):
        outs, lses, _ = parts
        out, lse = merge_attention(outs[:2], [lses[0] + 1e4, lses[1] - 1e4])
        assert mx.allclose(out, outs[0])
        assert mx.allclose(lse, lses[0] + 1e4)

    @pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
    def test_result_has_the_type_of_the_parts(self, parts, dtype):
        outs, lses, (wanted, _) = parts
        out, lse = merge_attention([x.astype(dtype) for x in outs], lses)
        assert (out.dtype, lse.dtype) == (dtype, mx.float32)
        found = np.array(out.astype(mx.float32))
        np.testing.assert_allclose(found, wanted, atol=0.1)

    def test_parts_that_do_not_fit_are_refused(self, parts):
        outs, lses, _ = parts
        with pytest.raises(ValueError, match="must be as many.*got 3 and 2"):
            merge_attention(outs, lses[:2])
        with pytest.raises(ValueError, match="at least one; got 0 and 0"):
            merge_attention([], [])
        with pytest.raises(ValueError, match=r"every part.*\(2, 3, 5\).*got"):
            merge_attention(outs[:1], [lses[0][..., None]])

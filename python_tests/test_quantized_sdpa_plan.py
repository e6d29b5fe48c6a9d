"""The plan and the codecs alone, by tables: neither runs attention."""

import itertools
import unittest

import mlx.core as mx
import numpy as np
from mlx_quantized_sdpa import _ext, turbo_codebook


def problem(**sizes):
    return _ext._problem(**sizes)


class TestCudaPrefillPlan(unittest.TestCase):
    def plan(self, sizes, **device):
        return _ext._plan_cuda_prefill(problem(**{"q_len": 512, **sizes}), **device)

    def test_kernels(self):
        table = [
            (dict(), {}, "wgmma"),
            (dict(k_dim=64, v_dim=64), {}, "wgmma"),
            (dict(), dict(bent=True), "wgmma"),
            # Few queries, and head dims that are not whole units of 32 codes.
            (dict(q_len=32), {}, "none"),
            (dict(q_len=33), {}, "wgmma"),
            (dict(k_dim=80, v_dim=80), {}, "none"),
            (dict(k_dim=576, v_dim=512), {}, "none"),
            # What only mma.sync serves.
            (dict(half_precision=False), {}, "mma"),
            (dict(k_dim=96, v_dim=96), {}, "mma"),
            (dict(k_dim=64), {}, "mma"),
            (dict(k_dim=512, v_dim=512), {}, "mma"),
            (dict(), dict(wide_rows=False), "mma"),
            (dict(), dict(compute_capability=80, shared_bytes=166912), "mma"),
            (dict(), dict(compute_capability=120, shared_bytes=101376), "mma"),
            # Too little shared memory for float32 in two parts.
            (
                dict(k_dim=512, v_dim=512, half_precision=False),
                dict(compute_capability=120, shared_bytes=101376),
                "none",
            ),
        ]
        for sizes, device, kernel in table:
            with self.subTest(**sizes, **device):
                self.assertEqual(self.plan(sizes, **device)[0], kernel)

    def test_work(self):
        heads = dict(n_q_heads=32, n_kv_heads=8)
        table = [
            # sizes: blocks of rows, splits of the keys
            (dict(kv_len=32768), 16, 1),
            (dict(kv_len=32768, q_len=64), 2, 8),
            (dict(kv_len=256, q_len=64), 2, 1),
            (dict(kv_len=0, q_len=33), 2, 1),
            (dict(kv_len=131072, q_len=512, batch=8), 16, 1),
            (dict(kv_len=131072, n_kv_heads=1, n_q_heads=1, q_len=128), 1, 16),
        ]
        for sizes, row_blocks, splits in table:
            with self.subTest(**sizes):
                plan = self.plan({**heads, **sizes})
                self.assertEqual(plan[3:], (row_blocks, splits))

    def test_bent_scores_take_smaller_tiles(self):
        self.assertEqual(self.plan({})[1], 128)
        self.assertEqual(self.plan({}, bent=True)[1], 64)


class TestPlan(unittest.TestCase):
    def test_kernels(self):
        table = [
            # Half precision with integer kernels: few rows stay in float32.
            (dict(n_q_heads=8), True, "vector"),
            (dict(n_q_heads=16), True, "vector"),
            (dict(n_q_heads=24), True, "integer"),
            (dict(n_q_heads=32), True, "integer"),
            (dict(q_len=512), True, "integer"),
            # No integer kernel for the format, the type or the head dim.
            (dict(n_q_heads=32), False, "vector"),
            (dict(n_q_heads=40), False, "tile"),
            (dict(half_precision=False), True, "vector"),
            (dict(half_precision=False, q_len=2), True, "tile"),
            (dict(k_dim=80, v_dim=80), True, "vector"),
            (dict(v_dim=48, q_len=9), True, "tile"),
            (dict(k_dim=48, q_len=9), True, "tile"),
        ]
        for sizes, has_integer, kernel in table:
            with self.subTest(**sizes, has_integer=has_integer):
                plan = _ext._plan_cpu(problem(**sizes), has_integer)
                self.assertEqual(plan[0], kernel)

    def test_row_blocks(self):
        table = [(1, 4, 1), (8, 32, 1), (24, 96, 1), (25, 96, 2), (512, 96, 22)]
        for q_len, block, n_blocks in table:
            with self.subTest(q_len=q_len):
                plan = _ext._plan_cpu(problem(q_len=q_len))
                self.assertEqual(plan[1:3], (block, n_blocks))

    def test_key_chunks(self):
        # Eight pieces for each thread, over 8 KV heads and the blocks of rows.
        table = [
            # threads, q_len, kv_len, keys a chunk, chunks
            (2, 1, 0, 512, 1),
            (2, 1, 1, 512, 1),
            (2, 1, 512, 512, 1),
            (2, 1, 513, 512, 2),
            (2, 1, 1025, 576, 2),
            (2, 1, 16384, 8192, 2),
            (2, 1, 16385, 8256, 2),
            (1, 1, 16384, 16384, 1),
            (3, 1, 16384, 5504, 3),
            (16, 1, 16384, 1024, 16),
            (64, 1, 16384, 512, 32),
            (64, 1, 131072, 4096, 32),
            (4, 32, 4096, 2048, 2),
            # Enough rows to fill the threads without splitting the keys.
            (64, 33, 4096, 4096, 1),
            (64, 512, 131072, 131072, 1),
        ]
        for threads, q_len, kv_len, chunk, n_chunks in table:
            with self.subTest(threads=threads, q_len=q_len, kv_len=kv_len):
                sizes = problem(q_len=q_len, kv_len=kv_len)
                plan = _ext._plan_cpu(sizes, threads=threads)
                self.assertEqual(plan[3:], (chunk, n_chunks))

    def test_one_kv_head_is_split_for_all_threads(self):
        for threads, n_chunks in ((1, 8), (2, 16), (4, 32), (64, 32)):
            sizes = problem(n_q_heads=4, n_kv_heads=1, kv_len=65536)
            plan = _ext._plan_cpu(sizes, threads=threads)
            self.assertEqual(plan[4], n_chunks)

    def test_chunks_cover_the_keys(self):
        lengths = [*range(1, 3000, 37), 8191, 8192, 8193, 100_003, 2**31 - 1]
        for kv_len, threads in itertools.product(lengths, (1, 2, 64)):
            plan = _ext._plan_cpu(problem(kv_len=kv_len), threads=threads)
            chunk, n_chunks = plan[3:]
            self.assertGreaterEqual(chunk * n_chunks, kv_len)
            self.assertLess(chunk * (n_chunks - 1), kv_len)
            self.assertTrue(n_chunks == 1 or chunk % 64 == 0)

    def test_plan_does_not_depend_on_the_batch(self):
        for q_len in (1, 9, 512):
            alone = _ext._plan_cpu(problem(q_len=q_len))
            self.assertEqual(alone, _ext._plan_cpu(problem(q_len=q_len, batch=64)))

    def test_partial_results_do_not_grow_with_the_batch(self):
        latent = dict(n_q_heads=128, n_kv_heads=1, k_dim=576, v_dim=512, kv_len=16384)
        table = [
            # threads, sizes, groups at once, of how many
            (2, dict(kv_len=512), 1, 8),
            (2, dict(), 8, 8),
            (2, dict(batch=64), 512, 512),
            (2, dict(batch=8192), 4032, 65536),
            (16, latent, 2, 2),
            (16, dict(latent, batch=1024), 2, 2048),
            (64, dict(latent, batch=1024), 5, 2048),
        ]
        for threads, sizes, at_once, n_groups in table:
            with self.subTest(threads=threads, **sizes):
                asked = problem(**sizes)
                self.assertEqual(_ext._cpu_groups_at_once(asked, threads), at_once)
                plan = _ext._plan_cpu(asked, threads=threads)
                heads = sizes.get("n_kv_heads", 8) * sizes.get("batch", 1)
                self.assertEqual(heads * plan[2], n_groups)

    def test_threads(self):
        self.assertEqual(_ext._cpu_threads(problem(kv_len=16), 8), 1)
        self.assertEqual(_ext._cpu_threads(problem(kv_len=128), 8), 3)
        self.assertEqual(_ext._cpu_threads(problem(kv_len=4096), 8), 8)
        self.assertEqual(_ext._cpu_threads(problem(kv_len=2**30), 64), 64)

    def test_fallback_chunks(self):
        table = [
            (dict(), 0, 1024),
            (dict(kv_len=0), 0, 1),
            (dict(kv_len=5), 0, 5),
            (dict(q_len=16), 0, 512),
            (dict(q_len=512), 0, 128),
            (dict(kv_len=4100), 100, 1100),
            (dict(kv_len=6000), 3000, 1000),
            (dict(kv_len=8205), 1641, 821),
            (dict(kv_len=131072, q_len=512), 131072, 128),
        ]
        for sizes, block_size, keys in table:
            with self.subTest(**sizes, block_size=block_size):
                found = _ext._fallback_chunk(problem(**sizes), block_size)
                self.assertEqual(found, keys)

    def test_unsupported_reasons(self):
        self.assertEqual(_ext._unsupported_reason(problem(), "cpu"), "")
        self.assertEqual(_ext._unsupported_reason(problem(k_dim=1024), "cpu"), "")
        for dim in (24, 1040):
            reason = _ext._unsupported_reason(problem(v_dim=dim), "cpu")
            self.assertIn(f"a head dim of {dim}", reason)
        self.assertEqual(_ext._unsupported_reason(problem(), "metal"), "")
        self.assertEqual(_ext._unsupported_reason(problem(k_dim=512), "metal"), "")
        for dim in (72, 528):
            reason = _ext._unsupported_reason(problem(v_dim=dim), "metal")
            self.assertIn(f"a head dim of {dim}; the Metal kernels take", reason)
        for backend, word in (("cuda", "CUDA"), ("none", "GPU")):
            self.assertIn(word, _ext._unsupported_reason(problem(), backend))


class TestCudaPlan(unittest.TestCase):
    def plan(self, options=None, **sizes):
        names = ("shape", "row_blocks", "splits", "blocks", "bytes")
        return dict(zip(names, _ext._plan_cuda(problem(**sizes), **(options or {}))))

    def test_splits(self):
        """One tile a warp while that fits, then an even number of blocks a group."""
        table = [
            # batch, kv_len, blocks a group, blocks
            (1, 0, 1, 8),
            (1, 65, 1, 8),
            (1, 257, 2, 16),
            (1, 4096, 16, 128),
            (1, 131072, 16, 128),
            (3, 32768, 5, 120),
            (5, 32768, 3, 120),
            (8, 32768, 2, 128),
            # Where too many multiprocessors would idle, all blocks share all tiles.
            (6, 32768, 0, 132),
            (32, 4096, 0, 132),
        ]
        for batch, kv_len, splits, blocks in table:
            with self.subTest(batch=batch, kv_len=kv_len):
                plan = self.plan(batch=batch, kv_len=kv_len)
                self.assertEqual((plan["splits"], plan["blocks"]), (splits, blocks))

    def test_ragged_sequences_share_all_tiles(self):
        """Unless there is a warp for every tile."""
        ragged = {"ragged": True}
        for sizes, splits in (
            (dict(batch=8, kv_len=32768), 0),
            (dict(batch=1, kv_len=4096), 16),
            (dict(batch=4, kv_len=129), 1),
        ):
            self.assertEqual(self.plan(ragged, **sizes)["splits"], splits)

    def test_short_sequences_do_not_depend_on_the_batch(self):
        for kv_len in (1, 129, 1025):
            alone = self.plan(n_q_heads=4, n_kv_heads=2, kv_len=kv_len)
            batch = self.plan(n_q_heads=4, n_kv_heads=2, kv_len=kv_len, batch=3)
            for name in ("shape", "splits"):
                self.assertEqual(alone[name], batch[name])

    def test_rows(self):
        table = [
            # sizes, row tiles, groups of a KV head
            (dict(n_q_heads=8), 1, 1),
            (dict(n_q_heads=64), 1, 1),
            (dict(n_q_heads=128), 2, 1),
            (dict(q_len=3), 2, 1),
            (dict(q_len=8), 2, 2),
            (dict(q_len=32), 2, 8),
            (dict(q_len=8, v_dim=256), 2, 2),
            # The output of more rows would not stay in registers.
            (dict(q_len=8, v_dim=512), 1, 4),
        ]
        for sizes, tiles, blocks in table:
            with self.subTest(**sizes):
                plan = self.plan(**sizes)
                self.assertEqual(
                    (plan["shape"][3], plan["row_blocks"]), (tiles, blocks)
                )

    def test_shared_memory(self):
        """Smaller tiles, then fewer warps: what a launch asks for, the device has."""
        table = [
            (232448, 128, (8, 3, 32)),
            (232448, 512, (8, 3, 16)),
            (166912, 512, (8, 2, 16)),
            (101376, 128, (8, 3, 16)),
            (101376, 512, (4, 2, 16)),
        ]
        for limit, dim, shape in table:
            with self.subTest(limit=limit, dim=dim):
                plan = self.plan({"shared_bytes": limit}, k_dim=dim, v_dim=dim)
                self.assertEqual(plan["shape"][:3], shape)
                self.assertLessEqual(plan["bytes"], limit)

    def test_window(self):
        plan = self.plan({"window_size": 1024}, kv_len=131072)
        self.assertEqual(plan["splits"], 5)


THREE = ("affine", 3, 64)


class TestMetalPlan(unittest.TestCase):
    def plan(self, architecture="applegpu_g16s", visible_keys=None, **sizes):
        p = problem(**sizes)
        keys = p.kv_len if visible_keys is None else visible_keys
        names = ("kernel", "rows", "keys", "simdgroups", "n_row_blocks", "n_splits")
        return dict(zip(names, _ext._plan_metal(p, keys, architecture)))

    def test_rows(self):
        """All rows of a KV head meet a decoded code where registers allow it."""
        table = [
            (dict(n_q_heads=8), "vector", 1, 1),
            (dict(n_q_heads=16), "vector", 2, 1),
            (dict(n_q_heads=24), "vector", 4, 1),
            (dict(n_q_heads=32), "vector", 4, 1),
            (dict(n_q_heads=64), "vector", 8, 1),
            (dict(n_q_heads=8, q_len=8), "vector", 8, 1),
            (dict(n_q_heads=72), "steel", 16, 1),
            (dict(q_len=4), "steel", 16, 1),
            (dict(q_len=5), "steel", 32, 1),
            (dict(q_len=8), "steel", 32, 1),
            (dict(q_len=9), "steel", 64, 1),
            (dict(q_len=17), "steel", 64, 2),
            (dict(q_len=512), "steel", 64, 32),
            # Wider types take more registers.
            (dict(n_q_heads=64, half_precision=False), "steel", 16, 1),
            # Whole words of few rows, which take more of them in float32.
            (dict(n_q_heads=16, k_format=THREE, v_format=THREE), "vector", 2, 1),
            (
                dict(
                    n_q_heads=16,
                    k_format=THREE,
                    v_format=THREE,
                    half_precision=False,
                ),
                "vector",
                4,
                1,
            ),
            (dict(n_q_heads=24, k_format=THREE, v_format=THREE), "vector", 4, 1),
            (dict(n_q_heads=64, k_format=THREE, v_format=THREE), "vector", 8, 1),
            # No tile of such head dims fits.
            (dict(q_len=512, k_dim=512, v_dim=512), "vector", 4, 512),
        ]
        for sizes, kernel, rows, n_blocks in table:
            with self.subTest(**sizes):
                plan = self.plan(**sizes)
                found = plan["kernel"], plan["rows"], plan["n_row_blocks"]
                self.assertEqual(found, (kernel, rows, n_blocks))

    def test_tiles(self):
        for dim, keys in ((64, 32), (80, 32), (96, 32), (128, 32), (256, 16)):
            with self.subTest(dim=dim):
                plan = self.plan(q_len=512, k_dim=dim, v_dim=dim)
                self.assertEqual(plan["keys"], keys)
                self.assertEqual(plan["simdgroups"] * 8, plan["rows"])
        # Values of float32 and a codebook's levels take twice the room.
        for dim, keys in ((64, 32), (128, 16), (256, 8)):
            sizes = dict(q_len=512, k_dim=dim, v_dim=dim, half_precision=False)
            self.assertEqual(self.plan(**sizes)["keys"], keys)
        turbo = ("turbo", 4, 128)
        plan = self.plan(q_len=512, k_format=turbo, v_format=turbo)
        self.assertEqual(plan["keys"], 16)

    def test_splits(self):
        table = [
            # architecture, visible keys, splits of 8 KV heads with one row
            ("applegpu_g16s", 0, 1),
            ("applegpu_g16s", 511, 1),
            ("applegpu_g16s", 512, 2),
            ("applegpu_g16s", 4096, 16),
            ("applegpu_g17p", 1 << 20, 4),
            ("applegpu_g16g", 1 << 20, 15),
            ("applegpu_g16s", 1 << 20, 30),
            ("applegpu_g15d", 1 << 20, 60),
            ("", 1 << 20, 15),
        ]
        for architecture, keys, splits in table:
            with self.subTest(architecture=architecture, keys=keys):
                plan = self.plan(architecture, kv_len=keys)
                self.assertEqual(plan["n_splits"], splits)

    def test_few_visible_keys_are_not_split(self):
        self.assertEqual(self.plan(kv_len=1 << 17, visible_keys=300)["n_splits"], 1)

    def test_enough_groups_are_not_split(self):
        self.assertEqual(self.plan(kv_len=1 << 17, q_len=2048)["n_splits"], 1)
        self.assertEqual(self.plan(kv_len=1 << 17, batch=64)["n_splits"], 1)


class TestMetalNames(unittest.TestCase):
    def test_kernel(self):
        name, line = _ext._metal_kernel(
            "vector",
            "float16",
            ("affine", 4, 64, 128, "float16", "float32"),
            ("turbo", 3, 96, 96, "bfloat16", "bfloat16"),
            4,
            128,
        )
        self.assertEqual(
            name,
            "quantized_sdpa_vector_float16_k_affine4_64_128_float16_float32"
            "_v_turbo3_96_96_bfloat16_rows4",
        )
        function = (
            "quantized_sdpa_vector<half, mlx::core::quantized_sdpa::KVOperand<"
            "mlx::core::kv::Affine<4, 64>, half, float, 128>, "
            "mlx::core::quantized_sdpa::KVOperand<"
            "mlx::core::kv::Turbo<3>, bfloat, bfloat, 96>, 4>"
        )
        self.assertEqual(
            line,
            f'\ntemplate [[host_name("{name}")]] [[kernel]] '
            f"decltype({function}) {function};\n",
        )

    def test_every_choice_shows(self):
        base = dict(
            kernel="steel",
            type="float16",
            k=("affine", 4, 64, 128, "float16", "float16"),
            v=("mxfp8", 8, 32, 128, "uint8", "uint8"),
            rows=32,
            keys=32,
        )
        changes = [
            dict(type="bfloat16"),
            dict(k=("affine", 8, 64, 128, "float16", "float16")),
            dict(k=("affine", 4, 32, 128, "float16", "float16")),
            dict(k=("affine", 4, 64, 64, "float16", "float16")),
            dict(k=("affine", 4, 64, 128, "float32", "float16")),
            dict(k=("affine", 4, 64, 128, "float16", "float32")),
            dict(v=("mxfp4", 4, 32, 128, "uint8", "uint8")),
            dict(rows=64),
            dict(keys=16),
        ]
        names = [_ext._metal_kernel(*{**base, **c}.values()) for c in [{}, *changes]]
        for part in zip(*names):
            self.assertEqual(len(set(part)), len(changes) + 1)

    def test_merge(self):
        name, line = _ext._metal_merge_kernel("bfloat16", 96)
        self.assertEqual(name, "quantized_sdpa_merge_bfloat16_96")
        self.assertIn("quantized_sdpa_merge<bfloat, 96>", line)

    def test_prebuilt(self):
        """Each is what a plan asks for."""
        wanted = set()
        formats = {
            "affine4": ("affine", 4, 64),
            "affine8": ("affine", 8, 64),
            "mxfp8": ("mxfp8", 8, 32),
        }
        pairs = ("affine8 affine8", "affine4 affine4", "affine8 affine4", "mxfp8 mxfp8")
        blocks = [("vector", rows) for rows in (1, 2, 4, 8)]
        blocks += [("steel", rows) for rows in (16, 32, 64)]
        for dtype, dim in itertools.product(("float16", "bfloat16"), (64, 128, 256)):
            wanted.add(_ext._metal_merge_kernel(dtype, dim)[0])
            for pair, (kernel, rows) in itertools.product(pairs, blocks):
                k, v = (
                    (*formats[x], dim, *2 * (["uint8"] if x == "mxfp8" else [dtype]))
                    for x in pair.split()
                )
                p = problem(n_q_heads=rows, n_kv_heads=1, k_dim=dim, v_dim=dim)
                plan = _ext._plan_metal(p, p.kv_len, "")
                self.assertEqual(plan[:2], (kernel, rows))
                wanted.add(_ext._metal_kernel(kernel, dtype, k, v, rows, plan[2])[0])
        self.assertEqual(set(_ext._metal_prebuilt_names()), wanted)


class TestCodecs(unittest.TestCase):
    """Every code of every format, by the codec's own decode."""

    def packs(self, bits, n_codes):
        """All codes of `bits` bits, `n_codes` to an integer, LSB first."""
        codes = list(range(1 << bits))
        size = -(-len(codes) // n_codes) * n_codes
        codes = (codes * n_codes)[:size]
        for start in range(0, len(codes), n_codes):
            part = codes[start : start + n_codes]
            yield part, sum(code << (bits * i) for i, code in enumerate(part))

    def test_packs_hold_whole_codes_in_whole_bytes(self):
        for name, bits, n_bytes, n_codes in _ext._list_codecs():
            with self.subTest(codec=name):
                self.assertEqual(n_bytes * 8, n_codes * bits)

    def test_codes_and_indices(self):
        for name, bits, _, n_codes in _ext._list_codecs():
            if not name.startswith(("affine", "turbo")):
                continue
            for codes, pack in self.packs(bits, n_codes):
                found = [_ext._decode_code(name, pack, i) for i in range(n_codes)]
                self.assertEqual(found, codes)

    def test_small_floats_as_mlx_reads_them(self):
        for mode, group_size, one in (
            ("mxfp4", 32, 127),
            ("mxfp8", 32, 127),
            ("nvfp4", 16, 0x38),
        ):
            ((_, bits, _, n_codes),) = [c for c in _ext._list_codecs() if c[0] == mode]
            n = max(1 << bits, group_size)
            words = [pack for _, pack in self.packs(bits, n_codes)]
            words = (words * n)[: n // n_codes]
            found = [
                _ext._decode_code(mode, w, i) for w in words for i in range(n_codes)
            ]
            # Four rows: MLX takes scales of fp formats by fours only.
            wanted = mx.dequantize(
                mx.array([words] * 4, dtype=mx.uint32),
                mx.full((4, n // group_size), one, dtype=mx.uint8),
                group_size=group_size,
                bits=bits,
                mode=mode,
                dtype=mx.float32,
            )
            with self.subTest(mode=mode):
                np.testing.assert_array_equal(np.array(wanted)[0], np.float32(found))

    def test_levels_are_those_of_the_package(self):
        for bits in (2, 3, 4):
            levels = np.float32(_ext._lloyd_max_levels(bits))
            np.testing.assert_allclose(
                levels, np.array(turbo_codebook(bits)), rtol=1e-6
            )
        with self.assertRaisesRegex(ValueError, "bits must lie between 1 and 4; got 9"):
            _ext._lloyd_max_levels(9)


if __name__ == "__main__":
    unittest.main()

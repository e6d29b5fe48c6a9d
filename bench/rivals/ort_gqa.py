"""ONNX Runtime's GroupQueryAttention over an int8 cache, one scale an operand."""

import numpy as np
from rivals.prepared import Absent, Prepared, calls_over, copies_for, to_heads

try:
    import onnxruntime as ort
    from onnx import TensorProto, helper
except ImportError as error:
    raise Absent(f"onnxruntime and onnx: {error}") from error

CODE_LIMIT = 127
TOLERANCE = 1e-9
DOMAIN = "com.microsoft"
F32, I32, I8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT8


def tensor(name, element, size):
    return helper.make_tensor_value_info(name, element, size)


def make_model(shape):
    """One node. Its inputs without a name are rotary tables, masks and the like."""
    names = ["q", "k", "v", "past_k", "past_v", "last", "total"]
    names += [""] * 5 + ["k_scale", "v_scale"]
    node = helper.make_node(
        "GroupQueryAttention",
        names,
        ["out", "next_k", "next_v"],
        domain=DOMAIN,
        num_heads=shape.q_heads,
        kv_num_heads=shape.kv_heads,
        scale=shape.scale,
        k_quant_type="PER_TENSOR",
        v_quant_type="PER_TENSOR",
        kv_cache_bit_width=8,
    )
    q_width = shape.q_heads * shape.head_dim
    kv_width = shape.kv_heads * shape.head_dim
    cache = [1, shape.kv_heads, shape.kv_len, shape.head_dim]
    inputs = [tensor("q", F32, [1, shape.q_len, q_width])]
    inputs += [tensor(x, F32, [1, shape.q_len, kv_width]) for x in "kv"]
    inputs += [tensor(x, I8, cache) for x in ("past_k", "past_v")]
    inputs += [tensor("last", I32, [1]), tensor("total", I32, [1])]
    inputs += [tensor(x, F32, [1]) for x in ("k_scale", "v_scale")]
    outputs = [tensor("out", F32, [1, shape.q_len, q_width])]
    outputs += [tensor(x, I8, cache) for x in ("next_k", "next_v")]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(DOMAIN, 1)]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return model.SerializeToString()


def make_session(shape, threads):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(
        make_model(shape), options, providers=["CPUExecutionProvider"]
    )


def quantize(x):
    scale = np.float32(np.abs(x).max() / CODE_LIMIT)
    codes = np.clip(np.rint(x / scale), -CODE_LIMIT - 1, CODE_LIMIT)
    return codes.astype(np.int8), scale


def rows(x, q_len):
    """The last rows of every head, side by side: ``[1, q_len, heads * dim]``."""
    last = x[:, x.shape[1] - q_len :]
    return np.ascontiguousarray(last.transpose(1, 0, 2)).reshape(1, q_len, -1)


def bind(session, feeds, k_codes, v_codes):
    """The call also appends its own keys and values: the present cache is bound onto
    the past one, whose last rows hold the same values already."""
    binding = session.io_binding()
    value = ort.OrtValue.ortvalue_from_numpy
    caches = {"k": value(k_codes[None].copy()), "v": value(v_codes[None].copy())}
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, value(array))
    binding.bind_output("out")
    for name, cache in caches.items():
        binding.bind_ortvalue_input(f"past_{name}", cache)
        binding.bind_ortvalue_output(f"next_{name}", cache)
    return binding


def prepare(entry, inputs, threads, cold):
    shape = entry.shape
    session = make_session(shape, threads)
    (k_codes, k_scale), (v_codes, v_scale) = quantize(inputs.k), quantize(inputs.v)
    feeds = {
        "q": rows(inputs.q, shape.q_len),
        "k": rows(inputs.k, shape.q_len),
        "v": rows(inputs.v, shape.q_len),
        "last": np.array([shape.kv_len - 1], dtype=np.int32),
        "total": np.array([shape.kv_len], dtype=np.int32),
        "k_scale": np.array([k_scale]),
        "v_scale": np.array([v_scale]),
    }
    kv_bytes = k_codes.nbytes + v_codes.nbytes
    count = copies_for(kv_bytes, cold)
    bindings = [bind(session, feeds, k_codes, v_codes) for _ in range(count)]
    run = calls_over(session.run_with_iobinding, bindings)

    def output():
        session.run_with_iobinding(bindings[0])
        return to_heads(bindings[0].get_outputs()[0].numpy(), shape)

    def values():
        return inputs.q, k_codes * k_scale, v_codes * v_scale

    return Prepared(run, output, values, kv_bytes, TOLERANCE)


RIVALS = {"onnxruntime_gqa": prepare}

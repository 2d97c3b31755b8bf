"""On a GPU with TensorRT 11: an engine carries the experts' kernels inside and computes what torch does."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
trt = pytest.importorskip("tensorrt")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from step35_trt.dialects.tensorrt_interfaces import Layer, interface  # noqa: E402 - after the skip
from step35_trt.dialects.tensorrt_plugins import KernelPlugin, register  # noqa: E402
from step35_trt.dialects.torch_kernels import present_target  # noqa: E402
from step35_trt.kernels import plugin, tactics  # noqa: E402
from step35_trt.kernels.catalogue import deployment  # noqa: E402
from step35_trt.kernels.compile import compile_kernels  # noqa: E402
from step35_trt.kernels.workloads import published  # noqa: E402

DEVICE = torch.device("cuda")
TOKENS, LIMIT = 4, 7.0


def test_an_engine_runs_the_experts() -> None:
    import tensorrt.plugin

    target, config = present_target(DEVICE), published().config
    launch, weights = plugin.load("sparse_moe", "launch"), plugin.load("sparse_moe", "weights")
    entries = tactics.load("sparse_moe", target.capability).entries
    geometry = plugin.load("sparse_moe", "geometry").Geometry(
        config.moe_num_experts,
        config.moe_top_k,
        config.hidden_size,
        config.moe_intermediate_size,
        config.moe_router_scaling_factor,
        "bf16",
    )
    layer = Layer(geometry.stack, (launch.limit_bits(LIMIT), launch.limit_bits(0.0)))
    wanted = ("route_logits", "few_gate_up", "few_down")
    variants = [
        v
        for v in deployment(config, target, ("sparse_moe",))
        if v.function in wanted
        and "*fp8e4nv" not in v.signature.values()
        and "*i16" not in v.signature.values()
    ]
    made = {
        k.variant.function: KernelPlugin(k, interface(k.variant, layer))
        for k in compile_kernels(variants, target)
    }
    ops = {name: register(one, trt).split("::")[1] for name, one in made.items()}

    def stack(n: int, k: int) -> torch.Tensor:
        return (torch.randn(geometry.stack, n, k, device=DEVICE) * k**-0.5).to(torch.bfloat16)

    gate, up = stack(geometry.inner, geometry.hidden), stack(geometry.inner, geometry.hidden)
    down = stack(geometry.hidden, geometry.inner)
    tensors = {
        "logits": torch.randn(TOKENS, geometry.experts, device=DEVICE),
        "bias": 0.1 * torch.randn(geometry.experts, device=DEVICE),
        "x": torch.randn(TOKENS, geometry.hidden, device=DEVICE).to(torch.bfloat16),
        "gate": gate,
        "up": up,
        "down": down,
    }
    builder = trt.Builder(trt.Logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    types = {torch.float32: trt.float32, torch.bfloat16: trt.bfloat16}
    handles = {name: network.add_input(name, types[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    step35 = tensorrt.plugin.op.step35

    def add(kernel: str, *arguments: str) -> list[object]:
        call = getattr(step35, ops[kernel])(*(handles[name] for name in arguments))
        found = network.add_plugin(call, aot=True)
        return [found.get_output(i) for i in range(found.num_outputs)]

    handles["ids"], handles["mix"] = add("route_logits", "logits", "bias")
    [handles["hidden"]] = add("few_gate_up", "x", "ids", "gate", "gate", "up", "up")
    [y] = add("few_down", "hidden", "ids", "mix", "down", "down")
    y.name = "y"
    network.mark_output(y)
    engine = trt.Runtime(trt.Logger()).deserialize_cuda_engine(
        builder.build_serialized_network(network, builder.create_builder_config())
    )
    context = engine.create_execution_context()
    out = torch.empty(TOKENS, geometry.hidden, dtype=torch.bfloat16, device=DEVICE)
    for name, tensor in (tensors | {"y": out}).items():
        context.set_tensor_address(name, tensor.data_ptr())
    stream = torch.cuda.Stream()
    assert context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()

    stacks = weights.ExpertWeights(*(weights.Matrix(values, None) for values in (gate, up, down)))
    ids, mix = launch.route_logits(tensors["logits"], tensors["bias"], geometry, entries)
    want = launch.experts(tensors["x"], ids, mix, stacks, geometry, entries, LIMIT)
    assert torch.equal(out, want)  # the same kernels, the same bits

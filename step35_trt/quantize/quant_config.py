"""What a converted checkpoint says of itself: `hf_quant_config.json` and config.json's `quantization_config`.

The first is what ModelOpt 0.47 writes (`export.quant_utils.process_layer_quant_config`), the second what it
makes of the first (`export.convert_hf_config`), but for the producer's name and `pre_quant_scale`, which is
false: the factors are folded into other weights. A checkpoint with FP8 blocks declares them as the official
FP8 repository does and has no `hf_quant_config.json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from step35_trt import __version__
from step35_trt.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from step35_trt.quantize.formats import Coding
    from step35_trt.quantize.recipe import Recipe

PLAIN = ("fp32", "bf16")


def declare(
    recipe: Recipe, codings: Mapping[str, Coding]
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """`hf_quant_config.json` and `quantization_config`, each None where there is none to write.

    Args:
        recipe: For the cache's type.
        codings: Of every matrix of the model, by parameter name.

    Raises:
        UnsupportedError: FP8 blocks together with another quantised form, which no declaration covers.
    """
    modules = {name.removesuffix(".weight"): coding for name, coding in codings.items()}
    kept = sorted(name for name, coding in modules.items() if coding.kind in PLAIN)
    quantised = {name: coding for name, coding in modules.items() if coding.kind not in PLAIN}
    if not quantised:
        return None, None
    forms = set(quantised.values())
    if any(form.kind == "fp8-blocks" for form in forms):
        if len(forms) > 1:
            raise UnsupportedError(
                f"recipe {recipe.name} has FP8 blocks beside other quantised weights, which no reader knows",
                "Use fp8-rows for the weights in FP8.",
            )
        block = next(iter(forms)).block
        return None, {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": kept,
            "quant_method": "fp8",
            "weight_block_size": [block, block],
        }
    layers = {name: _layer(coding) for name, coding in quantised.items()}
    cache = "FP8" if recipe.kv_cache == "fp8" else None
    details: dict[str, Any] = {"quant_algo": None, "kv_cache_quant_algo": cache}
    if len(forms) > 1:
        details |= {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    else:
        details |= next(iter(layers.values()))
    details["exclude_modules"] = kept
    declared = {"producer": {"name": "step35-trt", "version": __version__}, "quantization": details}
    return declared, _for_config(details, layers, declared["producer"])


def _layer(coding: Coding) -> dict[str, Any]:
    """ModelOpt's name of a form."""
    if coding.kind == "fp8-rows":
        return {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"}
    if coding.kind == "int8":
        return {"quant_algo": "W8A16", "group_size": coding.block}
    return {
        "quant_algo": "W4A16_AWQ",
        "group_size": coding.block,
        "has_zero_point": False,
        "pre_quant_scale": False,
    }


def _for_config(
    details: dict[str, Any], layers: dict[str, dict[str, Any]], producer: dict[str, str]
) -> dict[str, Any]:
    """The form that config.json carries."""
    found: dict[str, Any] = {}
    if "quantized_layers" in details:
        groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
        for name, layer in layers.items():
            groups.setdefault(repr(sorted(layer.items())), (layer, []))[1].append(name)
        found["config_groups"] = {
            f"group_{i}": _group(layer) | {"targets": sorted(names)}
            for i, (layer, names) in enumerate(groups.values())
        }
        found["quantized_layers"] = layers
    found["ignore"] = details["exclude_modules"]
    found["quant_algo"] = details["quant_algo"]
    if details["kv_cache_quant_algo"]:
        found["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return found | {"producer": producer, "quant_method": "modelopt"}


def _group(layer: dict[str, Any]) -> dict[str, Any]:
    if layer["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN":
        fp8 = {"dynamic": False, "num_bits": 8, "type": "float"}
        return {"input_activations": fp8, "weights": fp8 | {"strategy": "channel"}}
    if layer["quant_algo"] == "W8A16":
        return {"weights": {"dynamic": False, "num_bits": 8, "type": "int"}}
    return {"weights": {"dynamic": False, "num_bits": 4, "type": "int", "group_size": layer["group_size"]}}

"""Which matrices share an input, and what of the model can take that input's scale exactly.

Dividing an input by s and multiplying the columns of all its consumers by s changes nothing that is computed.
The division costs nothing where it can be folded into what makes the input:

    q, k, v, g                          input_layernorm
    router, shared and routed gate, up  post_attention_layernorm: one s for all, the router included
    o                                   rows of v: attention mixes, the gate scales heads, both linear;
                                        query heads of a group read the same v, so they share their s
    down                                rows of up, where no clamp lies between them (specification 2.7)
    eh_proj                             enorm and hnorm, each one half (specification 3.1)
    a vocabulary head                   its norm; what MTP takes is the hidden state before it (3.2)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from step35_trt.checkpoint import EXPERT_PROJECTIONS

if TYPE_CHECKING:
    from step35_trt.config import LayerSpec, Step35Config


@dataclass(frozen=True)
class Site:
    """One input of one or several matrices.

    Attributes:
        consumers: The matrices; an observer looks at the first one's input. Stacked ones come last.
        norms: Norms whose outputs, side by side, are the input.
        rows: The matrix whose rows are the input's features, up to elementwise products.
        share: Query heads that read the same rows, `share` consecutive blocks of `head` features each.
        head: Features of a head; 0 where features are not heads.
    """

    consumers: tuple[str, ...]
    norms: tuple[str, ...] = ()
    rows: str | None = None
    share: int = 1
    head: int = 0


Kind = Literal["embedding", "layer", "head", "mtp"]


@dataclass(frozen=True)
class Stage:
    """What is calibrated at one time.

    Attributes:
        name: `embedding`, `layer-i`, `head` or `mtp-k`.
        kind: What it computes.
        reads: The number of the hidden states it reads; all but the head write the next.
        matrices: Everything with more than one axis, stacked experts last.
        sites: All inputs of matrices.
        layer: The block of a layer or module.
        module: Which MTP module; 0 elsewhere.
    """

    name: str
    kind: Kind
    reads: int
    matrices: tuple[str, ...]
    sites: tuple[Site, ...] = ()
    layer: LayerSpec | None = None
    module: int = 0

    @property
    def moe(self) -> str | None:
        """Where the checkpoint keeps the routed experts, None without any."""
        return f"{self.layer.prefix}.moe" if self.layer and self.layer.moe else None


def stages(config: Step35Config) -> tuple[Stage, ...]:
    """The whole model in the order of its states."""
    last = config.num_hidden_layers
    return (
        Stage("embedding", "embedding", -1, ("model.embed_tokens.weight",)),
        *(_stage(f"layer-{x.index}", "layer", x.index, _block(x), x) for x in config.layers),
        _stage("head", "head", last, (Site(("lm_head.weight",), ("model.norm.weight",)),)),
        *(
            _stage(f"mtp-{k}", "mtp", x.index, (_joined(x), *_block(x), _own_head(x)), x, k)
            for k, x in enumerate(config.mtp_layers)
        ),
    )


def _stage(
    name: str,
    kind: Kind,
    reads: int,
    sites: tuple[Site, ...],
    layer: LayerSpec | None = None,
    module: int = 0,
) -> Stage:
    names = [name for site in sites for name in site.consumers]
    names.sort(key=lambda name: layer is not None and name in stacked(layer))
    return Stage(name, kind, reads, tuple(names), sites, layer, module)


def stacked(layer: LayerSpec) -> tuple[str, ...]:
    """The routed experts' matrices of a layer with any: gate, up, down."""
    return tuple(f"{layer.prefix}.moe.{part}.weight" for part in EXPERT_PROJECTIONS) if layer.moe else ()


def _block(layer: LayerSpec) -> tuple[Site, ...]:
    p, attention = layer.prefix, f"{layer.prefix}.self_attn"
    post = f"{p}.post_attention_layernorm.weight"
    projections = tuple(f"{attention}.{x}_proj.weight" for x in "qkvg")
    heads = Site(
        (f"{attention}.o_proj.weight",),
        rows=f"{attention}.v_proj.weight",
        share=layer.query_heads // layer.kv_heads,
        head=layer.head_dim,
    )
    first = (Site(projections, (f"{p}.input_layernorm.weight",)), heads)
    if not layer.moe:
        mlp = f"{p}.mlp"
        return (*first, Site(_gate_up(mlp), (post,)), _down(mlp, layer.shared_limit))
    shared, routed = f"{p}.share_expert", f"{p}.moe"
    consumers = (*_gate_up(shared), f"{routed}.gate.weight", *_gate_up(routed))
    return (
        *first,
        Site(consumers, (post,)),
        _down(shared, layer.shared_limit),
        _down(routed, layer.routed_limit),
    )


def _gate_up(where: str) -> tuple[str, str]:
    return f"{where}.gate_proj.weight", f"{where}.up_proj.weight"


def _down(where: str, limit: float) -> Site:
    return Site((f"{where}.down_proj.weight",), rows=None if limit else f"{where}.up_proj.weight")


def _joined(layer: LayerSpec) -> Site:
    p = layer.prefix
    return Site((f"{p}.eh_proj.weight",), (f"{p}.enorm.weight", f"{p}.hnorm.weight"))


def _own_head(layer: LayerSpec) -> Site:
    own = f"{layer.prefix}.transformer.shared_head"
    return Site((f"{own}.output.weight",), (f"{own}.norm.weight",))

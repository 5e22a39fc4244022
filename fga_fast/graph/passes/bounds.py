"""Takes the rounded encoders of SAEs out of a graph that shares its weights.

Somebody may write into such weights, and bounds of another encoder would lose features.
"""

from __future__ import annotations

import torch
from torch import fx


def without_bounds(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph, whose native scores take the dense product of the encoder."""
    graph = module.graph
    for node in graph.nodes:
        if node.target is torch.ops.fga_fast.score.default:
            names = [argument.name for argument in node.target._schema.arguments]
            dropped = {"encoder", "limits"}
            node.args = tuple(None if name in dropped else value for name, value in zip(names, node.args, strict=False))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)

"""Takes the rounded encoders of SAEs out of a graph that shares its weights.

Somebody may write into such weights, and bounds of another encoder would lose features.
"""

from __future__ import annotations

from torch import fx

_BOUNDS = {"encoder", "limits"}


def without_bounds(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph, whose native scores take the dense product of the encoder."""
    graph = module.graph
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)  # so asked, because the native library may not be loaded
        if schema is not None and schema.name == "fga_fast::score":
            names = [argument.name for argument in schema.arguments]
            values = zip(names, node.args, strict=True)
            node.args = tuple(None if name in _BOUNDS else value for name, value in values)
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)

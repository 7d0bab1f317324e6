"""Edits of ONNX graphs that several passes make."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir


def constant(graph: ir.Graph, name: str, array: np.ndarray | np.generic) -> ir.Value:
    """An initializer; one that is there already under this name is taken for the same."""
    if name not in graph.initializers:
        tensor = ir.Tensor(np.asarray(array), name=name)
        graph.register_initializer(
            ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        )
    return graph.initializers[name]


def maker(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value, if there is one."""
    return None if value is None else value.producer()


def array(value: ir.Value) -> np.ndarray:
    """What a constant holds."""
    assert value.const_value is not None
    return value.const_value.numpy()


def take_place(old: ir.Value, by: ir.Value) -> None:
    """Let one value stand, under the same name, wherever another one stood; the other one goes unused."""
    by.name, by.type, by.shape = old.name, old.type, old.shape
    old.name = f"{old.name}.replaced"
    ir.convenience.replace_all_uses_with(old, by, replace_graph_outputs=True)


class Inserter:
    """Puts new nodes in front of one node of a graph, or to its end."""

    def __init__(self, graph: ir.Graph, before: ir.Node | None = None) -> None:
        self.graph = graph
        self._before = before

    def node(self, op: str, inputs: Sequence[ir.Value | None], *attributes: ir.Attr, domain: str = "") -> ir.Value:
        """The result of a new operator with one output, a standard one if no domain is named."""
        new = ir.Node(domain, op, inputs, attributes)
        if self._before is None:
            self.graph.append(new)
        else:
            self.graph.insert_before(self._before, new)
        return new.outputs[0]

    def constant(self, name: str, array: np.ndarray | np.generic) -> ir.Value:
        """See the function of this name."""
        return constant(self.graph, name, array)

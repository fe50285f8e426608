"""How the parameters of a model lie on a mesh: projections and embeddings split over data and over tensors.

A projection has its outputs on the tensor axis, the one that ends a sub-layer its inputs (Mohammad Shoeybi and others:
Megatron-LM, 2019, arXiv:1909.08053, §3), so that a sub-layer needs one sum over that axis. The other side of a matrix
lies on the data axis (Samyam Rajbhandari and others: ZeRO, 2019, arXiv:1910.02054, §5.3), from which XLA gathers it
where it is used. All other arrays are everywhere: vectors, filters, and the few matrices that are no projections (b and
c of a state space, a bank of memories, a table of positions).
"""

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAST = ("output", "outer")  # the projections that end a sub-layer, by their names in every model


def shardings(model: nnx.Module, mesh: Mesh, *, data: str = "data", tensor: str = "tensor") -> nnx.Module:
    """The sharding of every array of a model, as a tree like it, for `jax.jit` and `jax.device_put`.

    Args:
        model: With arrays, or mere shapes from `jax.eval_shape`. Leading axes of stacked layers stay whole.
        mesh: With the two axes; a dimension that its axis does not divide stays whole.
        data: Axis over which batches are split.
        tensor: Axis over which projections are split.

    Raises:
        ValueError: The mesh has no such axis.
    """
    for axis in (data, tensor):
        if axis not in mesh.axis_names:
            raise ValueError(f"mesh: expected an axis {axis!r}, got {mesh.axis_names}")

    def shard(path, leaf):
        names = {getattr(key, "name", None) for key in path}
        if not names & {"kernel", "embedding"}:
            return NamedSharding(mesh, PartitionSpec())
        axes = (tensor, data) if names & {*LAST, "embedding"} else (data, tensor)
        sizes = zip(axes, leaf.shape[-2:], strict=True)
        split = [axis if size % mesh.shape[axis] == 0 else None for axis, size in sizes]
        return NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 2), *split))

    return jax.tree.map_with_path(shard, model)

"""The peer's side of `benchmark_neural_memory`: `python -P titans_peer.py OPTIONS FOLDER` in its own environment.

Reads FOLDER/inputs.npz and says `ready`; then answers every line `PROGRAM REPEATS` with the seconds of the fastest
call. The program `both` is forward and backward, `save` writes its results to FOLDER/results.npz. This imports nothing
of ours, which is not installed there.

The peer projects queries, keys, values and coefficients from one sequence. Here that sequence has all of them side by
side, and each projection takes its part out again, so that what is left is the memory.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from titans_pytorch import MemoryMLP, NeuralMemory


def main(folder: Path, interval: int, read: str, threads: int) -> None:
    """Compute and time on request until the input ends."""
    torch.set_num_threads(threads)
    inputs = {name: torch.from_numpy(x).requires_grad_() for name, x in np.load(folder / "inputs.npz").items()}
    weights = {name: x for name, x in inputs.items() if name.startswith("weight")}
    tokens = {name: x for name, x in inputs.items() if name not in weights}
    memory = make_memory(tokens, list(weights.values()), interval, read)

    def both(tokens=tokens):
        outputs = memory(torch.cat([x.flatten(2) for x in tokens.values()], dim=-1))[0]
        wanted = *tokens.values(), *memory.memory_model_parameters
        gradients = torch.autograd.grad(outputs, wanted, outputs.detach())
        return outputs.unflatten(-1, tokens["v"].shape[2:]).detach(), gradients

    def save():
        outputs, gradients = both()
        np.savez(folder / "results.npz", outputs=outputs, **dict(zip((*tokens, *weights), gradients, strict=True)))

    programs = {"both": both, "save": save}
    both({name: x[:, :interval] for name, x in tokens.items()})  # what a first call loads does not count
    print("ready", flush=True)
    for line in sys.stdin:
        program, repeats = line.split()
        print(min(seconds(programs[program]) for _ in range(int(repeats))), flush=True)


def make_memory(tokens, weights, interval, read):
    """The peer's module with these weights; its batches are our intervals, its chunks what it reads after."""
    heads, width = tokens["k"].shape[2:]
    memory = NeuralMemory(
        heads * width,
        dim_head=width,
        heads=heads,
        chunk_size={"after_token": 1, "after_interval": interval}[read],
        batch_size=interval,
        model=MemoryMLP(width, depth=len(weights), expansion_factor=weights[0].shape[-1] / width),
        momentum="momentum" in tokens,
        mem_model_norm_add_residual=False,
        pre_rmsnorm=False,
        store_memory_loss_fn=lambda prediction, value: ((prediction - value) ** 2).sum(-1),
        adaptive_step_transform=lambda step: step,
    )
    memory.memory_model_parameters = torch.nn.ParameterList(weight.detach() for weight in weights)
    sizes = [x.flatten(2).shape[-1] for x in tokens.values()]

    def part(name):
        return Apply(lambda sequence: sequence.split(sizes, dim=-1)[list(tokens).index(name)])

    def coefficient(name):  # [batch · heads, time]
        return Apply(lambda sequence: part(name)(sequence).movedim(-1, 1).flatten(0, 1))

    memory.to_queries, memory.to_keys, memory.to_values = map(part, "qkv")
    memory.to_adaptive_step = coefficient("step")
    # sigmoids follow, and the memory keeps 1 less the decay factor
    memory.to_decay_factor = Apply(lambda sequence: torch.logit(1 - coefficient("decay")(sequence))[..., None])
    if "momentum" in tokens:
        memory.to_momentum = Apply(lambda sequence: torch.logit(coefficient("momentum")(sequence))[None, ..., None])
    memory.retrieve_gate, memory.combine_heads = None, torch.nn.Identity()  # of several heads
    return memory


class Apply(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def seconds(program):
    """The time of one call."""
    begun = time.perf_counter()
    program()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main(Path(sys.argv[2]), **json.loads(sys.argv[1]))

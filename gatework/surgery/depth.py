"""``depth`` and ``gateskip``: a depth policy runs a pretrained model's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from gatework.core import registry
from gatework.core.errors import PartError
from gatework.depth.base import BlockPolicy
from gatework.depth.gateskip import BRANCHES, GateSkip
from gatework.depth.recursive import Recursive
from gatework.surgery.adapters import PretrainedBlock, Runner, adapt
from gatework.surgery.conversion import Conversion, convert, converter
from gatework.surgery.layout import describe

#: Of the regression that ranks tokens: its ridge, relative to the channels' mean square, and the spread of the gates' logits.
RIDGE, SPREAD = 0.01, 0.1


def depth(model: nn.Module, policy: str) -> Conversion:
    """Let a depth policy run a pretrained model's layers, in place.

    The layers become blocks that hold the same modules; the policy's own parameters start as the part does. Single layers hand out
    no hidden states then. Gradient checkpointing works on, in passes without a cache (``use_cache=False``).

    Args:
        model: a Hugging Face model of a pre-norm layout that :func:`~gatework.surgery.describe` knows, with the attention
            implementation sdpa or eager.
        policy: part expression of a depth policy, as ``"gateskip(budget=0.5)"``.

    Raises:
        PartError: for an unknown policy or argument, a model whose layers it cannot run, ``recursive`` (see
            :func:`gatework.surgery.recursive`).
    """
    return convert(model, "depth", {"policy": policy})


@converter("depth", new=("*.0.policy.*",))
def _depth(model: nn.Module, conversion: Conversion, initialise: bool, policy: str) -> None:
    layout = describe(model)
    blocks = adapt(model, layout)
    if issubclass(registry.lookup(registry.check(policy, "depth").name).cls, Recursive):
        raise PartError("recursive needs no policy in a pretrained model: surgery.recursive leaves the layers where they are")
    built = registry.build(policy, "depth", blocks=nn.ModuleList(blocks), d_model=layout.width, n_layers=len(blocks))
    if not isinstance(built, BlockPolicy):
        raise PartError(f"{policy} does not run a list of blocks")
    install(model, conversion, built)


def gateskip(
    model: nn.Module,
    budget: float = 0.75,
    gate_form: Literal["vector", "scalar", "mlp"] = "scalar",
    shared: bool = False,
    lam_s: float = 0.01,
    lam_e: float = 0.01,
    sparsity: Literal["l2", "l1", "kl"] = "l2",
    warmup: float = 0.5,
    batches: Sequence[Int[Tensor, "B T"]] | None = None,
) -> Conversion:
    """Put skip gates on every residual branch of a pretrained decoder, in place (:class:`gatework.depth.GateSkip`).

    The start preserves the model's function. The method starts with gates of sigmoid(5) = 0.993, which over 60 branches is not
    nothing, and with random gate weights. Here the gates' weights start at 0 and each branch is scaled by 1 / sigmoid(5), so that
    gate times branch is the branch, up to rounding. All tokens are then equally important and none is skipped, until training
    tells them apart and moves the skipped share from 0 to ``1 - budget``.

    Short trainings do better with ``batches``, which the paper does not have: the gates then start by ranking tokens by how much
    the branch adds, log |branch(u)|, as far as a linear map of u tells (ridge regression). They then differ from
    sigmoid(5) by about a thousandth (a logit of SmolLM2-135M moves by up to 0.2), nothing is skipped at first either, and what
    training skips first is what adds least.

    Args:
        model: a Hugging Face model of a pre-norm layout, with the attention implementation sdpa or eager.
        budget: share of its tokens that each branch computes once trained; ``conversion.part.set_budget`` changes it at any time.
        gate_form: ``scalar`` by default, a multiply-add per channel and token. A ``vector`` gate, the paper's, costs d_model times
            as much: in SmolLM2-135M a fifth of the layers' own work, most of what a budget of 0.75 saves.
        shared, lam_s, lam_e, sparsity, warmup: as :class:`~gatework.depth.GateSkip` takes them.
        batches: token ids without padding, together at least as many tokens as the model has channels.

    Keys and values of skipped tokens are computed, so the model's cache stays complete and ``generate`` works as before.

    Raises:
        PartError: for a model whose layers a depth policy cannot run (BERT, whose norms follow the sum).
        ValueError: for settings that GateSkip refuses.
    """
    conversion = convert(model, "gateskip", {
        "budget": budget, "gate_form": gate_form, "shared": shared, "lam_s": lam_s, "lam_e": lam_e, "sparsity": sparsity,
        "warmup": warmup,
    })
    if batches is not None:
        try:
            _rank(model, conversion.part, batches)
        except BaseException:
            conversion.undo()
            raise
    return conversion


@torch.no_grad()
def _rank(model: nn.Module, policy: GateSkip, batches: Sequence[Tensor]) -> None:
    """Let the gates rank tokens by the size of what the branches add."""
    if policy.gate_form == "mlp":
        raise PartError("gates of the form mlp cannot start from batches: their last layer reads random features")
    sums: dict[int, list[Any]] = {}

    def hook(gate: nn.Module) -> Callable[..., None]:
        def add(module: nn.Module, given: tuple[Tensor, ...], y: Tensor) -> None:
            u, size = given[0].flatten(0, -2).double(), y.flatten(0, -2).double().norm(dim=-1).log()
            new = [len(u), u.sum(0), size.sum(), u.T @ u, u.T @ size, size.square().sum()]
            sums[id(gate)] = [a + b for a, b in zip(sums.get(id(gate), [0] * len(new)), new, strict=True)]

        return add

    blocks: Any = policy.blocks
    gates: Any = policy.gates
    places = [(gates[i % len(gates)][branch].out, getattr(block, branch)) for i, block in enumerate(blocks) for branch in BRANCHES]
    hooks = [branch.register_forward_hook(hook(gate)) for gate, branch in places]
    was_training = model.training
    model.eval()
    try:
        for tokens in batches:
            model(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        model.train(was_training)
        for handle in hooks:
            handle.remove()
    for gate in {id(gate): gate for gate, _ in places}.values():
        count, *rest = sums.get(id(gate), [0])
        if count < policy.d_model:
            raise PartError(f"ranking tokens takes at least as many as the model has channels, {policy.d_model}, not {count}")
        mean, mean_size, squares, products, size_squares = (total / count for total in rest)
        spread = (size_squares - mean_size.square()).sqrt()
        covariance = squares - torch.outer(mean, mean)
        ridge = RIDGE * covariance.diagonal().mean() * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        weight = SPREAD * torch.linalg.solve(covariance + ridge, (products - mean * mean_size) / spread)
        gate.weight.copy_(weight.expand_as(gate.weight))
        gate.bias.sub_(weight @ mean)


@converter("gateskip", new=("*.0.policy.gates.*",))
def _gateskip(model: nn.Module, conversion: Conversion, initialise: bool, **arguments: Any) -> None:
    layout = describe(model)
    blocks = adapt(model, layout)
    policy = GateSkip(nn.ModuleList(blocks), layout.width, **arguments)
    start = 1.0
    for name, parameter in policy.gates.named_parameters():
        if name.endswith("out.weight"):
            nn.init.zeros_(parameter)
        elif name.endswith("out.bias"):
            start = float(parameter.detach().double()[0].sigmoid())
    for block in blocks:
        block.mixer.scale = block.feedforward.scale = 1 / start
    install(model, conversion, policy)


def install(model: nn.Module, conversion: Conversion, policy: BlockPolicy) -> None:
    """Put ``policy``, built over :func:`~gatework.surgery.adapters.adapt`'s blocks, in the place of the model's layers."""
    layout = describe(model)
    layers: Any = model.get_submodule(layout.blocks_path)
    weight = next(layers.parameters())
    own = {id(module) for block in policy.blocks for module in block.modules()}
    for module in policy.modules():
        if id(module) in own or isinstance(module, PretrainedBlock):
            continue
        for tensor in module.parameters(recurse=False):
            tensor.data = tensor.data.to(weight.device, weight.dtype)
        for name, buffer in module.named_buffers(recurse=False):
            wide = torch.promote_types(weight.dtype, torch.float32)
            module._buffers[name] = buffer.to(weight.device, wide if buffer.is_floating_point() else None)
    policy.train(model.training)
    conversion.part = policy
    first, last = layout.blocks[0].path, layout.blocks[-1].path.rpartition(".")[2]
    added = sum(p.numel() for name, p in policy.named_parameters() if not name.startswith("blocks."))
    conversion.replaced.append(f"{len(layers)} layers ({first} .. {last}) by {type(policy).__name__}")
    conversion.replaced.append(f"over {len(policy.blocks)} blocks, {added:,} parameters of its own")
    conversion.swap(layout.blocks_path, nn.ModuleList([Runner(policy, layers[0])]))



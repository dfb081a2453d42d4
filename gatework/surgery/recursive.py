"""``recursive``: the layers of a pretrained model run on the weights of a half or a third of them, with low-rank updates."""

from __future__ import annotations

from typing import Literal

from torch import nn

from gatework.core.errors import PartError
from gatework.depth.recursive import Borrower, Init, LoRALinear, share
from gatework.surgery.conversion import Conversion, convert, converter
from gatework.surgery.layout import describe


def recursive(
    model: nn.Module,
    loops: int = 2,
    rank: int = 64,
    init: Init = "average",
    lora: Literal["svd", "zero"] = "svd",
    share_norms: bool = True,
) -> Conversion:
    """Let a pretrained model's L layers share the weights of ``L / loops``, in place (:class:`gatework.depth.Recursive`).

    The layers stay L modules of the model's own classes, each with its place in the model's cache, so that ``generate`` and all
    else go on working. Every ``nn.Linear`` in them reads the shared weight and adds its layer's low-rank update. With ``rank`` as
    large as the linears and ``share_norms=False`` the model computes what it did before; below that it needs further training.
    The SVDs take about a second per layer of SmolLM2-135M.

    Args:
        model: a Hugging Face model that :func:`~gatework.surgery.describe` knows.
        loops: how often the unique layers are run; it divides the number of layers.
        rank: rank of each linear's update; 0 shares strictly.
        init: what the unique layers start from: ``average`` (the paper's best with updates), ``stepwise`` (its best without),
            ``lower``, ``upper`` or ``random``.
        lora: ``svd`` starts each update at the best approximation of what sharing takes from its layer, ``zero`` at 0.
        share_norms: share norm gains and biases too.

    Raises:
        PartError: for settings that do not fit the model, layers without ``nn.Linear`` (GPT-2) with a rank above 0.
    """
    return convert(model, "recursive", {
        "loops": loops, "rank": rank, "init": init, "lora": lora, "share_norms": share_norms,
    })


@converter("recursive", new=("*.lora.a", "*.lora.b"))
def _recursive(
    model: nn.Module, conversion: Conversion, initialise: bool, loops: int, rank: int, init: Init, lora: Literal["svd", "zero"],
    share_norms: bool,
) -> None:
    paths = [block.path for block in describe(model).blocks]
    if loops == 1:
        raise PartError("recursive with loops=1 would change nothing: give at least 2")
    if any(isinstance(module, Borrower) for module in model.modules()):
        raise PartError("the layers share their weights already: undo that conversion first")
    layers = [model.get_submodule(path) for path in paths]
    made = share(layers, loops, rank, init if initialise else "lower", lora if initialise else "zero", share_norms)
    for path, layer in zip(paths, made, strict=True):
        conversion.swap(path, layer)
    conversion.replaced.append(f"{len(layers)} layers by {loops} loops over {len(layers) // loops}")
    if rank:
        linears = [module for layer in made for module in layer.modules() if isinstance(module, LoRALinear)]
        size = sum(p.numel() for linear in linears for p in linear.lora.parameters())
        conversion.replaced.append(f"{len(linears)} linears by shared ones with updates, {size:,} parameters")

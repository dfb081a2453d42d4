"""``versatile_ffn``: a pretrained model's feed-forwards reused in width and depth."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from gatework.core.errors import PartError
from gatework.feedforward.versatile_ffn import VersatileFFN
from gatework.surgery.conversion import Conversion, convert, converter
from gatework.surgery.layout import describe


def versatile_ffn(
    model: nn.Module,
    experts: int = 8,
    k: int = 2,
    loops: int = 4,
    layout: Literal["contiguous", "strided"] = "contiguous",
    balance: float = 5e-5,
    path: Literal["both", "wide", "deep", "fixed"] = "both",
) -> Conversion:
    """Up-cycle the feed-forwards of a pretrained decoder, in place (:class:`gatework.feedforward.VersatileFFN`).

    Each takes over the weights of the layer's feed-forward and of the norm in front of it, and adds two small random routers. This
    changes the function, except with ``loops=1``: every token would need x + F(x), which no number of loops gives back. SmolLM2
    goes from 3.74 nats per token of the bundled text to 12.3, with two loops to 8.0 (the routers of seed 0). Train
    afterwards (:func:`~gatework.surgery.distill`), as the paper does, which starts from a trained model and moves the temperature
    from 5 to 0.1 over all steps.

    The model does not tell its layers which tokens are padding: in training, padding counts in the balance loss.

    Args:
        model: a Hugging Face model whose layers have a gated unit behind an RMS norm: Llama (SmolLM2 is one), Mistral, Qwen 2 and
            3, SmolLM3.
        experts, k, loops, layout, balance, path: as :class:`~gatework.feedforward.VersatileFFN` takes them; the hidden width of the
            model is a multiple of ``experts`` (SmolLM2-135M: 8 slices of 192).

    Raises:
        PartError: for a model with other feed-forwards (GPT-2, BERT), or sizes that do not fit.
    """
    return convert(model, "versatile_ffn", {
        "experts": experts, "k": k, "loops": loops, "layout": layout, "balance": balance, "path": path,
    })


class Branch(nn.Module):
    """What a layer adds to its stream, where ``part`` holds norm and residual itself."""

    def __init__(self, part: VersatileFFN) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The new stream less the old one."""
        y: Tensor = self.part(x) - x
        return y


@converter("versatile_ffn", new=("*.expert_router.weight", "*.depth_router.weight"))
def _versatile_ffn(model: nn.Module, conversion: Conversion, initialise: bool, **arguments: object) -> None:
    found = describe(model)
    made = []
    for block in found.blocks:
        if not found.pre_norm or len(block.feedforward) > 1:
            raise PartError(f"versatile_ffn takes over a gated unit behind its norm, and the blocks of {found.family} norm the sum")
        norm, dense = model.get_submodule(block.feedforward_norm), model.get_submodule(block.feedforward[0])
        if isinstance(dense, Branch):
            raise PartError("the feed-forwards are versatile_ffn already: undo that conversion first")
        try:
            made.append(VersatileFFN.from_dense(dense, norm, **arguments))
        except ValueError as error:
            raise PartError(f"versatile_ffn cannot take over {block.feedforward[0]}: {error}") from error
    for block, part in zip(found.blocks, made, strict=True):
        conversion.swap(block.feedforward_norm, nn.Identity())
        conversion.swap(block.feedforward[0], Branch(part).train(model.training))
    routers = sum(p.numel() for part in made for name, p in part.named_parameters() if "router" in name)
    conversion.replaced.append(f"{len(made)} feed-forwards and their norms by versatile_ffn, {routers:,} parameters of routers")

"""``GlobalLocal``: a trained classifier, kept as it is, with a small expert for one user and a gate between the two.

Zhang, Davoodi and Hu, A Mixture of Expert Approach for Low-Cost Customization of Deep Neural Networks, 2018, arXiv 1811.00056. The
equations below are reconstructed from its abstract and outline; sizes and weights are ours:

    y_G = GE(x), phi = the features before its last layer     GE is frozen, its batch norms too
    r = sigmoid(GN(phi))    y = y_L if r > theta else y_G     y_L = LE(phi)
    LE: D -> 32 -> classes, cross-entropy on the user's data, weight 1 where GE is wrong, 0.2 where it is right
    GN: D -> 16 -> 1, binary cross-entropy on the user's data and a replay of generic data:
        target 1 where GE is wrong and LE right, 0 where GE is right; examples that both get wrong are left out

Without the replay nothing tells the gate when to leave GE alone, and it hands everything to the local expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatework.core.contracts import Component, No, in_backward
from gatework.core.cost import count_flops, count_parameters
from gatework.core.errors import PartError
from gatework.core.registry import register

#: The local expert's weight for examples that the global one gets right.
EASY = 0.2


@dataclass(frozen=True)
class Overhead:
    """What customisation costs, as shares of the global expert's own: ``parameters``, and ``flops`` as executed for some inputs."""

    parameters: float
    flops: float


@register("global_local", paper="ge_le_gn")
class GlobalLocal(Component):
    """A frozen classifier customised by a local expert behind a hard gate.

    ``forward(x (N, ...)) -> logits (N, classes)``, each row wholly the global or wholly the local expert's. The local expert is
    evaluated for the rows that the gate gives it, and for no others. :meth:`customise` trains both small networks.

    With ``labels`` while training, ``forward`` leaves the two losses of the method as side outputs, for a training loop of
    your own; ``user`` marks the user's rows among the replayed ones. The gate has no gradient from the logits: the choice is
    hard.

    Args:
        model: the global expert, a trained classifier; its parameters are frozen, and it stays in evaluation mode.
        head: the path of its last layer, a linear one, whose inputs are the features phi.
        local: hidden width of the local expert.
        hidden: hidden width of the gate network.
        threshold: theta; 1 or more is the global expert always, below 0 the local one always. Kept as a buffer.

    Initialisation: PyTorch's for linear layers.

    Side outputs: losses ``local`` and ``gate`` (training, with labels), metric ``local_share``, the share of rows that the
        local expert got.

    Raises:
        PartError: if the model has no linear layer at ``head``, or does not run it once per call on one vector per row.
        ValueError: widths below 1.
    """

    family = "experts"
    capabilities = Component.capabilities | {"compiles": No("which rows the local expert runs is data")}
    threshold: Tensor

    def __init__(
        self, model: nn.Module, head: str = "head", local: int = 32, hidden: int = 16, threshold: float = 0.5
    ) -> None:
        super().__init__()
        if min(local, hidden) < 1:
            raise ValueError(f"local and hidden must be at least 1, got {local} and {hidden}")
        last = dict(model.named_modules()).get(head)
        if not isinstance(last, nn.Linear):
            found = "nothing" if last is None else f"a {type(last).__name__}"
            raise PartError(f"the features are what goes into the model's last linear layer, and there is {found} at {head!r}")
        self.model = model.requires_grad_(False)
        self.head = head
        self.local = nn.Sequential(nn.Linear(last.in_features, local), nn.ReLU(), nn.Linear(local, last.out_features))
        self.gate = nn.Sequential(nn.Linear(last.in_features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
        self.register_buffer("threshold", torch.tensor(float(threshold)))
        self.to(last.weight)
        self.train(self.training)

    def train(self, mode: bool = True) -> GlobalLocal:
        """Set the mode of the two small networks; the global expert stays in evaluation mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self, x: Tensor, labels: Int[Tensor, "N"] | None = None, user: Bool[Tensor, "N"] | None = None
    ) -> Float[Tensor, "N C"]:
        """Logits of N inputs of the model; ``labels`` and ``user`` (all rows, where not given) leave the losses behind.

        Raises:
            PartError: not one label, or one boolean of ``user``, per input.
        """
        if labels is not None and labels.shape != x.shape[:1]:
            raise PartError(f"there is one label per input, shape ({len(x)},), not {tuple(labels.shape)}")
        if user is not None and (user.shape != x.shape[:1] or user.dtype != torch.bool):
            raise PartError(f"user has one boolean per input, shape ({len(x)},), not {tuple(user.shape)} of {user.dtype}")
        global_logits, phi = self.features(x)
        chosen = self.gate_values(phi) > self.threshold
        rows = chosen.nonzero()[:, 0]
        logits = global_logits
        if len(rows):
            logits = global_logits.index_copy(0, rows, self.local(phi[rows]).to(global_logits.dtype))
        losses = {}
        if self.training and labels is not None:
            mine = torch.ones_like(chosen) if user is None else user
            local_logits = self.local(phi)
            losses["local"] = self.local_loss(local_logits[mine], global_logits[mine], labels[mine])
            losses["gate"] = self.gate_loss(phi, local_logits, global_logits, labels)
        if not in_backward():
            self.losses = losses
            self.metrics = {"local_share": chosen.sum() / max(len(chosen), 1)}
        return logits

    @torch.no_grad()
    def features(self, x: Tensor) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N D"]]:
        """The global expert's logits, and the features that its last layer made them from."""
        seen: list[Tensor] = []
        hook = self.model.get_submodule(self.head).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            logits: Tensor = self.model(x)
        finally:
            hook.remove()
        if len(seen) != 1 or seen[0].dim() != 2 or logits.dim() != 2:
            raise PartError(f"the model must run {self.head!r} once per call, on one vector of features per example")
        return logits, seen[0]

    def gate_values(self, phi: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
        """r, the gate network's opinion that the local expert should answer."""
        values: Tensor = self.gate(phi)[:, 0].sigmoid()
        return values

    def local_loss(
        self, local_logits: Float[Tensor, "N C"], global_logits: Float[Tensor, "N C"], labels: Int[Tensor, "N"]
    ) -> Float[Tensor, ""]:
        """Mean over the examples of the cross-entropy times 1, or 0.2 where the global expert is right; 0 without examples."""
        right = (global_logits.argmax(1) == labels).to(local_logits.dtype)
        return ((1 - (1 - EASY) * right) * F.cross_entropy(local_logits, labels, reduction="none")).sum() / max(len(labels), 1)

    def gate_loss(
        self,
        phi: Float[Tensor, "N D"],
        local_logits: Float[Tensor, "N C"],
        global_logits: Float[Tensor, "N C"],
        labels: Int[Tensor, "N"],
    ) -> Float[Tensor, ""]:
        """Mean binary cross-entropy over the examples that one of the experts gets right; 0 without any."""
        right = global_logits.argmax(1) == labels
        kept = right | (local_logits.detach().argmax(1) == labels)
        logits = self.gate(phi)[:, 0]
        each = F.binary_cross_entropy_with_logits(logits, (~right).to(logits.dtype), reduction="none")
        return (each * kept).sum() / kept.sum().clamp(min=1)

    def customise(
        self,
        user: tuple[Tensor, Tensor],
        replay: tuple[Tensor, Tensor],
        steps: int = 300,
        lr: float = 1e-2,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        """Train the local expert on the user's data, then the gate on both; the global expert is run once on each.

        Args:
            user: inputs and labels of the user.
            replay: inputs and labels of the kind that the model was trained for.
            steps: of Adam, for each of the two.
            lr: learning rate.
            batch_size: rows per step; the gate's are half the user's and half replayed, whatever their numbers are.
            seed: of the batches.

        Raises:
            ValueError: if there are no examples, or not as many labels.
        """
        known = []
        for what, (x, labels) in {"user": user, "replay": replay}.items():
            _check_examples(what, x, labels)
            known.append((*self.features(x), labels))
        if min(steps, batch_size) < 1:
            raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
        generator = torch.Generator().manual_seed(seed)

        def draw(which: int, count: int) -> tuple[Tensor, ...]:
            chosen = torch.randint(len(known[which][2]), (count,), generator=generator)
            return tuple(tensor[chosen.to(tensor.device)] for tensor in known[which])

        def local_step() -> Tensor:
            global_logits, phi, labels = draw(0, batch_size)
            return self.local_loss(self.local(phi), global_logits, labels)

        def gate_step() -> Tensor:
            halves = zip(draw(0, (batch_size + 1) // 2), draw(1, (batch_size + 1) // 2), strict=True)
            global_logits, phi, labels = (torch.cat(pair) for pair in halves)
            with torch.no_grad():
                local_logits = self.local(phi)
            return self.gate_loss(phi, local_logits, global_logits, labels)

        for part, loss in ((self.local, local_step), (self.gate, gate_step)):
            optimizer = torch.optim.Adam(part.parameters(), lr=lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                optimizer.zero_grad()
                loss().backward()
                optimizer.step()
                schedule.step()

    @torch.no_grad()
    def choose_threshold(self, x: Tensor, labels: Int[Tensor, "N"]) -> float:
        """Set theta to what is right most often on held-out examples, generic and the user's in the mixture that is expected.

        Between two values of r that decide alike it is their middle; of equally good thresholds it is the highest, which
        trusts the global expert most.

        Returns:
            The share of right answers there.

        Raises:
            ValueError: if there are no examples, or not as many labels.
        """
        _check_examples("the mixture", x, labels)
        global_logits, phi = self.features(x)
        r, order = self.gate_values(phi).sort(descending=True)
        globally = (global_logits.argmax(1) == labels)[order].long()
        gain = (self.local(phi).argmax(1) == labels)[order].long() - globally
        # With the first n of the order given to the local expert; equal values of r cannot be told apart.
        right = globally.sum() + torch.cat([gain.new_zeros(1), gain.cumsum(0)])
        possible = torch.cat([gain.new_ones(1).bool(), r[:-1] > r[1:], gain.new_ones(1).bool()])
        n = int(torch.where(possible, right, -1).argmax())
        edges = torch.cat([r.new_ones(1), r, -r.new_ones(1)])
        self.threshold.fill_(1.0 if n == 0 else float(edges[n] + edges[n + 1]) / 2)
        return float(right[n]) / len(labels)

    @torch.no_grad()
    def overhead(self, x: Tensor) -> Overhead:
        """Parameters of the local expert and the gate, and FLOPs that they execute for ``x``, over the global expert's."""
        with count_flops() as alone:
            self.model(x)
        with count_flops() as together:
            self(x)
        small = count_parameters(self.local) + count_parameters(self.gate)
        return Overhead(small / count_parameters(self.model), together.total / alone.total - 1)

    def extra_repr(self) -> str:
        """Where the features are taken."""
        return f"head={self.head!r}"


def _check_examples(what: str, x: Tensor, labels: Tensor) -> None:
    if not len(x) or len(x) != len(labels):
        raise ValueError(f"{what} has {len(x)} inputs and {len(labels)} labels: one each is wanted, and at least one")


__all__ = ["GlobalLocal", "Overhead"]

"""``FederatedGateTrainer``: clients that share a model's weights and keep gates of their own, simulated in one process.

Chen et al., Efficient Personalized Federated Learning via Sparse Model-Adaptation, ICML 2023, arXiv 2305.02776 (pFedGate), with
the gate of ``block_sparsity``. A round: the server sends its weights to every client; each takes ``epochs`` passes over its
examples and in every step moves its gate net and its copy of the weights by the gradients of the same loss; the server's new
weights are the mean of the clients', weighted by their numbers of examples. Gate nets never leave their clients.

The same code is the baselines: without a gate it is federated averaging (McMahan et al., 2017, arXiv 1602.05629), with
``average=False`` every client trains alone, and ``average`` set to False after some rounds is fine-tuning. Differences to the
released code: gate and weights move in the same step (the paper's algorithm; the code's default takes turns by epochs), every
client takes part in every round, and both steps are plain SGD, gradients clipped at norm 10 as in the code. Schedules inside the
model's parts are not moved: call ``core.advance(trainer.model, ...)`` between rounds.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatework.core.contracts import losses, metrics
from gatework.core.registry import build
from gatework.learners.base import Batch, Loss

#: Gradients are clipped to this norm, those of the weights and those of the gate net apart.
CLIP_NORM = 10.0


class FederatedGateTrainer:
    """Rounds of federated learning over simulated clients, with or without personal gates.

    Args:
        model: the server's; trained in place.
        loss_fn: ``loss_fn(model(x), y)`` -> scalar mean loss.
        clients: inputs and targets of each client's training examples.
        gate: expression of the clients' gates, ``"block_sparsity(budget=0.5)"``; None for none. Each client's starts anew.
        lr: step size of the weights.
        gate_lr: step size of the gate nets.
        epochs: passes of a client over its examples per round.
        batch_size: examples per step.
        average: whether the clients' weights are averaged; may be changed between rounds. Without, each client goes on
            from its own weights, which are the server's at first.
        seed: of the order of the examples.

    Raises:
        ValueError: for no clients, a client without examples, or numbers that are not positive.
        PartError: the gate cannot be built for the model.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        clients: Sequence[Batch],
        gate: str | None = "block_sparsity",
        lr: float = 0.1,
        gate_lr: float = 0.1,
        epochs: int = 1,
        batch_size: int = 32,
        average: bool = True,
        seed: int = 0,
    ) -> None:
        if not clients or any(len(x) == 0 or len(x) != len(y) for x, y in clients):
            raise ValueError("every client needs examples, and as many targets; there must be at least one client")
        if not min(lr, gate_lr) > 0 or min(epochs, batch_size) < 1:
            raise ValueError(f"lr, gate_lr, epochs and batch_size must be positive, got {lr}, {gate_lr}, {epochs}, {batch_size}")
        self.model, self.loss_fn, self.clients, self.gate = model, loss_fn, list(clients), gate
        self.lr, self.gate_lr, self.epochs, self.batch_size, self.average = lr, gate_lr, epochs, batch_size, average
        self.gates = [self._new_gate() for _ in self.clients]
        self.own: list[dict[str, Tensor] | None] = [None for _ in self.clients]
        self.rounds = 0
        self._local = copy.deepcopy(model)
        self._generator = torch.Generator().manual_seed(seed)

    def _new_gate(self) -> Any:
        if self.gate is None:
            return None
        x = self.clients[0][0]
        like = next(self.model.parameters())
        made = build(self.gate, "component", model=self.model, input_shape=tuple(x.shape[1:]))
        return made.to(like.device, torch.promote_types(like.dtype, torch.float32))

    def round(self) -> dict[str, float]:
        """One round; returns ``loss`` (and ``density``, with gates), means over the examples seen."""
        states, said = [], {"loss": 0.0, "density": 0.0}
        for k, (x, _) in enumerate(self.clients):
            found = self._train(k, weights=True, epochs=self.epochs)
            states.append({name: value.detach().clone() for name, value in self._local.state_dict().items()})
            said = {name: said[name] + found[name] * len(x) for name in said}
        total = sum(len(x) for x, _ in self.clients)
        if self.average:
            self.own = [None for _ in self.clients]
            self._average(states, [len(x) / total for x, _ in self.clients])
        else:
            self.own = list(states)
        self.rounds += 1
        return {name: value / total for name, value in said.items() if name == "loss" or self.gate is not None}

    def _train(self, k: int, weights: bool, epochs: int) -> dict[str, float]:
        """Train client ``k``'s copy (where ``weights``) and its gate, starting from the server's weights or its own."""
        net, gate, (x, y) = self._local, self.gates[k], self.clients[k]
        net.load_state_dict(self._weights(k))
        net.train(weights)
        moved = [(list(net.parameters()), self.lr)] if weights else []
        if gate is not None:
            moved.append((list(gate.train().parameters()), self.gate_lr))
        optimizer = torch.optim.SGD([{"params": params, "lr": lr} for params, lr in moved])
        said, count = {"loss": 0.0, "density": 0.0}, 0
        for _ in range(epochs):
            for chosen in torch.randperm(len(x), generator=self._generator).split(self.batch_size):
                some = x[chosen]
                net.zero_grad(set_to_none=True)
                optimizer.zero_grad(set_to_none=True)
                loss = self.loss_fn(net(some) if gate is None else gate(net, some), y[chosen])
                torch.stack([loss, *losses(net).values()]).sum().backward()
                for params, _ in moved:
                    nn.utils.clip_grad_norm_(params, CLIP_NORM)
                optimizer.step()
                density = 1.0 if gate is None else float(metrics(gate)["density"])
                said = {"loss": said["loss"] + loss.item() * len(chosen), "density": said["density"] + density * len(chosen)}
                count += len(chosen)
        return {name: value / count for name, value in said.items()}

    def _weights(self, k: int) -> dict[str, Tensor]:
        """Where client ``k`` starts: the server's weights, or its own where it goes alone."""
        own = None if self.average else self.own[k]
        return self.model.state_dict() if own is None else own

    @torch.no_grad()
    def _average(self, states: list[dict[str, Tensor]], shares: list[float]) -> None:
        """The server's floating parameters and buffers become the clients' mean; whole numbers stay."""
        for name, value in self.model.state_dict().items():
            if value.is_floating_point():
                value.copy_(sum(share * state[name] for share, state in zip(shares, states, strict=True)))

    def join(self, client: Batch, epochs: int = 1) -> int:
        """A new client: its gate is trained on its examples, the weights stay as they are; returns its number.

        From the next round on it takes part like the others.

        Raises:
            ValueError: without gates there is nothing to train.
        """
        if self.gate is None:
            raise ValueError("a new client trains its gate, and there are no gates; give the trainer gate='block_sparsity'")
        self.clients.append(client)
        self.gates.append(self._new_gate())
        self.own.append(None)
        self._train(len(self.clients) - 1, weights=False, epochs=epochs)
        return len(self.clients) - 1

    @torch.no_grad()
    def predict(self, k: int, x: Tensor) -> Tensor:
        """Client ``k``'s output for ``x``, in evaluation mode; its gates are those of all its training examples."""
        net, gate = self._local, self.gates[k]
        net.load_state_dict(self._weights(k))
        net.eval()
        if gate is None:
            out: Tensor = net(x)
            return out
        scores = gate.eval().scores(self.clients[k][0])
        gated: Tensor = gate(net, x, scores)
        return gated

    def accuracies(self, data: Sequence[Batch]) -> list[float]:
        """Each client's share of right classes, on ``data``'s examples for it.

        Raises:
            ValueError: if ``data`` is not for as many clients as there are.
        """
        if len(data) != len(self.clients):
            raise ValueError(f"there are {len(self.clients)} clients, and data for {len(data)}")
        return [float((self.predict(k, x).argmax(-1) == y).double().mean()) for k, (x, y) in enumerate(data)]

    def densities(self) -> list[float]:
        """The share of the weights that each client uses in evaluation; 1 without gates."""
        if self.gate is None:
            return [1.0 for _ in self.clients]
        with torch.no_grad():
            return [g.report(g.eval().scores(x))["total"] for g, (x, _) in zip(self.gates, self.clients, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """All that training moves: the server's weights, gates, clients' own weights, the order of the examples to come."""
        return {
            "model": self.model.state_dict(),
            "gates": [None if gate is None else gate.state_dict() for gate in self.gates],
            "own": self.own,
            "rounds": self.rounds,
            "average": self.average,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit; clients that joined have to have joined again.

        Raises:
            ValueError: if it was taken with another number of clients, or with gates where there are none.
        """
        if [gate is None for gate in state["gates"]] != [gate is None for gate in self.gates]:
            raise ValueError("the state is of other clients: as many are needed, with gates where it has gates")
        self.model.load_state_dict(state["model"])
        for gate, kept in zip(self.gates, state["gates"], strict=True):
            if gate is not None:
                gate.load_state_dict(kept)
        self.own, self.rounds, self.average = list(state["own"]), state["rounds"], state["average"]
        self._generator.set_state(state["generator"])


__all__ = ["FederatedGateTrainer"]

"""``EntityModel``: facts (subject, relation, object), learnt and recalled by three kinds of models.

Wang and Sun, Is the Reversal Curse a Binding Problem? Uncovering Limitations of Transformers from a Basic Generalization
Failure, 2025, arXiv 2504.01928; the released code was read. An entity has a name of k tokens.

- ``surface``: a language model over ``subject's name, relation, object's name``, trained on the object's tokens.
- ``concept``: the same over one token for each entity, whose embedding is also its row of the head.
- ``jepa``: a recognition module Rec makes a concept vector of a name, and a semantic module Sem, a causal model over
  ``[Rec(s), relation]``, predicts the object's. With p = rms(Sem(...)) at the last place, InfoNCE over the batch:

      loss = -log softmax over the candidates c of p . Rec(c), at the object; gradients reach both sides

  Rec is a causal transformer, of which the last token's output is taken (Rec(c) is then not normalised), or, with ``memory``,
  ``layer_norm(memory_layer(mean of the name's embeddings))``, p being layer-normalised alike. The memory has one slot for each
  entity, whose key is that mean; keys and embeddings stay fixed.

There are no positions (the code bans them); causal attention tells the order.

Differences: the candidates of a batch are its distinct subjects and objects, where the code takes all its subjects, relations and
objects, so that an object which occurs twice is once right and once wrong; relations have embeddings of their own and do not pass
through Rec; the blocks are this library's.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatework.core.contracts import State
from gatework.core.errors import PartError
from gatework.feedforward.memory_layer import MemoryLayer
from gatework.models.decoder import Decoder
from gatework.models.trunk import trunk


class EntityModel(nn.Module):
    """Log-probabilities of objects, given subject and relation.

    ``forward(facts (B, 3)) -> (B, E)``: numbers of subject, relation and object in, the logarithm of each entity's probability of
    being the object out. In evaluation all entities are ranked and the object's number is not read. In training only what the
    loss needs is computed, all else is minus infinity: the object's entry (``surface``, ``concept``), or those of the batch's
    entities (``jepa``). Minus the mean of the objects' entries is the loss of all three.

    Args:
        names: the entities' names, (E, k) numbers of tokens.
        relations: number of relations.
        level: which model.
        d_model, layers, heads, d_ff, mixer, feedforward, depth: as in :class:`gatework.models.Decoder`; of Sem for ``jepa``.
        recognition_layers: blocks of Rec.
        memory: k of the memory layer that Rec is made of; None is a transformer.

    Initialisation: embeddings normal with standard deviation ``d_model**-0.5``; every part starts as its paper says.

    Raises:
        PartError: unknown parts, sizes that do not fit, names that are not whole numbers from 0 on, ``memory`` of a model without
            Rec.

    Example:
        >>> names = torch.tensor([[0, 2], [0, 3], [1, 2], [1, 3]])
        >>> EntityModel(names, relations=2, level="jepa", d_model=16).eval()(torch.tensor([[0, 1, -100]])).shape
        torch.Size([1, 4])
    """

    task_arguments: ClassVar[tuple[str, ...]] = ("names", "relations")
    names: Tensor

    def __init__(
        self,
        names: Int[Tensor, "E k"],
        relations: int,
        level: Literal["surface", "concept", "jepa"] = "surface",
        d_model: int = 64,
        layers: int = 2,
        heads: int = 4,
        d_ff: int | None = None,
        mixer: Any = "attention(rope=false)",
        feedforward: Any = "mlp",
        depth: Any = "stack",
        recognition_layers: int = 1,
        memory: int | None = None,
    ) -> None:
        super().__init__()
        if names.dim() != 2 or not names.numel() or names.is_floating_point() or int(names.min()) < 0:
            raise PartError(f"names are (entities, tokens) of whole numbers from 0 on, not {tuple(names.shape)} of {names.dtype}")
        if level not in ("surface", "concept", "jepa"):
            raise PartError(f"the levels are surface, concept and jepa, not {level!r}")
        if memory is not None and level != "jepa":
            raise PartError(f"memory belongs to the recognition of level=jepa, and this model has level={level}")
        if relations < 1:
            raise PartError(f"relations must be at least 1, got {relations}")
        self.level, self.relations = level, relations
        self.register_buffer("names", torch.arange(len(names))[:, None] if level == "concept" else names.clone(), persistent=False)
        self.tokens = int(self.names.max()) + 1
        sizes: dict[str, Any] = {"d_model": d_model, "heads": heads, "d_ff": d_ff}
        if level != "jepa":
            parts = {"mixer": mixer, "feedforward": feedforward, "depth": depth}
            self.decoder = Decoder(self.tokens + relations, layers=layers, **parts, **sizes)
            return
        purpose: dict[str, Any] = {"purpose": "a model that reads names from left to right", "needs": ("causal",)}
        self.embedding, self.relation = nn.Embedding(self.tokens, d_model), nn.Embedding(relations, d_model)
        for embedding in (self.embedding, self.relation):
            nn.init.normal_(embedding.weight, std=d_model**-0.5)
        self.memory: MemoryLayer | None = None
        if memory is None:
            self.recognition = trunk(mixer, feedforward, depth, layers=recognition_layers, **sizes, **purpose)
        else:
            try:
                self.memory = MemoryLayer(d_model, d_ff=len(names), k=memory)
            except ValueError as error:
                raise PartError(str(error)) from error
            self.memory.keys.requires_grad_(False).copy_(self.embedding.weight.detach()[self.names].mean(1))
            self.embedding.requires_grad_(False)
            self.norm = nn.LayerNorm(d_model)
        self.semantics = trunk(mixer, feedforward, depth, layers=layers, **sizes, **purpose)

    def extra_repr(self) -> str:
        """The level, and numbers of entities and relations."""
        return f"level={self.level}, entities={len(self.names)}, relations={self.relations}"

    def forward(self, facts: Int[Tensor, "B 3"]) -> Float[Tensor, "B E"]:
        """Log-probabilities of the objects."""
        if facts.dim() != 2 or facts.shape[1] != 3:
            raise PartError(f"a fact is the numbers of a subject, a relation and an object, not a row of {tuple(facts.shape)}")
        subjects, relations, objects = facts.unbind(1)
        if self.training and bool((objects < 0).any()):
            raise PartError("in training every fact has its object")
        if self.level == "jepa":
            return self._predict(subjects, relations, objects)
        prefix = torch.cat([self.names[subjects], self.tokens + relations[:, None]], 1)
        return self._trained(prefix, objects) if self.training else self._ranked(prefix)

    # The language models.

    def _trained(self, prefix: Tensor, objects: Tensor) -> Tensor:
        """The log-probabilities of the objects' names."""
        wanted = self.names[objects]
        logits = self.decoder(torch.cat([prefix, wanted[:, :-1]], 1))[:, -wanted.shape[1] :]
        found = _log_softmax(logits).gather(-1, wanted[..., None])[..., 0].sum(1)
        nothing = found.new_full((len(found), len(self.names)), -torch.inf)
        return nothing.scatter(1, objects[:, None], found[:, None])

    def _ranked(self, prefix: Tensor) -> Tensor:
        """The log-probabilities of all names, token by token along the tree of their beginnings."""
        batch, tokens = len(prefix), self.names.shape[1]
        state: State = self.decoder.init_state(batch)
        logits = self.decoder(prefix, state=state)[:, -1]
        total = logits.new_zeros(batch, len(self.names), dtype=torch.promote_types(logits.dtype, torch.float32))
        node = torch.zeros_like(self.names[:, 0])  # Of each entity, among the distinct beginnings of this length.
        for place in range(tokens):
            total = total + _log_softmax(logits).view(batch, -1, logits.shape[-1])[:, node, self.names[:, place]]
            if place + 1 < tokens:
                beginnings, longer = torch.stack([node, self.names[:, place]], 1).unique(dim=0, return_inverse=True)
                parent, token = beginnings.unbind(1)
                rows = torch.arange(batch, device=prefix.device)[:, None]
                state.reorder((rows * (int(node.max()) + 1) + parent).flatten())
                logits = self.decoder(token.repeat(batch)[:, None], state=state)[:, -1]
                node = longer
        return total

    # Joint embeddings.

    def concepts(self, entities: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Rec: the concept vectors of entities, of ``level="jepa"``."""
        embedded = self.embedding(self.names[entities])
        if self.memory is None:
            found: Tensor = self.recognition(embedded)[:, -1]
            return found
        normed: Tensor = self.norm(self.memory(embedded.mean(1)))
        return normed

    def _predict(self, subjects: Tensor, relations: Tensor, objects: Tensor) -> Tensor:
        """Log-probabilities among the batch's entities in training, among all in evaluation."""
        if self.training:
            candidates, place = torch.cat([subjects, objects]).unique(return_inverse=True)
        else:
            candidates, place = torch.arange(len(self.names), device=subjects.device), subjects
        known = self.concepts(candidates)
        pair = torch.stack([known[place[: len(subjects)]], self.relation(relations)], 1)
        predicted = self.semantics(pair)[:, -1]
        predicted = F.rms_norm(predicted, predicted.shape[-1:]) if self.memory is None else self.norm(predicted)
        found = _log_softmax(predicted @ known.t())
        if not self.training:
            return found
        return found.new_full((len(found), len(self.names)), -torch.inf).index_copy(1, candidates, found)

    @torch.no_grad()
    def entanglement(self) -> float:
        """How far a step on one entity's concept moves the others': the mean over pairs of |cos| of the activations that Rec's last
        matrix multiplies.

        A step of gradient descent on that matrix for concept a moves concept b by a multiple of h_a . h_b. They are the last
        feed-forward's hidden units, or the weights of the memory's slots, which are 0 but for those that an entity reads.

        Raises:
            PartError: another level than ``jepa``, a feed-forward without a matrix ``down``.
        """
        if self.level != "jepa":
            raise PartError(f"entanglement is that of recognition, and level={self.level} has none")
        everyone = torch.arange(len(self.names), device=self.names.device)
        if self.memory is not None:
            weights, slots = self.memory.read(self.embedding(self.names).mean(1))
            return entanglement(weights.new_zeros(len(everyone), len(self.memory.keys)).scatter(1, slots, weights))
        down = getattr(self.recognition.blocks[-1].feedforward, "down", None)  # type: ignore[union-attr,index]
        if not isinstance(down, nn.Linear):
            raise PartError("entanglement needs a feed-forward with a last matrix called down, such as mlp")
        seen: list[Tensor] = []
        handle = down.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, -1]))
        try:
            self.concepts(everyone)
        finally:
            handle.remove()
        return entanglement(seen[0])


def entanglement(hidden: Float[Tensor, "N H"]) -> float:
    """The mean of |cos| over all pairs of rows."""
    unit = F.normalize(hidden.detach().double(), dim=1)
    count = len(unit)
    return float(((unit @ unit.t()).abs().sum() - unit.square().sum()) / (count * (count - 1)))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

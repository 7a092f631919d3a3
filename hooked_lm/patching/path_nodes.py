"""The ends of paths: which activations can send and receive, and which sender comes before which receiver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard, cast

from hooked_lm.hooked_model import HookedModel
from hooked_lm.interventions import Intervention, Selection
from hooked_lm.names import UnknownHookError, describe_unknown, get_act_name

__all__ = ["RECEIVERS", "ROUTES", "SENDERS", "Node", "NodeLike", "NodeRules", "Nodes", "as_tuple", "is_node"]

ROUTES = ("direct", "mlps", "all")

# The order of computation in a block. In parallel blocks the MLP reads the stream when attention does.
SENDERS = {
    "embed": 0,
    "pos_embed": 0,
    "resid_pre": 1,
    "z": 3,
    "attn_out": 4,
    "resid_mid": 5,
    "mlp_out": 7,
    "resid_post": 8,
}
RECEIVERS = {
    "resid_pre": 1,
    "q": 2,
    "k": 2,
    "v": 2,
    "gate": 2,
    "resid_mid": 5,
    "mlp_in": 6,
    "resid_post": 8,
    "logits": 9,
}
_ALIASES = {"result": "z", "q_input": "q", "k_input": "k", "v_input": "v"}
_WITHOUT_LAYER = ("embed", "pos_embed", "logits")


@dataclass(frozen=True)
class Node:
    """One end of a path; functions also take it as a tuple, `("z", 0, 3)`.

    Attributes:
        name: of a sender `"z"` (a head's output), `"attn_out"`, `"mlp_out"`, `"embed"`, `"pos_embed"`, `"resid_pre"`,
            `"resid_mid"` or `"resid_post"`; of a receiver `"q"`, `"k"`, `"v"` (a head's input for each of them),
            `"gate"` (where heads have gates), `"mlp_in"`, one of the three streams, or `"logits"` (the stream that the
            final norm reads).
        layer: its block; none for `"embed"`, `"pos_embed"` and `"logits"`.
        head: for `"z"`, `"q"` and `"gate"` a head, for `"k"` and `"v"` a key-value head; several as a tuple; None for
            all.
        pos: positions; None for all.

    >>> Node("k", 1, head=1)
    Node(name='k', layer=1, head=1, pos=None)
    """

    name: str
    layer: int | None = None
    head: Selection = None
    pos: Selection = None

    def site(self, n_layers: int) -> str:
        """Return the hook name at which the node is patched.

        Args:
            n_layers: of the model; `"logits"` is at the last.
        """
        if self.name == "logits":
            return get_act_name("resid_post", n_layers - 1)
        return get_act_name(self.name, self.layer)


NodeLike = Node | str | tuple[str | int | tuple[int, ...] | None, ...]
Nodes = NodeLike | Sequence[NodeLike]


@dataclass(frozen=True)
class NodeRules:
    """Checks of nodes against a model, its prompts and the routes.

    Attributes:
        model: the model.
        n_positions: of the prompts.
        routes: what may carry the change from senders to receivers.
    """

    model: HookedModel
    n_positions: int
    routes: str

    def checked(self, nodes: Nodes, role: Literal["sender", "receiver"]) -> tuple[Node, ...]:
        """Return nodes in one form, each checked against the model and the prompts.

        Args:
            nodes: one or several.
            role: which end of the path they are.

        Raises:
            UnknownHookError: the model has no such site.
            ValueError: there are none, or one cannot be this end of a path.
        """
        several = [nodes] if is_node(nodes) else list(cast(Sequence[NodeLike], nodes))
        if not several:
            raise ValueError(f"a set of {role}s is empty")
        return tuple(self._node(one, role) for one in several)

    def _node(self, given: NodeLike, role: str) -> Node:
        cfg, known = self.model.cfg, SENDERS if role == "sender" else RECEIVERS
        if isinstance(given, tuple):
            node = Node(*given)  # type: ignore[arg-type]  # checked below
        else:
            node = Node(given) if isinstance(given, str) else given
        node = Node(_ALIASES.get(node.name, node.name), node.layer, node.head, node.pos)
        if node.name not in known:
            raise ValueError(f"{node.name!r} is no {role}: {role}s are {', '.join(map(repr, known))}")
        if (node.layer is None) != (node.name in _WITHOUT_LAYER):
            needs = "belongs to no layer" if node.name in _WITHOUT_LAYER else "is in a layer: give it"
            raise ValueError(f"the {role} {node.name!r} {needs}; got layer={node.layer!r}")
        if node.layer is not None and not (isinstance(node.layer, int) and 0 <= node.layer < cfg.n_layers):
            raise ValueError(f"the {role} {node}: layers run 0-{cfg.n_layers - 1}")
        site = node.site(cfg.n_layers)
        axes = {name: point.axes for name, point in self.model.hook_dict.items()}
        if site not in axes:
            raise UnknownHookError(describe_unknown(site, list(axes)))
        if node.name == "pos_embed" and cfg.positional_embedding_type != "standard":
            raise ValueError("this model's position embeddings are not written to the stream: they cannot be senders")
        Intervention(site, "zero", pos=node.pos, head=node.head).check(cfg, axes)
        n_pos = self.n_positions
        wrong = [one for one in as_tuple(node.pos) if not -n_pos <= one < n_pos]
        if wrong:
            raise ValueError(f"the {role} {node.name!r} pos {wrong[0]}: the prompts have {n_pos} positions")
        return Node(node.name, node.layer, node.head, _from_start(node.pos, n_pos))

    def check_reached(self, senders: Sequence[Node], receivers: Sequence[Node]) -> None:
        """Check that each of the senders comes before some receiver.

        Args:
            senders, receivers: both ends.

        Raises:
            ValueError: one does not.
        """
        for sender in senders:
            if not any(self.reaches(sender, one) for one in receivers):
                among = ", ".join(map(str, receivers))
                raise ValueError(f"there is no path from {sender} to {among}: none is computed from it by this route")

    def reaches(self, sender: Node, receiver: Node) -> bool:
        """Return whether the receiver is computed after the sender, at a position that the routes lead to.

        Args:
            sender, receiver: both ends.
        """
        if self._order(sender, SENDERS) >= self._order(receiver, RECEIVERS):
            return False
        if sender.pos is None or receiver.pos is None:
            return True
        sent, read = as_tuple(sender.pos), as_tuple(receiver.pos)
        if self.routes == "all":
            return self.model.cfg.attention_dir == "bidirectional" or min(sent) <= max(read)
        return bool(set(sent) & set(read))

    def _order(self, node: Node, order: Mapping[str, int]) -> tuple[int, int]:
        if node.layer is None:
            return (0, 0) if node.name != "logits" else (self.model.cfg.n_layers, 0)
        if node.name == "mlp_in" and self.model.cfg.parallel_attn_mlp:
            return node.layer, RECEIVERS["q"]
        return node.layer, order[node.name]


def is_node(nodes: object) -> TypeGuard[NodeLike]:
    """Return whether this is one node, in any of its forms, and not several.

    Args:
        nodes: one or several.
    """
    return isinstance(nodes, (Node, str)) or (isinstance(nodes, tuple) and bool(nodes) and isinstance(nodes[0], str))


def as_tuple(selection: Selection) -> tuple[int, ...]:
    """Return a selection's entries; none for None.

    Args:
        selection: an entry, several, or None.
    """
    return () if selection is None else selection if isinstance(selection, tuple) else (selection,)


def _from_start(pos: Selection, n_pos: int) -> Selection:
    return tuple(one % n_pos for one in pos) if isinstance(pos, tuple) else None if pos is None else pos % n_pos

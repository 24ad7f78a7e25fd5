"""`optimizer.groups`: a learning rate, a weight decay and an optimizer of its own for each role of parameters.

    optimizer.groups.embedding.lr=1e-3            instead of optimizer.lr, under the same schedule
    optimizer.groups.vector.weight_decay=0.01     norms and biases do not decay otherwise
    optimizer.groups.embedding.name=adamw         instead of optimizer.name, with the default options of its own

    matrix      linear layers, several in one weight too        head      what scores the vocabulary
    experts     routed ones, and their biases                   router    what chooses the experts of a token
    embedding   tables, tied to the head or not                 vector    norms, biases, everything else

Each role is a separate group, whose learning rate is logged under its name. Torch-free; `parts` joins the optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace

from configs.choices import OptimizerName
from configs.errors import ConfigError
from configs.schema import Optimizer as Settings
from configs.schema_train import RoleGroup, RoleGroups
from trainer.model.roles import Described, Matrices, Role
from trainer.optim.protocol import Group, Held

KEY = "optimizer.groups"
ROLES = tuple(item.name for item in fields(RoleGroups))
MATRICES = ("matrix", "experts")


def role_of(parameter: Described) -> str:
    if parameter.routed is not None:
        return "experts"
    return "matrix" if parameter.role is Role.packed else str(parameter.role)


def typical(role: str) -> Described:
    """A large parameter of a role."""
    shape = (2**40,) if role == Role.vector else (2**40, 2**40)
    return Described(name="", shape=shape, role=Role(role), matrices=Matrices() if role in MATRICES else None)


def given(settings: Settings) -> Mapping[str, RoleGroup]:
    """The roles with settings."""
    roles = {role: getattr(settings.groups, role) for role in ROLES}
    return {role: group for role, group in roles.items() if group != RoleGroup()}


def names(settings: Settings) -> dict[str, OptimizerName]:
    """The roles that another optimizer updates."""

    def other(group: RoleGroup) -> OptimizerName | None:
        return group.name if group.name is not settings.name else None

    found = {role: other(group) for role, group in given(settings).items()}
    return {role: name for role, name in found.items() if name is not None}


def by(settings: Settings, name: OptimizerName) -> Settings:
    """Settings of one optimizer, for all that it updates. `optimizer.options` are those of `optimizer.name`."""
    options = settings.options if name is settings.name else {}
    return replace(settings, name=name, options=options, groups=RoleGroups())


def given_keys(settings: Settings) -> Iterator[str]:
    """The keys that were given."""
    for role, group in given(settings).items():
        for item in fields(group):
            if (value := getattr(group, item.name)) is not None:
                yield f"{KEY}.{role}.{item.name}={value}"


def check(trained: Iterable[Described], settings: Settings, model: str) -> None:
    """trained: of the whole model. Raises ConfigError for roles that it does not have."""
    there = {role_of(about) for about in trained}
    missing = [role for role in given(settings) if role not in there]
    if missing:
        has = ", ".join(role for role in ROLES if role in there)
        keys = [key for key in given_keys(settings) if key.split(".")[2] in missing]
        raise ConfigError(
            *(f"{key}: nothing that is trained of {model} has this role; it has {has}; leave it out" for key in keys)
        )


def divide(groups: Sequence[Group], settings: Settings) -> list[Group]:
    """Groups of an optimizer, with separate ones for roles with settings."""
    chosen, divided = given(settings), list[Group]()
    for group in groups:
        rest = tuple(item for item in group.parameters if role_of(item[0]) not in chosen)
        divided += [replace(group, parameters=rest)] if rest or not chosen else []
        for role, own in chosen.items():
            if members := tuple(item for item in group.parameters if role_of(item[0]) == role):
                divided.append(_separate(replace(group, name=role, parameters=members), own, settings))
    return divided


def _separate(group: Group, own: RoleGroup, settings: Settings) -> Group:
    factor = group.factor if own.lr is None else own.lr / settings.lr
    return replace(
        group, factor=factor, weight_decay=group.weight_decay if own.weight_decay is None else own.weight_decay
    )


def updated_separately(held: Iterable[Held], settings: Settings) -> list[list[Held]]:
    """The updated parameters, group by group."""
    chosen = given(settings)
    groups: dict[str, list[Held]] = {}
    for one in held:
        role = role_of(one.whole)
        groups.setdefault(role if role in chosen else "", []).append(one)
    return list(groups.values()) or [[]]

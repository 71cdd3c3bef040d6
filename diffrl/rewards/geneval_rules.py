"""GenEval's rules: what an image's detections are worth for what its prompt asked for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffrl.errors import InputError
from diffrl.ranges import require_int

__all__ = [
    "POSITIONS",
    "Clause",
    "Detection",
    "Task",
    "clearly_right",
    "graded",
    "positions",
    "published",
    "task_of",
]

POSITIONS = ("left of", "right of", "above", "below")


@dataclass(frozen=True)
class Detection:
    """An object in an image.

    Args:
        label: its class, spelt as in the metadata, e.g. "traffic light".
        score: how sure the detector is, in [0, 1].
        box: (left, top, right, bottom) in pixels, y downwards.
        colour: e.g. "red", or a function () → colour, which is called only where a prompt asks for a colour.
    """

    label: str
    score: float
    box: Sequence[float]
    colour: str | Callable[[], str] | None = None


@dataclass(frozen=True)
class Clause:
    """So many objects of a class, perhaps of a colour, perhaps beside those of an earlier clause."""

    label: str
    count: int
    color: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class Task:
    """What a prompt asks for."""

    tag: str
    include: list[Clause]
    exclude: list[Clause]


def task_of(metadata: Mapping[str, Any]) -> Task:
    """Metadata of GenEval's format, checked.

    Args:
        metadata: "tag"; "include", a list of {"class", "count", perhaps "color" and "position": [where, clause]};
            perhaps "exclude", a list of {"class", "count"}: fewer than so many. Other keys are not looked at.

    Raises:
        ValueError: something is missing or wrong; the message names the field.
    """
    if not isinstance(metadata.get("tag"), str):
        raise InputError(f'tag is {metadata.get("tag")!r}: give GenEval\'s, such as "counting"')
    clauses: dict[str, list[Clause]] = {}
    for key in ("include", "exclude"):
        entries = metadata.get(key) or []
        if not isinstance(entries, list | tuple) or (key == "include" and not entries):
            raise InputError(f'{key} is {metadata.get(key)!r}: give a list of {{"class": ..., "count": ...}}')
        known = {"class", "count", "color", "position"} if key == "include" else {"class", "count"}
        clauses[key] = [_clause(f"{key}[{i}]", i, entry, known) for i, entry in enumerate(entries)]
    return Task(metadata["tag"], clauses["include"], clauses["exclude"])


def _clause(where: str, number: int, entry: Any, known: set[str]) -> Clause:
    if not isinstance(entry, Mapping) or not {"class", "count"} <= set(entry) <= known:
        raise InputError(
            f"{where} is {entry!r}: give class and count, and nothing but {', '.join(sorted(known))}"
        )
    for key in ("class", "color"):
        if key in entry and not (isinstance(entry[key], str) and entry[key]):
            raise InputError(f"{where}.{key} is {entry[key]!r}: give a word")
    count = require_int(f"{where}.count", entry["count"])
    position = entry.get("position")
    if position is not None:
        pair = position if isinstance(position, list | tuple) and len(position) == 2 else (None, None)
        if pair[0] not in POSITIONS or type(pair[1]) is not int or not 0 <= pair[1] < number:
            raise InputError(
                f"{where}.position is {position!r}: give [one of {', '.join(POSITIONS)}; "
                "the number of an earlier clause]"
            )
        position = (pair[0], pair[1])
    return Clause(entry["class"], count, entry.get("color"), position)


Found = Mapping[str, Sequence[Detection]]
"""Detections of an image by label, the surest first."""


def published(found: Found, task: Task, tau: float) -> bool:
    """GenEval's verdict, for evaluation: at least as many as asked, judged on the surest, and nothing excluded."""
    groups: list[Sequence[Detection] | None] = []
    for clause in task.include:
        group = found.get(clause.label, ())[: clause.count]
        right = len(group) == clause.count and _coloured(group, clause) == clause.count
        groups.append(group if right and _placed(group, clause, groups, tau) else None)
    excluded = any(len(found.get(clause.label, ())) >= clause.count for clause in task.exclude)
    return None not in groups and not excluded


def clearly_right(found: Found, task: Task, tau: float) -> bool:
    """The strict verdict of training code: exactly as many as asked, all of them as asked."""
    return _judged(found, task, tau)[0]


def graded(found: Found, task: Task, tau: float) -> float:
    """The graded reward of training code: the mean of a part for each number, colour and position that is asked for.

    A number n where c are asked for has the part 1 - |c - n|/c, below 0 for n > 2c; so has a colour, of objects whose
    number is right. Where it is wrong, colour and position together have one part 0. A position that is wrong has
    the parts 0 *and* 1, as published.
    """
    parts = _judged(found, task, tau)[1]
    return sum(parts) / len(parts)


def _judged(found: Found, task: Task, tau: float) -> tuple[bool, list[float]]:
    groups: list[Sequence[Detection] | None] = []
    parts: list[float] = []
    for clause in task.include:
        group = found.get(clause.label, ())
        parts.append(_part(clause.count, len(group)))
        right = len(group) == clause.count
        if not right and (clause.color or clause.position):
            parts.append(0.0)
        if right and clause.color:
            coloured = _coloured(group, clause)
            parts.append(_part(clause.count, coloured))
            right = coloured == clause.count
        if right and clause.position:
            right = _placed(group, clause, groups, tau)
            if groups[clause.position[1]] is None:
                parts.append(0.0)
            else:
                parts += [1.0] if right else [0.0, 1.0]
        groups.append(group if right else None)
    return None not in groups, parts


def _part(asked: int, there: int) -> float:
    return 1 - abs(asked - there) / asked


def _coloured(group: Sequence[Detection], clause: Clause) -> int:
    """How many have the colour; all, if none is asked for."""
    if clause.color is None:
        return len(group)
    colours = [d.colour() if callable(d.colour) else d.colour for d in group]
    if None in colours:
        raise InputError(
            f"the prompt asks for a {clause.color} {clause.label}, and the detector gave no colour: give one with each "
            "detection"
        )
    return colours.count(clause.color)


def _placed(
    group: Sequence[Detection], clause: Clause, groups: Sequence[Sequence[Detection] | None], tau: float
) -> bool:
    """Whether each of a group stands where it should to each of its target; also if nothing is asked."""
    if clause.position is None:
        return True
    where, target = clause.position
    others = groups[target]
    return others is not None and all(where in positions(a.box, b.box, tau) for a in group for b in others)


def positions(a: Sequence[float], b: Sequence[float], tau: float) -> set[str]:
    """Where box a lies, seen from box b: none, one or two of `POSITIONS`.

        d = c_a - c_b,    d' = sign(d)·max(|d| - τ(s_a + s_b), 0),    u = d'/‖d‖

    with centres c and sizes s, in x and y: left of for u_x < -1/2, right of for u_x > 1/2, above for u_y < -1/2 and
    below for u_y > 1/2.
    """
    box_a, box_b = (np.asarray(box, dtype=float).reshape(2, 2) for box in (a, b))
    d = box_a.mean(0) - box_b.mean(0)
    s = np.abs(box_a[1] - box_a[0]) + np.abs(box_b[1] - box_b[0])
    shrunk = np.sign(d) * np.maximum(np.abs(d) - tau * s, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(d)
    signs = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in signs.items() if holds}

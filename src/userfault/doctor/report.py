"""The doctor's findings, for people and for programs."""

from __future__ import annotations

import json
import textwrap
from itertools import groupby

from userfault import __version__
from userfault.doctor import usable
from userfault.doctor.finding import Finding, State

_MARKS: dict[State, str] = {"yes": "ok", "partly": "~", "no": "--", "unknown": "?", "fact": ""}
_WIDTH = 100


def as_text(findings: list[Finding]) -> str:
    """A page for people: what is there, and under what is not, why and what mends it."""
    lines = [_verdict(findings), ""]
    column = max(len(finding.name) for finding in findings)
    for topic, group in groupby(findings, key=lambda finding: finding.topic):
        lines.append(topic)
        for finding in group:
            lines.append(f"  {_MARKS[finding.state]:2}  {finding.name:{column}}  {finding.value}".rstrip())
            if finding.state != "yes":
                lines += textwrap.wrap(finding.why, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
                lines += [f"        > {command}" for command in finding.mend]
        lines.append("")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    """One JSON object: `userfault` (version), `usable` (bool) and `findings` (a list of objects)."""
    return json.dumps(
        {
            "userfault": __version__,
            "usable": usable(findings),
            "findings": [finding.as_json() for finding in findings],
        },
        indent=2,
    )


def _verdict(findings: list[Finding]) -> str:
    if not usable(findings):
        return "userfault does not work here. What is marked -- says why."
    states = {finding.name: finding.state for finding in findings}
    if states.get("system calls on absent memory") != "yes":
        return (
            "userfault works here, but a system call on memory that is not there fails with EFAULT: use "
            "Region.pread, pwrite, readinto or pin()."
        )
    return "userfault works here."

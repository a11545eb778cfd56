"""What a job from files to files asks for: the fields of a request that belong together; looks at no file."""

from dataclasses import dataclass
from typing import Self

from kms_core.jobs.file_patterns import Tree, is_tree
from kms_core.jobs.model import MOVING
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Reference:
    """One file, or many (``tree``). ``target`` is the source itself for files that are replaced."""

    source: str
    target: str
    overwrite: bool = False
    dry_run: bool = False
    rate_per_s: float = 0.0

    @classmethod
    def of(cls, body: wire.JobIn) -> Self:
        """Raises InvalidRequest for fields that do not go together."""
        source = body.source or ""
        target = source if body.target is None else body.target
        found = cls(source, target, bool(body.overwrite), bool(body.dry_run), body.rate_per_s or 0.0)
        if is_tree(source):
            found.check_many(body.kind)
        elif found.dry_run or found.rate_per_s:
            raise InvalidRequest("dry_run and rate_per_s are for a source that names many files, with *")
        if body.target is None:
            found.check_in_place(body.kind)
        return found

    @property
    def tree(self) -> Tree:
        return Tree.parse(self.source)

    @property
    def in_place(self) -> bool:
        return self.target == self.source

    @property
    def text(self) -> str:
        """All of it, to tell one request from another."""
        rest = f"\n{self.dry_run} {self.rate_per_s}" if self.dry_run or self.rate_per_s else ""
        return f"{self.source}\n{self.target}\n{self.overwrite}{rest}"

    def check_many(self, kind: wire.JobKind) -> None:
        Tree.parse(self.source)
        if self.dry_run and kind not in MOVING:
            raise InvalidRequest("dry_run is for rewrap and reseal")
        if self.in_place:
            self.check_in_place(kind)
        elif not self.target.endswith("/") or "*" in self.target:
            raise InvalidRequest("The target of many files is a directory: end it with a slash, and no star")

    def check_in_place(self, kind: wire.JobKind) -> None:
        if kind not in MOVING:
            raise InvalidRequest(
                "Give items, or source and target; to upload a file use /files/encrypt or /files/decrypt"
            )
        if not self.overwrite and not self.dry_run:
            raise InvalidRequest("A job without a target replaces its source: say so with overwrite")

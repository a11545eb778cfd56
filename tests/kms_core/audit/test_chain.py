"""Laws of the chain, over trails and damages made up: what is done to one is found, and nothing else is."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kms_core.audit.keys import Concealer, PublicKeys, Signer
from kms_core.audit.log import AuditLog
from kms_core.audit.verification.scan import VerificationReport
from kms_core.audit.verification.verify import verify
from kms_core.settings.model import AuditSection
from support.audit_logs import audit_section, problem_codes, record

MEMORY: Final = Path("/dev/shm")  # trails wait for their folder, and there are hundreds
HYPOTHESIS_SETTINGS: Final = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CONTEXTS: Final = st.dictionaries(
    st.sampled_from(["env", "row", "ü"]), st.text("0123456789abcdef", max_size=8)
)
NAMES: Final = st.text(max_size=12)
STAGES: Final = st.sampled_from(["", "", "", "intent", "outcome"])
RECORDS: Final = st.lists(st.tuples(NAMES, CONTEXTS, STAGES), min_size=1, max_size=8)
RULES: Final = st.builds(audit_section, checkpoint_lines=st.integers(1, 6))
SIZES: Final = st.sampled_from([600, 2000, 1 << 20])
TRAILS: Final = st.lists(st.tuples(RULES, SIZES, RECORDS), min_size=1, max_size=3)
Plan = list[tuple[AuditSection, int, list[tuple[str, dict[str, str], str]]]]
"""Settings, the size of a segment, and records, for each chain."""
Pick = Callable[[int], int]
"""A number below the given one."""


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.at(tmp_path_factory.mktemp("keys") / "signing.key")


class Written:
    """A folder of one closed chain for each entry of a plan, and the last signed line of each."""

    def __init__(self, folder: Path, plan: Plan, signer: Signer) -> None:
        self.folder = folder
        self.keys = PublicKeys([signer.public])
        self.anchors: list[bytes] = []
        for rules, rotate_bytes, records in plan:
            section = msgspec.structs.replace(rules, path=folder)
            trail = AuditLog(section, "api", Concealer(bytes(32)), signer)
            trail.rotate_bytes = rotate_bytes
            for number, (name, context, stage) in enumerate(records):
                effect = f"e{number}" if stage else ""
                trail.append(record(principal=name, context=context, stage=stage, effect=effect))
            trail.close()
            self.anchors.append(trail.last_signed.removesuffix(b"\n"))

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.iterdir())

    def any_file(self, pick: Pick) -> Path:
        return self.files[pick(len(self.files))]

    def verified(self, *, anchored: bool = True) -> VerificationReport:
        return verify(self.folder, self.keys, {"here": self.anchors} if anchored and self.anchors else {})


@contextmanager
def written(plan: Plan, signer: Signer) -> Iterator[Written]:
    memory = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="kms-chain-", dir=memory) as folder:
        yield Written(Path(folder), plan, signer)


# -- damages -----------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def edit(trail: Written, pick: Pick) -> None:
    """One byte becomes another."""
    path = trail.any_file(pick)
    data = bytearray(path.read_bytes())
    data[pick(len(data))] ^= 1 + pick(255)
    path.write_bytes(bytes(data))


def remove_lines(trail: Written, pick: Pick) -> None:
    path = trail.any_file(pick)
    lines = lines_of(path)
    at = pick(len(lines))
    del lines[at : at + 1 + pick(3)]
    path.write_bytes(b"".join(lines))


def swap_lines(trail: Written, pick: Pick) -> None:
    """Within a file, or between two."""
    one, other = trail.any_file(pick), trail.any_file(pick)
    places = [(path, number) for path in dict.fromkeys((one, other)) for number in range(len(lines_of(path)))]
    (path, at), (path_2, at_2) = places[pick(len(places))], places[pick(len(places))]
    if (path, at) == (path_2, at_2):
        path_2, at_2 = next(audit_folder for audit_folder in places if audit_folder != (path, at))
    line, line_2 = lines_of(path)[at], lines_of(path_2)[at_2]
    for where, number, instead in ((path, at, line_2), (path_2, at_2, line)):
        lines = lines_of(where)
        lines[number] = instead
        where.write_bytes(b"".join(lines))


def repeat_line(trail: Written, pick: Pick) -> None:
    """Somewhere in the same file or in another one."""
    source, target = trail.any_file(pick), trail.any_file(pick)
    lines, stray = lines_of(target), lines_of(source)
    lines.insert(pick(len(lines) + 1), stray[pick(len(stray))])
    target.write_bytes(b"".join(lines))


def put_in(trail: Written, pick: Pick) -> None:
    """A line that was never written, or an empty one."""
    path = trail.any_file(pick)
    lines = lines_of(path)
    lines.insert(pick(len(lines) + 1), (b"\n", b"{}\n", b'{"seq":1}\n', b"\xff\n")[pick(4)])
    path.write_bytes(b"".join(lines))


def cut(trail: Written, pick: Pick) -> None:
    """The end of a file, from any byte on."""
    path = trail.any_file(pick)
    data = path.read_bytes()
    path.write_bytes(data[: pick(len(data))])


def remove_file(trail: Written, pick: Pick) -> None:
    trail.any_file(pick).unlink()


def copy_file(trail: Written, pick: Pick) -> None:
    path = trail.any_file(pick)
    shutil.copy(path, path.with_name(f"copy-of-{path.name}"))


def fuse_files(trail: Written, pick: Pick) -> None:
    """The lines of one file behind those of another, as if it went on."""
    path = trail.any_file(pick)
    path.write_bytes(path.read_bytes() + trail.any_file(pick).read_bytes())


DAMAGES: Final = (
    edit,
    remove_lines,
    swap_lines,
    repeat_line,
    put_in,
    cut,
    remove_file,
    copy_file,
    fuse_files,
)


# -- laws --------------------------------------------------------------------------------------------


@HYPOTHESIS_SETTINGS
@given(TRAILS)
def test_a_trail_that_nobody_touched_is_not_accused(signer: Signer, plan: Plan) -> None:
    with written(plan, signer) as trail:
        reports = [trail.verified(anchored=anchored) for anchored in (True, False)]
        report = reports[0]

        assert [(each.verdict, problem_codes(each)) for each in reports] == [("intact", [])] * len(reports)
        assert [chain.state for chain in report.chains] == ["closed"] * len(plan)
        assert all(chain.signed_seq == chain.last_seq for chain in report.chains)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_chain_that_stops_when_its_file_has_just_become_full_is_closed(signer: Signer, count: int) -> None:
    """The last record ends the file; the closing line begins another one."""
    with written([(audit_section(), 1, [("ada", {}, "")] * count)], signer) as trail:
        report = trail.verified(anchored=False)

        assert (report.verdict, report.chains[0].state) == ("intact", "closed")
        assert len(trail.files) == count + 1


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@HYPOTHESIS_SETTINGS
@given(TRAILS, st.data())
def test_whatever_is_done_to_an_anchored_trail_is_found(
    signer: Signer, damage: Callable[[Written, Pick], None], plan: Plan, data: st.DataObject
) -> None:
    """What nobody else has seen may be cut at its end without contradiction; that is told as an open end.

    Without anchors a chain may also go as a whole.
    """
    with written(plan, signer) as trail:
        damage(trail, lambda below: data.draw(st.integers(0, below - 1)))

        assert trail.verified().verdict == "damaged"
        if damage is not remove_file:
            assert trail.verified(anchored=False).verdict in {"damaged", "open end"}

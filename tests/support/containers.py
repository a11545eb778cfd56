"""Runs services of a Compose file from the tree of one image: by crun, as containers with a read-only root.

They share a network without a way out, and a process and a mount namespace that end with the thread that made
them: however a test ends, no process and no mount stays. Docker would also give them networks of their own, a
seccomp profile, limits of memory and processors, and an init process.
"""

import copy
import json
import os
import resource
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from kms_core.programs import tether
from support.artefacts import passes
from support.programs import program
from support.waiting import until

Json = dict[str, Any]
_INSIDE: Final = (
    "ip link set lo up && mount -t tmpfs tmpfs /run"
    " && mount -t cgroup2 cgroup2 /sys/fs/cgroup"  # crun refuses a mixture of both versions
    " && exec sleep infinity"
)
_LAYER: Final = (  # for mount points, as Docker's: lower layer, place, then a command
    'umask 022 && mkdir -p "$2/upper" "$2/work" "$2/root" && lower=$1 place=$2 && shift 2'
    ' && layers="lowerdir=$lower,upperdir=$place/upper,workdir=$place/work"'
    ' && mount -t overlay -o "$layers" overlay "$place/root"'
    ' && exec "$@"'
)
_SYS_RESOURCE: Final = 24  # CAP_SYS_RESOURCE, capabilities(7)
_NAMESPACES: Final = ("--net", "--mount", "--pid")


@dataclass(frozen=True)
class Image:
    """Its files, unpacked, and its configuration in the format of Docker."""

    root: Path
    config: Json

    def volume(self, target: str, folder: Path) -> Path:
        """A new volume, with the owner and the mode of what it hides in the image, as Docker makes it."""
        hidden = self.root / target.lstrip("/")
        folder.mkdir(exist_ok=True)
        if hidden.exists():
            found = hidden.stat()
            os.chown(folder, found.st_uid, found.st_gid)
            folder.chmod(found.st_mode & 0o7777)
        return folder


@dataclass(frozen=True)
class Container:
    """One that was started; ``healthcheck`` is the command that tells whether it works."""

    name: str
    crun: Sequence[str]
    process: subprocess.Popen[bytes]
    bundle: Path
    specification: Json
    healthcheck: Sequence[str]

    def run(self, *words: str, **more: Any) -> subprocess.CompletedProcess[bytes]:  # noqa: ANN401 -- subprocess's own keywords
        """Run a command in it, as ``docker exec`` does."""
        with tempfile.NamedTemporaryFile("w", dir=self.bundle, suffix=".json") as file:
            # the same user, and no more rights
            json.dump(self.specification["process"] | {"args": words}, file)
            file.flush()
            argv = [*self.crun, "exec", "--process", file.name, self.name]
            return subprocess.run(argv, capture_output=True, check=False, timeout=120, **more)

    @property
    def is_healthy(self) -> bool:
        return self.run(*self.healthcheck).returncode == 0

    def until_healthy(self) -> None:
        def fact() -> bool:
            assert self.process.poll() is None, f"{self.name} ended:\n{self.output}"
            return self.is_healthy

        until(fact, lambda: f"{self.name} is healthy\n{self.output}")

    @property
    def output(self) -> str:
        return (self.bundle / "log").read_text("utf-8", "replace")

    def stop(self, limit_s: float) -> int:
        """Send SIGTERM; its exit code. Raises TimeoutExpired after ``limit_s``, when Docker kills."""
        subprocess.run([*self.crun, "kill", self.name, "TERM"], check=True, capture_output=True)
        return self.process.wait(limit_s)


@dataclass(frozen=True)
class Pod:
    """What containers share; ``secrets`` are the files of secrets by name."""

    image: Image
    folder: Path
    secrets: Mapping[str, Path]
    inside: Sequence[str]
    template: Json
    containers: dict[str, Container] = field(default_factory=dict)

    def start(self, name: str, service: Json) -> Container:
        """Start a service that Compose has read (``config --format json``)."""
        bundle = self.folder / name
        bundle.mkdir()
        place = f"/run/{name}"
        specification = self._specification(service, f"{place}/root")
        (bundle / "config.json").write_text(json.dumps(specification))
        crun = (program("crun"), "--root", "/run/crun", "--cgroup-manager=disabled")
        layer = ("/bin/sh", "-c", _LAYER, "sh", str(self.image.root), place)
        with (bundle / "log").open("wb") as log:
            argv = [*self.inside, *layer, *crun, "run", "--bundle", str(bundle), name]
            process = tether.spawn(argv, env=dict(os.environ), output=log)
        check = (service.get("healthcheck") or {}).get("test") or self.image.config["Healthcheck"]["Test"]
        assert check[0] == "CMD"
        made = Container(name, (*self.inside, *crun), process, bundle, specification, check[1:])
        self.containers[name] = made
        return made

    def _specification(self, service: Json, root: str) -> Json:
        """The runtime specification of OCI: https://github.com/opencontainers/runtime-spec."""
        image, made = self.image.config, copy.deepcopy(self.template)
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        entry = service.get("entrypoint") or image["Entrypoint"]
        default = [] if service.get("entrypoint") else image["Cmd"] or []
        user, _, group = (service.get("user") or image["User"]).partition(":")
        environ = dict(pair.split("=", 1) for pair in image["Env"]) | service.get("environment", {})
        made["process"] |= {
            "terminal": False,
            "args": [*entry, *(service.get("command") or default)],
            "env": [f"{name}={value}" for name, value in environ.items()],
            "cwd": service.get("working_dir") or image["WorkingDir"] or "/",
            "user": {"uid": int(user), "gid": int(group)},
            "capabilities": {},
            "noNewPrivileges": True,
            "rlimits": [_limit(*each) for each in service.get("ulimits", {}).items()],
        }
        made["root"] = {"path": root, "readonly": service["read_only"]}
        made["mounts"] = [each for each in made["mounts"] if each["type"] != "cgroup"]
        made["mounts"] += self._mounts(service)
        made["linux"].pop("resources", None)
        shared = {"network", "cgroup"}
        made["linux"]["namespaces"] = [
            each for each in made["linux"]["namespaces"] if each["type"] not in shared
        ]
        return made

    def _mounts(self, service: Json) -> Iterator[Json]:
        for each in service.get("tmpfs", ()):
            target, _, options = each.partition(":")
            yield {
                "destination": target,
                "type": "tmpfs",
                "source": "tmpfs",
                "options": options.split(","),
            }
        for each in service["volumes"]:
            if each["type"] == "volume":
                source = self.image.volume(each["target"], self.folder / f"volume-{each['source']}")
            else:
                source = Path(each["source"])
            yield _bind(source, each["target"], "ro" if each.get("read_only") else "rw")
        for each in service.get("secrets", ()):
            target = each.get("target") or f"/run/secrets/{each['source']}"
            yield _bind(self.secrets[each["source"]], target, "ro")
        yield _bind(self.folder / "hosts", "/etc/hosts", "ro")


def _bind(source: Path, target: str, mode: str) -> Json:
    return {"destination": target, "type": "bind", "source": str(source), "options": ["bind", mode]}


def _limit(name: str, value: Any) -> Json:  # noqa: ANN401 -- a number, or an object without its zeros
    """One resource limit; some machines let not even root raise theirs."""
    number, kind = value if isinstance(value, int) else value.get("soft", 0), f"RLIMIT_{name.upper()}"
    if number == resource.RLIM_INFINITY and not _may_raise_limits():
        number = resource.getrlimit(getattr(resource, kind))[1]
    bound = number % 2**64
    return {"type": kind, "hard": bound, "soft": bound}


def _may_raise_limits() -> bool:
    (line,) = [each for each in Path("/proc/self/status").read_text().splitlines() if "CapEff" in each]
    return bool(int(line.split()[1], 16) >> _SYS_RESOURCE & 1)


@contextmanager
def pod(image: Image, folder: Path, names: Sequence[str], secrets: Mapping[str, Path]) -> Iterator[Pod]:
    """A pod whose containers find each other by ``names``. Started from a thread that outlives it.

    Skips where the kernel gives no namespaces.
    """
    folder.chmod(0o755)
    (folder / "hosts").write_text(f"127.0.0.1 localhost {' '.join(names)}\n")
    (folder / "hosts").chmod(0o644)
    unshare, enter = program("unshare"), program("nsenter")
    (folder / "spec").mkdir()
    passes(program("crun"), "spec", cwd=folder / "spec")
    template: Json = json.loads((folder / "spec/config.json").read_text())
    argv = [unshare, *_NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", _INSIDE]
    with (folder / "pod.log").open("wb") as log:
        outer = tether.spawn(argv, env=dict(os.environ), output=log)
    try:
        until(lambda: _first(outer) or outer.poll() is not None, "the namespaces are there")
        if outer.poll() is not None:
            pytest.skip(f"no container can be run here: {(folder / 'pod.log').read_text()}")
        inside = [enter, f"--target={_first(outer)}", *_NAMESPACES, "--"]
        made = Pod(image, folder, secrets, inside, template)
        try:
            yield made
        finally:
            for each in made.containers.values():
                each.process.kill()
                each.process.wait()
    finally:
        outer.kill()  # and with it all that is inside
        outer.wait()


def _first(outer: subprocess.Popen[bytes]) -> str:
    """The first process of the namespaces, once all is mounted there; empty before."""
    try:
        (pid,) = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        return pid if Path(f"/proc/{pid}/comm").read_text() == "sleep\n" else ""
    except (OSError, ValueError):
        return ""

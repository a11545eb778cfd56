"""An install whose client certificates can be revoked."""

from datetime import timedelta
from pathlib import Path
from typing import Final

import httpx2 as httpx
from cryptography import x509

from kms_protocol.wire import PREFIX
from support.credentials import Authority, CertAndKey, SecuredService

NAME: Final = x509.DNSName("builder.example.com")
EXPIRED: Final = timedelta(minutes=-5)


class Revoking(SecuredService):
    """An install that serves HTTPS and reads a revocation list of its clients' authorities."""

    def __init__(
        self, folder: Path, redis: str = "unix:///nonexistent.sock", more: str = "", *, has_lists: bool = True
    ) -> None:
        self.clients = Authority(folder / "clients")
        self.servers = Authority(folder / "servers", "a CA of servers")
        self.pair = self.servers.issue("server", x509.DNSName("localhost"), server=True)
        self.crl = folder / "clients.crl"
        self.crl.write_bytes(self.clients.crl())
        lists = f'client_crl = "{self.crl}"\n' if has_lists else ""
        super().__init__(
            folder,
            '[kms.auth]\nmode = "required"\n[kms.auth.certificates.builder]\n'
            'subject = "DNS:builder.example.com"\nscopes = ["status", "jobs:write,encrypt"]\n'
            f'[kms.server]\ntls_cert = "{self.pair.cert}"\ntls_key = "{self.pair.key}"\n'
            f'client_ca = "{self.clients.ca_file}"\n{lists}{more}',
            redis,
        )
        self.url = f"https://localhost:{self.port}"

    def client(self, pair: CertAndKey | None = None) -> httpx.Client:
        return httpx.Client(base_url=self.url, verify=self.servers.context(pair), trust_env=False)

    def status(self, pair: CertAndKey | None = None, headers: dict[str, str] | None = None) -> httpx.Response:
        with self.client(pair) as http:
            return http.get(f"{PREFIX}/status", headers=headers)

    def put(self, crl: bytes) -> None:
        """As an operator does: a new file in place of the old one."""
        made = self.crl.with_suffix(".new")
        made.write_bytes(crl)
        made.replace(self.crl)

    def trust(self, *authorities: bytes) -> None:
        """Put these certificates in client_ca in place of the old ones."""
        made = self.clients.ca_file.with_suffix(".new")
        made.write_bytes(b"".join(authorities))
        made.replace(self.clients.ca_file)

    def certificate(self, *, file: str = "builder", lasts: timedelta = timedelta(days=1)) -> CertAndKey:
        return self.clients.issue(file, NAME, lasts=lasts)

"""Known vulnerabilities of the pinned dependencies (`constraints.txt`), by pip-audit: what `make audit` prints.

    python tests/audit.py [--strict]

pip-audit takes a package that its service does not know for one without vulnerabilities, and an index without that
service knows none. So what was audited is counted. Exits 1 on a vulnerability that pyproject.toml does not except; where
no package could be audited it says so loudly and exits 0, with --strict 1: no audit is no pass.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVICES = ("pypi", "osv")
TIMEOUT_S = 300


def audit(service: str, excepted: list[str]) -> list[dict[str, object]] | None:
    """One object per dependency, as pip-audit prints them; None where the service is out of reach."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps", "--disable-pip",
               "--vulnerability-service", service, "--format", "json", "--progress-spinner", "off"]  # fmt: skip
    for name in excepted:
        command += ["--ignore-vuln", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        found: list[dict[str, object]] = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, ValueError, KeyError):
        return None
    return found


def verdict(found: list[dict[str, object]] | None, excepted: dict[str, str], *, strict: bool) -> tuple[int, list[str]]:
    """Exit code, and what to print."""
    known = [d for d in found or [] if "skip_reason" not in d]
    bad = [f"{d['name']} {d['version']}: {v['id']}, mended in {v['fix_versions']}" for d in known for v in d["vulns"]]  # type: ignore[attr-defined]
    if not known:
        return int(strict), [
            "*" * 78,
            "NOT AUDITED: no vulnerability service can be reached from here, or it knows none of the",
            "packages in constraints.txt. This is no pass. Run `make audit` where pypi.org or osv.dev is.",
            "*" * 78,
        ]
    words = [f"audit: {len(known)} of {len(found or [])} pinned packages audited, {len(bad)} vulnerabilities"]
    words += [f"  NOT AUDITED: {d['name']}: {d['skip_reason']}" for d in found or [] if d not in known]
    words += [f"  excepted: {name}: {why}" for name, why in excepted.items()]
    return int(bool(bad) or (strict and len(known) < len(found or []))), [*words, *(f"  {line}" for line in bad)]


def main() -> int:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    excepted: dict[str, str] = settings["tool"]["cai"]["audit-exceptions"]
    found = None
    for service in SERVICES:
        found = audit(service, list(excepted))
        if found and any("skip_reason" not in d for d in found):
            break
    code, words = verdict(found, excepted, strict="--strict" in sys.argv)
    print("\n".join(words))
    return code


if __name__ == "__main__":
    sys.exit(main())

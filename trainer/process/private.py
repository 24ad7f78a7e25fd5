"""Privacy of a run's record: who may read each file, and which contents are omitted.

Only the owner can read config.yaml, argv.json, git.json and the diffs, and also the group if the umask lets the group
write (002 or 007, as on clusters whose groups share their folders). Metrics, status, checkpoints and the model follow
the umask like any file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

# Names, as parts of a path, of files that usually hold keys.
_FILE = re.compile(
    r"(^|/)([^/]*\.env(\.[^/]*)?|\.envrc|\.netrc|_netrc|\.npmrc|\.pypirc|\.pgpass|\.git-credentials|\.htpasswd"
    r"|id_(rsa|dsa|ecdsa|ed25519)[^/]*|[^/]*\.(pem|key|p12|pfx|jks|kdbx|keystore|tfvars)|[^/]*(secret|credential)[^/]*"
    r"|kaggle\.json|\.(ssh|aws|gnupg|kube|docker)/.*)$",
    re.IGNORECASE,
)
# Values: a key's name with a literal in a service's format, or a password in an address. A digit is required where code
# has such names too: token = next(tokens), "eos_token": "<|endoftext|>".
_VALUE = re.compile(
    r"(api_?key|access_?key|auth_?key|private_?key|token)[\"']?\s*[:=]\s*(?P<quote>[\"']?)"
    r"(?=[^\s\"'<>|$(.\[{]*\d)[^\s\"'<>|$(.\[{]{16,}(?P=quote)\s*[,;}]?\s*$"
    r"|(secret|passw(or)?d|passphrase)[\"']?\s*[:=]\s*([\"'][^\s\"'<>$(\[{]{6,}[\"']|(?=\S*\d)[^\s\"'<>$(.\[{]{8,}\s*$)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|\b(hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{18,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{35}|eyJ[\w-]{20,}\.eyJ[\w-]{20,})"
    r"|://[^/\s:@]+:[^/\s@]{3,}@",
    re.IGNORECASE | re.MULTILINE,
)
_SECTION = re.compile(r"^(?=diff --git )", re.MULTILINE)
_MARKS = ("--- ", "+++ ", "rename from ", "rename to ", "copy from ", "copy to ")


def write_private(path: Path, text: str) -> None:
    """Write a new private file. Raises FileExistsError: an existing file is not ours."""
    umask = os.umask(0o077)  # the umask can be read only by setting it
    os.umask(umask)
    shared = 0o600 if umask & 0o020 else 0o660
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, shared)
    with open(descriptor, "w") as file:
        file.write(text)


def without_secrets(diff: str) -> tuple[str, list[str]]:
    """A git diff without the files that seem to hold keys, and the names of these files."""
    kept: list[str] = []
    left_out: list[str] = []
    for section in filter(None, _SECTION.split(diff)):
        paths = _paths(section)
        if any(_FILE.search(path) for path in paths) or _VALUE.search(section):
            left_out.append(paths[-1])
            kept.append(f"left out, it may hold a key: {paths[-1]}\n")
        else:
            kept.append(section)
    return "".join(kept), left_out


def _paths(section: str) -> list[str]:
    """The file's names before and after, from the section's head. git quotes a name with special characters."""
    first, *head = section.partition("\n@@")[0].splitlines()
    # Without content (an empty or binary file, a change of mode) both names are in the first line only.
    found = re.split(r" (?=\"?b/)", first.removeprefix("diff --git "))
    found += [line.removeprefix(mark) for line in head for mark in _MARKS if line.startswith(mark)]
    names = [path.strip().strip('"') for path in found]
    return [name.removeprefix("a/").removeprefix("b/") for name in names if name != os.devnull]

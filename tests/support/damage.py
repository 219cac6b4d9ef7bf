"""Plans put together by hand."""

import json
import zipfile

from vqdeploy.runtime.manifest import FILE


def pack(path, members):
    """A ZIP written by hand: `members` are pairs of name and bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def unpack(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def edited(plan, target, edit):
    """A copy of a plan whose manifest, as a dictionary, went through `edit`."""
    members = unpack(plan)
    data = json.loads(members[FILE])
    edit(data)
    members[FILE] = json.dumps(data).encode()
    return pack(target, members.items())

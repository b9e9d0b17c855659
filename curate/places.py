"""Where the pictures of a public set lie on this disk: folders and tar archives, asked by the names that the set uses.

    places = Places(["ShareGPT-4o-Image", "images-000.tar"])
    places.read("image/v2v_17.png")                       the bytes of the file
    places.read("https://example.org/a/b.jpg")            of an address: what img2dataset stored under it, or b.jpg

Sets name their pictures from folders that users do not have ("/Echo-4o-Image/Surrel-Fantasy-Image/images/00000.jpg"). So
leading folders are left out, one after the other, until the first picture is found in a place; of all others it is as many.
A wrong picture is worse than none: a name that two places have is refused, and a file that was found by a part of its name
belongs to the first who asked.

Archives are read where they lie (records/files.py), none is unpacked. In those of img2dataset every picture has a .json
beside it that names its address.
"""

import os
import posixpath
from pathlib import Path
from urllib.parse import unquote, urlparse

from checkpoint import InputError
from records.files import MAX_FILE, MAX_RECORD, PICTURES, Shard, members, split_key
from records.validate import decode, picture_path


class Folder:
    """A folder. Its links are followed; a name cannot lead out of it."""

    def __init__(self, path: str | Path):
        if not os.path.isdir(path):
            raise InputError(f"{path}: no folder and no .tar of pictures")
        self.path = os.path.abspath(path)

    def read(self, name: str) -> bytes | None:
        """The bytes of a file, None where there is none of that name."""
        path = picture_path(self.path, name)
        if not path.is_relative_to(self.path) or not path.is_file():
            return None
        if path.stat().st_size > MAX_FILE:
            raise InputError(f"too large: {name!r:.80} has {path.stat().st_size:,} bytes")
        return path.read_bytes()

    def stored_as(self, address: str) -> str | None:
        return None


class Tar:
    """A tar archive, with img2dataset's notes or without."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        self.shard = Shard(path)
        self.names = None  # {address: name of its picture}; read when the first address is asked for

    def read(self, name: str) -> bytes | None:
        try:
            return self.shard.find("", name)
        except InputError as e:
            if str(e).startswith("no such picture"):
                return None
            raise

    def stored_as(self, address: str) -> str | None:
        """The member that img2dataset made of an address."""
        if self.names is None:
            self.names = self.addresses()
        return self.names.get(address)

    def addresses(self) -> dict[str, str]:
        pictures = {}  # {key: name}
        notes = {}  # {key: address}
        with open(self.path, "rb") as file:
            for _, member in members(file, os.path.getsize(self.path)):
                key, ending = split_key(member.name)
                if ending in PICTURES:
                    pictures[key] = member.name
                elif ending == "json" and member.size <= MAX_RECORD:
                    file.seek(member.data)
                    try:
                        note = decode(file.read(member.size))
                    except InputError:
                        continue
                    if isinstance(note, dict) and isinstance(note.get("url"), str):
                        notes[key] = note["url"]
        return {address: pictures[key] for key, address in notes.items() if key in pictures}


class Places:
    """Several of them, each asked for every picture."""

    def __init__(self, paths: list[str | Path]):
        own = dict.fromkeys(os.path.realpath(path) for path in paths)
        self.places = [Tar(path) if path.endswith(".tar") else Folder(path) for path in own]
        self.left_out = {}  # {number of the place: leading folders that its names lack, as its first picture showed}
        self.owners = {}  # {(number of the place, name): the full name of the picture that was found by this part of it}

    def read(self, wanted: str) -> bytes:
        """InputError where there is no such picture, or where it cannot be said which it is."""
        address = urlparse(wanted).scheme in ("http", "https")
        for depth, name in enumerate(self.stored(wanted) if address else shortened(wanted)):
            found = {}
            for k, place in enumerate(self.places):
                if address or self.left_out.get(k, depth) == depth:
                    data = place.read(name)
                    if data is not None:
                        found[k] = data
            if len(found) > 1:
                raise InputError(f"picture in several places: {name!r:.80}")
            for k, data in found.items():
                if not address:
                    self.left_out[k] = depth
                if address or depth:
                    owner = self.owners.setdefault((k, name), wanted)
                    if owner != wanted:
                        raise InputError(f"picture of another name: {name!r:.80} is already {owner!r:.80}")
                return data
        raise InputError(f"no such picture: {wanted!r:.80}")

    def stored(self, address: str) -> list[str]:
        """What a picture from the network may be called here."""
        names = [name for place in self.places if (name := place.stored_as(address))]
        last = posixpath.basename(unquote(urlparse(address).path))
        return [*names, last] if last else names


def shortened(name: str) -> list[str]:
    """A name, then the name without its first folder, and so on; none for a name that leads out of where it starts."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        return []
    return ["/".join(parts[k:]) for k in range(len(parts))]

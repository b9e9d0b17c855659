"""`python -m sketchbook show|write|check`: a sheet of dialogues, a corpus on disk, how reliable the checker is."""

import argparse
import sys

from pathlib import Path

from checkpoint import BUNDLED, InputError
from sketchbook import checker, dialogues
from sketchbook.dialogues import KINDS, SPLITS


def main() -> None:
    arguments = argparse.ArgumentParser("python -m sketchbook", description=dialogues.__doc__.split("\n")[0])
    arguments.add_argument("command", choices=("write", "show", "check"))
    arguments.add_argument("--out", default=None, help="folder of the corpus, or file of the sheet")
    arguments.add_argument("--n", type=int, default=12, help="how many dialogues; for check how many pictures a kind")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--split", choices=SPLITS, default="train")
    arguments.add_argument("--kinds", nargs="*", metavar="KIND", help="only these kinds, by their usual weights")
    arguments.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    given = arguments.parse_args()
    try:
        if unknown := set(given.kinds or ()) - set(KINDS):
            raise InputError(f"no kind called {sorted(unknown)[0]!r}; there are {', '.join(KINDS)}")
        kinds = {k: KINDS[k][1] for k in given.kinds} if given.kinds else None
        if given.command == "write":
            print(dialogues.write(given.out or "corpus", given.n, given.seed, given.split, kinds, given.size))
        elif given.command == "show":
            dialogues.show(given.out or "sheet.png", given.n, given.seed, given.split, kinds, given.size)
        else:
            checker.report(given.n, given.size, bundled_vae())
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def bundled_vae():
    """A function that encodes and decodes a picture with the miniature's VAE; None where there is none."""
    folder = Path(BUNDLED) / "vae"
    if not folder.is_dir():
        return None
    # torch takes seconds to import, and only this needs it.
    import torch

    from vae import VAE, to_image, to_tensor

    vae = VAE.from_pretrained(folder).eval()

    @torch.no_grad()
    def decode(picture):
        return to_image(vae.decode_latents(vae.encode_latents(to_tensor(picture)[None]))[0])

    return decode


if __name__ == "__main__":
    main()

"""`python -m curate web`, `synth`, `video`, `import` and `show`: see the module of that name in COMMANDS."""

import importlib
import sys

import interrupt

COMMANDS = {
    "web": "curate.web",
    "synth": "curate.synth",
    "video": "curate.video",
    "import": "curate.importing",
    "show": "curate.show",
}


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print(f"usage: python -m curate {{{','.join(COMMANDS)}}} ...; each has --help")
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    importlib.import_module(COMMANDS[sys.argv[1]]).main(sys.argv[2:])


if __name__ == "__main__":
    interrupt.quiet()
    import training  # what it imports takes seconds

    training.run_script(main)

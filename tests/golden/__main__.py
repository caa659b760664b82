"""Rewrites the golden files. The diff is the review: ``make golden``, then read it."""

from tests.golden.files import FOLDER, GOLDEN


def main() -> None:
    for name, content in GOLDEN.items():
        path = FOLDER / name
        text = content()
        changed = not path.exists() or path.read_text() != text
        path.write_text(text)
        print(f"{'rewrote' if changed else 'unchanged'} {path}")


if __name__ == "__main__":
    main()

"""What others rely on changes only on purpose: by ``make golden``, in a diff that is read."""

import pytest

from tests.golden.files import FOLDER, GOLDEN


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_it_is_as_it_was_agreed(name: str) -> None:
    assert GOLDEN[name]() == (FOLDER / name).read_text(), f"{name} changed: run `make golden` and review the diff"

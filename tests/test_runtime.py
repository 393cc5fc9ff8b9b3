"""The set-up of a process around its imports."""

import gc

import pytest

from offline_kto.kto_core.runtime import importing


@pytest.mark.parametrize("in_own_process", [True, False])
def test_imports_are_set_aside_in_our_own_process_only(in_own_process: bool) -> None:
    """In another program's process they would keep its garbage for ever."""
    before = gc.get_freeze_count()
    try:
        with importing(in_own_process=in_own_process):
            assert not gc.isenabled()
            imported: list[list[int]] = [[] for _ in range(1000)]
        assert gc.isenabled()
        assert (gc.get_freeze_count() >= before + len(imported)) == in_own_process
    finally:
        gc.unfreeze()
        gc.freeze()  # as before


def test_imports_that_fail_leave_the_search_as_it_was() -> None:
    with pytest.raises(ImportError), importing(in_own_process=True):
        raise ImportError
    assert gc.isenabled()

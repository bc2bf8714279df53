"""What is said of a run of lmms-eval that failed."""

import pytest

from haplovl.evaluate.harness.run import _reason


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("Traceback:\n  File x\nhaplovl.errors.UserError: a prompt has 90 tokens\nbye\n", "a prompt has 90 tokens"),
        ("[rank0]: haplovl.errors.UserError: no picture\nE1125 multiprocessing: failed\n", "no picture"),
        ("ValueError: first\nrow: 3\nKeyError: 'image'\n", "KeyError: 'image'"),
        ("started\nKilled\n", "Killed"),
        ("", "it said nothing"),
    ],
)
def test_the_last_error_of_the_log_is_given_as_the_reason(log, reason, tmp_path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(log)
    assert _reason(path) == reason

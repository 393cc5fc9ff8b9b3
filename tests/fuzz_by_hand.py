"""A longer look for what breaks the readers: the targets of test_fuzz.py under atheris, which follows their branches.

    pip install atheris
    OMP_NUM_THREADS=1 python tests/fuzz_by_hand.py feedback-records -max_total_time=300

The first word is the target (without one, all are listed); the rest goes to libFuzzer as it is: `-runs=100000`,
`-rss_limit_mb=4096`, a folder to keep what was found interesting in. It ends at the first input that breaks a rule,
and leaves that input in the current folder as crash-...; name the file behind the target to run it again.
`shards 5000` breaks that many shards instead, without atheris.
"""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]


def targets() -> dict[str, Callable[[bytes], object]]:
    """Name -> what is called with the fuzzer's bytes; a test stands for what hypothesis draws from them."""
    import test_fuzz as fuzz

    def feedback(content: bytes) -> None:
        suffix = fuzz.SUFFIXES[content[0] % len(fuzz.SUFFIXES)] if content else ".jsonl"
        fuzz.feedback_from_bytes(content[1:], suffix)

    return {
        "feedback": feedback,
        "feedback-damaged": fuzz.test_a_damaged_feedback_file_ends_in_rows_or_in_our_own_error.hypothesis.fuzz_one_input,
        "feedback-records": fuzz.test_any_records_as_feedback_end_in_rows_or_in_our_own_error.hypothesis.fuzz_one_input,
        "exports": fuzz.test_a_changed_export_ends_in_rows_or_in_our_own_error.hypothesis.fuzz_one_input,
        "manifest": fuzz.manifest_from_bytes,
        "manifest-changed": fuzz.test_a_changed_manifest_is_taken_or_refused_by_our_own_error.hypothesis.fuzz_one_input,
        "config": fuzz.config_from_text,
        "weights": fuzz.weights_from_bytes,
        "shard": fuzz.shard_from_bytes,
    }


def main() -> None:
    if sys.argv[1:2] == ["shards"]:
        import test_fuzz

        test_fuzz.damage_shards(int(sys.argv[2]))
        return
    import atheris

    with atheris.instrument_imports(include=["offline_kto", "json", "csv", "yaml"]):
        known = targets()
    if len(sys.argv) < 2 or sys.argv[1] not in known:
        sys.exit(f"{__doc__}\nTargets: {', '.join(known)}, shards")
    warnings.simplefilter("ignore")
    # What hypothesis draws from needs more bytes than libFuzzer begins with.
    options = ["-len_control=0", "-max_len=4096", "-rss_limit_mb=6000", *sys.argv[2:]]
    atheris.Setup([sys.argv[0], *options], known[sys.argv[1]])
    atheris.Fuzz()


if __name__ == "__main__":
    main()

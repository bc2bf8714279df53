"""One `Media` for many threads and processes; references that lead nowhere."""

import json
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from haplovl.data.media import Media
from haplovl.pictures import ImageError

COUNT = 60
TALK = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]


@pytest.fixture(params=["zip", "parquet"])
def own(request, tmp_path, collected, picture):
    """Sixty records with a picture each."""
    if request.param == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for i in range(COUNT):
                archive.writestr(f"{i}.jpg", picture(i))
        rows = [{"id": f"r{i}", "image": f"{i}.jpg", "conversations": TALK} for i in range(COUNT)]
        (tmp_path / "a.json").write_text(json.dumps(rows))
        return collected(format="llava", annotations=[str(tmp_path / "a.json")], images=str(tmp_path / "a.zip"))
    rows = [{"image": {"bytes": picture(i)}, "caption": "x"} for i in range(COUNT)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=25)
    return collected(format="parquet", files=[str(tmp_path / "a.parquet")])


def test_threads_in_any_order_get_their_own_pictures(own, picture) -> None:
    order = Random(1).choices(range(COUNT), k=400)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: own.pictures(i)[0], order))
    assert found == [picture(i) for i in order]


def test_it_can_be_sent_to_another_process(own, picture) -> None:
    own.pictures(3)
    sent = pickle.loads(pickle.dumps(own.media))
    assert sent.read("own", own.records[7].images[0]) == picture(7)
    assert sent.open("own", own.records[7].images[0]).size == (12, 8)


@pytest.mark.parametrize("ref", ["", "x", "file:", "http://a/b.jpg", "zip:none.zip!a.jpg", "file:../sources.json"])
def test_references_that_lead_nowhere(own, ref) -> None:
    with pytest.raises(ImageError):
        own.media.read("own", ref)
    with pytest.raises(ImageError):
        own.media.read("no such source", ref)


def test_only_files_have_a_path(tmp_path) -> None:
    assert Media(tmp_path).path("own", "file:a/b.jpg") == tmp_path / "own/media/a/b.jpg"
    assert Media(tmp_path).path("own", "zip:a.zip!b.jpg") is None

"""LLaVA's own files, and those that follow them, in exactly their published layout; images in every place."""

import json
import tarfile
import zipfile
from io import BytesIO

import pytest

from haplovl.errors import UserError

LLAVA_558K = [
    {
        "id": "004539375",
        "image": "00453/004539375.jpg",
        "conversations": [
            {"from": "human", "value": "Render a clear and concise summary of the photo.\n<image>"},
            {"from": "gpt", "value": "select luxury furniture 3 - inch gel memory foam mattress topper"},
        ],
    },
    {
        "id": "002239345",
        "image": "00223/002239345.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."},
            {"from": "gpt", "value": "a grey watch with an army style strap"},
        ],
    },
]
LLAVA_665K = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
            {"from": "gpt", "value": "The bus in the image is white and red."},
            {"from": "human", "value": "What feature can be seen on the back of the bus?"},
            {"from": "gpt", "value": "The back of the bus features an advertisement."},
        ],
    },
    {
        "id": "VG_100K_2/1",
        "image": "vg/VG_100K/1.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhere?"}, {"from": "gpt", "value": "[0.1, 0.2]"}],
    },
    {
        "id": "wgByO4Y_0",
        "model": "",
        "conversations": [{"from": "human", "value": "Write a poem."}, {"from": "gpt", "value": "Roses."}],
    },
]
SHAREGPT4V = [
    {
        "id": "000000000009",
        "image": "coco/train2017/000000000009.jpg",
        "conversations": [
            {"from": "human", "value": "What do you see happening in this image?\n<image>"},
            {"from": "gpt", "value": "In the center of the image, a vibrant blue lunch tray holds four containers."},
        ],
    }
]
M4_INSTRUCT = [
    {
        "sample_id": 39,
        "conversations": [
            {"from": "human", "value": "What is different?\n<image>\n<image>"},
            {"from": "gpt", "value": "The second is darker."},
        ],
        "image": ["HQ-Edit/images/1.jpg", "HQ-Edit/images/2.jpg"],
        "choice_list": None,
        "metadata": {"dataset": "HQ-Edit", "split": "train", "num_sample": 1, "task_instruction": ""},
    }
]
MLLM_DEMO = [
    {
        "messages": [
            {"content": "<image>Who are they?", "role": "user"},
            {"content": "They're Kane and Gretzka.", "role": "assistant"},
        ],
        "images": ["mllm_demo_data/1.jpg"],
    }
]


def write(path, data) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, data)) if path.suffix == ".jsonl" else json.dumps(data, indent=2)
    path.write_text(text)
    return str(path)


def write_images(folder, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return str(folder)


def write_zip(path, files: dict[str, bytes], method=zipfile.ZIP_DEFLATED) -> str:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return str(path)


def write_tar(path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, BytesIO(content))
    return str(path)


@pytest.mark.parametrize("place", ["folder", "tar", "zip"])
def test_llava_558k_with_its_images_in_every_place(tmp_path, collected, picture, place) -> None:
    files = {"00453/004539375.jpg": picture(10), "00223/002239345.jpg": picture(20)}
    writers = {"folder": write_images, "tar": write_tar, "zip": write_zip}
    images = writers[place](tmp_path / ("images" + ("" if place == "folder" else f".{place}")), files)
    annotations = [write(tmp_path / "blip_laion_cc_sbu_558k.json", LLAVA_558K)]
    own = collected(format="llava", annotations=annotations, images=images, captions=True)
    assert [record.id for record in own.records] == ["004539375", "002239345"]
    assert [record.kind for record in own.records] == ["caption", "caption"]
    assert own.records[0].turns[0].question == "Render a clear and concise summary of the photo.\n<image>"
    assert [own.pictures(0), own.pictures(1)] == [[picture(10)], [picture(20)]]
    assert (own.source.records, own.source.images, own.source.skipped) == (2, 2, 0)
    assert own.records[0].images[0].startswith("file:" if place == "folder" else f"{place}:images.{place}!")


def test_llava_665k_with_images_in_several_places(tmp_path, collected, picture) -> None:
    """COCO's archive lacks the first folder that the records name; Visual Genome is a folder."""
    coco = write_zip(tmp_path / "train2017.zip", {"train2017/000000033471.jpg": picture(1)})
    genome = write_images(tmp_path / "genome", {"VG_100K/1.jpg": picture(2)})
    annotations = [write(tmp_path / "llava_v1_5_mix665k.json", LLAVA_665K)]
    own = collected(format="llava", annotations=annotations, images={"coco": coco, "vg": genome})
    assert [record.kind for record in own.records] == ["instruction", "instruction", "text"]
    assert [len(record.turns) for record in own.records] == [2, 1, 1]
    assert own.pictures(0) + own.pictures(1) == [picture(1), picture(2)]
    assert own.skipped == {}


def test_sharegpt4v_and_m4_instruct_and_messages(tmp_path, collected, picture) -> None:
    names = ["coco/train2017/000000000009.jpg", "HQ-Edit/images/1.jpg", "HQ-Edit/images/2.jpg", "mllm_demo_data/1.jpg"]
    images = write_images(tmp_path / "images", {name: picture(i) for i, name in enumerate(names)})
    sets = {"sharegpt4v.json": SHAREGPT4V, "m4_instruct_annotations.json": M4_INSTRUCT, "mllm_demo.jsonl": MLLM_DEMO}
    annotations = [write(tmp_path / name, data) for name, data in sets.items()]
    own = collected(format="llava", annotations=annotations, images=images)
    assert own.errors == ["", "", ""]
    assert [record.id for record in own.records] == ["000000000009", "39", "mllm_demo-1"]
    assert own.pictures(1) == [picture(1), picture(2)]
    assert own.records[2].turns[0].question == "<image>Who are they?"
    assert own.records[2].turns[0].answer == "They're Kane and Gretzka."
    assert own.pictures(2) == [picture(3)]


def test_messages_in_parts(tmp_path, collected, picture) -> None:
    parts = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is it?"}]
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
    ]
    odd = [{"role": "user", "content": [{"type": "sound"}]}, {"role": "assistant", "content": "x"}]
    annotations = [write(tmp_path / "a.jsonl", [{"id": "a", "messages": talk}, {"id": "b", "messages": odd}])]
    images = write_images(tmp_path / "images", {"a.jpg": picture(3)})
    own = collected(format="llava", annotations=annotations, images=images)
    assert (own.records[0].system, own.records[0].turns[0].question) == ("Be brief.", "<image>\nWhat is it?")
    assert own.pictures(0) == [picture(3)]
    assert "string 'value'" in own.errors[1]


def test_sharegpt_and_dolphin_and_alpaca(tmp_path, collected) -> None:
    sharegpt = [
        {"id": "QWJhYvA_0", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {
            "id": "QWJhYvA_1",
            "conversations": [
                {"from": "gpt", "value": "… the rest of an answer."},
                {"from": "human", "value": "Why?"},
                {"from": "chatgpt", "value": "Because."},
                {"from": "user", "value": "And then?"},
            ],
        },
        {"id": "i6IyJda_0", "conversations": []},
    ]
    own = collected(format="sharegpt", annotations=[write(tmp_path / "ShareGPT_V3.json", sharegpt)])
    assert [turn.answer for turn in own.records[0].turns] == ["Hello"]
    assert [(turn.question, turn.answer) for turn in own.records[1].turns] == [("Why?", "Because.")]
    assert own.errors[2] == "the conversation is empty"
    sharegpt[0]["image"] = "a.jpg"
    own = collected(format="sharegpt", annotations=[write(tmp_path / "llava.json", sharegpt)])
    assert own.errors[0] == "the record names an image, but the format sharegpt is for text; see the format llava"
    assert not own.errors[1]
    sharegpt[1]["video"] = "a.mp4"
    own = collected(format="sharegpt", annotations=[write(tmp_path / "llava.json", sharegpt)])
    assert own.errors[1] == "the record names a video, but the format sharegpt is for text; see the format video"


def test_a_record_of_a_video_is_no_text(tmp_path, collected, picture) -> None:
    (tmp_path / "a.jpg").write_bytes(picture(1))
    talk = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "A man falls."}]
    frames = [{"from": "human", "value": "<image>\nWhat happens?"}, {"from": "gpt", "value": "A man falls."}]
    records = [
        {"id": "v", "video": "x.mp4", "conversations": talk},
        {"id": "frames", "video": "x.mp4", "image": ["a.jpg"], "conversations": frames},
    ]
    own = collected(format="llava", annotations=[write(tmp_path / "v.json", records)], images=str(tmp_path))
    assert own.errors == ["the record names a video, but the format llava is for pictures; see the format video", ""]


def test_a_list_that_was_cut_off_stops_the_collection(tmp_path, collected) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    path = tmp_path / "half.json"
    path.write_text(json.dumps([{"id": f"r{i}", "conversations": talk} for i in range(100)])[:4000])
    with pytest.raises(
        UserError, match=r"half.json of the source own is unusable from entry \d+ on: not valid JSON from"
    ):
        collected(format="llava", annotations=[str(path)], sample=2)
    assert not (tmp_path / "raw").exists()
    own = collected(format="llava", annotations=[str(path)], damaged_files="keep")
    assert len(own.records) > 30 and own.errors[-1].startswith("not valid JSON from here to the end of the file")
    path.write_text(json.dumps({"data": []}))
    with pytest.raises(UserError, match="the file must hold a JSON list of records"):
        collected(format="llava", annotations=[str(path)])


def test_ids_that_are_made_up_differ_between_files(tmp_path, collected) -> None:
    talk = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    files = [write(tmp_path / f"train.v{number}.jsonl", [talk]) for number in (1, 2)]
    ids = [record.id for record in collected(format="sharegpt", annotations=files).records]
    assert ids == ["train.v1-1", "train.v2-1"]


def test_alpaca_and_dolphin(tmp_path, collected) -> None:
    rows = [
        {"instruction": "Give three tips for staying healthy.", "input": "", "output": "1. Eat well."},
        {"instruction": "Identify the odd one out.", "input": "Twitter, Instagram, Telegram", "output": "Telegram"}
        | {"split": "test"},
        {"instruction": 3, "input": "", "output": "x"},
    ]
    own = collected(format="alpaca", annotations=[write(tmp_path / "alpaca_data.json", rows)])
    questions = [record.turns[0].question for record in own.records[:2]]
    assert questions == [rows[0]["instruction"], "Identify the odd one out.\nTwitter, Instagram, Telegram"]
    assert [record.id for record in own.records[:2]] == ["alpaca_data-0", "alpaca_data-1"]
    assert [record.split for record in own.records[:2]] == ["", "test"]
    assert own.errors[2] == "'instruction' must be a string"

    dolphin = [{"instruction": "You are an AI assistant.", "input": "Is it?", "output": "Yes."}]
    annotations = [write(tmp_path / "flan1m-alpaca-uncensored.jsonl", dolphin)]
    own = collected(format="alpaca", annotations=annotations, instruction="system")
    assert (own.records[0].system, own.records[0].turns[0].question) == ("You are an AI assistant.", "Is it?")


def test_sample_and_split(tmp_path, collected) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    annotations = [write(tmp_path / "a.jsonl", [{"id": f"r{i}", "conversations": talk} for i in range(200)])]
    ids = {}
    for size in (20, 50):
        own = collected(format="llava", annotations=annotations, sample=size, split="validation")
        ids[size] = [record.id for record in own.records]
        assert len(ids[size]) == own.source.records == size
        assert {record.split for record in own.records} == {"validation"}
    assert set(ids[20]) < set(ids[50])
    assert ids[50] == sorted(ids[50], key=lambda name: int(name[1:]))

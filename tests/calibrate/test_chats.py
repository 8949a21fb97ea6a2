import base64
import io
import json

import pytest
from PIL import Image

from vlmq_serve.calibrate.chats import read_chats
from vlmq_serve.format.errors import VLMQError


def png(colour: tuple[int, int, int] = (255, 0, 0)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def line(image: object, answer: object = "red", question: str = "What?") -> str:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    user, assistant = {"role": "user", "content": content}, {"role": "assistant", "content": answer}
    return json.dumps({"messages": [user, assistant], "task": "colour"})


def write(folder, *lines: str):
    file = folder / "chats.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def test_images_by_relative_path_absolute_path_and_data_url(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(png())
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    file = write(tmp_path, line("pictures/a.png"), "", line(str(tmp_path / "pictures" / "a.png")), line(url))
    chats = read_chats(file)
    assert [chat.line for chat in chats] == [1, 3, 4]
    assert [chat.images()[0].getpixel((3, 3)) for chat in chats] == [(255, 0, 0)] * 3
    assert len({chat.digest() for chat in chats}) == 1
    assert chats[0].task == "colour"
    assert chats[0].answer == "red"
    assert chats[0].prompt[0]["content"] == [{"type": "image"}, {"type": "text", "text": "What?"}]


def test_openai_image_url_and_answer_in_parts(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    user = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "re"}, {"type": "text", "text": "d"}]}
    chat = read_chats(write(tmp_path, json.dumps({"messages": [user, answer]})))[0]
    assert chat.answer == "red"
    assert chat.task is None
    assert chat.images()[0].size == (8, 8)


def test_digest_sees_pixels_and_words(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b.png").write_bytes(png((0, 255, 0)))
    chats = read_chats(write(tmp_path, line("a.png"), line("b.png"), line("a.png", question="Which?")))
    assert len({chat.digest() for chat in chats}) == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{not json", "line 2: not valid JSON"),
        ('{"messages": []}', "line 2: got no list 'messages'"),
        ("[1]", "line 2: got no list 'messages'"),
        (line("a.png", answer=" "), "line 2: has no answer"),
        (json.dumps({"messages": [{"role": "user", "content": "hello"}]}), "line 2: has no answer"),
        (json.dumps({"messages": [{"role": "robot", "content": "x"}]}), "line 2: got role 'robot'"),
        (json.dumps({"messages": [{"role": "user", "content": 3}]}), "line 2: got content of type int"),
        (line(None), "line 2: got a content part"),
        (
            json.dumps(
                {
                    "messages": [
                        {"role": "user", "content": "Draw"},
                        {
                            "role": "assistant",
                            "content": [{"type": "text", "text": "so"}, {"type": "image", "image": "a.png"}],
                        },
                    ]
                }
            ),
            "line 2: has an image in its answer",
        ),
        (json.dumps({"messages": [{"role": "user", "content": [{"type": "video"}]}]}), "line 2: got a content part"),
    ],
)
def test_bad_lines_are_named(tmp_path, bad, message):
    with pytest.raises(VLMQError, match=message) as caught:
        read_chats(write(tmp_path, line("a.png"), bad))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "line 1: image 'missing.png' cannot be read"),
        ("text.png", "line 1: image 'text.png' is broken"),
        ("cut.png", "line 1: image 'cut.png' is broken"),
        ("data:image/png;base64,@@@", "broken base64"),
        ("data:image/png,abc", "no base64 data URL"),
        ("https://example.org/a.png", "is a web address"),
    ],
)
def test_bad_images_are_named(tmp_path, source, message):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(png()[:40])
    chat = read_chats(write(tmp_path, line(source)))[0]
    with pytest.raises(VLMQError, match=message):
        chat.images()


def test_empty_missing_and_binary_files(tmp_path):
    with pytest.raises(VLMQError, match="is empty"):
        read_chats(write(tmp_path, ""))
    with pytest.raises(VLMQError, match="cannot be read"):
        read_chats(tmp_path / "nothing.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VLMQError, match="not UTF-8"):
        read_chats(tmp_path / "binary")


def test_photos_stand_upright_as_their_exif_data_say(tmp_path):
    """A phone stores what its sensor saw and a note how it was held; vLLM and browsers follow the note."""
    photo = Image.new("RGB", (16, 8), (0, 0, 0))
    photo.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    photo.save(tmp_path / "photo.png", exif=exif)
    ((seen,),) = [chat.images() for chat in read_chats(write(tmp_path, line("photo.png")))]
    assert seen.size == (8, 16)
    assert seen.getpixel((4, 2)) == (255, 255, 255)
    assert seen.getpixel((4, 13)) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    if mode == "P":
        image = Image.new("P", (8, 8), 0)
        image.putpalette([0, 0, 0, 255, 0, 0])
        image.paste(1, (4, 0, 8, 8))
        image.save(tmp_path / "a.png", transparency=0)
    else:
        image = Image.new(mode, (8, 8))
        image.paste((255, 0, 0, 255) if mode == "RGBA" else (80, 255), (4, 0, 8, 8))
        image.save(tmp_path / "a.png")
    ((seen,),) = [chat.images() for chat in read_chats(write(tmp_path, line("a.png")))]
    assert seen.mode == "RGB"
    assert seen.getpixel((1, 4)) == (255, 255, 255)
    assert seen.getpixel((6, 4)) == ((80, 80, 80) if mode == "LA" else (255, 0, 0))


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        ((400, 300), None, (400, 300)),
        ((400, 300), 120_000, (400, 300)),
        ((400, 300), 119_999, (399, 299)),
        ((4000, 3000), 1_000_000, (1154, 866)),
        ((5000, 1), 1024, (2262, 1)),
    ],
)
def test_large_images_are_scaled_down_and_small_ones_left_alone(tmp_path, size, limit, expected):
    Image.new("RGB", size, (255, 0, 0)).save(tmp_path / "a.png")
    ((seen,),) = [chat.images(limit) for chat in read_chats(write(tmp_path, line("a.png")))]
    assert seen.size == expected
    assert seen.getpixel((0, 0)) == (255, 0, 0)


def test_scaling_comes_after_turning_and_the_white_ground(tmp_path):
    photo = Image.new("RGBA", (64, 32))
    photo.paste((255, 0, 0, 255), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    photo.save(tmp_path / "photo.png", exif=exif)
    ((seen,),) = [chat.images(16 * 32) for chat in read_chats(write(tmp_path, line("photo.png")))]
    assert seen.size == (16, 32)
    assert [seen.getpixel((8, y)) for y in (4, 28)] == [(255, 0, 0), (255, 255, 255)]

"""Ask an OpenAI-compatible server about a picture.

python examples/ask.py http://localhost:8000/v1 photo.jpg "What is on the sign?"
"""

import argparse
import base64
import mimetypes
import sys
from pathlib import Path

import openai


def main() -> None:
    """Send one image with one question and write the answer as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("image", type=Path)
    parser.add_argument("question")
    options = parser.parse_args()
    client = openai.OpenAI(base_url=options.base_url, api_key="none")
    model = client.models.list().data[0].id
    kind = mimetypes.guess_type(options.image.name)[0] or "image/png"
    url = f"data:{kind};base64,{base64.b64encode(options.image.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": options.question}]
    messages = [{"role": "user", "content": content}]
    for chunk in client.chat.completions.create(model=model, messages=messages, temperature=0, stream=True):
        sys.stdout.write(chunk.choices[0].delta.content or "")
        sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
